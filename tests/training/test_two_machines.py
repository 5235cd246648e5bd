"""Two machines without a disk in common, by two launchers with a folder each, and one of them dies."""

import socket
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, as_argv, child_environment, make_photo, tiny_flags
from hostile import refusal
from runs import QUIET, assert_same_tensors, results_of, train
from safetensors.torch import load_file

IMAGES = 7  # indices 0, 2, 4, 6 and 1, 3, 5, of which 3 is broken: two steps an epoch and one


@pytest.fixture(scope="module")
def flags(vae_folders, tmp_path_factory):
    """Flags of a run of two steps an epoch whose folders are below where it runs, on seven photos of which one is broken."""
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(4)
    for number in range(IMAGES):
        make_photo(rng, (48, 40)).save(folder / f"{number}.png")
    (folder / "3.png").write_bytes(b"no picture")
    outputs = {"latent_cache_dir": "cache", "log_dir": "runs", "save_dir": "ckpt"}
    schedule = {"train_batch_size": 2, "cache_views": 2, "epochs": 3, "save_steps": 2, "cache_per_machine": True}
    return tiny_flags(vae_folders, (folder, folder), folder) | QUIET | outputs | schedule


def run_machines(script, argv, folder, torchrun=False):
    """Run the script as one process on each of two machines, in folder/0 and folder/1; [exit status], [stderr]. `torchrun`
    starts them, or else its variables are set without it, which saves its imports."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    machines = []
    for number in range(2):
        (folder / str(number)).mkdir(parents=True, exist_ok=True)
        launcher, env = [sys.executable], {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": number, "LOCAL_RANK": 0}
        if torchrun:
            job = {"nnodes": 2, "node_rank": number, "nproc_per_node": 1, "master_addr": "127.0.0.1", "master_port": port}
            launcher, env = [sys.executable, "-m", "torch.distributed.run", *as_argv(job)], {}
        env = {name: str(value) for name, value in env.items()} | {"WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}
        command = [*launcher, str(ROOT / script), *argv]
        options = {"cwd": folder / str(number), "env": child_environment(**env)}
        machines.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **options))
    said = [machine.communicate(timeout=300)[1] for machine in machines]
    return [machine.returncode for machine in machines], said


def addresses_in(root):
    """The addresses of all rows of the one cache below `root`."""
    chunks = root.glob("*/*.safetensors")
    return [tuple(address) for chunk in chunks for address in load_file(chunk)["addresses"].tolist()]


def test_machines_that_share_no_disk_train_on_their_own_images_and_go_on_bit_for_bit(flags, tmp_path):
    """Images that both encode or nobody; machines of which one has more batches than the other, and waits for it for ever; a
    machine that begins anew since the checkpoint is on another one; an order that the kill has changed."""
    whole, broken, argv = tmp_path / "whole", tmp_path / "broken", as_argv(flags)
    ended, said = run_machines("train_align_with_args.py", argv, whole, torchrun=True)
    assert ended == [0, 0], said
    caches = [addresses_in(whole / number / "cache") for number in "01"]
    assert list(map(len, caches)) == [2 * 4, 2 * 2] and len(set(caches[0] + caches[1])) == 2 * (IMAGES - 1)
    assert not list(whole.glob("1/ckpt/*.pth"))

    ended, _ = run_machines("tests/mortal.py", ["kept", "2", *argv], broken)  # the first one dies with a checkpoint at step 4
    assert all(ended) and results_of(broken / "0").last["step"] == 4
    ended, said = run_machines("train_align_with_args.py", [*argv, "--resume"], broken)
    assert ended == [0, 0], said
    assert results_of(whole / "0").last["step"] == 6
    assert_same_tensors(results_of(broken / "0").last, results_of(whole / "0").last)
    once_more = {"resume": True, "epochs": 4, "save_dir": broken / "0" / "ckpt"}
    refusal(lambda: train(flags, broken, **once_more), "the run to resume had 2 processes, now 1")
