"""A process among others that may not be there."""

import argparse
import datetime
import socket

import pytest
from accelerate.state import AcceleratorState
from hostile import refusal

from runtime import processes


@pytest.mark.parametrize("rank", ["0", "1"])
def test_variables_of_a_launcher_that_is_gone_end_in_one_line(monkeypatch, rank):
    """RANK and WORLD_SIZE exported by an earlier job: a run that waits half a day for processes which nobody starts."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", **place}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(processes, "MEETING", datetime.timedelta(seconds=1))
    args = argparse.Namespace(device="cpu", precision="float32")
    AcceleratorState._reset_state(reset_partial_state=True)  # an earlier test of this interpreter has met nobody too
    refusal(lambda: processes.create_accelerator(args), "launcher's environment", "WORLD_SIZE", "unset them")


def test_processes_that_have_met_wait_longer(monkeypatch):
    """A second process that gives up after minutes while the first one waits for another run's latent cache."""
    import torch.distributed as dist

    patiences = []
    monkeypatch.setattr(dist.distributed_c10d, "_set_pg_timeout", lambda patience, _: patiences.append(patience))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        processes.create_accelerator(argparse.Namespace(device="cpu", precision="float32"))
        assert patiences == [processes.WORK] and processes.WORK > processes.MEETING
    finally:
        dist.destroy_process_group()
        AcceleratorState._reset_state(reset_partial_state=True)
