"""The learning rate at every step, and what the optimizer holds. The 2-process curve is in test_processes.py."""

import pytest
import torch
from runs import QUIET, specified, train

from train_align_with_args import create_align_pipeline, load_vae_model, parse_args, setup_optimizer, setup_scheduler
from training.optimizer import ADAMW_SHARE, Muon


@pytest.mark.parametrize("warmup_steps", [0, 4, 8])
def test_learning_rate_of_a_real_run_follows_the_formula_across_decays(flags, tmp_path, warmup_steps):
    """Off-by-one warm-up, a decay by steps instead of epochs, a warm-up that ends when the decay starts (8 > 2 epochs)."""
    run = train(flags, tmp_path, epochs=5, warmup_steps=warmup_steps, scheduler_step_size=2, scheduler_gamma=0.3, **QUIET)
    logged = run.scalars["train/learning_rate"]
    assert [step for step, _ in logged] == list(range(1, 16))  # 10 images in batches of 4: 3 steps an epoch
    for step, value in logged:
        assert value == pytest.approx(specified(step - 1, 3, 1e-3, warmup_steps, 2, 0.3), rel=1e-5), step


def test_scheduler_alone_matches_the_formula_at_every_step():
    """Stepping twice per call, or rounding the epoch up, shows within the first two decays."""
    args = parse_args(["--learning_rate", "2e-4", "--warmup_steps", "7", "--scheduler_step_size", "3"])
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=args.learning_rate)
    scheduler = setup_scheduler(optimizer, args, steps_per_epoch=5)
    for step in range(50):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(specified(step, 5, 2e-4, 7, 3, 0.5), rel=1e-9), step
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
