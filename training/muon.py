"""Muon: an optimizer whose steps change all directions of a weight matrix alike, the weak ones as much as the strong."""

from __future__ import annotations

import torch

from utils import cpu_has_bfloat16

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # coefficients and number of iterations are the published ones
ITERATIONS = 5
# AdamW's part of the learning rate. With the full rate, the first and last layers make the loss jump.
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
        if (
            found_inf is not None
        ):  # a factor of 0 leaves weights and momentum as they are; 0 times NaN would not, so it is masked
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
