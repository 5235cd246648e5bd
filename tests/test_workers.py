"""Data workers that die, stand still or cannot be started, signals to all processes, and batches without shared memory."""

import os
import signal
import struct
import subprocess
import sys
import time
from functools import partial

import pytest
import torch
from conftest import ROOT
from hostile import no_hang, refusal
from runs import is_alive
from torch.utils.data import Dataset

import dataloader
from dataloader import Loader, WorkersLost, work
from utils import STOP_SIGNALS, StopWaiting

ONE_BY_ONE = [[index] for index in range(10)]


class Troubled(Dataset):
    """Ten numbers; the worker that is to make number 5 comes to grief by `trouble`. Beside each stands a long text, of which a
    pipe does not hold as many as are on their way."""

    def __init__(self, trouble=int):
        self.trouble = trouble

    def __getitem__(self, index):
        if index == 5:
            self.trouble()
        return {"pixel_values": torch.full((3,), index, dtype=torch.uint8), "path": "x" * 50_000}


def first_of(items):
    return items[0]


def numbers(batches):
    return [round((batch["pixel_values"][0].item() + 1) * 127.5) for batch in batches]


def killed():
    signal.raise_signal(signal.SIGKILL)


def stopped():
    signal.raise_signal(signal.SIGSTOP)


@pytest.fixture
def hurried(monkeypatch):
    """No test waits as long as a run does."""
    monkeypatch.setattr(dataloader, "TICK", 0.2)
    monkeypatch.setattr(dataloader, "IMPORTS", 60.0)  # where Python forks no more


@pytest.mark.parametrize("trouble, said", [(killed, "killed"), (stopped, "delivered")])
def test_a_worker_that_cannot_deliver_ends_the_wait(hurried, trouble, said):
    """A wait for ever for a worker that stands still, or for the rest of what a killed one was sending; a traceback for one
    that the kernel has killed for memory."""
    loader = Loader(Troubled(trouble), ONE_BY_ONE, 2, first_of, patience=0.4)
    with no_hang(), pytest.raises(WorkersLost, match=rf"^num_workers 2: .*{said}.*lower it \(0: none\).*--memory"):
        list(loader)


