"""The latent cache: each training image through both frozen VAEs once, ever.

What is stored: for every image K views (random crops and flips, the same that training without a cache would draw), each
with both VAEs' scaled latents in float16 and, where the module takes the image, its pixels in uint8. One file per column,
rows in the order (image, view), read through a memory map, so that training needs no memory for them.

Under which key: a digest of everything the content depends on (`cache_key`); any change gives another folder.

How it is built: in chunks of images. A chunk's rows are written and flushed, then one line in the journal says that they
are there; a killed build goes on with the chunks that have no line. A file lock keeps two runs from building at once.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import math
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout

from utils import UserError, count_of, flush_to_disk, one_line, write_json

log = logging.getLogger(__name__)

CHUNK_IMAGES = 32  # a kill loses at most this many images' work


def cache_key(**parts) -> str:
    """A digest of everything that a cache's content depends on; `parts` are plain JSON values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


class LatentCache:
    """Rows of several columns for `length` images with `views` views each, in `root/key`.

    Args:
        columns: {name: (shape of one row, numpy dtype)}.
        key: from `cache_key`.
    """

    def __init__(self, root: str | os.PathLike, key: str, length: int, views: int, columns: dict):
        self.folder = Path(root) / key
        self.length, self.views, self.columns = length, views, columns
        self._maps = {}

    @property
    def row_bytes(self) -> int:
        return sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in self.columns.values())

    @property
    def total_bytes(self) -> int:
        return self.length * self.views * self.row_bytes

    @property
    def chunks(self) -> int:
        return -(-self.length // CHUNK_IMAGES)

    def chunk_images(self, chunk: int) -> range:
        return range(chunk * CHUNK_IMAGES, min((chunk + 1) * CHUNK_IMAGES, self.length))

    # ---- what is there

    def journal(self) -> dict[int, dict[int, str]]:
        """{chunk that is complete: {image left out of it: why}}; a line that a kill cut short does not count."""
        entries = {}
        with contextlib.suppress(FileNotFoundError):
            for line in (self.folder / "journal.jsonl").read_text(encoding="utf-8", errors="replace").splitlines():
                with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
                    entry = json.loads(line)
                    entries[entry["chunk"]] = {int(image): why for image, why in entry["left_out"].items()}
        return entries

    @property
    def complete(self) -> bool:
        return (self.folder / "complete.json").is_file()

    def left_out(self) -> dict[int, str]:
        """{image that is not in the cache: why}."""
        return {image: why for entry in self.journal().values() for image, why in entry.items()}

    # ---- building

    @contextlib.contextmanager
    def lock(self):
        """Only one run builds at a time; the kernel drops a dead run's lock."""
        lock = FileLock(self.folder / "lock")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder):
                pass
        except OSError as error:
            raise UserError(
                f"latent_cache_dir {self.folder.parent}: cannot write there ({one_line(error)}), and it holds no complete "
                "cache of these images; name another folder"
            ) from None
        try:
            lock.acquire(timeout=0)
        except Timeout:
            log.info("another run is building this latent cache: waiting for it")
            lock.acquire()
        except (OSError, NotImplementedError) as error:
            log.warning("this file system knows no locks (%s): let no other run build this cache meanwhile", one_line(error))
        try:
            yield
        finally:
            lock.release()

    def prepare(self) -> None:
        """Say what the cache will take, and stop at once if the disk does not have it."""
        log.info(
            "latent cache: %s x %s, %.0f MB in %s",
            count_of(self.length, "image"), count_of(self.views, "view"), self.total_bytes / 1e6, self.folder,
        )  # fmt: skip
        images_there = sum(len(self.chunk_images(chunk)) for chunk in self.journal())
        needed = (self.length - images_there) * self.views * self.row_bytes
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise UserError(
                f"latent_cache_dir {self.folder.parent}: the cache takes {needed / 1e6:.0f} MB more and the disk has "
                f"{free / 1e6:.0f} MB; name another folder, lower cache_views, or train without cache_latents"
            )

    def write_chunk(self, chunk: int, rows: dict[str, np.ndarray], left_out: dict[int, str]) -> None:
        """Store a chunk's rows, each column (images · views, *shape), and only then say that they are there."""
        try:
            for name, values in rows.items():
                shape, dtype = self.columns[name]
                values = np.ascontiguousarray(values, dtype)
                offset = chunk * CHUNK_IMAGES * self.views * math.prod(shape) * values.itemsize
                create = os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0)
                with os.fdopen(os.open(self.folder / f"{name}.bin", create, 0o666), "r+b") as file:
                    file.seek(offset)
                    file.write(memoryview(values).cast("B"))
                    flush_to_disk(file)
            line = json.dumps({"chunk": chunk, "left_out": left_out}) + "\n"
            with open(self.folder / "journal.jsonl", "a", encoding="utf-8") as file:
                file.write(line if file.tell() == 0 else "\n" + line)  # a line cut short by a kill must not swallow this one
                flush_to_disk(file)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise UserError(
                    f"latent_cache_dir {self.folder.parent}: the disk is full; what is cached is kept. Free "
                    f"{self.total_bytes / 1e6:.0f} MB or name another folder, then start again"
                ) from None
            raise UserError(f"latent_cache_dir {self.folder.parent}: cannot be written ({one_line(error)})") from None

    def finish(self) -> None:
        write_json(self.folder / "complete.json", {"images": self.length, "views": self.views, "bytes": self.total_bytes})

    # ---- reading

    def column(self, name: str) -> np.ndarray:
        """The column as a read-only memory map (length · views, *shape)."""
        if name not in self._maps:
            shape, dtype = self.columns[name]
            rows = self.length * self.views
            path = self.folder / f"{name}.bin"
            try:
                try:
                    self._maps[name] = np.memmap(path, dtype, "r", shape=(rows, *shape))
                except OSError as error:
                    if error.errno not in (errno.ENODEV, errno.ENOSYS, errno.EOPNOTSUPP):
                        raise
                    log.warning("%s: this file system cannot map files: reading it into memory", path)
                    self._maps[name] = np.fromfile(path, dtype, rows * math.prod(shape)).reshape(rows, *shape)
            except (OSError, ValueError) as error:  # gone, or shorter than what was written
                raise UserError(f"latent cache {self.folder}: damaged ({one_line(error)}); delete this folder") from None
        return self._maps[name]

    def read(self, name: str, images: np.ndarray, views: np.ndarray) -> np.ndarray:
        """The rows of (image, view) pairs, copied into memory: (B, *shape)."""
        return self.column(name)[images * self.views + views]

    def __getstate__(self):
        return self.__dict__ | {"_maps": {}}  # a worker process opens its own maps
