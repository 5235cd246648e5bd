"""Steps whose loss or gradient is not finite: left out on the device, counted, and the end of a run that has only those."""

from __future__ import annotations

import torch

from utils import UserError

SHOWN_FILES = 8
KEPT_STEPS = 100  # outcomes that may wait on the device before they are read


def leave_out(optimizer: torch.optim.Optimizer, ok: torch.Tensor) -> None:
    """Have the next `optimizer.step()` do nothing unless `ok`.

    torch's gradient scaler tells a fused optimizer by the attribute `found_inf` to leave weights, moments and step count as
    they are; the same attribute is set here. An optimizer that is not fused, on a device without the kernel, does not read
    it: its gradients are dropped instead, which waits for the device.
    """
    if all(group.get("fused", True) for group in optimizer.param_groups):
        optimizer.found_inf = (~ok).float()
    elif not ok:
        optimizer.zero_grad(set_to_none=True)


class BadSteps:
    """Masks and counts bad steps without waiting for the device at every step.

        ok = bad_steps.mask(optimizer, loss, grad_norm)      # a tensor; the optimizer's next step heeds it
        bad_steps.note(ok, step, files)
        bad_steps.read()                                     # now and then; waits for the device

    Under a gradient scaler (float16) overflow is the scaler's business: it skips the step and halves its scale. Only what is
    still not finite at a scale below 1 is counted.

    Attributes:
        total: bad steps so far. in_a_row: those at the end of what was read.
    """

    def __init__(self, limit: int, accelerator):
        self.limit, self.accelerator = limit, accelerator
        self.total = self.in_a_row = 0
        self._pending = []

    def mask(self, optimizer: torch.optim.Optimizer, loss: torch.Tensor, grad_norm: torch.Tensor) -> torch.Tensor:
        """Have the next `optimizer.step()` do nothing if this loss or gradient norm is not finite; returns whether it is."""
        ok = loss.detach().isfinite() & grad_norm.isfinite().to(loss.device)
        if self.accelerator.num_processes > 1:  # gradients are shared, a loss is each process's own
            ok = self.accelerator.reduce(ok.float(), "sum") >= self.accelerator.num_processes - 0.5
        if self.accelerator.scaler is None:
            leave_out(optimizer, ok)
        return ok

    def note(self, ok: torch.Tensor, step: int, files: list[str]) -> None:
        """Remember the outcome of `step` (counted from 1) and which files this process had in its batch."""
        self._pending.append((ok, step, files))
        if len(self._pending) >= KEPT_STEPS:
            self.read()

    def read(self) -> int:
        """Count what was noted since the last time; returns how many of it were bad. UserError after `limit` in a row."""
        if not self._pending:
            return 0
        outcomes = torch.stack([ok for ok, _, _ in self._pending]).tolist()
        pending, self._pending = self._pending, []
        if self.accelerator.scaler is not None and self.accelerator.scaler.get_scale() >= 1:
            outcomes = [True] * len(outcomes)
        for ok, (_, step, files) in zip(outcomes, pending):
            self.in_a_row = 0 if ok else self.in_a_row + 1
            self.total += not ok
            if self.in_a_row >= self.limit:
                shown = ", ".join(map(repr, files[:SHOWN_FILES])) + (", …" if len(files) > SHOWN_FILES else "")
                raise UserError(
                    f"the loss or its gradient was not finite in {self.in_a_row} steps in a row (--max_bad_steps), the last of "
                    f"them step {step} with {shown}: lower --learning_rate, set --grad_clip 1, or look at those files; "
                    "judge the last checkpoint with eval_align.py before going on from it"
                )
        return outcomes.count(False)

    def state_dict(self) -> dict:
        return {"bad_steps": self.total, "bad_steps_in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict) -> None:
        self.total = state["bad_steps"]
        self.in_a_row = state["bad_steps_in_a_row"]
