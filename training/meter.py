"""Means over the steps since the last log entry."""

from __future__ import annotations

import torch


class Meter:
    """The mean of a figure, or of several in one tensor, since the last log entry, summed on the device. Steps that were not
    finite do not count."""

    def __init__(self, device: torch.device, shape: tuple[int, ...] = ()):
        self._sum = torch.zeros(shape, device=device)
        self._steps = torch.zeros((), device=device)

    def add(self, values: torch.Tensor, ok: torch.Tensor) -> None:
        """Add a step's values, if the step was `ok`."""
        self._sum += torch.where(ok, values.detach(), 0)
        self._steps += ok

    def read(self, accelerator) -> float | list[float]:
        """The mean over steps and processes, nan where no step was counted; then counting starts anew. Waits for the device."""
        mean = accelerator.reduce(self._sum / self._steps, "mean").tolist()
        self._sum.zero_()
        self._steps.zero_()
        return mean

    def state_dict(self) -> dict:
        return {"loss_sum": self._sum.cpu(), "summed_steps": self._steps.cpu()}

    def load_state_dict(self, state: dict) -> None:
        """ValueError for sums of another shape."""
        if state["loss_sum"].shape != self._sum.shape or state["summed_steps"].shape != ():
            raise ValueError(f"sums of shape {tuple(state['loss_sum'].shape)} and {tuple(state['summed_steps'].shape)}")
        self._sum.copy_(state["loss_sum"])
        self._steps.copy_(state["summed_steps"])
