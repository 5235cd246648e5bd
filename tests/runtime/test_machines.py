"""Which processes of a run are on one machine, and what they tell each other."""

import json
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest
from conftest import ROOT, child_environment
from hostile import refusal

from runtime import processes

PROCESSES = """
import json, os, sys
import accelerate
from runtime.processes import machine_of
places = json.loads(sys.argv[1])
for rank, place in enumerate(places):
    if not os.fork():
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(place), WORLD_SIZE=str(len(places)))
        machine = machine_of(accelerate.Accelerator(cpu=True), separate=True)
        found = [machine.number, machine.rank, machine.world, machine.of_first(lambda: rank), machine.of_each(rank)]
        os.write(1, (json.dumps([rank, found]) + "\\n").encode())
        os._exit(0)
for place in places:
    assert not os.wait()[1]
"""


def test_each_machine_has_a_first_process_of_its_own():
    """Processes that take another machine's word for what is in their cache, or wait for it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = child_environment(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), PYTHONPATH=str(ROOT))
    command = [sys.executable, "-c", PROCESSES, json.dumps([0, 1, 0])]
    printed = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=env, timeout=300, check=True).stdout
    found = dict(map(json.loads, printed.splitlines()))
    assert found == {0: [0, 0, 2, 0, [0, 2]], 1: [0, 1, 2, 0, [0, 2]], 2: [1, 0, 1, 2, [0, 2]]}


@pytest.mark.parametrize(
    ("places", "machines"), [([0, 1, 0], [2, 1]), ([0, 0, 0], [1, 1, 1]), ([0, 1, 2], [3]), ([0, 0, 1, 1], None)]
)
def test_machines_are_those_of_the_launcher(monkeypatch, places, machines):
    """A launcher that numbers the processes across the machines in turn, so that two machines take each other's shares."""
    monkeypatch.setattr(processes, "gathered", lambda value, accelerator: places)
    accelerator = SimpleNamespace(num_processes=len(places), local_process_index=0)
    assert processes.machines_of(accelerator, separate=False) == (range(len(places)),)
    if machines:
        assert [len(machine) for machine in processes.machines_of(accelerator, separate=True)] == machines
    else:
        refusal(lambda: processes.machines_of(accelerator, separate=True), "launcher's environment", places)
