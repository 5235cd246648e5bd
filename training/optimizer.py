"""How a step changes the weights: Muon, the steps that are left out, the running average, and an optimizer's saved state."""

from __future__ import annotations

import torch

from utils import UserError, cpu_has_bfloat16
from vae_align import AlignModule

ADAMW_STATE = {"step", "exp_avg", "exp_avg_sq"}  # what AdamW keeps for each parameter
MUON_STATE = {"momentum"}
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # coefficients and number of iterations are the published ones
ITERATIONS = 5
# AdamW's part of the learning rate. At the full rate the first and last layers make the loss jump.
ADAMW_SHARE = 1 / 3


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised, for the weights of hidden convolutions; AdamW for all other parameters.

    A convolution's weight counts as a matrix (out, in · kh · kw). Its Nesterov momentum G is replaced by the nearest
    semi-orthogonal matrix, UVᵀ of its singular value decomposition, by Newton-Schulz iteration (Jordan et al. 2024,
    https://kellerjordan.github.io/posts/muon). Scaled by 0.2 · sqrt(max(rows, columns)) such a step is as large as one of
    AdamW (Liu et al. 2025, arXiv:2502.16982), so one weight decay serves both, and one learning rate: AdamW takes
    `ADAMW_SHARE` of it.

    Args:
        matrices: weights of convolutions or linear layers; others: biases, first and last layers and the like.
        fused: run AdamW in one kernel, where the device has it.

    As with torch's fused optimizers, a step does nothing where the attribute `found_inf` holds a tensor other than 0.
    """

    def __init__(self, matrices, others, lr: float, weight_decay: float, momentum: float = 0.95, fused: bool = False):
        self._adamw = torch.optim.AdamW(others, lr=ADAMW_SHARE * lr, weight_decay=weight_decay, fused=fused)
        self._step_supports_amp_scaling = fused  # a gradient scaler then sets `found_inf` too, and never waits for it
        group = {"params": list(matrices), "lr": lr, "weight_decay": weight_decay, "momentum": momentum}
        super().__init__([group, *self._adamw.param_groups], {})
        self._share()

    def _share(self):
        """Let AdamW work on this object's own groups and state, so that a scheduler or a checkpoint sees one optimizer."""
        self._adamw.param_groups, self._adamw.state = self.param_groups[1:], self.state

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        self._share()

    @torch.no_grad()
    def step(self, closure=None):
        loss = torch.enable_grad()(closure)() if closure else None
        found_inf = getattr(self, "found_inf", None)
        self._adamw.found_inf = found_inf
        self._adamw.step()
        group = self.param_groups[0]
        shapes = {}
        for weight in group["params"]:
            if weight.grad is not None:
                shapes.setdefault(weight.shape, []).append(weight)
        for weights in shapes.values():  # those of one shape at once: a GPU would wait for the launch of each
            self._step_matrices(weights, group, found_inf)
        return loss

    def _step_matrices(self, weights, group, found_inf):
        for weight in weights:
            if "momentum" not in self.state[weight]:
                self.state[weight]["momentum"] = torch.zeros_like(weight)
        buffers = [self.state[weight]["momentum"] for weight in weights]
        gradients, momentum, stacked = map(torch.stack, ([weight.grad for weight in weights], buffers, weights))
        taken = 1.0
        if found_inf is not None:
            # a factor of 0 keeps weights and momentum; 0 times NaN would not, so NaN is masked
            taken = 1 - found_inf
            gradients.masked_fill_(found_inf.bool(), 0)
        momentum.lerp_(gradients, (1 - group["momentum"]) * taken)
        # the order of the columns does not matter; that in which channels_last has them saves a copy
        columns_last = gradients.lerp_(momentum, group["momentum"]).movedim(2, -1)
        updates = orthogonalised(columns_last.flatten(2))
        rate = group["lr"] * 0.2 * max(updates.shape[1:]) ** 0.5
        updates = updates.view(columns_last.shape).movedim(-1, 2)
        stacked.mul_(1 - group["lr"] * group["weight_decay"] * taken).sub_(updates.mul_(rate * taken))
        torch._foreach_copy_([*weights, *buffers], [*stacked.unbind(), *momentum.unbind()])


def orthogonalised(matrices: torch.Tensor) -> torch.Tensor:
    """(N, rows, columns) -> nearly semi-orthogonal matrices with the same singular vectors: singular values 0.7 to 1.2.

    In bfloat16, as published, where the device multiplies fast in it; elsewhere in float32.
    """
    a, b, c = NEWTON_SCHULZ
    fast = matrices.is_cuda or (matrices.device.type == "cpu" and cpu_has_bfloat16())
    x = matrices.to(torch.bfloat16 if fast else torch.float32)
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    for _ in range(ITERATIONS):
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)


