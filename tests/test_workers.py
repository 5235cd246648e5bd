"""Data workers that die, stand still or cannot be started, and batches that come without shared memory."""

import os
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
import torch
from conftest import ROOT
from hostile import no_hang, refusal
from torch.utils.data import Dataset

import dataloader as workers
from dataloader import WorkerLoader, WorkersLost


class Troubled(Dataset):
    """Ten numbers; the worker that is to make number 5 comes to grief by `trouble`."""

    def __init__(self, trouble):
        self.trouble = trouble

    def __len__(self):
        return 10

    def __getitem__(self, index):
        if index == 5:
            self.trouble()
        return torch.full((3,), float(index))


@pytest.mark.parametrize(
    "trouble, said",
    [(partial(signal.raise_signal, signal.SIGKILL), "killed"), (partial(signal.raise_signal, signal.SIGSTOP), "delivered")],
    ids=["killed", "stopped"],
)
def test_a_worker_that_cannot_deliver_ends_the_wait(monkeypatch, trouble, said):
    """A wait for ever for a worker that stands still; a traceback for one that the kernel has killed for memory."""
    monkeypatch.setattr(workers, "TICK", 0.2)
    monkeypatch.setattr(workers, "IMPORTS", 10.0)  # where Python forks no more
    loader = WorkerLoader(Troubled(trouble), patience=0.4, batch_size=1, num_workers=2)
    with (
        no_hang(),
        pytest.raises(WorkersLost, match=rf"^num_workers 2: .*{said}.*lower it \(0: none\).*--shm-size"),
    ):
        list(loader)


IMMORTAL = """
import multiprocessing.popen_fork, os, signal, sys
import dataloader as workers
from dataloader import WorkerLoader, WorkersLost
from torch.utils.data import _utils

class Stopped:
    def __len__(self):
        return 1
    def __getitem__(self, index):
        signal.raise_signal(signal.SIGSTOP)

workers.TICK = _utils.MP_STATUS_CHECK_INTERVAL = 0.2
popen = multiprocessing.popen_fork.Popen
popen.kill = popen.terminate = lambda self: os.write(1, b"%d " % self.pid)
try:
    list(WorkerLoader(Stopped(), 0.4, batch_size=1, num_workers=1, multiprocessing_context="fork"))
except WorkersLost:
    sys.exit(7)
"""


def test_a_worker_that_not_even_a_kill_ends_does_not_keep_the_program(tmp_path):
    """A run that has saved and said its line, and then waits for ever for a worker whose disk does not answer (D state)."""
    with open(tmp_path / "worker", "wb") as file:  # no pipe, which the worker would keep open
        left = subprocess.run([sys.executable, "-c", IMMORTAL], cwd=ROOT, timeout=240, stdout=file)
    os.kill(int((tmp_path / "worker").read_text().split()[0]), signal.SIGKILL)
    assert left.returncode == 7


def test_workers_that_cannot_be_started_are_refused_in_one_line(monkeypatch):
    """A traceback where the system has no memory or processes left for workers."""
    monkeypatch.setattr(os, "fork", lambda: (_ for _ in ()).throw(OSError(12, "Cannot allocate memory")))
    refusal(lambda: list(WorkerLoader([1, 2], num_workers=1)), "num_workers 1: they cannot be started", "allocate")


def test_batches_need_no_shared_memory(monkeypatch):
    """A batch lost in a worker's queue, and a wait for ever, where /dev/shm is small: a container's is 64 MB."""

    def refuse(*_):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1_2>: No space left on device (28)")

    monkeypatch.setattr(torch.UntypedStorage, "_share_fd_cpu_", refuse)
    monkeypatch.setattr(torch.UntypedStorage, "_share_filename_cpu_", refuse)
    monkeypatch.setattr(workers, "TICK", 0.5)
    loader = WorkerLoader(Troubled(int), patience=1, batch_size=2, num_workers=2, collate_fn=None)
    with no_hang():
        assert [batch.tolist() for batch in loader] == [[[i] * 3, [i + 1] * 3] for i in range(0, 10, 2)]


def test_an_iteration_that_nobody_finishes_costs_the_next_one_nothing(monkeypatch):
    """A slow batch of an abandoned pass that is taken for a lost worker; batches of it that turn up in the next pass."""
    monkeypatch.setattr(workers, "TICK", 0.1)
    options = {"batch_size": 1, "num_workers": 2, "persistent_workers": True}
    loader = WorkerLoader(Troubled(partial(time.sleep, 0.5)), patience=20, **options)
    for _ in range(2):
        next(iter(loader))
        assert [batch[0, 0].item() for batch in loader] == list(range(10))
