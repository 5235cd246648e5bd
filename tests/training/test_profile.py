"""Where a step's time goes, as the run says it."""

import gzip
import json
from types import SimpleNamespace

import pytest
import torch
from runs import QUIET, train

from training import profile
from training.profile import PARTS, TRACE, StepProfile


def test_each_part_has_its_own_time_and_the_backward_pass_is_divided(tmp_path, monkeypatch):
    """Time of one part counted as the next one's, steps before the first or after the last that counts, a backward pass of the
    decoder called the module's."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(profile, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    steps = StepProfile(2, 10, torch.device("cpu"), tmp_path)

    class Slow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, values, seconds):
            ctx.seconds = seconds
            clock.now += seconds
            return values.clone()

        @staticmethod
        def backward(ctx, gradient):
            clock.now += ctx.seconds
            return gradient, None

    for step in range(10, 20):
        steps.begin(step)
        assert steps.active == (step in (12, 13))
        for part, seconds in (("data", 1), ("encoding", 2)):
            steps.enter(part)
            clock.now += seconds if steps.active else 1000
        steps.enter("module")
        aligned = Slow.apply(torch.zeros(1, requires_grad=True), 4)
        steps.watch(aligned)
        steps.enter("decoding")
        Slow.apply(aligned, 8).sum().backward()
        steps.enter("optimizer")
        clock.now += 16
        steps.enter("logging")
        steps.enter(None)
        clock.now += 500
    seconds = {"data": 1, "encoding": 2, "module": 8, "decoding": 16, "optimizer": 16, "logging": 0}
    assert steps.shares == pytest.approx({part: each / 43 for part, each in seconds.items()})
    assert "37 % optimizer" in steps.text() and "logging" not in steps.text()


def test_a_run_says_how_fast_it_was_and_where_the_time_went(flags, tmp_path, capsys):
    """--profile that nothing reads, shares that TensorBoard does not have, a trace that no viewer opens."""
    run = train(flags, tmp_path, **QUIET, max_train_steps=6, profile=3, decoder_loss_weight=1.0)
    said = capsys.readouterr().out
    assert "images/s" in said and "% module" in said
    shares = {part: run.scalars[f"profile/{part}"][0][1] for part in PARTS}
    assert sum(shares.values()) == pytest.approx(1, abs=1e-5)
    assert all(shares[part] > 0 for part in ("data", "module", "decoding", "optimizer"))
    with gzip.open(run.event_files[0].parent / TRACE) as file:
        assert any("conv" in event["name"] for event in json.load(file)["traceEvents"])


def test_without_the_flag_nothing_is_profiled(flags, tmp_path, capsys):
    """A profiler that slows every run down, or a line about one that never was."""
    run = train(flags, tmp_path, **QUIET, max_train_steps=6)
    assert "images/s" in capsys.readouterr().out
    assert not [tag for tag in run.scalars if tag.startswith("profile/")] and not list(tmp_path.rglob(TRACE))
