"""The learning rate at every step, and what the optimizer holds. The curves of real runs are in test_processes.py."""

import pytest
import torch
from runs import specified

from train_align_with_args import create_align_pipeline, load_vae_model, parse_args, setup_optimizer, setup_scheduler
from training.optimizer import ADAMW_SHARE, Muon


@pytest.mark.parametrize("warmup_steps", [0, 7, 20])
def test_the_schedule_matches_the_formula_at_every_step(warmup_steps):
    """Stepping twice per call, or rounding the epoch up; a warm-up that ends when the decay starts (after 15 steps)."""
    args = parse_args(["--learning_rate", "2e-4", "--warmup_steps", str(warmup_steps), "--scheduler_step_size", "3"])
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=args.learning_rate)
    scheduler = setup_scheduler(optimizer, args, steps_per_epoch=5)
    for step in range(50):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(specified(step, 5, 2e-4, warmup_steps, 3, 0.5), rel=1e-9), step
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize(("name", "kind"), [("adamw", torch.optim.AdamW), ("muon", Muon)])
def test_optimizer_holds_the_modules_parameters_and_no_others(vae_folders, name, kind):
    """A VAE's weights among the parameters, a forgotten branch, or a weight decay that nothing reads."""
    args = parse_args(["--weight_decay", "0.03", "--learning_rate", "0.002", "--optimizer", name])
    vaes = [load_vae_model(vae_folders[name], "", None, "cpu", torch.float32) for name in ("kl4", "kl16")]
    pipeline = create_align_pipeline(*vaes, args)
    optimizer = setup_optimizer(pipeline, args)
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert {id(parameter) for parameter in held} == {id(parameter) for parameter in pipeline.module.parameters()}
    assert len(held) == len(list(pipeline.module.parameters()))
    assert all(parameter.requires_grad for parameter in held)
    assert isinstance(optimizer, kind)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.03] * len(optimizer.param_groups)
    assert [group["lr"] for group in optimizer.param_groups] == [0.002, 0.002 * ADAMW_SHARE][: len(optimizer.param_groups)]
