"""Losses on latents: each takes (prediction, target) of one shape and returns a scalar, differentiable in prediction.

A new loss is a function of that form and one line in `LOSSES`; `--loss_type` then offers it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from utils import UserError


def weighted_l1(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """L1 on latents (B, C, h, w) that counts errors on detail more than errors on flat areas.

    The weight of an element is 1 plus its contrast, which is the target's distance from the mean of its 3x3 neighbourhood,
    divided by the mean contrast of its channel. The weights are then scaled to mean 1, so that values compare with `l1`. Most
    of a photo is smooth and soon learnt. Decoders turn errors on edges and texture into artefacts, and a plain mean over
    positions hides those errors.
    """
    with torch.no_grad():
        smooth = F.avg_pool2d(target, 3, stride=1, padding=1, count_include_pad=False)
        contrast = (target - smooth).abs()
        weight = 1 + contrast / contrast.mean(dim=(0, 2, 3), keepdim=True).clamp_min(1e-6)
        weight = weight / weight.mean()
    return (weight * (prediction - target).abs()).mean()


def channel_moments(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """How far the mean and the standard deviation of each channel of latents (B, C, h, w), over the whole batch, are off.

    The mean over channels of (difference of means)² + (difference of standard deviations)². A squared error alone shrinks
    what cannot be predicted towards its mean, and losses on decoded images move the mean of those channels that hold a
    decoder's sharpness: a tenth of a standard deviation halves the finest detail, at next to no cost in squared error.
    """
    means, deviations = zip(_moments(prediction), _moments(target))
    return F.mse_loss(*means) + F.mse_loss(*deviations)


def _moments(latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    variance, mean = torch.var_mean(latents.float(), dim=(0, 2, 3), correction=0)
    return mean, (variance + 1e-6).sqrt()  # a constant channel has a gradient too


LOSSES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "mse": F.mse_loss,
    "l1": F.l1_loss,
    "weighted_l1": weighted_l1,
}


def get_loss_function(loss_type: str) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """The loss of that name: a function (prediction, target) -> scalar tensor. UserError for an unknown name."""
    if loss_type not in LOSSES:
        raise UserError(f"loss_type {loss_type}: choose from {', '.join(LOSSES)}")
    return LOSSES[loss_type]
