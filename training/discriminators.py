"""Networks that tell what the module makes from what VAE2 makes: one looks at latents, one at decoded pictures.

Both judge place by place: they return maps of logits, positive where they see VAE2's. Every convolution has spectral norm 1
(Miyato et al. 2018, arXiv:1802.05957), which bounds how steeply a logit can rise, and so the gradient that reaches the module.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

SLOPE = 0.2  # of the leaky ReLUs, as in most discriminators
HEAD_WIDTH = 64  # channels of a head on frozen features
PIXEL_WIDTHS = (32, 64, 96)  # of the head on pixels, which halves the resolution with each
JUDGED_STAGES = (1, 2, 4)  # of AlexNet's five, at strides 4, 8 and 8: texture, shapes, things


class Convolution(nn.Conv2d):
    """A convolution in the precision of its input; its weights, and their spectral norm, are float32."""

    def forward(self, x):
        return self._conv_forward(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


def convolution(*shape, **options) -> nn.Module:
    return spectral_norm(Convolution(*shape, **options))


class LatentDiscriminator(nn.Module):
    """Judges latents of VAE2's space, beside VAE1's latents of the same picture where the module sees those: 0.3 M parameters.

    Args:
        channels: of VAE2's latents. given_channels: of VAE1's, 0 for a module that does not see them.
    """

    def __init__(self, channels: int, given_channels: int, width: int = 64):
        super().__init__()
        self.layers = nn.Sequential(
            convolution(channels + given_channels, width, 3, padding=1),
            nn.LeakyReLU(SLOPE),
            convolution(width, width, 3, padding=1),
            nn.LeakyReLU(SLOPE),
            convolution(width, 2 * width, 4, stride=2, padding=1),
            nn.LeakyReLU(SLOPE),
            convolution(2 * width, 2 * width, 3, padding=1),
            nn.LeakyReLU(SLOPE),
            convolution(2 * width, 1, 1),
        )

    def forward(self, latents: torch.Tensor, given: torch.Tensor | None = None) -> list[torch.Tensor]:
        """Latents (B, channels, h, w), given (B, given_channels, h', w') in the same precision -> [logits (B, 1, h/2, w/2)]."""
        if given is not None:
            if given.shape[2:] != latents.shape[2:]:  # VAEs of different stride
                given = F.interpolate(given, latents.shape[2:], mode="area")
            latents = torch.cat([latents, given], dim=1)
        return [self.layers(latents)]


class PictureDiscriminator(nn.Module):
    """Judges pictures by a frozen network's features at several strides (Projected GAN, Sauer et al. 2021, arXiv:2111.01007),
    and by their pixels, where a pattern too fine for those features shows.

    Args:
        feature_channels: of the feature maps.
    """

    def __init__(self, feature_channels: list[int]):
        super().__init__()
        self.heads = nn.ModuleList(self._head(channels) for channels in feature_channels)
        layers, channels = [], 3
        for width in PIXEL_WIDTHS:
            layers += [convolution(channels, width, 4, stride=2, padding=1), nn.LeakyReLU(SLOPE)]
            channels = width
        self.pixels = nn.Sequential(*layers, convolution(channels, 1, 3, padding=1))

    @staticmethod
    def _head(channels):
        return nn.Sequential(
            convolution(channels, HEAD_WIDTH, 1),
            nn.LeakyReLU(SLOPE),
            convolution(HEAD_WIDTH, HEAD_WIDTH, 3, padding=1),
            nn.LeakyReLU(SLOPE),
            convolution(HEAD_WIDTH, 1, 1),
        )

    def forward(self, pictures: torch.Tensor, *features: torch.Tensor) -> list[torch.Tensor]:
        """Pictures (B, 3, H, W) in [-1, 1] and their feature maps (B, channels, h, w), all in one precision -> a map of logits
        for each feature map, and one for the pixels."""
        judged = [head(_level(stage)) for head, stage in zip(self.heads, features, strict=True)]
        return [*judged, self.pixels(pictures)]


def _level(features: torch.Tensor) -> torch.Tensor:
    """Features at a root mean square of 1 for each picture, since those of the stages differ by orders of magnitude."""
    scale = features.detach().float().square().mean(dim=(1, 2, 3), keepdim=True).add(1e-6).rsqrt()
    return features * scale.to(features.dtype)
