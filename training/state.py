"""What a run must remember from step to step, gathered in one object. A checkpoint's `training` is written and read here."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from evaluation.ladder import FixedRungs
from training.bad_steps import BadSteps
from training.budget import Budget
from training.meter import Meter
from training.objective import Objective
from training.restore import load_optimizer, on_cpu
from utils import UserError, one_line
from vae_align import AlignModule


@dataclass
class TrainingState:
    """Everything that goes on from one step to the next. Tensors are on the device; `state_dict` copies them to the CPU.

    Attributes:
        module: the `AlignModule` that the optimizer moves; average: its running average, or None.
        optimizer, scheduler: as torch has them; scaler: the gradient scaler of float16, or None.
        budget: when the run ends.
        data: what the order of the training images depends on, see `resume.data_order` and `resume.names_digest`.
        meter: the training loss since the last log entry.
        places: of each process in a stream of training images (see `stream.StreamSampler`); None where a step tells its place.
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
    meter: Meter
    budget: Budget
    data: dict
    places: list | None = None
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
                "weights": on_cpu(self.module.state_dict()) if self.average else None,  # without averages they are judged
                "optimizer": on_cpu(self.optimizer.state_dict()),
                "scheduler": self.scheduler.state_dict(),
                "scaler": self.scaler.state_dict() if self.scaler else None,
            },
            **self.objective.state_dict(),
            **self.data,
            **self.meter.state_dict(),
            "budget": self.budget.state_dict(),
            "places": self.places,
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
        load_optimizer(self.optimizer, state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        if self.scaler and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
