"""Muon: an optimizer whose steps change all directions of a weight matrix alike, the weak ones as much as the strong."""

from __future__ import annotations

import torch

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # coefficients and number of iterations are the published ones
ITERATIONS = 5


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised, for the weights of hidden convolutions; AdamW for all other parameters.

    A convolution's weight counts as a matrix (out, in · kh · kw). Its Nesterov momentum G is replaced by the nearest
    semi-orthogonal matrix, UVᵀ of its singular value decomposition, by Newton-Schulz iteration (Jordan et al. 2024,
    https://kellerjordan.github.io/posts/muon). Scaled by 0.2 · sqrt(max(rows, columns)) such a step is as large as one of
    AdamW (Liu et al. 2025, arXiv:2502.16982), so one learning rate and one weight decay serve both.

    Args:
        matrices: weights of convolutions or linear layers; others: biases, first and last layers and the like.
        fused: run AdamW in one kernel, where the device has it.

    As with torch's fused optimizers, a step does nothing where the attribute `found_inf` holds a tensor other than 0.
    """

    def __init__(self, matrices, others, lr: float, weight_decay: float, momentum: float = 0.95, fused: bool = False):
        self._adamw = torch.optim.AdamW(others, lr=lr, weight_decay=weight_decay, fused=fused)
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
        gradients = torch.stack([weight.grad for weight in weights])
        for weight in weights:
            if "momentum" not in self.state[weight]:
                self.state[weight]["momentum"] = torch.zeros_like(weight)
        buffers = [self.state[weight]["momentum"] for weight in weights]
        momentum = torch.stack(buffers).lerp(gradients, 1 - group["momentum"])
        updates = orthogonalised(gradients.lerp(momentum, group["momentum"]).flatten(2))
        rate = group["lr"] * 0.2 * max(updates.shape[1:]) ** 0.5
        for weight, buffer, moved, update in zip(weights, buffers, momentum, updates):
            stepped = weight * (1 - group["lr"] * group["weight_decay"]) - rate * update.view_as(weight)
            if found_inf is not None:
                stepped, moved = (torch.where(found_inf.bool(), old, new) for old, new in ((weight, stepped), (buffer, moved)))
            weight.copy_(stepped)
            buffer.copy_(moved)


def orthogonalised(matrices: torch.Tensor) -> torch.Tensor:
    """(N, rows, columns) -> nearly semi-orthogonal matrices with the same singular vectors: singular values 0.7 to 1.2.

    In bfloat16 where the device multiplies fast in it, as published; on a CPU in float32.
    """
    a, b, c = NEWTON_SCHULZ
    x = matrices.bfloat16() if matrices.is_cuda else matrices.float()
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(matrices.dtype)
