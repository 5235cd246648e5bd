"""Smallest real training runs inside this interpreter, and what they leave behind."""

import io
import itertools
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import torch
from conftest import ROOT, as_argv, child_environment, read_scalars
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import eval_align
import train_align_with_args as train_script

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
LAUNCHER = [sys.executable, str(ROOT / "tests" / "launch.py")]  # the same in less time
QUIET = {"eval_frequency": 0, "save_frequency": 0, "visualize_frequency": 0}


def results_of(folder):
    """What a run with `log_dir` folder/runs and `save_dir` folder/ckpt left: checkpoints by age, the last one's content,
    scalars by tag, the losses alone, and its event files."""
    folder = Path(folder)
    checkpoints, scalars = sorted((folder / "ckpt").glob("align_pipeline_*.pth")), read_scalars(folder / "runs")
    return SimpleNamespace(
        checkpoints=checkpoints,
        last=torch.load(checkpoints[-1], weights_only=True) if checkpoints else None,
        scalars=scalars,
        losses=[loss for _, loss in scalars.get("train/loss", ())],
        event_files=sorted((folder / "runs").rglob("events.out.tfevents.*")),
    )


def train(flags, folder, **changes):
    """Run `train_align_with_args.main` here, in and into `folder`; a change of None drops a flag."""
    flags = {**flags, "log_dir": Path(folder) / "runs", "save_dir": Path(folder) / "ckpt", **changes}
    folder, before = Path(folder), os.getcwd()
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)  # whatever has a relative default stays out of the repository
    try:
        train_script.main(as_argv(flags))
    finally:
        os.chdir(before)
    return results_of(folder)


def judge(checkpoint, photos, folder, **changes):
    """Run `eval_align.main` here on these photos, into `folder`; its results."""
    flags = {"checkpoint": checkpoint, "eval_data_dir": photos, "output_dir": folder, "device": "cpu", "num_workers": 0}
    return eval_align.main(as_argv(flags | {"metrics": "ssim", "num_samples": 0} | changes))


def end_after(patch, steps, error):
    """Let runs in this interpreter have no more batches after these steps, but `error`."""
    endless = train_script.endless

    def batches(loader):
        yield from itertools.islice(endless(loader), steps)
        raise error

    patch.setattr(train_script, "endless", batches)


def event_tags(event_file):
    """{"scalars" | "images" | "histograms": [tag, …]} of one event file."""
    events = EventAccumulator(str(event_file))
    events.Reload()
    return events.Tags()


def same_weights(first, second):
    """Whether two checkpoints' contents hold bit-identical weights."""
    first, second = first["state_dict"], second["state_dict"]
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def tensors_of(value, where=""):
    """{place: tensor} of a checkpoint's content, at any depth."""
    if isinstance(value, torch.Tensor):
        return {where: value}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    return {place: tensor for name, item in items for place, tensor in tensors_of(item, f"{where}/{name}").items()}


def assert_same_tensors(first, second):
    """Every tensor of two checkpoints is bit-identical."""
    first, second = tensors_of(first), tensors_of(second)
    assert first.keys() == second.keys()
    differing = [name for name in first if not torch.equal(first[name], second[name])]
    assert not differing


def start(flags, folder, launcher=(), **env):
    """The training program as the first process of a group of its own, in `folder`, its output in folder/log."""
    folder.mkdir(exist_ok=True)
    command = [*(launcher or [sys.executable]), str(ROOT / "train_align_with_args.py"), *as_argv(flags)]
    with open(folder / "log", "a") as log:
        return subprocess.Popen(
            command, stdout=log, stderr=log, cwd=folder, env=child_environment(**env), start_new_session=True
        )


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


def write_shard(path, files):
    with tarfile.open(path, "w") as shard:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            shard.addfile(entry, io.BytesIO(content))


def tiny_of(flags, folder):
    """`flags` with their outputs in `folder`."""
    return {**flags, "log_dir": folder / "runs", "save_dir": folder / "ckpt"}


def specified(step, steps_per_epoch, learning_rate, warmup_steps, step_size, gamma):
    """The learning rate of a step by the specification's formula, written down once more."""
    warmup = min(1, (step + 1) / warmup_steps) if warmup_steps else 1
    return learning_rate * warmup * gamma ** ((step // steps_per_epoch) // step_size)
