"""What a run must remember from step to step, gathered in one object. A checkpoint's `training` is written and read here."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from evaluation.fixed_rungs import FixedRungs
from training.bad_steps import BadSteps
from training.budget import Budget
from training.objective import Objective
from utils import UserError, one_line
from vae_align import AlignModule

ADAMW_STATE = {"step", "exp_avg", "exp_avg_sq"}  # what AdamW keeps for each parameter
MUON_STATE = {"momentum"}


class LossMeter:
    """The mean training loss since the last log entry, summed on the device. Steps that were not finite do not count."""

    def __init__(self, device: torch.device):
        self._sum = torch.zeros((), device=device)
        self._steps = torch.zeros((), device=device)

    def add(self, loss: torch.Tensor, ok: torch.Tensor) -> None:
        """Add a step's scalar loss, if the step was `ok`."""
        self._sum += torch.where(ok, loss.detach(), 0)
        self._steps += ok

    def read(self, accelerator) -> float:
        """The mean over steps and processes, after which counting starts anew. Waits for the device."""
        mean = accelerator.reduce(self._sum / self._steps, "mean").item()
        self._sum.zero_()
        self._steps.zero_()
        return mean

    def state_dict(self) -> dict:
        return {"loss_sum": self._sum.cpu(), "summed_steps": self._steps.cpu()}

    def load_state_dict(self, state: dict) -> None:
        self._sum.copy_(state["loss_sum"])
        self._steps.copy_(state["summed_steps"])


@dataclass
class TrainingState:
    """Everything that goes on from one step to the next. Tensors are on the device; `state_dict` copies them to the CPU.

    Attributes:
        module: the `AlignModule` that the optimizer moves; average: its running average, or None.
        optimizer, scheduler: as torch has them; scaler: the gradient scaler of float16, or None.
        budget: when the run ends. data: what the order of the training images depends on, see `resume.data_order` and
            `resume.names_digest`.
        step: optimizer steps done; metrics: the ladder of the newest evaluation, {rung: {metric: value}}.
        fixed: the rungs that training cannot move, as they were measured.
    """

    module: AlignModule
    average: AlignModule | None
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    scaler: torch.amp.GradScaler | None
    bad_steps: BadSteps
    objective: Objective
    meter: LossMeter
    budget: Budget
    data: dict
    step: int = 0
    metrics: dict = field(default_factory=dict)
    fixed: FixedRungs = field(default_factory=FixedRungs)

    @property
    def judged(self) -> AlignModule:
        """The module that is evaluated and saved."""
        return self.average or self.module

    def state_dict(self) -> dict:
        """A checkpoint's `training`; the judged weights, the step and the metrics stand beside it in the file."""
        self.bad_steps.read()
        return {
            "state": {
                "weights": _on_cpu(self.module.state_dict()) if self.average else None,  # without averages they are judged
                "optimizer": _on_cpu(self.optimizer.state_dict()),
                "scheduler": self.scheduler.state_dict(),
                "scaler": self.scaler.state_dict() if self.scaler else None,
            },
            **self.objective.state_dict(),
            **self.data,
            **self.meter.state_dict(),
            "budget": self.budget.state_dict(),
            "fixed": self.fixed.state_dict(),
            **self.bad_steps.state_dict(),
        }

    def load_state_dict(self, content: dict) -> None:
        """Go on from the `content` of a checkpoint, whose judged weights are already in place. UserError if it does not fit."""
        training = content["training"]
        try:
            self._restore(training["state"])
            self.objective.load_state_dict(training)
            self.meter.load_state_dict(training)
            self.budget.load_state_dict(training["budget"])
            self.fixed.load_state_dict(training["fixed"])
            self.bad_steps.load_state_dict(training)
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise UserError(f"the state of its training does not fit its module ({one_line(error)})") from None
        self.step = content["step"]
        self.metrics = content["metrics"]

    def _restore(self, state):
        if self.average:
            self.module.load_state_dict(state["weights"])
        kinds = [MUON_STATE if "momentum" in group else ADAMW_STATE for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        if self.optimizer.state:  # empty before the first step that was not skipped
            for names, group in zip(kinds, self.optimizer.param_groups):
                for parameter in group["params"]:
                    _fit_moments(self.optimizer.state[parameter], parameter, names)
        self.scheduler.load_state_dict(state["scheduler"])
        if self.scaler and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])


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


def _on_cpu(value):
    if isinstance(value, dict):
        return {name: _on_cpu(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_on_cpu(item) for item in value]
    return value.detach().cpu().contiguous() if isinstance(value, torch.Tensor) else value
