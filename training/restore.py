"""Tensors and optimizers on their way into a checkpoint and out of it."""

from __future__ import annotations

import torch

ADAMW_STATE = {"step", "exp_avg", "exp_avg_sq"}  # what AdamW keeps for each parameter
MUON_STATE = {"momentum"}


def on_cpu(value):
    """`value` with every tensor in its dicts and lists as a contiguous one on the CPU."""
    if isinstance(value, dict):
        return {name: on_cpu(item) for name, item in value.items()}
    if isinstance(value, list):
        return [on_cpu(item) for item in value]
    return value.detach().cpu().contiguous() if isinstance(value, torch.Tensor) else value


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Have an optimizer, AdamW or Muon, go on from what its `state_dict` was. ValueError for moments of another shape."""
    kinds = [MUON_STATE if "momentum" in group else ADAMW_STATE for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    if optimizer.state:  # empty before the first step that was not skipped
        for names, group in zip(kinds, optimizer.param_groups):
            for parameter in group["params"]:
                _fit_moments(optimizer.state[parameter], parameter, names)


def _fit_moments(moments: dict, parameter: torch.Tensor, names: set) -> None:
    """Give each moment its parameter's memory layout, which a fused kernel relies on without checking it; ValueError for
    another shape, which the kernel would not notice either."""
    if moments.keys() != names:
        raise ValueError(f"moments {sorted(map(str, moments))} instead of {sorted(names)}")
    for name, moment in moments.items():
        if moment.shape != (() if name == "step" else parameter.shape):
            raise ValueError(f"{name} of shape {tuple(moment.shape)}")
        if name != "step":
            moments[name] = torch.empty_like(parameter).copy_(moment)
