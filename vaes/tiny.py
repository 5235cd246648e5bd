"""The tiny autoencoders of TAESD's author, whose layers have the numbers of his files (taesd.py)."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import torch
from torch import nn

from vae_align import Clamp, StageBlock

WIDTH = 64


def _blocks(width: int, count: int = 3, pooled: bool = False) -> list[nn.Module]:
    return [StageBlock(width, pooled) for _ in range(count)]


def make_encoder(channels: int, stride: int, pooled: bool = False) -> nn.Sequential:
    """Images (B, 3, H, W) in [0, 1] -> latents. Layers are numbered as in the author's files."""
    if stride == 32:
        layers = [nn.Conv2d(3, 32, 3, 2, padding=1), nn.ReLU(), nn.Conv2d(32, WIDTH, 3, 2, padding=1), nn.ReLU()]
    else:
        layers = [nn.Conv2d(3, WIDTH, 3, padding=1)]
    layers += _blocks(WIDTH, 1)
    for stage in range(3):
        layers += [nn.Conv2d(WIDTH, WIDTH, 3, 2, padding=1, bias=False), *_blocks(WIDTH, pooled=pooled and stage == 2)]
    return nn.Sequential(*layers, nn.Conv2d(WIDTH, channels, 3, padding=1))


def make_decoder(channels: int, stride: int, pooled: bool = False) -> nn.Sequential:
    """Latents -> images (B, 3, H, W), about [0, 1]. Layers are numbered as in the author's files."""
    widths = (256, 128, 64, 64, 64, 64) if stride == 32 else (64, 64, 64, 64)
    layers = [Clamp(), nn.Conv2d(channels, widths[0], 3, padding=1), nn.ReLU()]
    for stage, (width, following) in enumerate(itertools.pairwise(widths)):
        layers += [*_blocks(width, pooled=pooled and stage == 0), nn.Upsample(scale_factor=2)]
        layers += [nn.Conv2d(width, following, 3, padding=1, bias=False)]
    return nn.Sequential(*layers, *_blocks(widths[-1], 1), nn.Conv2d(widths[-1], 3, 3, padding=1))


class TinyAutoencoder(nn.Module):
    """An encoder and a decoder that are called as diffusers' models are: `encode(images).latents`, `decode(latents).sample`,
    images in [-1, 1].

    `config` holds `latent_channels`, `stride`, `pooled` (TAEF2's middle blocks) and `fold`: 2 where 2x2 of its latents make one
    scaled latent of its space, otherwise 1.
    """

    def __init__(self, latent_channels: int, stride: int = 8, pooled: bool = False, fold: int = 1):
        super().__init__()
        self.config = {"latent_channels": latent_channels, "stride": stride, "pooled": pooled, "fold": fold}
        self.encoder = make_encoder(latent_channels, stride, pooled)
        self.decoder = make_decoder(latent_channels, stride, pooled)

    @classmethod
    def from_config(cls, config) -> TinyAutoencoder:
        return cls(**config)

    def encode(self, images: torch.Tensor):
        return SimpleNamespace(latents=self.encoder(images * 0.5 + 0.5))

    def decode(self, latents: torch.Tensor):
        return SimpleNamespace(sample=self.decoder(latents) * 2 - 1)
