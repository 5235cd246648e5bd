"""Training on a CUDA device: the kernels and copies that a CPU does not have. Skipped where there is none."""

import pytest
import torch
from runs import QUIET, assert_same_tensors, train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
DEVICE = "cuda"


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_skipped_step_leaves_weights_and_moments_as_they_were(flags, tmp_path, optimizer):
    """A fused kernel that does not read `found_inf`, and so trains on NaN."""
    flags = {**flags, "device": DEVICE, "optimizer": optimizer, "weight_decay": 0.1}
    before = train(flags, tmp_path / "before", **QUIET, max_train_steps=2)
    spoilt = {**flags, "loss_weight": 1e6, "learning_rate": 1e3, "max_bad_steps": 100}
    after = train(spoilt, tmp_path / "after", **QUIET, max_train_steps=30)
    assert all(tensor.isfinite().all() for tensor in after.last["state_dict"].values())
    assert before.last["step"] == 2


def test_float16_trains_under_its_scaler(flags, tmp_path):
    """A scaler that is never used, never saved, or that takes its own overflows for bad steps."""
    run = train({**flags, "device": DEVICE, "precision": "float16"}, tmp_path, **QUIET, max_train_steps=12)
    assert run.last["training"]["state"]["scaler"]["scale"] > 0
    assert run.last["training"]["bad_steps"] == 0
    assert all(loss == loss for _, loss in run.scalars["train/loss"])


def test_a_compiled_module_learns_the_same(flags, tmp_path):
    """A compiled graph of one batch's sizes, or weights that are saved under the compiler's names."""
    losses = []
    for compiled in (None, True):
        run = train({**flags, "device": DEVICE}, tmp_path / str(compiled), **QUIET, max_train_steps=4, compile=compiled)
        losses.append([loss for _, loss in run.scalars["train/loss"]])
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


def test_cached_batches_on_the_device_train_as_on_the_cpu(flags, tmp_path):
    """A copy that is read before it has arrived: pinned memory that the next batch overwrites."""
    losses = []
    for device in ("cpu", DEVICE):
        run = train({**flags, "device": device, "num_workers": 1}, tmp_path / device, **QUIET, max_train_steps=9)
        losses.append([loss for _, loss in run.scalars["train/loss"]])
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)


def test_a_run_resumed_on_the_device_goes_on_from_its_state(flags, tmp_path):
    """Moments left on the CPU, or a step count that a fused kernel wants on the device."""
    flags = {**flags, "device": DEVICE, "ema_decay": 0.9}
    whole = train(flags, tmp_path / "whole", **QUIET, max_train_steps=6)
    train(flags, tmp_path / "broken", **QUIET, max_train_steps=3)
    again = train(flags, tmp_path / "broken", **QUIET, max_train_steps=6, resume=True)
    assert again.last["step"] == whole.last["step"] == 6
    torch.testing.assert_close(again.last["state_dict"], whole.last["state_dict"], rtol=1e-3, atol=1e-4)
    assert_same_tensors(again.last["training"]["order"], whole.last["training"]["order"])
