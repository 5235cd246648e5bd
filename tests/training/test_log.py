"""What a run writes while it trains."""

import json
import math
import time
from types import SimpleNamespace

from conftest import read_scalars

from training.log import TRAINING_FILE, RunLog


def lines_of(folder):
    return [json.loads(line) for line in (folder / TRAINING_FILE).read_text().splitlines()]


def test_losses_are_in_json_lines_and_in_tensorboard_alike(tmp_path):
    """A curve that only an event file holds; a loss that is not finite, which JSON cannot hold, or which ends the run."""
    log = RunLog(tmp_path)
    for step, loss in ((1, 0.5), (2, math.nan), (3, 0.25)):
        log.step = step
        log.log_training(loss=loss, learning_rate=0.125, grad_norm=math.nan if step == 2 else 1.0)
    log.close()
    assert lines_of(tmp_path) == [
        {"step": 1, "loss": 0.5, "learning_rate": 0.125},
        {"step": 2, "loss": None, "learning_rate": 0.125},
        {"step": 3, "loss": 0.25, "learning_rate": 0.125},
    ]
    scalars = read_scalars(tmp_path)
    assert scalars["train/loss"] == [(1, 0.5), (3, 0.25)]
    assert scalars["train/grad_norm"] == [(1, 1.0), (3, 1.0)]
    assert [step for step, _ in scalars["train/learning_rate"]] == [1, 2, 3]


def test_a_resumed_runs_log_repeats_no_point_and_keeps_what_came_before(tmp_path):
    """Points beyond the checkpoint that stay beside the resumed run's; a torn last line; event files that are read in the
    wrong order since both were begun within a second."""
    first = RunLog(tmp_path)
    for step in (1, 2, 3):
        first.step = step
        first.log_training(loss=float(step), learning_rate=0.5)
    first.close()
    with open(tmp_path / TRAINING_FILE, "a") as file:
        file.write('{"step": 4, "lo')
    second = RunLog(tmp_path, step=2)
    second.step = 3
    second.log_training(loss=30.0, learning_rate=0.5)
    second.close()
    assert [(line["step"], line["loss"]) for line in lines_of(tmp_path)] == [(1, 1.0), (2, 2.0), (3, 30.0)]
    assert read_scalars(tmp_path)["train/loss"] == [(1, 1.0), (2, 2.0), (3, 30.0)]


def test_a_new_log_waits_for_nothing(tmp_path, monkeypatch):
    """A second that every run loses at its start for the sake of resumed ones."""
    waits = []
    monkeypatch.setattr("training.log.time", SimpleNamespace(time=time.time, sleep=waits.append))
    RunLog(tmp_path).close()
    assert not waits
