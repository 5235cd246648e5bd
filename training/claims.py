"""A run's name, taken in one step: no two runs write the same logs or the same best checkpoint, however they are started."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from filelock import FileLock, Timeout

from training.checkpoints import best_path
from utils import UserError, next_stamp


class RunClaim:
    """The claim of one run on its name: the folder `log_dir/align_{stamp}`, and `align_best_{stamp}.pth` in `save_dir`.

    A new run's claim is the folder, which only one process can create. A resumed run has its folder already; there the claim
    is a lock that the kernel drops with the process. Where the file system knows no locks the folder alone decides.

    Attributes:
        name: such as "align_20251231_034701".
    """

    def __init__(self, log_dir: str | os.PathLike, save_dir: str | os.PathLike, resumed: str | None = None):
        """`resumed`: the name of the run that goes on, or None for a new run. UserError if another process has it."""
        self._save_dir = Path(save_dir)
        self._lock = None
        if resumed:
            self.name = resumed
            if not self._locked():
                raise UserError(f"{resumed}: another process is going on with this run; wait until it ends, or stop it")
            return
        rejected = []
        while not self._claim_new_name(Path(log_dir), rejected):
            pass  # each try leaves a folder there, so that the next name is a second later
        for folder in rejected:
            folder.rmdir()

    def _claim_new_name(self, log_dir: Path, rejected: list[Path]) -> bool:
        self.name = f"align_{max(next_stamp(log_dir, 'align'), next_stamp(self._save_dir, 'align_best'))}"
        folder = log_dir / self.name
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            return False  # another run of this second was quicker
        if self._locked() and not best_path(self._save_dir, self.name).exists():
            return True
        self.release()  # a run that logs elsewhere has this name in `save_dir`
        rejected.append(folder)
        return False

    def _locked(self) -> bool:
        lock = FileLock(self._save_dir / f".{self.name}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return False
        except (OSError, NotImplementedError):  # a file system without locks
            return True
        self._lock = lock
        return True

    def release(self) -> None:
        """Let others have the name; the lock's file goes too."""
        if self._lock:
            with contextlib.suppress(OSError):
                os.unlink(self._lock.lock_file)
            self._lock.release()
            self._lock = None
