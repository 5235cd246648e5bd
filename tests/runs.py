"""Smallest real training runs inside this interpreter, and what they leave behind."""

import os
from pathlib import Path
from types import SimpleNamespace

import torch
from conftest import as_argv, read_scalars
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train_align_with_args as train_script

ONE_THREAD = {"OMP_NUM_THREADS": "1"}


QUIET = {"eval_frequency": 0, "save_frequency": 0, "visualize_frequency": 0}


def results_of(folder):
    """What a run with `log_dir` folder/runs and `save_dir` folder/ckpt left: checkpoints by age, the last one's content,
    scalars by tag, and its event files."""
    folder = Path(folder)
    checkpoints = sorted((folder / "ckpt").glob("align_pipeline_*.pth"))
    return SimpleNamespace(
        checkpoints=checkpoints,
        last=torch.load(checkpoints[-1], weights_only=True) if checkpoints else None,
        scalars=read_scalars(folder / "runs"),
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


def event_tags(event_file):
    """{"scalars" | "images" | "histograms": [tag, …]} of one event file."""
    events = EventAccumulator(str(event_file))
    events.Reload()
    return events.Tags()


def same_weights(first, second):
    """Whether two checkpoints' contents hold bit-identical weights."""
    first, second = first["state_dict"], second["state_dict"]
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
