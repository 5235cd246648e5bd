"""List what latent caches hold and how much of it no run has used for a while; with --drop, delete that.

    python tools/drop_unused_latents.py --latent_cache_dir latent_cache --unused_days 30 --drop

A chunk, the views of up to 32 images, goes as a whole. A cache that a run on this machine uses at this moment is left alone.
"""

import logging
import shutil
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cache.read import lock
from runtime.cli import Parser, integer, run
from utils import UserError, count_of, one_line, open_regular, printable, read_json

log = logging.getLogger(__name__)


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--latent_cache_dir", default="latent_cache", help="folder of latent caches")
    parser.add_argument("--unused_days", type=integer(1, 36500), default=30, help="after so many days without a run, in days")
    parser.add_argument("--drop", action="store_true", help="delete what is unused; without it nothing is changed")
    args = parser.parse_args(argv)
    root, limit = Path(args.latent_cache_dir).expanduser(), time.time() - 86400 * args.unused_days
    if not root.is_dir():
        raise UserError(f"--latent_cache_dir {root}: no such folder")
    for about in sorted(root.glob("[0-9a-f]" * 24 + "/about.json")):
        folder = about.parent
        if folder.is_symlink():  # others may write in `root`: nothing is deleted or written through a link
            continue
        try:
            known = read_json(about)
            what = ", ".join(f"{name} {known.get(name)}" for name in ("vae1", "vae2", "image_size", "seed"))
            chunks = [  # in earlier layouts folders; a user's own files and links stay
                entry
                for entry in folder.iterdir()
                if not entry.is_symlink() and (entry.is_dir() or entry.suffix in (".safetensors", ".lock", ".tmp"))
            ]
            old = [entry for entry in chunks if entry.stat().st_mtime < limit]
            print(printable(f"{folder}: {what}; {size_of(chunks)}, of which {size_of(old)} unused"))
            if args.drop and old:
                with open_regular(about, "r+b") as file:
                    free = lock(file, shared=False)
                    for entry in ([folder] if {*old, about} == {*folder.iterdir()} else old) if free else []:
                        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
                    print("  dropped" if free else "  in use by a run: left alone")
        except (OSError, ValueError, AttributeError) as error:
            log.warning("%s: left alone (%s)", folder, one_line(error))


def size_of(chunks: list[Path]) -> str:
    size = sum(file.lstat().st_size for chunk in chunks for file in (chunk, *chunk.rglob("*")))
    return f"{count_of(len(chunks), 'chunk')} ({size / 1e6:.1f} MB)"


if __name__ == "__main__":
    run(main)
