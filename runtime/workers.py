"""Data workers: processes that make batches, and a loader that never waits for them in vain."""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.process
import os
import pickle
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.utils.data import DataLoader
from torch.utils.data._utils.pin_memory import pin_memory

from runtime.interrupts import leave_signals_to_parent, signals_held_back
from utils import UserError, one_line

IMPORTS = 480.0  # seconds more for the first batch of workers that are no forks: each imports torch, from whatever disk
PATIENCE = 120.0  # seconds without a batch after which data workers are given up
TIMED_OUT = "DataLoader timed out"  # how torch's message begins
LOST = "lower it (0: none), or give the machine or container more memory (docker: --memory, --shm-size)"
TICK = 5.0  # seconds after which the wait for a batch looks whether all workers live


class WorkersLost(UserError):
    """No further batch will come: a data worker has died, stands still, or could not be started, or a stream has ended. Begins
    with the setting that it is about."""


class WorkerLoader(DataLoader):
    """A DataLoader that never waits in vain: its workers survive a signal to all processes, its errors are those that its
    workers raised, and a worker that cannot deliver is `WorkersLost`.

    A worker's batch comes through its pipe as bytes (`Parcel`), not through shared memory. Containers have little of that, and
    a worker whose queue fails to get any says so to nobody.

    Args:
        patience: seconds to wait for a batch beyond 2 s for each of its images.
        options: of the DataLoader.
    """

    def __init__(self, dataset, patience: float = PATIENCE, **options):
        workers = options.get("num_workers", 0)
        super().__init__(dataset, timeout=min(TICK, patience) if workers else 0, **options)
        if workers:
            self.collate_fn = Parcelled(self.collate_fn)
        self._patience = patience + 2 * (getattr(self.batch_sampler, "batch_size", None) or 1)

    def __iter__(self):
        if not self.num_workers:
            yield from super().__iter__()
            return
        batches = self._started()
        waited = 0.0 if multiprocessing.get_start_method() == "fork" else -IMPORTS
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except WorkersLost:  # no worker's: raised here, where the order of the images is drawn
                raise
            except UserError as error:  # torch puts the worker's traceback into its message
                raise UserError(str(error).rpartition(f"{UserError.__module__}.{UserError.__qualname__}: ")[2]) from None
            except RuntimeError as error:
                waited += self.timeout  # by the count: a suspended program waits for nobody
                if not str(error).startswith(TIMED_OUT) or waited >= self._patience:
                    raise self._lost(error, batches) from None
                continue
            waited = 0.0
            yield batch.open() if isinstance(batch, Parcel) else batch

    def _started(self):
        """torch's iterator, with its workers at work."""
        batches = self._iterator
        if batches:  # it first waits for what its workers still do for an iteration that nobody reads any more
            batches._timeout = self._patience
        try:
            with signals_held_back(), _signal_of_children_kept():
                batches = super().__iter__()
        except OSError as error:  # no memory, processes or semaphores for them
            raise WorkersLost(f"num_workers {self.num_workers}: they cannot be started ({one_line(error)}); {LOST}") from None
        except RuntimeError as error:
            raise self._lost(error, batches) from None
        batches._timeout = self.timeout
        return batches

    def _lost(self, error: RuntimeError, batches) -> Exception:
        """`error` as `WorkersLost`, if that is what it says; the workers end, for one that stands still never would."""
        if str(error).startswith(TIMED_OUT):
            why = "no data worker has delivered anything for minutes, such as from a disk that does not answer"
        elif str(error).startswith("DataLoader worker (pid"):
            why = "a data worker has ended unexpectedly, most often killed for want of memory"
        else:
            return error
        for worker in batches._workers:
            worker.kill()
        for worker in batches._workers:
            worker.join(min(TICK, self._patience))
            if worker.is_alive():  # its disk does not answer: Python would wait for it at its own end
                multiprocessing.process._children.discard(worker)
        return WorkersLost(f"num_workers {self.num_workers}: {why}; {LOST}")


class Parcel:
    """A batch as the bytes in which a worker sends it. Where torch pins memory it opens the parcel too."""

    def __init__(self, batch):
        self._bytes = pickle.dumps(batch, protocol=pickle.HIGHEST_PROTOCOL)

    def open(self):
        return pickle.loads(self._bytes)

    def pin_memory(self):
        return pin_memory(self.open())


@dataclass
class Parcelled:
    """A `collate_fn` whose batches leave their worker as parcels."""

    collate_fn: Callable

    def __call__(self, items):
        return Parcel(self.collate_fn(items))


@contextlib.contextmanager
def _signal_of_children_kept():
    """Within this context torch's handler of SIGCHLD is not installed. It raises wherever the program happens to be when a
    worker dies, such as between a step's update and its count; the loader notices at the next batch."""
    if not hasattr(signal, "SIGCHLD") or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)


def loader_options(num_workers: int) -> dict:
    """The options of a `WorkerLoader` with at most `num_workers` processes, and at most one per CPU core."""
    num_workers = min(num_workers, os.cpu_count() or 1)
    return {
        "num_workers": num_workers,
        "worker_init_fn": leave_signals_to_parent,
        "persistent_workers": num_workers > 0,
        "pin_memory": torch.cuda.is_available(),
    }
