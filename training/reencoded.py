"""A target beside VAE2's own: what decoding with VAE1 and encoding with VAE2 makes of VAE1's latents.

VAE1's latents do not hold all that VAE2's do, so a module that regresses on VAE2's latents learns the mean of all that could
have been there, and blurs. Re-encoded latents are a function of VAE1's latents alone: regressing on them needs no mean, and
they have the texture that VAE1's decoder invents. With weight W the target is `(1 - W) · VAE2's + W · re-encoded`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from latents.spaces import Codec, reencode
from training.window import Window

REACH = 4  # latents around a window that are decoded with it, since VAE1's decoder looks at them


@dataclass
class Reencoded:
    """What decode + re-encode makes of a batch.

    Attributes:
        latents: VAE2's, of the picture that VAE1 decodes, (B, channels, h, w). source: VAE1's, of any stride. weight: W.
    """

    codec1: Codec
    codec2: Codec
    source: torch.Tensor
    latents: torch.Tensor
    weight: float

    @torch.no_grad()
    def picture_in(self, window: Window) -> torch.Tensor:
        """What VAE1 decodes in a window of VAE2's latents: (items, 3, height · stride, width · stride) in [-1, 1]."""
        stride = self.codec2.stride
        area = window.widened(REACH, math.lcm(self.codec1.stride, stride) // stride)
        picture = self.codec1.decode(area.cut_of_stride(self.source, stride, self.codec1.stride)).clamp(-1, 1)
        return window.cut_from(picture, area, stride)


@dataclass
class Reencoder:
    """Decodes with VAE1 and encodes with VAE2, without gradients, what the latent cache has not.

    Attributes:
        codec1, codec2: the frozen VAEs. weight: W in [0, 1), the share of what is re-encoded in the target.
    """

    codec1: Codec
    codec2: Codec
    weight: float

    def __call__(self, batch: dict, source: torch.Tensor) -> Reencoded:
        """A training batch and VAE1's latents of it (B, channels, h, w)."""
        if "reencoded" in batch:
            latents = batch["reencoded"].to(source.device, non_blocking=True)
        else:
            latents = reencode(source, self.codec1, self.codec2)
        return Reencoded(self.codec1, self.codec2, source, latents, self.weight)
