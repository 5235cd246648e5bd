"""List what a latent cache holds and how long no run has wanted it; with --drop, delete what is older.

    python tools/drop_unused_latents.py --latent_cache_dir latent_cache
    python tools/drop_unused_latents.py --latent_cache_dir latent_cache --unused_days 30 --drop

A row is one view of one image. A cache that a run uses at this moment is left alone.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from cache.store import LatentCache, today
from runtime.cli import Parser, integer, run
from utils import UserError, count_of, read_json

ROWS_AT_ONCE = 256


def opened(folder: Path) -> LatentCache | None:
    """The cache in `folder`; None if there is none of this version."""
    try:
        about = read_json(folder / "about.json")
        columns = {name: (tuple(shape), dtype) for name, (shape, dtype) in about.pop("columns").items()}
        return LatentCache(folder.parent, folder.name, columns, about)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def drop_rows(cache: LatentCache, oldest: int) -> None:
    """Delete the rows that no run has wanted since day `oldest`. What stays of a shard moves to a new one first, so that a kill
    loses nothing."""
    for claims in cache.folder.glob("*.claims"):  # nobody builds now
        claims.unlink()
    for shard in list(cache.shards()):
        days = cache.days(shard)
        kept = np.flatnonzero(days >= oldest)
        if len(kept) == len(days):
            continue
        number = cache.shards().index(shard)
        addresses = cache.addresses(shard)
        for start in range(0, len(kept), ROWS_AT_ONCE):
            part = kept[start : start + ROWS_AT_ONCE]
            cache.append(addresses[part], cache.read(cache.row_numbers(number, part)), [], days[part])
        shutil.rmtree(cache.folder / shard)


def of_an_earlier_version(folder: Path) -> bool:
    return (folder / "journal.jsonl").is_file()


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def description(cache: LatentCache, days: np.ndarray, oldest: int) -> str:
    about = cache.about
    old = int((days < oldest).sum())
    megabytes = cache.row_bytes / 1e6
    return (
        f"{cache.folder}: {about.get('vae1')} and {about.get('vae2')}, {about.get('image_size')} px, seed {about.get('seed')}; "
        f"{count_of(len(days), 'row')}, {len(days) * megabytes:.1f} MB, of which {old}, {old * megabytes:.1f} MB, unused"
    )


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--latent_cache_dir", default="latent_cache", help="folder of latent caches")
    parser.add_argument("--unused_days", type=integer(1, 36500), default=30, help="after so many days without a run, in days")
    parser.add_argument("--drop", action="store_true", help="delete what is unused; without it nothing is changed")
    args = parser.parse_args(argv)
    root, oldest = Path(args.latent_cache_dir).expanduser(), today() - args.unused_days
    if not root.is_dir():
        raise UserError(f"--latent_cache_dir {root}: no such folder")
    before = size_of(root)
    for folder in sorted(entry for entry in root.iterdir() if entry.is_dir()):
        cache = opened(folder)
        if cache:
            list_or_drop(cache, oldest, args.drop)
        elif of_an_earlier_version(folder):
            old = (folder / "journal.jsonl").stat().st_mtime < time.time() - 86400 * args.unused_days
            print(f"{folder}: of an earlier version, {size_of(folder) / 1e6:.1f} MB, which nothing reads")
            if args.drop and old:
                shutil.rmtree(folder)
    print(
        f"dropped: {(before - size_of(root)) / 1e6:.1f} MB"
        if args.drop
        else "nothing was changed; --drop deletes what is unused"
    )


def list_or_drop(cache: LatentCache, oldest: int, drop: bool) -> None:
    with cache.unused_by_others() if drop else contextlib.nullcontext(True) as free:
        days = np.concatenate([np.empty(0, int), *(cache.days(shard) for shard in cache.shards())])
        print(description(cache, days, oldest) + ("" if free else "; in use by a run: left alone"))
        if drop and free:
            if (days < oldest).all():
                shutil.rmtree(cache.folder)
            else:
                drop_rows(cache, oldest)


if __name__ == "__main__":
    run(main)
