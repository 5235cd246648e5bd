"""What one rung of the ladder made of a batch of images."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from evaluation.per_image import to_8bit


@dataclass(frozen=True)
class Sample:
    """What one rung of the ladder made of a batch, and what that is held against.

    Attributes:
        original: the images (B, 3, H, W) in [-1, 1].
        picture: what the rung's latents decode to, (B, 3, H, W), about [-1, 1].
        latents: the rung's scaled latents (B, C, h, w) in VAE2's space; None for VAE1's own, which are in another space.
        vae2_picture, vae2_latents: VAE2's own reconstruction, and its posterior mean.
        index: place of each image in the set.
    """

    original: torch.Tensor
    picture: torch.Tensor
    latents: torch.Tensor | None
    vae2_picture: torch.Tensor
    vae2_latents: torch.Tensor
    index: tuple[int, ...]

    @functools.cached_property
    def levels(self) -> torch.Tensor:
        """`picture` as 8-bit levels (B, 3, H, W), float."""
        return to_8bit(self.picture)

    @functools.cached_property
    def original_levels(self) -> torch.Tensor:
        return to_8bit(self.original)

    @functools.cached_property
    def vae2_levels(self) -> torch.Tensor:
        return to_8bit(self.vae2_picture)