# ----------------------------------------------------------------------------------------------------------------------
# Steps that are left out

SHOWN_FILES = 8
KEPT_STEPS = 100  # outcomes that may wait on the device before they are read


def leave_out(optimizer: torch.optim.Optimizer, ok: torch.Tensor) -> None:
    """Make the next `optimizer.step()` do nothing unless `ok`.

    torch's gradient scaler sets the attribute `found_inf`, which tells a fused optimizer to leave weights, moments and step
    count unchanged. This function sets the same attribute. An optimizer that is not fused does not read it: its gradients are
    dropped instead, which waits for the device.
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

    Under a gradient scaler (float16) the scaler skips a step that overflows, and halves its scale until none does.

    Attributes:
        total: bad steps so far. in_a_row: bad steps since the last good one, without those that a scaler skipped at a scale of
            1 or more.
    """

    WHY = "loss or gradient not finite, or no image readable"  # what makes a step bad

    def __init__(self, limit: int, accelerator):
        self.limit, self.accelerator = limit, accelerator
        self.total = self.in_a_row = 0
        self._pending = []

    def mask(self, optimizer: torch.optim.Optimizer, loss: torch.Tensor, grad_norm: torch.Tensor) -> torch.Tensor:
        """Make the next `optimizer.step()` do nothing if this loss or gradient norm is not finite; returns whether both are."""
        ok = loss.detach().isfinite() & grad_norm.isfinite().to(loss.device)
        if self.accelerator.num_processes > 1:  # gradients are shared, a loss is each process's own
            ok = self.accelerator.reduce(ok.float(), "sum") >= self.accelerator.num_processes - 0.5
        if self.accelerator.scaler is None:
            leave_out(optimizer, ok)
        return ok

    def note(self, ok: torch.Tensor, step: int, files: list[str]) -> None:
        """Remember the outcome of `step` (counted from 1) and the files in this process's batch: empty names for a batch of
        which no image could be read."""
        self._pending.append((ok, step, files))
        if len(self._pending) >= KEPT_STEPS:
            self.read()

    def read(self) -> int:
        """Count the noted outcomes; returns the number of new bad steps. UserError after `limit` in a row."""
        if not self._pending:
            return 0
        outcomes = torch.stack([ok for ok, _, _ in self._pending]).tolist()
        pending, self._pending = self._pending, []
        overflowed = self.accelerator.scaler is not None and self.accelerator.scaler.get_scale() >= 1
        for ok, (_, step, files) in zip(outcomes, pending):
            self.in_a_row = 0 if ok or overflowed else self.in_a_row + 1
            self.total += not ok
            if self.in_a_row >= self.limit and not any(files):
                raise UserError(
                    f"--train_data_dir: {self.in_a_row} steps in a row were skipped (--max_bad_steps), the last of them, step "
                    f"{step}, since none of its images can be read; mend those that are named above as left out"
                )
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


# ----------------------------------------------------------------------------------------------------------------------
# The running average, and the saved state


@torch.no_grad()
def update_average(average: AlignModule, module: AlignModule, decay: float, step: int, ok: torch.Tensor) -> None:
    """Exponential moving average of the weights after `step` steps; a step that was not `ok` changes nothing.

    Its decay grows from 0, a copy, over 1/6 to `decay`, so that short runs are averaged too. (torch's `AveragedModel` keeps its
    count on the device and waits for it in every step.)
    """
    decay = min(decay, step / (10 + step)) if step > 1 else 0.0
    averages = list(average.parameters())
    towards = [torch.where(ok, weight, mean) for weight, mean in zip(module.parameters(), averages)]
    torch._foreach_lerp_(averages, towards, 1 - decay)


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Load the state of an optimizer, AdamW or Muon. ValueError for moments of another shape."""
    kinds = [MUON_STATE if "momentum" in group else ADAMW_STATE for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    if optimizer.state:  # empty before the first step that was not skipped
        for names, group in zip(kinds, optimizer.param_groups):
            for parameter in group["params"]:
                _fit_moments(optimizer.state[parameter], parameter, names)


def _fit_moments(moments: dict, parameter: torch.Tensor, names: set) -> None:
    """Give each moment its parameter's memory layout, which a fused kernel needs unchecked; ValueError for another shape."""
    if moments.keys() != names:
        raise ValueError(f"moments {sorted(map(str, moments))} instead of {sorted(names)}")
    for name, moment in moments.items():
        if moment.shape != (() if name == "step" else parameter.shape):
            raise ValueError(f"{name} of shape {tuple(moment.shape)}")
        if name != "step":
            moments[name] = torch.empty_like(parameter).copy_(moment)
