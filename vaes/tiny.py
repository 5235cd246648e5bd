"""Tiny autoencoders in their author's own format: two files, an encoder and a decoder, layers by number (taesd.py)."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

from utils import UserError, count_of
from vae_align import Clamp, StageBlock

SUFFIXES = (".safetensors", ".pth")
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
    """An encoder and a decoder with diffusers' manners: `encode(images).latents`, `decode(latents).sample`, images in [-1, 1].

    `config` holds `latent_channels`, `stride`, `pooled` (TAEF2's middle blocks) and `fold`, 2 where 2x2 of its latents are one
    scaled latent of its space.
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


def find_tiny_files(path: Path, label: str) -> tuple[Path, Path] | None:
    """(encoder, decoder) of a tiny autoencoder in its author's format; None if `path` is no place of one.

    `path` is a folder that holds one pair `X_encoder.*`, `X_decoder.*`, one of the two files, or the two files' common stem,
    such as models/vae_approx/taesd. UserError for a folder with several pairs, or for half of one.
    """
    if os.path.isdir(path):  # `Path.is_dir` fails for too long a name
        stems = sorted({_stem(file) for file in path.iterdir() if _stem(file)})
        if len(stems) > 1:
            raise UserError(f"{label} {path}: {count_of(len(stems), 'tiny autoencoder')} there; name one: {path / stems[0]}")
        stem = path / stems[0] if stems else None
    else:
        stem = path.with_name(_stem(path)) if _stem(path) else path
    if stem is None:
        return None
    pair = [_existing(stem, part) for part in ("encoder", "decoder")]
    if not any(pair):
        return None
    for part, file in zip(("encoder", "decoder"), pair):
        if file is None:
            raise UserError(f"{label} {stem}: its {part} is missing ({stem.name}_{part}.safetensors or .pth beside the other)")
    return tuple(pair)


def read_tiny_config(encoder: Path, decoder: Path) -> dict:
    """The config of a `TinyAutoencoder` for these files, read off their weights' shapes. ValueError for other files."""
    weights = read_part(encoder)
    first, last = weights.get("0.weight"), max((int(name.split(".")[0]) for name in weights), default=0)
    if first is None or first.ndim != 4 or f"{last}.weight" not in weights:
        raise ValueError(f"{encoder.name} is no tiny autoencoder's encoder")
    channels, stride = len(weights[f"{last}.weight"]), 32 if len(first) == 32 else 8
    pooled = any(".pool." in name for name in weights)
    return {"latent_channels": channels, "stride": stride, "pooled": pooled, "fold": 2 if pooled and channels == 32 else 1}


def read_tiny(files: tuple[Path, Path], config) -> TinyAutoencoder:
    """The model with its weights, every one of which must have its place; an error of torch's or safetensors' otherwise."""
    with torch.device("meta"):
        model = TinyAutoencoder.from_config(config)
    for part, file in zip((model.encoder, model.decoder), files):
        part.load_state_dict(read_part(file), strict=True, assign=True)
    return model


def read_part(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of one file. ComfyUI's files may put the part's name before each layer's number."""
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file

        weights = load_file(file)
    else:
        weights = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(weights, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in weights.values()):
        raise ValueError(f"{file.name} holds no weights")
    prefix = "encoder." if "encoder" in file.stem else "decoder."
    weights = {name.removeprefix(prefix): tensor for name, tensor in weights.items()}
    if not all(name.split(".")[0].isdigit() for name in weights):
        raise ValueError(f"{file.name} does not number its layers as the author's files do")
    return weights


def stem_of(files: tuple[Path, Path]) -> str:
    """Such as "taesd" of taesd_encoder.pth."""
    return _stem(files[0])


def _stem(file: Path) -> str:
    for part in ("_encoder", "_decoder"):
        if file.suffix in SUFFIXES and file.stem.endswith(part):
            return file.stem.removesuffix(part)
    return ""


def _existing(stem: Path, part: str) -> Path | None:
    files = (stem.with_name(f"{stem.name}_{part}{suffix}") for suffix in SUFFIXES)
    return next((file for file in files if os.path.isfile(file)), None)
