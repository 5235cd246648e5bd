"""Who encodes which chunk of a latent cache, among all that build it at once: the processes of one run, or of several.

A file beside the shards has a byte for each chunk. The process that has the lock on a byte encodes that chunk, and the kernel
drops the lock with the process. The byte counts how often the chunk was finished: a count that has changed tells whoever looked
for missing rows before that the look is out of date for this chunk. (The lock lies on the byte itself since NFS reads anew, and
writes no more than, what a lock covers.)
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from utils import count_of

with contextlib.suppress(ImportError):  # not on Windows
    import fcntl

log = logging.getLogger(__name__)

STALE = 600.0  # seconds in which nobody encodes anything, after which the claims of others count no more
POLL = 0.5  # seconds between looks at the claims of others
PROBE = 1 << 40  # a byte that stands for no chunk


class ChunkClaims:
    """The claims on the chunks of one set of images; a context, at whose end this process's own are dropped.

    Without locks, on Windows, on some file systems and in another user's folder, every process claims whatever it asks for.

    Attributes:
        works: whether there are locks. known: how often each chunk was finished when this process last looked, modulo 256.
    """

    def __init__(self, path: Path):
        self.known, self.works = b"", False
        self._file, self._patient = None, True
        with contextlib.suppress(OSError, NameError):
            self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            self._claim(PROBE)
            self.works = True

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self._file is not None:
            os.close(self._file)

    def look(self, chunks: int) -> None:
        """Take the counts of so many chunks as known. Whoever looks for missing rows afterwards misses none of these."""
        counts = os.pread(self._file, chunks, 0) if self.works else b""
        self.known = counts.ljust(chunks, b"\0")

    def taken(self, numbers: Iterable[int], held: list[int]) -> Iterator[int]:
        """Claim chunk after chunk: the numbers of those that are this process's to encode. Those that others have claimed go to
        `held`, and those that others have finished are passed over."""
        for number in numbers:
            if not self.works:
                yield number
            elif not self._claim(number) and self._patient:
                held.append(number)
            elif self._is_finished(number):
                self._drop(number)
            else:
                yield number

    def finish(self, number: int) -> None:
        """Let the others know that the rows of a chunk are in the cache."""
        if self.works:
            os.pwrite(self._file, bytes([(self.known[number] + 1) % 256]), number)
            self._drop(number)

    def show_life(self) -> None:
        """Let those who wait know that somebody encodes."""
        with contextlib.suppress(OSError, TypeError):
            os.utime(self._file)

    def left_undone(self, numbers: list[int]) -> list[int]:
        """Wait for those who have claimed these chunks; the ones that are to be encoded after all: their claimers have died, or
        nobody has shown life for `STALE` seconds."""
        waited, still, life = 0.0, 0.0, None
        while numbers := [number for number in numbers if not self._is_finished(number)]:
            if any(self._is_free(number) for number in numbers):
                break
            last, life = life, os.fstat(self._file).st_mtime_ns
            still = still + POLL if life == last else 0.0
            if still >= STALE:
                log.warning("those who encode the rest of the latent cache have done nothing for %.0f s: doing it here", STALE)
                self._patient = False
                break
            if waited == 10 * POLL:
                log.info("latent cache: waiting for others, who encode the last %s", count_of(len(numbers), "chunk"))
            time.sleep(POLL)
            waited += POLL
        return numbers

    def _claim(self, number: int) -> bool:
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, number)
        except (BlockingIOError, PermissionError):
            return False
        return True

    def _drop(self, number: int) -> None:
        fcntl.lockf(self._file, fcntl.LOCK_UN, 1, number)

    def _is_free(self, number: int) -> bool:
        free = self._claim(number)
        if free:
            self._drop(number)
        return free

    def _is_finished(self, number: int) -> bool:
        count = os.pread(self._file, 1, number)
        return (count[0] if count else 0) != self.known[number]
