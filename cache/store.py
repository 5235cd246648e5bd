"""The latent cache: each view of each image through both frozen VAEs once, ever.

A row is one view (a random crop and flip, the same that training without a cache would draw) with both VAEs' scaled latents in
float16 and, where the module takes the image, its pixels in uint8. Its address is the image's content and the view's number.
So a file that is touched, copied, renamed or joined by others keeps its rows. What else a row depends on (VAEs, size, seed, …)
names the folder, by a digest (`cache_key`).

A folder holds shards. A shard belongs to the one process that made it, which alone appends to it:

    rows.bin         the addresses, 16 bytes each, in the order of the rows
    NAME.bin         a column, read through a memory map, so that training needs no memory for it
    used.bin         the day on which a run last wanted each row, 16 bits each
    left_out.jsonl   images that could not be encoded, and why

Beside the shards a file SET.claims says who encodes what of a set of images (`cache.claims`).

An address is written when its row is on the disk. A kill loses at most what has no address yet, and two processes that build at
once do double work at worst; `cache.claims` keeps them from that.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import math
import os
import secrets
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np

from cache.contents import WORD
from utils import UserError, flush_to_disk, one_line, write_json

with contextlib.suppress(ImportError):  # not on Windows, where a mapped file cannot be deleted anyway
    import fcntl

log = logging.getLogger(__name__)

SHARD_BITS = 40  # a row's number is its shard's, shifted, and its place there
PLACE = (1 << SHARD_BITS) - 1
SPREAD = np.uint64(0x9E3779B97F4A7C15)  # odd: no two views of an image get the same address
DAY = np.dtype("<u2")  # days since 1970


def cache_key(**parts) -> str:
    """A digest of everything that a cache's rows depend on; `parts` are plain JSON values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


