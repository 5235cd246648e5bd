"""Where a step's time goes, as the run says it."""

import gzip
import json

import pytest
import torch
from runs import QUIET, train
from torch.profiler import record_function

from training.log import PARTS, TRACE, StepProfile


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


def test_without_the_flag_nothing_is_profiled(flags, tmp_path, capsys):
    """A profiler that slows every run down, or a line about one that never was."""
    run = train(flags, tmp_path, **QUIET, max_train_steps=6)
    assert "images/s" in capsys.readouterr().out
    assert not [tag for tag in run.scalars if tag.startswith("profile/")] and not list(tmp_path.rglob(TRACE))