class Half:
    """A worker's pipe through which the fifth batch comes by half, and then `trouble`."""

    def __init__(self, pipe, trouble):
        self.recv, self._pipe, self._trouble, self._left = pipe.recv, pipe, trouble, 5

    def send_bytes(self, content):
        self._left -= 1
        if self._left:
            return self._pipe.send_bytes(content)
        os.write(self._pipe.fileno(), struct.pack("!i", len(content)) + content[: len(content) // 2])
        self._trouble()


@pytest.mark.parametrize("trouble, said", [(killed, "killed"), (stopped, "delivered")])
def test_a_batch_of_which_half_has_come_ends_the_wait(hurried, monkeypatch, trouble, said):
    """A wait for ever for the other half, which torch's loader has within its own time-out."""
    monkeypatch.setattr(dataloader, "work", lambda dataset, collate, pipe: work(dataset, collate, Half(pipe, trouble)))
    loader = Loader(Troubled(), ONE_BY_ONE, 1, first_of, patience=0.4)
    with no_hang(), pytest.raises(WorkersLost, match=said):
        list(loader)


def test_a_wait_without_data_says_so(hurried, monkeypatch, caplog):
    """A bar that stands still for minutes without a word, or with one word a second."""
    monkeypatch.setattr(dataloader, "SILENCE", 0.4)
    with no_hang(), pytest.raises(WorkersLost):
        list(Loader(Troubled(stopped), ONE_BY_ONE, 1, first_of, patience=1.4))
    said = [record.getMessage() for record in caplog.records]
    assert said == [f"no data for {seconds} s from 1 data worker" for seconds in range(4)]


def test_a_worker_that_dies_while_nobody_waits_is_noticed_at_the_next_batch(hurried):
    """An error between a step's update and its count, where torch's handler of SIGCHLD raises it; a hang at a resumed pass."""
    loader = Loader(Troubled(), ONE_BY_ONE, 1, first_of)
    before = signal.getsignal(signal.SIGCHLD)
    next(iter(loader))
    (worker,) = loader._workers
    worker.kill()
    worker.join()
    assert signal.getsignal(signal.SIGCHLD) == before
    with no_hang(20), pytest.raises(WorkersLost):
        list(loader)


def test_a_wait_ends_when_the_run_is_to_stop(hurried):
    """SIGTERM unheard for minutes while a disk does not answer: a scheduler kills the run before it has saved."""
    loader = Loader(Troubled(stopped), ONE_BY_ONE, 1, first_of)

    def stop():
        raise StopWaiting(143)

    loader.check = stop
    with no_hang(60), pytest.raises(StopWaiting):
        list(loader)


ALONE = """
import multiprocessing.popen_fork, os, signal, sys, time
import dataloader
from dataloader import Loader, WorkersLost

class Items:
    def __init__(self, trouble):
        self.trouble = trouble
    def __getitem__(self, index):
        return index and self.trouble()

def start(trouble, **options):
    batches = iter(Loader(Items(trouble), [[0], [1]], 1, list, **options))
    next(batches)
    return batches
"""

LEFT_ALONE = """
batches = start(lambda: time.sleep(3600))
print(multiprocessing.active_children()[0].pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""

STUCK = """
start(lambda: open(sys.argv[1]).read())  # a pipe that nobody writes into
sys.exit(7)
"""

IMMORTAL = """
dataloader.TICK = 0.2
popen = multiprocessing.popen_fork.Popen
popen.kill = popen.terminate = lambda self: os.write(1, b"%d " % self.pid)
try:
    list(start(lambda: signal.raise_signal(signal.SIGSTOP), patience=0.4))
except WorkersLost:
    sys.exit(7)
"""


def run_alone(program, *argv, **options):
    return subprocess.run([sys.executable, "-c", ALONE + program, *argv], cwd=ROOT, timeout=240, **options)


def test_a_program_does_not_wait_for_its_workers(tmp_path):
    """A failed run that never ends since its worker waits for a disk, or is one that not even a kill ends (D state)."""
    os.mkfifo(tmp_path / "pipe")
    assert run_alone(STUCK, tmp_path / "pipe").returncode == 7
    with open(tmp_path / "worker", "wb") as file:  # no pipe, which the worker would keep open
        left = run_alone(IMMORTAL, stdout=file)
    os.kill(int((tmp_path / "worker").read_text().split()[0]), signal.SIGKILL)
    assert left.returncode == 7


def test_workers_end_with_a_parent_that_was_killed(tmp_path):
    """Workers of half a gigabyte each that live on for ever, in a read or in the sending of a batch."""
    with open(tmp_path / "worker", "wb") as file:
        run_alone(LEFT_ALONE, stdout=file)
    worker = int((tmp_path / "worker").read_text())
    with no_hang(60):
        while is_alive(worker):
            time.sleep(0.1)


@pytest.mark.parametrize("why, remedy", [("Cannot allocate memory", "memory"), ("AF_UNIX path too long", "TMPDIR")])
def test_workers_that_cannot_be_started_are_refused_in_one_line(monkeypatch, why, remedy):
    """A traceback where the system has no memory or processes left for workers; one remedy for every cause."""
    monkeypatch.setattr(os, "fork", lambda: (_ for _ in ()).throw(OSError(12, why)))
    refusal(lambda: list(Loader(Troubled(), [[0]], 1)), "num_workers 1: they cannot be started", why, remedy)
    assert not set(STOP_SIGNALS) & signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_batches_need_no_shared_memory(monkeypatch, hurried):
    """A bus error, or a batch lost in a worker's queue, where /dev/shm is small or full: a container's is 64 MB."""

    def refuse(*_):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1_2>: No space left on device (28)")

    monkeypatch.setattr(torch.UntypedStorage, "_share_fd_cpu_", refuse)
    with no_hang():
        assert numbers(Loader(Troubled(), ONE_BY_ONE, 2, first_of, patience=60)) == list(range(10))


def test_a_run_on_the_cpu_leaves_a_gpu_alone(monkeypatch, hurried):
    """A CUDA context, hundreds of megabytes on a GPU that is full, of a run that was to keep away from it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.Tensor, "pin_memory", None)
    assert numbers(Loader(Troubled(), ONE_BY_ONE, 2, first_of, device="cpu", patience=60)) == list(range(10))


def test_an_iteration_that_nobody_finishes_costs_the_next_one_nothing(hurried):
    """A slow batch of an abandoned pass that is taken for a lost worker; batches of it that turn up in the next pass."""
    loader = Loader(Troubled(partial(time.sleep, 0.5)), ONE_BY_ONE, 2, first_of, patience=60)
    for _ in range(2):
        next(iter(loader))
        assert numbers(loader) == list(range(10))


class ToAll(Dataset):
    """The process of the worker that was asked, which sends itself every signal that asks politely."""

    def __getitem__(self, index):
        for number in STOP_SIGNALS:
            os.kill(os.getpid(), number)
        return os.getpid()


def hear_signals_then_work(*args):
    for number in STOP_SIGNALS:
        os.kill(os.getpid(), number)
    work(*args)


def test_workers_survive_a_signal_to_all(monkeypatch, start_method):
    """A job's SIGTERM that ends a worker, at work or while it is born, and with it the run that it asks to stop and save."""
    loader = Loader(ToAll(), [[0], [1], [2]], 1, list)
    if start_method == "fork":
        monkeypatch.setattr(dataloader, "work", hear_signals_then_work)
    with no_hang():
        assert len({pid for (pid,) in loader}) == 1
    assert not set(STOP_SIGNALS) & signal.pthread_sigmask(signal.SIG_BLOCK, [])