def today() -> int:
    return int(time.time() // 86400)


def addresses_of(contents: np.ndarray, views: int | np.ndarray) -> np.ndarray:
    """Contents (…, 2) uint64 and the numbers of views (…,) -> addresses (…, 2) uint64."""
    first = contents[..., 0] + np.asarray(views, np.uint64) * SPREAD  # wraps around
    return np.stack([first, np.broadcast_to(contents[..., 1], first.shape)], axis=-1)


class LatentCache:
    """Rows of several columns, in `root/key`.

    Args:
        columns: {name: (shape of one row, numpy dtype)}.
        key: from `cache_key`.
        about: what the key was made of, for people; written beside the rows.
    """

    def __init__(self, root: str | os.PathLike, key: str, columns: dict, about: dict | None = None):
        self.folder = Path(root) / key
        self.columns, self.about = columns, about or {}
        self._shards = []  # their names; a number given to one stays
        self._maps = {}
        self._own = None  # the name of the shard that this process appends to
        self._own_rows = 0
        self._hold = None

    @property
    def row_bytes(self) -> int:
        return sum(map(self._bytes_in, self.columns))

    def _bytes_in(self, column: str) -> int:
        shape, dtype = self.columns[column]
        return math.prod(shape) * np.dtype(dtype).itemsize

    # ---- what is there

    def shards(self) -> list[str]:
        """The names of all shards, the oldest first, but those that this process has not seen before last."""
        with contextlib.suppress(OSError):
            there = {file.parent.name for file in self.folder.glob("*/rows.bin")}
            self._shards += sorted(there.difference(self._shards))
        return self._shards

    def addresses(self, shard: str) -> np.ndarray:
        """The addresses of the rows of a shard whose every column is there: (rows, 2) uint64."""
        try:
            content = (self.folder / shard / "rows.bin").read_bytes()
            rows = len(content) // (2 * WORD.itemsize)
            sizes = [(self.folder / shard / f"{name}.bin").stat().st_size // self._bytes_in(name) for name in self.columns]
        except FileNotFoundError:
            return np.empty((0, 2), WORD)
        whole = min(rows, *sizes)
        if whole < rows:
            log.warning("latent cache %s: cut short, %d of its rows are encoded again", self.folder / shard, rows - whole)
        return np.frombuffer(content, WORD, 2 * whole).reshape(-1, 2)

    def find(self, addresses: np.ndarray) -> np.ndarray:
        """Addresses (…, 2) -> the numbers of their rows (…,) int64, -1 for those that are not there."""
        wanted = addresses.reshape(-1, 2)
        rows = np.full(len(wanted), -1, np.int64)
        for number, shard in enumerate(self.shards()):
            there = self.addresses(shard)
            if len(there):
                order = np.argsort(there[:, 0], kind="stable")
                places = order[np.searchsorted(there[:, 0], wanted[:, 0], sorter=order).clip(max=len(there) - 1)]
                found = (there[places] == wanted).all(axis=1) & (rows < 0)
                rows[found] = self.row_numbers(number, places[found])
        return rows.reshape(addresses.shape[:-1])

    @staticmethod
    def row_numbers(shard: int, places: np.ndarray) -> np.ndarray:
        """The numbers of the rows at these places of the shard with that number."""
        return places + (shard << SHARD_BITS)

    def left_out(self, reader: str, views: int) -> dict[str, str]:
        """{digest of a content, in hexadecimal: why it could not be encoded}, for so many views, by what `reader` names."""
        found = {}
        for shard in self.shards():
            with contextlib.suppress(FileNotFoundError):
                path = self.folder / shard / "left_out.jsonl"
                for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                    with contextlib.suppress(ValueError, KeyError, TypeError):  # cut short by a kill
                        entry = json.loads(line)
                        if entry["reader"] == reader and entry["views"] <= views:
                            found[entry["content"]] = entry["why"]
        return found

    def days(self, shard: str) -> np.ndarray:
        """The days on which a run last wanted the rows of a shard: (rows,) int64, since 1970."""
        rows = len(self.addresses(shard))
        days = np.full(rows, today())  # of what a power cut took
        with contextlib.suppress(FileNotFoundError):
            known = np.fromfile(self.folder / shard / "used.bin", DAY)[:rows]
            days[: len(known)] = known
        return days

    def mark_used(self, rows: np.ndarray) -> None:
        """Note that a run wants these rows today, where that can be written."""
        for number in np.unique(rows >> SHARD_BITS).tolist():
            path = self.folder / self._shards[number] / "used.bin"
            places = rows[rows >> SHARD_BITS == number] & PLACE
            with contextlib.suppress(OSError, ValueError):
                days = np.memmap(path, DAY, "r+")
                places = places[places < len(days)]
                if (days[places] != today()).any():
                    days[places] = today()

    # ---- building

    def hold(self) -> None:
        """Keep the rows from being dropped (tools/drop_unused_latents.py) while this process lives; the kernel lets go of them.
        UserError if they are being dropped right now."""
        with contextlib.suppress(OSError, NameError):
            if self.folder.is_dir():
                with contextlib.suppress(OSError):
                    (self.folder / "in_use").touch()
                self._hold = open(self.folder / "in_use", "rb")  # noqa: SIM115 (as long as this process lives)
                try:
                    fcntl.flock(self._hold, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise UserError(
                        f"latent_cache_dir {self.folder.parent}: entries are being dropped there; start again when that is done"
                    ) from None

    @contextlib.contextmanager
    def unused_by_others(self):
        """Within this context no run can take hold of the rows; the context's value is False where one has hold of them."""
        with open(self.folder / "in_use", "ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
            except (OSError, NameError):  # no such locks here
                yield True
            else:
                yield True

    def begin(self) -> None:
        """Have a folder to write rows into. UserError where nothing can be written."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder):
                pass
        except OSError as error:
            raise UserError(
                f"latent_cache_dir {self.folder.parent}: cannot write there ({one_line(error)}), and it holds no complete "
                "cache of these images; name another folder"
            ) from None
        self.hold()

    def require_space(self, rows: int) -> None:
        """UserError unless the disk has room for so many more rows."""
        needed, free = rows * self.row_bytes, shutil.disk_usage(self.folder).free
        if needed > free:
            raise UserError(
                f"latent_cache_dir {self.folder.parent}: the cache takes {needed / 1e6:.0f} MB more and the disk has "
                f"{free / 1e6:.0f} MB; name another folder, lower cache_views, or train without cache_latents"
            )

    def append(self, addresses: np.ndarray, rows: dict[str, np.ndarray], left_out: list[dict], days=None) -> None:
        """Store rows, each column (R, *shape), and only then their addresses (R, 2); and what could not be encoded. `days` on
        which they were last wanted: (R,), by default today."""
        try:
            shard = self._own_shard()
            for name, values in rows.items():
                shape, dtype = self.columns[name]
                values = np.ascontiguousarray(values, dtype).reshape(len(addresses), *shape)
                self._write(shard / f"{name}.bin", self._own_rows * self._bytes_in(name), values)
            days = np.full(len(addresses), today() if days is None else days).astype(DAY)
            self._write(shard / "used.bin", self._own_rows * DAY.itemsize, days, flush=False)
            if left_out:
                lines = "".join(json.dumps(entry) + "\n" for entry in left_out)
                with open(shard / "left_out.jsonl", "a", encoding="utf-8") as file:
                    file.write(lines)
                    flush_to_disk(file)
            self._write(shard / "rows.bin", self._own_rows * addresses.itemsize * 2, addresses)
            self._own_rows += len(addresses)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise UserError(
                    f"latent_cache_dir {self.folder.parent}: the disk is full; what is cached is kept. Free some of it or name "
                    "another folder, then start again"
                ) from None
            raise UserError(f"latent_cache_dir {self.folder.parent}: cannot be written ({one_line(error)})") from None

    def _own_shard(self) -> Path:
        if self._own is None:
            self._own, self._own_rows = f"{time.time_ns():020d}-{secrets.token_hex(4)}", 0
            (self.folder / self._own).mkdir(parents=True)
            write_json(self.folder / "about.json", {**self.about, "columns": self.columns})
        return self.folder / self._own

    @staticmethod
    def _write(path: Path, offset: int, values: np.ndarray, flush: bool = True) -> None:
        create = os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0)
        with os.fdopen(os.open(path, create, 0o666), "r+b") as file:
            file.seek(offset)
            if values.size:
                file.write(memoryview(values).cast("B"))
            if flush:
                flush_to_disk(file)

    # ---- reading

    def _column(self, name: str, number: int) -> np.ndarray:
        """A column of a shard as a read-only memory map (rows, *shape)."""
        if (name, number) not in self._maps:
            shape, dtype = self.columns[name]
            path = self.folder / self._shards[number] / f"{name}.bin"
            rows = path.stat().st_size // self._bytes_in(name)
            try:
                column = np.memmap(path, dtype, "r", shape=(rows, *shape))
            except OSError as error:
                if error.errno not in (errno.ENODEV, errno.ENOSYS, errno.EOPNOTSUPP):
                    raise
                log.warning("%s: this file system cannot map files: reading it into memory", path)
                column = np.fromfile(path, dtype, rows * math.prod(shape)).reshape(rows, *shape)
            self._maps[name, number] = column
        return self._maps[name, number]

    def read(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Those rows of every column, copied into memory: {name: (B, *shape)}."""
        numbers, places = rows >> SHARD_BITS, rows & PLACE
        first = int(numbers[0])
        try:
            if len(self._shards) == 1 or (numbers == first).all():
                return {name: self._column(name, first)[places] for name in self.columns}
            pairs = list(zip(numbers.tolist(), places.tolist()))
            return {name: np.stack([self._column(name, number)[place] for number, place in pairs]) for name in self.columns}
        except (OSError, ValueError, IndexError) as error:  # gone, or shorter than when it was found
            raise UserError(f"latent cache {self.folder}: damaged ({one_line(error)}); start again") from None

    def __getstate__(self):
        return self.__dict__ | {"_maps": {}, "_hold": None}  # a worker process opens its own maps
