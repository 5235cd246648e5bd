"""What a run writes while it trains."""

import gzip
import json
import math
import os

import pytest
import torch
from conftest import read_scalars
from hostile import no_hang
from runs import QUIET, train
from torch.profiler import record_function

from training.log import PARTS, TRACE, TRAINING_FILE, RunLog, StepProfile, drop_lines_after


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


def test_a_resumed_runs_log_repeats_no_point_and_keeps_what_came_before(tmp_path, monkeypatch):
    """Points beyond the checkpoint that stay beside the resumed run's; a torn last line; event files that are read in the
    wrong order since both were begun within a second; a second that every new run loses for that."""
    with monkeypatch.context() as patch:
        patch.setattr("training.log.time.sleep", lambda _: pytest.fail("a new log waits"))
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


def test_only_the_steps_after_the_first_count(tmp_path):
    """Steps before the first or after the last that counts: what starts and compiles would be called the module's."""
    with StepProfile(2, torch.device("cpu"), tmp_path) as profile:
        for step in range(8):
            with record_function("module"), record_function(f"step {step}"):
                torch.ones(4).sum()
            profile.step()
    with gzip.open(tmp_path / TRACE) as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert {name for name in names if str(name).startswith("step ")} == {"step 2", "step 3"}
    assert profile.shares == {**dict.fromkeys(PARTS, 0.0), "module": 1.0}
    assert profile.text().startswith("a step: 100 % module; trace: ")


def test_a_run_says_how_fast_it_was_and_where_the_time_went(flags, tmp_path, capsys):
    """--profile that nothing reads, shares that TensorBoard does not have, a trace that no viewer opens."""
    run = train(flags, tmp_path, **QUIET, max_train_steps=6, profile=3, decoder_loss_weight=1.0)
    said = capsys.readouterr().out
    assert "images/s" in said and "% module" in said
    shares = {part: run.scalars[f"profile/{part}"][0][1] for part in PARTS}
    assert sum(shares.values()) == pytest.approx(1, abs=1e-5)
    assert all(shares[part] > 0 for part in ("waiting for data", "module", "losses and decoding", "backward", "optimizer"))
    with gzip.open(run.event_files[0].parent / TRACE) as file:
        assert any("conv" in event["name"] for event in json.load(file)["traceEvents"])


def test_another_tools_lines_and_pipes_hold_no_run_up(tmp_path):
    """A traceback over a line that nests deep; a run that waits for someone to write into a pipe."""
    log = tmp_path / "training.jsonl"
    log.write_text('{"step": 1}\n' + "[" * 10**5 + "\n")
    drop_lines_after(log, 1)
    assert log.read_text() == '{"step": 1}\n'
    os.mkfifo(tmp_path / "metrics.jsonl")
    with no_hang(), pytest.raises(OSError, match="a pipe"):
        drop_lines_after(tmp_path / "metrics.jsonl", 1)
