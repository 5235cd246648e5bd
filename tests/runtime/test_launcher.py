"""A process among others: those that a launcher has started, and those that may not be there."""

import datetime
import json
import logging
import os
import socket
import subprocess
import sys
import warnings

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import ROOT, child_environment
from hostile import refusal

from runtime import processes
from runtime.processes import create_accelerator


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


@pytest.fixture
def launched(monkeypatch):
    """A function: the variables by which a launcher says that this is process `rank` of `world`."""

    def launch(rank, world):
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world}
        for name, value in place.items():
            monkeypatch.setenv(name, str(value))

    yield launch
    if processes.distributed.is_initialized():
        processes.distributed.destroy_process_group()
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("rank", [0, 1])
def test_variables_of_a_launcher_that_is_gone_end_in_one_line(monkeypatch, launched, rank):
    """RANK and WORLD_SIZE exported by an earlier job: a run that waits half a day for processes which nobody starts."""
    launched(rank, 2)
    monkeypatch.setattr(processes, "MEETING", datetime.timedelta(seconds=1))
    refusal(lambda: create_accelerator("cpu", "float32"), "launcher's environment", "WORLD_SIZE", "unset them")


def test_processes_that_have_met_wait_longer(launched):
    """A second process that gives up after minutes while the first one waits for another run's latent cache; a private,
    deprecated call for it, with a warning in each process."""
    launched(0, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        create_accelerator("cpu", "float32")
    group = processes.distributed.distributed_c10d._get_default_group()

    patience = group._get_backend(torch.device("cpu")).options._timeout
    assert patience == processes.WORK > processes.MEETING


@pytest.mark.parametrize(
    "name, value",
    [("ACCELERATE_USE_DEEPSPEED", "true"), ("ACCELERATE_USE_FSDP", "1"), ("WORLD_SIZE", "many"), ("OMPI_COMM_WORLD_SIZE", "2")],
)
def test_a_launchers_environment_that_does_not_fit_is_one_line(monkeypatch, launched, name, value):
    """A traceback of a library that the user has never heard of; a variable, such as mpirun's, that the line leaves out."""
    if not name.startswith("ACC"):
        launched(0, 2)
        monkeypatch.delenv("MASTER_ADDR")
    monkeypatch.setenv(name, value)
    monkeypatch.setattr(processes, "MEETING", datetime.timedelta(seconds=1))
    refusal(lambda: create_accelerator("cpu", "float32"), name)


def test_variables_that_accelerate_adds_are_not_said_to_be_the_users(monkeypatch):
    """ "unset RANK" to who has set none: only mpirun's variables, in a shell that mpirun has not started."""
    for name in [name for name in os.environ if name.startswith(processes.LAUNCHERS)]:
        monkeypatch.delenv(name)
    for name, value in (("SIZE", "2"), ("RANK", "0"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(f"OMPI_COMM_WORLD_{name}", value)
    names = "OMPI_COMM_WORLD_LOCAL_RANK, OMPI_COMM_WORLD_RANK, OMPI_COMM_WORLD_SIZE"
    refusal(lambda: create_accelerator("cpu", "float32"), f"its variables: {names}; unset them")


def test_neither_the_environment_nor_an_earlier_run_changes_what_is_learnt(monkeypatch):
    """A launcher's gradient accumulation that divides every gradient though flags and seed are the same; Accelerate's memory
    of the run before: a refusal, or bfloat16 where float32 was asked for."""
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    assert create_accelerator("cpu", "float32").gradient_accumulation_steps == 1
    assert [create_accelerator("cpu", name).mixed_precision for name in ("bfloat16", "float32")] == ["bf16", "no"]


PROCESSES = """
import json, logging, os, sys
from runtime.processes import create_accelerator, from_first, gathered
for rank in range(2):
    if not os.fork():
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
        logging.basicConfig(level=logging.INFO)
        accelerator = create_accelerator("cpu", "float32")
        found = [rank, from_first(lambda: [rank], accelerator), gathered(rank, accelerator), logging.getLogger().level]
        os.write(1, (json.dumps(found) + "\\n").encode())
        os._exit(0)
for rank in range(2):
    assert not os.wait()[1]
"""


def test_the_first_process_speaks_for_all():
    """Processes of which each reads a checkpoint of its own disk; each line once for each process."""
    env = child_environment(MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port(), PYTHONPATH=str(ROOT))
    printed = subprocess.run(
        [sys.executable, "-c", PROCESSES], stdout=subprocess.PIPE, text=True, env=env, timeout=300, check=True
    )
    found = sorted(map(json.loads, printed.stdout.splitlines()))
    assert found == [[0, [0], [0, 1], logging.INFO], [1, [0], [0, 1], logging.ERROR]]
