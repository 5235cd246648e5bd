"""Which content each image has: a digest of its bytes, remembered so that an unchanged file is not read again.

What is remembered is (stamp, content): the stamp is a digest of path, size, times and inode, as in git's index. Each run
appends to a file of its own, so that no two write to one; forgetting an entry costs no more than reading that image again.
"""

from __future__ import annotations

import contextlib
import itertools
import secrets
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from dataloader import ImageDataset, UnreadableImage
from images.files import digest_of
from utils import atomic_file

WORD = np.dtype("<u8")  # a digest is two of them
RECORD = np.dtype([("stamp", WORD, 2), ("content", WORD, 2)])
AT_ONCE = 1024  # images whose contents are read before they are written down
MOST_FILES = 16  # more are made into one
MOST_RECORDS = 1 << 20  # what that one keeps, or four times the images at hand, the newest


@dataclass(frozen=True)
class Contents:
    """The contents of a data set's images.

    Attributes:
        digests: (N, 2) uint64, zero where the image cannot be read. unreadable: {index: why}.
    """

    digests: np.ndarray
    unreadable: dict[int, str]


def words_of(digests: list[bytes]) -> np.ndarray:
    """N digests of 16 bytes -> (N, 2) uint64."""
    return np.frombuffer(b"".join(digests), WORD).reshape(-1, 2)


def contents_of(dataset: ImageDataset, folder: Path, threads: int) -> Contents:
    """The content of each image of `dataset`: what `folder` remembers, the others read by so many threads."""
    stamps, digests = _stamps_of(dataset), np.zeros((len(dataset), 2), WORD)
    known = _remembered(folder, stamps, digests)
    unreadable = {}
    own = folder / f"{time.time_ns():020d}-{secrets.token_hex(4)}.bin"
    waiting = np.flatnonzero(~known)
    with (
        ThreadPoolExecutor(max(1, threads)) as pool,
        tqdm(total=len(waiting), desc="read", unit="image", delay=2, disable=not len(waiting)) as bar,
    ):
        for start in range(0, len(waiting), AT_ONCE):
            part = waiting[start : start + AT_ONCE]
            shares = np.array_split(part, max(1, threads))
            found = itertools.chain.from_iterable(pool.map(lambda share: _read(dataset, share), shares))
            for index, content in zip(part.tolist(), found):
                if isinstance(content, UnreadableImage):
                    unreadable[index] = content.why
                else:
                    digests[index] = np.frombuffer(content, WORD)
            _remember(own, stamps[part], digests[part])
            bar.update(len(part))
    _make_one_of_many(folder, max(MOST_RECORDS, 4 * len(dataset)))
    return Contents(digests, unreadable)


def _stamps_of(dataset: ImageDataset) -> np.ndarray:
    """A digest of each image's stamp, zero where there is none: (N, 2) uint64."""
    stamps = []
    for index in range(len(dataset)):
        try:
            stamp = dataset.source.stamp(index)
        except OSError:
            stamp = None
        stamps.append(digest_of([stamp.encode(errors="surrogateescape")]) if stamp else bytes(16))
    return words_of(stamps)


def _read(dataset: ImageDataset, indices: np.ndarray) -> list[bytes | UnreadableImage]:
    found = []
    for index in indices.tolist():
        try:
            found.append(dataset.content(index))
        except UnreadableImage as error:
            found.append(error)
    return found


def _records(folder: Path) -> Iterator[tuple[Path, np.ndarray]]:
    """(file, its whole records), oldest first."""
    for path in sorted(folder.glob("*.bin")):
        with contextlib.suppress(OSError):
            content = path.read_bytes()
            yield path, np.frombuffer(content[: len(content) // RECORD.itemsize * RECORD.itemsize], RECORD)


def _remembered(folder: Path, stamps: np.ndarray, digests: np.ndarray) -> np.ndarray:
    """Fill in the contents that `folder` remembers under these stamps; which ones those are: (N,) bool."""
    known = np.zeros(len(stamps), bool)
    for _, records in _records(folder):
        if len(records):
            records = records[np.argsort(records["stamp"][:, 0])]
            places = np.searchsorted(records["stamp"][:, 0], stamps[:, 0]).clip(max=len(records) - 1)
            found = (records["stamp"][places] == stamps).all(axis=1) & stamps.any(axis=1)
            digests[found] = records["content"][places[found]]
            known |= found
    return known


def _remember(path: Path, stamps: np.ndarray, digests: np.ndarray) -> None:
    sound = stamps.any(axis=1) & digests.any(axis=1)
    records = np.empty(sound.sum(), RECORD)
    records["stamp"], records["content"] = stamps[sound], digests[sound]
    if len(records):
        with contextlib.suppress(OSError):  # where nothing can be written, images are read again the next time
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "ab") as file:
                file.write(records.tobytes())


def _make_one_of_many(folder: Path, most: int) -> None:
    files = list(_records(folder))
    if len(files) <= MOST_FILES:
        return
    newest_first = np.concatenate([records for _, records in files])[::-1]
    _, first = np.unique(newest_first["stamp"], axis=0, return_index=True)
    kept = newest_first[np.sort(first)[:most]][::-1]
    with contextlib.suppress(OSError):
        with atomic_file(folder / f"{time.time_ns():020d}-{secrets.token_hex(4)}.bin") as file:
            file.write(kept.tobytes())
        for path, _ in files:
            path.unlink(missing_ok=True)
