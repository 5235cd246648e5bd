"""Training losses: each takes (prediction, target) of one shape and returns a scalar that is differentiable in prediction."""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F

from utils import UserError


def weighted_l1(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """L1 on latents (B, C, h, w) in which detail counts more than flat ground.

    Each element is weighted by 1 + its target's distance from the 3x3 neighbourhood mean, relative to the average such
    distance of its channel; the weights are then scaled to mean 1, so values compare with `l1`. Most of a photo is smooth
    and soon learnt; what a decoder turns into artefacts is edges and texture that a plain mean over positions hides.
    """
    with torch.no_grad():
        smooth = F.avg_pool2d(target, 3, stride=1, padding=1, count_include_pad=False)
        contrast = (target - smooth).abs()
        weight = 1 + contrast / contrast.mean(dim=(0, 2, 3), keepdim=True).clamp_min(1e-6)
        weight = weight / weight.mean()
    return (weight * (prediction - target).abs()).mean()


def charbonnier(prediction: torch.Tensor, target: torch.Tensor, epsilon: float = 1e-2) -> torch.Tensor:
    """Mean of sqrt(error² + epsilon²) - epsilon: L1 for large errors, smooth at zero (Charbonnier et al. 1994)."""
    return ((prediction - target).square() + epsilon**2).sqrt().sub(epsilon).mean()


LOSSES = {
    "mse": F.mse_loss,
    "l1": F.l1_loss,
    "weighted_l1": weighted_l1,
    "huber": F.smooth_l1_loss,
    "charbonnier": charbonnier,
}


def loss_term(text: str) -> tuple[str, float]:
    """'name=weight' -> (name, weight), as --extra_losses takes them; ValueError when it is not of that form."""
    name, _, weight = text.partition("=")
    if name not in LOSSES or not 0 < float(weight) <= 1e6:
        raise ValueError(f"{text}: not of the form NAME=WEIGHT with NAME one of {', '.join(LOSSES)} and WEIGHT above 0")
    return name, float(weight)


def checked_loss_term(text: str) -> str:
    """An argparse type: `text` unchanged if `loss_term` understands it."""
    try:
        loss_term(text)
    except ValueError:
        names = ", ".join(LOSSES)
        raise argparse.ArgumentTypeError(f"{text}: must be NAME=WEIGHT, NAME one of {names}, WEIGHT above 0") from None
    return text


def get_loss_function(loss_type: str):
    """The loss of that name: a function (prediction, target) -> scalar tensor. UserError for an unknown name."""
    if loss_type not in LOSSES:
        raise UserError(f"--loss_type {loss_type}: choose from {', '.join(LOSSES)}")
    return LOSSES[loss_type]
