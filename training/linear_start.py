"""The best linear map between two latent spaces, in closed form: where training starts and what it must beat."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from vaes.pipeline import PipelineWithVAEs, encoded_batches

DAMPING = 1e-4  # ridge penalty, relative to the mean squared input
RIDGE_IMAGES = 512  # half a million equations at 256 px


class RidgeRegression:
    """Accumulates normal equations for a 3x3 convolution with bias from one set of latents to another.

    Minimises ||Y - X W||² + λ ||W||² over all positions seen, X being the zero-padded 3x3 neighbourhoods and a one:
    W = (XᵀX + λI)⁻¹ XᵀY (Hoerl & Kennard 1970). float64, memory independent of how much is added.
    """

    def __init__(self, in_channels: int, out_channels: int):
        self.in_channels, self.out_channels = in_channels, out_channels
        size = in_channels * 9 + 1
        self.xx = torch.zeros(size, size, dtype=torch.float64)
        self.xy = torch.zeros(size, out_channels, dtype=torch.float64)

    @torch.no_grad()
    def add(self, inputs: torch.Tensor, targets: torch.Tensor) -> None:
        """Add pairs of inputs (B, in, h, w) and targets (B, out, h, w)."""
        x = F.unfold(inputs.float(), 3, padding=1).transpose(1, 2).flatten(0, 1)
        x = torch.cat([x, x.new_ones(len(x), 1)], dim=1)
        y = targets.float().flatten(2).transpose(1, 2).flatten(0, 1)
        self.xx += (x.T @ x).cpu().double()
        self.xy += (x.T @ y).cpu().double()

    def solve(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(weight (out, in, 3, 3), bias (out,)) of the convolution, float32."""
        penalty = torch.full((len(self.xx),), DAMPING * self.xx.diagonal()[:-1].mean(), dtype=torch.float64)
        penalty[-1] = 0  # the bias is free
        solution = torch.linalg.solve(self.xx + torch.diag(penalty), self.xy).float().T
        return solution[:, :-1].reshape(self.out_channels, self.in_channels, 3, 3).contiguous(), solution[:, -1].contiguous()


def fit_ridge(pipeline: PipelineWithVAEs, loader, accelerator) -> None:
    """Fit the map between a pipeline's latents on some training images; its module keeps it beside the weights."""
    regression = RidgeRegression(pipeline.module.ridge_weight.shape[1], pipeline.config.out_channels)
    for inputs, target, _ in encoded_batches(pipeline, loader, accelerator, RIDGE_IMAGES):
        regression.add(pipeline.module.on_output_grid(inputs["latents"]), target)
    if accelerator.num_processes > 1:  # every process adds what it saw, and all start from the same map
        for name in ("xx", "xy"):
            setattr(regression, name, accelerator.reduce(getattr(regression, name).to(accelerator.device), "sum").cpu())
    if regression.xx.any():
        pipeline.module.remember_ridge(*regression.solve())
