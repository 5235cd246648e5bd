"""Training on a CUDA device: the kernels and copies that a CPU does not have. Skipped where there is none."""

import math
from types import SimpleNamespace

import pytest
import torch
from runs import QUIET, tensors_of, train

from train_align_with_args import parse_args, setup_optimizer
from training.optimizer import BadSteps
from vae_align import AlignConfig, align_module

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture(autouse=True)
def device_is_used():
    """Fail a test whose run fell back to the CPU, such as by Accelerate's memory of an earlier run in this interpreter."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.max_memory_allocated()
    yield
    assert torch.cuda.max_memory_allocated() > before


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_skipped_step_leaves_weights_and_moments_as_they_were(name):
    """A fused kernel that does not read `found_inf`, and so writes NaN into weights, moments or the step count."""
    torch.manual_seed(0)
    module = align_module(AlignConfig(input_types=("latent",), hidden_channels=8, num_blocks=1)).to(DEVICE)
    parts = SimpleNamespace(training_module=module, device=torch.device(DEVICE))
    optimizer = setup_optimizer(parts, parse_args(["--optimizer", name]))
    bad_steps = BadSteps(10, SimpleNamespace(num_processes=1, scaler=None))
    latents = torch.randn(2, 4, 8, 8, device=DEVICE)

    def step(scale):
        optimizer.zero_grad(set_to_none=True)
        loss = scale * module(latents).square().mean()
        loss.backward()
        ok = bad_steps.mask(optimizer, loss, torch.nn.utils.clip_grad_norm_(module.parameters(), math.inf))
        optimizer.step()
        state = tensors_of([module.state_dict(), optimizer.state_dict()])
        return bool(ok), {place: tensor.clone() for place, tensor in state.items()}

    first, skipped, third = step(1.0), step(float("nan")), step(1.0)
    assert [ok for ok, _ in (first, skipped, third)] == [True, False, True]
    assert all(torch.equal(skipped[1][place], tensor) for place, tensor in first[1].items())
    assert any(not torch.equal(third[1][place], tensor) for place, tensor in first[1].items())
    assert all(tensor.isfinite().all() for tensor in third[1].values())


def test_float16_trains_under_its_scaler(flags, tmp_path):
    """A scaler that is never used or never saved, or whose own overflows are taken for bad steps."""
    run = train({**flags, "device": DEVICE, "precision": "float16"}, tmp_path, **QUIET, max_train_steps=12)
    assert run.last["training"]["state"]["scaler"]["scale"] > 0
    assert run.last["training"]["bad_steps_in_a_row"] == 0
    assert len(run.losses) == 12 and all(map(math.isfinite, run.losses))


def test_a_compiled_module_learns_the_same(flags, tmp_path):
    """A compiled graph that holds for the first batch's sizes only, or weights saved under the compiler's names."""
    runs = [
        train({**flags, "device": DEVICE}, tmp_path / str(compiled), **QUIET, max_train_steps=4, compile=compiled)
        for compiled in (None, True)
    ]
    assert runs[0].losses == pytest.approx(runs[1].losses, rel=1e-2)
    assert runs[0].last["state_dict"].keys() == runs[1].last["state_dict"].keys()


def test_cached_batches_on_the_device_train_as_on_the_cpu(flags, tmp_path):
    """A batch that is read before its copy has arrived: pinned memory that the next batch overwrites."""
    runs = [
        train({**flags, "device": device, "num_workers": 1}, tmp_path / name, **QUIET, max_train_steps=9)
        for name, device in (("host", "cpu"), ("device", DEVICE))
    ]
    assert runs[0].losses == pytest.approx(runs[1].losses, rel=2e-2)


def test_a_run_resumed_on_the_device_goes_on_from_its_state(flags, tmp_path):
    """Moments left on the CPU or started anew, or a step count that a fused kernel wants on the device."""
    flags = {**flags, "device": DEVICE, "ema_decay": 0.9}
    whole = train(flags, tmp_path / "whole", **QUIET, max_train_steps=6)
    train(flags, tmp_path / "broken", **QUIET, max_train_steps=3)
    again = train(flags, tmp_path / "broken", **QUIET, max_train_steps=6, resume=True)
    assert again.last["step"] == whole.last["step"] == 6
    wanted, found = (tensors_of([run.last["state_dict"], run.last["training"]["state"]]) for run in (whole, again))
    assert any("optimizer" in place for place in wanted)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)
