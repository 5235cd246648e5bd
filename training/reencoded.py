"""A target beside VAE2's own: what decoding with VAE1 and encoding with VAE2 makes of VAE1's latents.

VAE1's latents do not hold all that VAE2's do, so a module that regresses on VAE2's latents learns the mean of all that could
have been there, and blurs. Re-encoded latents are a function of VAE1's latents alone: regressing on them needs no mean, and
they have the texture that VAE1's decoder invents.

With weight W the target is `(1 - W) · VAE2's + W · re-encoded`. Decoding and encoding are dear, so only the images of a step
that are decoded for its other losses are re-encoded, around the same window. A squared error against the mixture has the
gradient of `(1 - W) · error against VAE2's + W · error against re-encoded`; the first is taken everywhere, the second where it
is known, which is everywhere in the mean over steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from latents.spaces import Codec
from training.window import Window

# Latents around a window that are decoded and encoded with it. From TAESD to TAEF1 the latents in the window are off what the
# whole image would give by a mean square of 0.18 without them, 0.03 with four and 0.01 with six; re-encoded latents as such are
# off VAE2's by 0.2.
REACH = 8


@dataclass
class Reencoded:
    """What became of VAE1's latents in a part of the image.

    Attributes:
        area: that part. picture: VAE1's there, (items, 3, height · stride, width · stride) in [-1, 1].
        latents: VAE2's of that picture, (items, channels, height, width). stride: of VAE2's latents.
    """

    area: Window
    picture: torch.Tensor
    latents: torch.Tensor
    stride: int

    def picture_in(self, window: Window) -> torch.Tensor:
        return window.cut_from(self.picture, self.area, self.stride)

    def latents_in(self, window: Window) -> torch.Tensor:
        return window.cut_from(self.latents, self.area)

    def known(self, aligned: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Aligned (B, channels, h, w) and re-encoded latents where nothing that they depend on was left out."""
        inner = self.area.inner(REACH, 1)
        return self.area.cut(aligned)[inner], self.latents[inner]


@dataclass
class Reencoder:
    """Decodes with VAE1 and encodes with VAE2, without gradients.

    Attributes:
        codec1, codec2: the frozen VAEs. weight: W in [0, 1), the share of what is re-encoded in the target.
    """

    codec1: Codec
    codec2: Codec
    weight: float

    @torch.no_grad()
    def __call__(self, source: torch.Tensor, window: Window) -> Reencoded:
        """VAE1's latents (B, channels, h, w) and a window in VAE2's -> what is known around it."""
        stride = self.codec2.stride
        area = window.widened(REACH, math.lcm(self.codec1.stride, stride) // stride)
        picture = self.codec1.decode(area.cut_of_stride(source, stride, self.codec1.stride)).clamp(-1, 1)
        return Reencoded(area, picture, self.codec2.encode(picture), stride)
