"""The learning rate at every step, and what the optimizer holds. The curves of real runs are in test_processes.py."""

import pytest
import torch
from runs import specified

from train_align_with_args import create_align_pipeline, load_vae_model, parse_args, setup_optimizer, setup_scheduler
from training.optimizer import ADAMW_SHARE, Muon


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("stepped", [(5,), ()], ids=["by steps", "by epochs"])
@pytest.mark.parametrize("warmup_steps", [0, 7, 20])
def test_the_schedule_matches_the_formula_at_every_step(warmup_steps, stepped, name):
    """Stepping twice per call, or rounding the epoch up; a warm-up that ends when the decay starts (after 15 steps); stepped by
    epochs, a warm-up of 100 epochs in place of 100 steps, which AdamW alone follows, or which a resumed run begins anew."""
    args = parse_args(["--learning_rate", "2e-4", "--warmup_steps", str(warmup_steps), "--scheduler_step_size", "3"])
    weights, rates = [torch.nn.Parameter(torch.zeros(2, 2, 1, 1)) for _ in range(2)], [2e-4, 2e-4 * ADAMW_SHARE]
    sum(weight.sum() for weight in weights).backward()

    def started():
        optimizer = torch.optim.AdamW(weights, lr=2e-4) if name == "adamw" else Muon(weights[:1], weights[1:], 2e-4, 0.0)
        return optimizer, setup_scheduler(optimizer, args, *stepped)

    optimizer, scheduler = started()
    for step in range(50):
        for group, rate in zip(optimizer.param_groups, rates):
            assert group["lr"] == pytest.approx(specified(step, 5, rate, warmup_steps, 3, 0.5), rel=1e-9), step
        optimizer.step()
        if stepped or step % 5 == 4:
            scheduler.step()
        if step == 11:
            saved, (optimizer, scheduler) = (optimizer.state_dict(), scheduler.state_dict()), started()
            optimizer.load_state_dict(saved[0]), scheduler.load_state_dict(saved[1])


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
