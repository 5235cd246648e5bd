"""Signals to the workers that decode images: they pass by, and the parent ends the workers."""

import os
import signal

from hostile import no_hang
from torch.utils.data import get_worker_info

from dataloader import WorkerLoader
from runtime.interrupts import leave_signals_to_parent
from utils import STOP_SIGNALS


def die_then_leave_signals(worker):
    os.kill(os.getpid(), signal.SIGTERM)
    leave_signals_to_parent(worker)


def test_workers_survive_a_signal_to_all_while_they_are_born():
    """A job's SIGTERM at the first step that ends a worker, and with it the run that it asks to stop."""
    loader = WorkerLoader(list(range(3)), batch_size=None, num_workers=1, worker_init_fn=die_then_leave_signals)
    with no_hang():
        assert list(loader) == [0, 1, 2]
    assert not set(STOP_SIGNALS) & signal.pthread_sigmask(signal.SIG_BLOCK, [])


def worker_number(items):
    return get_worker_info().id


def test_workers_end_with_a_parent_that_did_not_fork_them(start_method):
    """A program that waits at its end for workers whose parent is the fork server: they took its SIGTERM for a stranger's."""
    options = {"num_workers": 1, "persistent_workers": True, "collate_fn": worker_number}
    loader = WorkerLoader(list(range(3)), worker_init_fn=leave_signals_to_parent, **options)
    assert list(loader) == [0, 0, 0]
    (worker,) = loader._iterator._workers
    worker.terminate()
    worker.join(60)
    assert worker.exitcode == 0
