"""The align module and the file that carries it: VAE1's latents, the image, or both -> VAE2's latents.

This file needs torch alone, so it can be copied into any program. It imports safetensors only inside the functions that
read or write a .safetensors file, and huggingface_hub only where a module is named by its place on the hub.

    pipeline = AlignPipeline.from_pretrained("taesd_to_taef1_latent.safetensors")
    flux_latents = pipeline.translate(sd15_latents)            # scaled latents, as diffusers' denoisers take them
    flux_latents = pipeline.translate(sd15_latents, raw=True)  # raw latents, as VAEs give them and ComfyUI keeps them

Latents are *scaled* latents, the space in which diffusion models work, except where a name says `raw`.
"""

from __future__ import annotations

import functools
import itertools
import json
import logging
import math
import os
import pickle
import re
import reprlib
import stat
import zipfile
import zlib
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

log = logging.getLogger(__name__)

CHECKPOINT_FORMAT = "vae-align"
FORMAT_NUMBER = 1  # of both kinds of file; files without a number are older and read the same
CHECKPOINT_PREFIX = "align_pipeline"
LARGEST_PIXEL = 8.0  # no picture in [-1, 1] goes so far beyond, not even one that a VAE has decoded and nobody clamped
PRETRAINED_NAME = "model.safetensors"  # of the weights in a folder that `AlignPipeline.save_pretrained` writes
# residual blocks on VAE2's grid; the stages of tiny autoencoders, finer grids included: the finest one cut down, or whole
ARCHITECTURES = ("plain", "tiny", "whole")
STAGE_BLOCKS = 3  # of a tiny autoencoder, at each grid
POOL_GROUPS = 4  # of the normalisation in TAEF2's pooled blocks
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)  # owner/name
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "token")  # of `hf_hub_download`
COMPUTE_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
CHANNELS = {  # of scaled latents: the named spaces that have so many
    4: "sd15, sdxl, playground25",
    12: "mochi",
    16: "sd3, flux1, kandinsky5, glm-image, wan21, hunyuan-video, cogvideox, cogvideox-5b, easyanimate, cosmos1",
    32: "sana, hunyuan-video-1.5",
    48: "wan22",
    64: "hunyuan-image, qwen-image-2.1",
    128: "flux2, ltx, ltx2",
}
GRID_KEYS = ("latent_fold", "out_fold", "pooled_decoder", "pooled_encoder")
RANGES = {  # of an `AlignConfig`'s whole numbers; this tool writes no file with a number beyond them
    "latent_channels": (1, 8192),
    "out_channels": (1, 8192),
    "hidden_channels": (1, 8192),
    "num_blocks": (0, 1000),
    "downsample_times": (0, 12),
    "latent_stride": (1, 4096),
    "out_stride": (1, 4096),
    "latent_fold": (1, 16),
    "out_fold": (1, 16),
}


class AlignError(ValueError):
    """Inputs or a file that cannot be used. The message is one printable line: the thing, its value, the remedy."""

    def __init__(self, message: str):
        line = " ".join(message.split())
        super().__init__("".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in line))


# ----------------------------------------------------------------------------------------------------------------------
# Latent spaces


@dataclass(frozen=True)
class LatentSpace:
    """A latent space: its name, its grid, and the map between raw and scaled latents.

    Scaled latents are `(fold(raw) - mean) / std`. diffusers' `(raw - shift_factor) * scaling_factor` is the case
    `mean = shift_factor`, `std = 1 / scaling_factor` in every channel.

    Attributes:
        name: such as "sd15"; None for a space that has no name.
        channels: of the scaled latents; stride: image pixels per scaled latent.
        mean, std: one number per channel of the scaled latents.
        fold: `fold` x `fold` raw latents become one scaled latent of `fold**2` times as many channels, in the order
            (channel, row, column) of `torch.nn.functional.pixel_unshuffle`; 1 where the family folds nothing.
    """

    name: str | None
    channels: int
    stride: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    fold: int = 1

    def __post_init__(self):
        if self.name is not None and not (isinstance(self.name, str) and 0 < len(self.name) <= 64):
            raise AlignError(f"latent space {_shown(self.name)}: its name must be text of at most 64 letters")
        for name, (low, high) in {"channels": (1, 8192), "stride": (1, 4096), "fold": (1, 16)}.items():
            _require_whole(f"{name} of latent space {self.name}", getattr(self, name), low, high)
        if self.channels % self.fold**2:
            raise AlignError(f"latent space {self.name}: {self.channels} channels cannot hold {self.fold}x{self.fold} latents")
        for name in ("mean", "std"):
            values = getattr(self, name)
            if not isinstance(values, (list, tuple)) or len(values) != self.channels or not all(map(_is_finite, values)):
                raise AlignError(f"latent space {self.name}: its {name} must be {self.channels} numbers, one for each channel")
            object.__setattr__(self, name, tuple(map(float, values)))
        if min(self.std) < 1e-6:  # float16 and float32 could not divide by it
            raise AlignError(f"latent space {self.name}: its std holds {min(self.std)}; the least that is usable is 1e-06")

    @classmethod
    def from_scale(
        cls, name: str | None, channels: int, stride: int, scaling_factor: float = 1.0, shift_factor: float = 0.0
    ) -> LatentSpace:
        """The space of diffusers' `(raw - shift_factor) * scaling_factor`."""
        return cls(name, channels, stride, (shift_factor,) * channels, (1 / scaling_factor,) * channels)

    @property
    def map_is_known(self) -> bool:
        """Whether raw latents are known: an unnamed space whose map does nothing is a tiny autoencoder's, which works on
        scaled latents and does not say what the raw latents of its space are."""
        return self.name is not None or any(self.mean) or any(value != 1 for value in self.std)

    def __str__(self) -> str:
        return f"{self.name or 'unnamed'} ({self.channels} channels, stride {self.stride})"

    def to_scaled(self, raw: torch.Tensor) -> torch.Tensor:
        """Raw latents (B, channels / fold², h · fold, w · fold) -> scaled latents (B, channels, h, w), in the same dtype."""
        if raw.ndim != 4 or raw.shape[1] * self.fold**2 != self.channels or any(side % self.fold for side in raw.shape[2:]):
            raise AlignError(
                f"raw latents of shape {tuple(raw.shape)}: the space {self} has {self.channels // self.fold**2} raw channels "
                f"and sides that are multiples of {self.fold}"
            )
        folded = F.pixel_unshuffle(raw, self.fold) if self.fold > 1 else raw
        mean, std = self._moments(folded)
        return (folded - mean) / std

    def to_raw(self, scaled: torch.Tensor) -> torch.Tensor:
        """The inverse of `to_scaled`."""
        if scaled.ndim != 4 or scaled.shape[1] != self.channels:
            raise AlignError(f"scaled latents of shape {tuple(scaled.shape)}: the space {self} has {self.channels} channels")
        mean, std = self._moments(scaled)
        folded = scaled * std + mean
        return F.pixel_shuffle(folded, self.fold) if self.fold > 1 else folded

    def from_pipeline(self, latents: torch.Tensor, size: tuple[int, int] | None = None) -> torch.Tensor:
        """Scaled latents as a diffusers pipeline shapes them with `output_type="latent"` -> (B, channels, h, w).

        Taken are (B, channels, h, w); with a frame (B, channels, 1, h, w), as Wan and other video models give them, or
        (B, 1, channels, h, w), as CogVideoX does; channels last (B, 1, h, w, channels), as Kandinsky 5 does; and packed
        tokens (B, h·w, channels), as FLUX.2 and LTX-Video do, or of 2x2 latents (B, h/2·w/2, 4·channels), as FLUX.1 and
        Qwen-Image do. Tokens do not tell their grid: `size` is the image's (height, width) in pixels. AlignError for another
        shape, more frames than one, or a size that does not fit.
        """
        shape = tuple(latents.shape)
        if latents.ndim == 5:
            order = (1, 2, 4) if (self.name or "").startswith("cogvideox") else (1, 4, 2)  # a side may be as long as channels
            axis = next((axis for axis in order if shape[axis] == self.channels), None)
            if axis:
                self._require_one_frame(shape, shape[2 if axis == 1 else 1])
                return latents.movedim(axis, 1)[:, :, 0]
        if latents.ndim != 3:
            return latents
        patch = {self.channels: 1, 4 * self.channels: 2}.get(shape[2])
        if patch is None:
            raise AlignError(
                f"packed latents of shape {shape}: tokens of the space {self} have {self.channels} numbers, or 4 times"
            )
        if size is None:
            raise AlignError(f"packed latents of shape {shape}: pass size=(height, width) of the image in pixels")
        height, width = (side // (self.stride * patch) for side in size)
        if height * width != shape[1] or any(side % (self.stride * patch) for side in size):
            raise AlignError(
                f"packed latents of shape {shape} do not belong to an image of {tuple(size)} px in the space {self}"
            )
        grid = latents.transpose(1, 2).reshape(shape[0], shape[2], height, width)
        return F.pixel_shuffle(grid, patch) if patch > 1 else grid

    def _require_one_frame(self, shape: tuple[int, ...], frames: int) -> None:
        if frames != 1:
            raise AlignError(f"latents of shape {shape} are {frames} frames of a video; pass a picture's, which are one frame")

    def _moments(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean, std = (torch.tensor(values, dtype=latents.dtype, device=latents.device) for values in (self.mean, self.std))
        return mean.view(1, -1, 1, 1), std.view(1, -1, 1, 1)

    def to_dict(self) -> dict:
        """Plain JSON values, from which `from_dict` makes the space again."""
        return asdict(self) | {"mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_dict(cls, values: dict) -> LatentSpace:
        return _from_dict(cls, values, "latent space")


def pack(latents: torch.Tensor) -> torch.Tensor:
    """Scaled latents (B, C, h, w) -> the tokens (B, h/2 · w/2, 4 C) of FLUX.1's, Chroma's and Qwen-Image's transformers."""
    if latents.ndim != 4 or any(side % 2 for side in latents.shape[2:]):
        raise AlignError(f"latents of shape {tuple(latents.shape)}: only (B, C, h, w) with even h and w can be packed")
    return F.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2)


# ----------------------------------------------------------------------------------------------------------------------
# The module


@dataclass(frozen=True)
class AlignConfig:
    """Everything that shapes an `AlignModule`.

    `latent_channels` and `latent_stride` are VAE1's, `out_channels` and `out_stride` VAE2's (stride: image pixels per
    latent). The image branch halves `downsample_times` times. `architecture` says what the branches and blocks are made of:
    see `ARCHITECTURES`.

    Not of architecture plain: `latent_fold` and `out_fold` say how many raw latents in a row and in a column one scaled latent
    holds, 2 in FLUX.2's space; the module works on the raw ones' grid. `pooled_decoder` and `pooled_encoder`: whether VAE1's
    decoder and VAE2's encoder have TAEF2's blocks, which look at the whole picture, on their coarsest grid.
    """

    input_types: tuple[str, ...] = ("image", "latent")
    latent_channels: int = 4
    out_channels: int = 16
    hidden_channels: int = 64
    num_blocks: int = 2
    downsample_times: int = 3
    latent_stride: int = 8
    out_stride: int = 8
    architecture: str = "plain"
    latent_fold: int = 1
    out_fold: int = 1
    pooled_decoder: bool = False
    pooled_encoder: bool = False

    def __post_init__(self):
        types = tuple(kind for kind in ("image", "latent") if kind in self.input_types)
        if not types or not all(kind in types for kind in self.input_types):
            raise AlignError(f"input_types {_shown(list(self.input_types))}: choose from image, latent, or both")
        object.__setattr__(self, "input_types", types)
        for name, (low, high) in RANGES.items():
            _require_whole(name, getattr(self, name), low, high)
        if self.architecture not in ARCHITECTURES:
            raise AlignError(f"architecture {_shown(self.architecture)}: choose from {', '.join(ARCHITECTURES)}")
        if self.architecture != "plain" and self.downsample_times == 0:
            raise AlignError(f"downsample_times 0: an image branch of architecture {self.architecture} halves at least once")
        for name in ("pooled_decoder", "pooled_encoder"):
            if not isinstance(getattr(self, name), bool):
                raise AlignError(f"{name} {_shown(getattr(self, name))}: must be true or false")
        for kind in ("latent", "out"):
            channels, stride, fold = (getattr(self, f"{kind}_{what}") for what in ("channels", "stride", "fold"))
            if fold > 1 and self.architecture == "plain":
                raise AlignError(f"{kind}_fold {fold}: architecture plain does not work on unfolded latents")
            if channels % fold**2 or stride % fold:
                raise AlignError(
                    f"{kind}_fold {fold}: {channels} channels of stride {stride} do not hold {fold}x{fold} latents"
                )
        if self.draws and self.latent_stride & (self.latent_stride - 1):
            raise AlignError(
                f"latent_stride {self.latent_stride}: architecture {self.architecture} decodes latents of a stride that is a "
                "power of 2"
            )
        for stride in (self.out_stride, self.grid_stride):
            if max(self.latent_stride, stride) % min(self.latent_stride, stride):
                raise AlignError(f"strides {self.latent_stride} and {stride}: one must be a multiple of the other")

    @property
    def grid_stride(self) -> int:
        """Image pixels per place of the grid on which the blocks work."""
        return self.out_stride // self.out_fold

    @property
    def draws(self) -> bool:
        """Whether the module makes the image that it looks at, out of VAE1's latents."""
        return self.architecture != "plain" and self.input_types == ("latent",)

    def to_dict(self) -> dict:
        """Plain JSON values, from which `from_dict` makes the config again. What older versions do not know is left out where
        it changes nothing."""
        values = asdict(self) | {"input_types": list(self.input_types)}
        return {name: value for name, value in values.items() if name not in GRID_KEYS or value != getattr(AlignConfig, name)}

    @classmethod
    def from_dict(cls, values: dict) -> AlignConfig:
        """AlignError names a key that this version does not know: what it means for the module is unknown too."""
        return _from_dict(cls, values, "architecture")


class ResidualBlock(nn.Module):
    """x + conv(act(conv(act(x)))). No normalisation: the level of latents carries meaning."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return x + self.conv2(F.silu(self.conv1(F.silu(x))))


class ImageBranch(nn.Sequential):
    """Image -> features, halved `downsample_times` times; narrow where the grid is fine, `hidden_channels` at the end."""

    def __init__(self, hidden_channels: int, downsample_times: int):
        widths = [max(16, hidden_channels >> level) for level in reversed(range(max(1, downsample_times)))]
        widths[-1] = hidden_channels
        if downsample_times == 0:
            layers = [nn.Conv2d(3, hidden_channels, 3, padding=1)]
        else:
            # the first halving is free: 2x2 pixels become 12 channels, so no convolution runs at full resolution
            layers = [nn.PixelUnshuffle(2), nn.Conv2d(12, widths[0], 3, padding=1)]
        for narrow, wide in itertools.pairwise(widths):
            layers += [ResidualBlock(narrow), nn.SiLU(), nn.Conv2d(narrow, wide, 3, stride=2, padding=1)]
        super().__init__(*layers)


class StageBlock(nn.Module):
    """relu(x + conv(relu(conv(relu(conv(x)))))): the block of tiny autoencoders (TAESD), whose weights it can take. With
    `pooled`, TAEF2's: x + pool(x) takes the place of x, and its normalisation looks at the whole picture."""

    def __init__(self, channels: int, pooled: bool = False):
        super().__init__()
        self.conv = nn.Sequential(*_with_relu(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(3)))
        if pooled:
            wide = 4 * channels
            self.pool = nn.Sequential(
                nn.Conv2d(channels, wide, 1, bias=False),
                nn.GroupNorm(POOL_GROUPS, wide),
                nn.ReLU(),
                nn.Conv2d(wide, channels, 1, bias=False),
            )

    def forward(self, x):
        x = x + self.pool(x) if hasattr(self, "pool") else x
        return F.relu(x + self.conv(x))


class Clamp(nn.Module):
    """3 · tanh(x / 3), as tiny autoencoders' decoders do: latents beyond ±3 are noise to them."""

    def forward(self, x):
        return torch.tanh(x / 3) * 3


class PictureStages(nn.Sequential):
    """Latents -> the picture of them, (B, 3, H, W) in [-1, 1]: the decoder of a tiny autoencoder, layer by layer."""

    def __init__(self, config: AlignConfig):
        hidden, fold = config.hidden_channels, config.latent_fold
        layers = [nn.PixelShuffle(fold)] if fold > 1 else []
        layers += [Clamp(), nn.Conv2d(config.latent_channels // fold**2, hidden, 3, padding=1), nn.ReLU()]
        for doubled in range((config.latent_stride // fold).bit_length() - 1):
            layers += _stage_blocks(hidden, pooled=config.pooled_decoder and doubled == 0)
            layers += [nn.Upsample(scale_factor=2), nn.Conv2d(hidden, hidden, 3, padding=1, bias=False)]
        layers += [StageBlock(hidden), nn.Conv2d(hidden, 3, 3, padding=1), nn.Hardtanh()]
        super().__init__(*layers)


class ImageStages(nn.Sequential):
    """Image -> features, halved `downsample_times` times as a tiny autoencoder's encoder does it; cheaper where the grid is
    finest: no convolution runs at full resolution, and one block at half."""

    def __init__(self, hidden_channels: int, downsample_times: int):
        layers = [nn.PixelUnshuffle(2), nn.Conv2d(12, hidden_channels, 3, padding=1), nn.ReLU()]
        layers += [nn.Conv2d(hidden_channels, hidden_channels, 3, padding=1)]
        for halved in range(1, downsample_times):
            layers += [*_stage_blocks(hidden_channels, 1 if halved == 1 else STAGE_BLOCKS), _halving(hidden_channels)]
        super().__init__(*layers)


class WholeStages(nn.Sequential):
    """Image in [-1, 1] -> features, halved `downsample_times` times: a tiny autoencoder's encoder, layer by layer, without its
    last blocks."""

    def __init__(self, hidden_channels: int, downsample_times: int):
        layers = [UnitRange(), nn.Conv2d(3, hidden_channels, 3, padding=1)]
        for halved in range(downsample_times):
            layers += [*_stage_blocks(hidden_channels, STAGE_BLOCKS if halved else 1), _halving(hidden_channels)]
        super().__init__(*layers)


class UnitRange(nn.Module):
    """[-1, 1] -> [0, 1], on which tiny autoencoders work: beyond the edge they see black."""

    def forward(self, x):
        return x * 0.5 + 0.5


def _stage_blocks(channels: int, count: int = STAGE_BLOCKS, pooled: bool = False) -> list[nn.Module]:
    return [StageBlock(channels, pooled) for _ in range(count)]


def _halving(channels: int) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, 3, stride=2, padding=1, bias=False)


def _with_relu(layers) -> list[nn.Module]:
    """The layers with a ReLU between each two."""
    return [part for layer in layers for part in (nn.ReLU(), layer)][1:]


BRANCHES = {"plain": ImageBranch, "tiny": ImageStages, "whole": WholeStages}


class AlignModule(nn.Module):
    """VAE1's latents, the image, or both -> VAE2's latents. All latents are scaled latents.

    Architecture "plain":

        z1 (B, C1, H/s1, W/s1) ──┬────────────────────── linear 3x3 ──────────────────────┐
                                 └─ conv 3x3 ─┐                                           │
                                              + ── num_blocks residual blocks ── conv ──── + ── z2 (B, C2, H/s2, W/s2)
        image (B, 3, H, W) ── ImageBranch ────┘

    Architectures "tiny" and "whole", made of a tiny autoencoder's parts, whose weights are their start (see
    `training/vae_start.py`):

        z1 ── conv 3x3 ──────┐
                             + ── 3 + num_blocks stage blocks ── conv ── z2
        image ─ ImageStages ─┘  (of "whole": WholeStages)

    Without image among its inputs it looks at its own picture of z1, which PictureStages makes. They are VAE1's decoder and
    stay as they are: the rest sees from them how z1 looks, texture included. Who has that picture may pass it as `image`.

    No batch statistics, and convolutions only but in TAEF2's blocks: any size and aspect ratio, the same in training and in
    use. The buffers `ridge_weight` and `ridge_bias` keep the closed-form linear map that `remember_ridge` was given.

    `forward` computes and checks nothing, so that exporters can trace it with sizes left open; `check_inputs` says in words
    what does not fit.
    """

    def __init__(self, config: AlignConfig):
        super().__init__()
        self.config = config
        plain, hidden = config.architecture == "plain", config.hidden_channels
        if "latent" in config.input_types:
            folded = self._channels_on(config.out_stride)
            if plain:
                self.linear = nn.Conv2d(folded, config.out_channels, 3, padding=1)
            self.latent_in = nn.Conv2d(self._channels_on(config.grid_stride), hidden, 3, padding=1)
            self.register_buffer("ridge_weight", torch.zeros(config.out_channels, folded, 3, 3))
            self.register_buffer("ridge_bias", torch.zeros(config.out_channels))
        if config.draws:
            self.picture = PictureStages(config).requires_grad_(False)
        if config.draws or "image" in config.input_types:
            self.image_in = BRANCHES[config.architecture](hidden, config.downsample_times)
        if plain:
            self.blocks = nn.Sequential(*(ResidualBlock(hidden) for _ in range(config.num_blocks)), nn.SiLU())
        else:
            further = _stage_blocks(hidden, config.num_blocks)
            self.blocks = nn.Sequential(*_stage_blocks(hidden, pooled=config.pooled_encoder), *further)
        self.out = nn.Conv2d(hidden, config.out_channels // config.out_fold**2, 3, padding=1)

    def forward(self, latents: torch.Tensor | None = None, image: torch.Tensor | None = None) -> torch.Tensor:
        hidden = 0
        if self.config.draws and image is None:
            image = self.picture(latents)
        if "latent" in self.config.input_types:
            hidden = self.latent_in(self._on_grid(latents, self.config.grid_stride))
        if hasattr(self, "image_in"):
            hidden = hidden + self._features_on_grid(image)
        aligned = self.out(self.blocks(hidden))
        if self.config.out_fold > 1:
            aligned = F.pixel_unshuffle(aligned, self.config.out_fold)
        return aligned + self.linear(self.on_output_grid(latents)) if hasattr(self, "linear") else aligned

    def _features_on_grid(self, image: torch.Tensor) -> torch.Tensor:
        """The image's features, on the blocks' grid. Which operation leads there depends on the config alone, and no size is
        read but to hand it on: an exporter can leave sizes open."""
        features = self.image_in(image)
        halved, stride = 2**self.config.downsample_times, self.config.grid_stride
        if halved == stride:
            return features
        if halved < stride and stride % halved == 0:
            return F.avg_pool2d(features, stride // halved)  # bilinear would skip pixels of a finer grid
        grid = (image.shape[2] // stride, image.shape[3] // stride)
        return F.interpolate(features, size=grid, mode="area" if halved < stride else "bilinear")

    def check_inputs(self, latents: torch.Tensor | None = None, image: torch.Tensor | None = None) -> None:
        """AlignError unless `forward` can take these: latents (B, latent_channels, h, w), image (B, 3, H, W) in [-1, 1]."""
        config, grids = self.config, []
        for kind, name, tensor in (("latent", "latents", latents), ("image", "image", image)):
            if kind in config.input_types and tensor is not None and tensor.ndim != 4:
                raise AlignError(f"{name} of shape {tuple(tensor.shape)}: pass a batch, four dimensions")
        if "latent" in config.input_types:
            if latents is None:
                raise AlignError("this module takes VAE1's latents as input; pass latents=")
            if latents.shape[1] != config.latent_channels:
                raise AlignError(f"latents have {latents.shape[1]} channels; this module takes {config.latent_channels}")
            grids.append([side * config.latent_stride / config.out_stride for side in latents.shape[2:]])
        if "image" in config.input_types:
            if image is None:
                raise AlignError("this module takes the image as input; pass image=, float NCHW in [-1, 1]")
            if image.shape[1] != 3:
                raise AlignError(f"the image has {image.shape[1]} channels; this module takes RGB")
            if "latent" in config.input_types and len(latents) != len(image):
                raise AlignError(f"batches of {len(latents)} latents and of {len(image)} images: must be as many")
            grids.append([side / config.out_stride for side in image.shape[2:]])
        if grids[-1] != grids[0]:
            raise AlignError(
                f"an image of {image.shape[2]}x{image.shape[3]} px does not belong to latents of "
                f"{latents.shape[2]}x{latents.shape[3]}, which stand for {latents.shape[2] * config.latent_stride}x"
                f"{latents.shape[3] * config.latent_stride} px"
            )
        if not all(side > 0 and side.is_integer() for side in grids[0]):
            raise AlignError(
                f"the inputs cover {grids[0][0]:g}x{grids[0][1]:g} of VAE2's latents; image sides must be multiples of "
                f"{max(config.out_stride, config.latent_stride)} px"
            )

    def on_output_grid(self, latents: torch.Tensor) -> torch.Tensor:
        """VAE1's latents on VAE2's grid: folded into channels where VAE1's is finer, which loses nothing, repeated where it is
        coarser."""
        return self._on_grid(latents, self.config.out_stride)

    def _on_grid(self, latents: torch.Tensor, stride: int) -> torch.Tensor:
        finer, coarser = stride // self.config.latent_stride, self.config.latent_stride // stride
        if finer > 1:
            return F.pixel_unshuffle(latents, finer)
        return F.interpolate(latents, scale_factor=coarser, mode="nearest") if coarser > 1 else latents

    def _channels_on(self, stride: int) -> int:
        return self.config.latent_channels * max(1, stride // self.config.latent_stride) ** 2

    def hidden_weights(self) -> list[nn.Parameter]:
        """The weights of the convolutions of blocks and image branch, which an optimizer may treat as matrices."""
        branch = self.image_in.modules() if hasattr(self, "image_in") else ()
        return [layer.weight for layer in (*self.blocks.modules(), *branch) if isinstance(layer, nn.Conv2d)]

    def remember_ridge(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
        """Keep the closed-form linear map (a 3x3 convolution's weight and bias) beside the weights."""
        self.ridge_weight.copy_(weight)
        self.ridge_bias.copy_(bias)

    @torch.no_grad()
    def start_from_ridge(self) -> None:
        """Set the linear path to the remembered closed-form map and the deep path to zero: training starts where linear
        methods end. Nothing in the other architectures, which have no linear path."""
        if not hasattr(self, "linear"):
            return
        self.linear.weight.copy_(self.ridge_weight)
        self.linear.bias.copy_(self.ridge_bias)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    @property
    def has_ridge(self) -> bool:
        return "latent" in self.config.input_types and bool(self.ridge_weight.any())

    def linear_map(self, latents: torch.Tensor) -> torch.Tensor:
        """What the closed-form linear map alone makes of VAE1's latents."""
        return F.conv2d(self.on_output_grid(latents), self.ridge_weight, self.ridge_bias, padding=1)


# ----------------------------------------------------------------------------------------------------------------------
# Whose latents these are

# Second moments of scaled latents of photos, from tools/measure_spaces.py: {channels: {space: for each band of `bands_of`
# the upper triangle of a matrix, row by row}}.
MOMENTS = {
    4: {
        "sd15": (
            "0.254 0.0211 0.0372 0.0905 0.254 -0.0444 -0.00352 0.211 0.0922 0.188",
            "0.269 0.0363 0.0356 0.127 0.263 -0.0531 0.0146 0.182 0.0722 0.207",
            "0.222 0.0224 0.0348 0.107 0.187 -0.033 0.0264 0.146 0.0611 0.149",
        ),
        "sdxl": (
            "0.17 0.0619 0.0256 0.0531 0.227 -0.0139 0.0372 0.404 0.0891 0.209",
            "0.16 0.0847 0.0162 0.0729 0.219 -0.0218 0.0549 0.37 0.0808 0.197",
            "0.138 0.139 0.024 0.0721 0.296 -0.043 0.0786 0.44 0.0645 0.245",
        ),
    },
    16: {
        "sd3": (
            "0.524 -0.19 -0.259 0.152 0.196 -0.156 -0.389 -0.975 0.291 0.595 0.144 0.29 0.348 -0.186 -0.0483 0.339 0.401 "
            "0.136 0.0209 -0.338 0.24 0.349 1.07 -0.213 -0.48 -0.0249 -0.238 -0.15 0.00868 -0.00457 -0.356 0.519 0.265 "
            "-0.173 0.291 0.483 0.713 -0.313 -0.374 0.0249 -0.0936 -0.097 0.031 -0.132 -0.445 0.807 -0.0383 0.31 0.345 "
            "0.0602 -0.174 0.108 0.304 0.186 0.384 -0.259 -0.357 -0.304 0.619 -0.206 -0.368 -1.11 0.0801 0.497 0.123 0.278 "
            "0.179 -0.186 -0.0752 0.275 0.584 0.478 1.04 -0.391 -0.39 0.166 -0.0587 0.0229 -0.0856 -0.213 -0.565 0.921 "
            "1.59 -0.53 -0.83 0.0849 -0.322 -0.136 -0.0322 -0.219 -0.757 4.64 -1.11 -2.23 -0.113 -1.03 -0.67 0.088 -0.16 "
            "-1.67 0.638 0.565 -0.154 0.161 0.094 0.157 0.231 0.628 1.37 0.156 0.643 0.461 -0.123 0.0127 0.805 0.373 0.152 "
            "0.264 -0.273 -0.23 -0.139 0.504 0.288 -0.0901 -0.115 0.273 0.497 -0.246 -0.215 0.105 0.513 0.209 0.165 0.4 "
            "0.271 0.968",
        ),
        "flux1": (
            "0.419 0.152 -0.151 0.0533 -0.0557 0.0607 0.192 -0.135 0.156 -0.189 0.0596 -0.00389 0.131 -0.0644 -0.091 "
            "-0.00687 1.65 -0.253 0.0369 0.224 0.116 1.25 -0.72 0.134 0.495 0.174 0.493 0.773 -0.801 -0.418 -0.526 0.48 "
            "0.0297 -0.0508 -0.19 -0.204 0.111 -0.114 0.0556 -0.0809 0.0183 0.00693 -0.0303 0.107 -0.0516 0.217 -0.0316 "
            "-0.015 0.0787 -0.0946 0.0899 -0.107 -0.00211 0.0325 0.0654 -0.0519 -0.00937 0.0182 0.288 0.0691 0.189 -0.0403 "
            "-0.0484 0.172 -0.0237 0.0958 0.0578 -0.0611 -0.0689 -0.0054 0.317 0.0335 0.000942 0.034 -0.0392 0.0279 0.0133 "
            "-0.0874 -0.0218 -0.0977 0.104 1.34 -0.69 0.217 0.447 0.155 0.442 0.749 -0.616 -0.387 -0.426 0.627 -0.157 "
            "-0.186 -0.221 -0.208 -0.533 0.422 0.33 0.358 0.361 -0.157 0.0444 0.0679 0.122 -0.0904 -0.00311 0.0107 0.778 "
            "0.146 0.302 0.362 -0.358 -0.313 -0.449 0.38 -0.0134 0.216 -0.161 -0.293 -0.247 0.467 0.338 -0.384 -0.176 "
            "-0.237 0.769 -0.532 -0.376 -0.476 0.82 0.307 0.453 0.614 0.355 0.708",
        ),
    },
}
DEGREES = 3  # of freedom: latents of edges lie far from those of plain areas, as in Student's t distribution
CLEAR = {4: 0.35, 16: 3.0}  # a difference of log-likelihoods that right latents do not show, of drawings or noise neither
LEAST_DETAIL, LEAST_SHARE, LEAST_PLACES = 0.2, 0.25, 32  # plain areas say too little: how many places must have how much detail


def bands_of(latents: torch.Tensor) -> torch.Tensor | None:
    """What tells latent spaces apart, of scaled latents (B, C, h, w): numbers (bands, places, C) in float32; None where too
    few places have any detail.

    Of 16 channels the latents themselves; of 4 the details of a Haar transform in overlapping 2x2 windows (down, across,
    diagonal), for the colours of SD 1.5's and SDXL's latents are alike and their textures are not. The two outer rows and
    columns, where encoders see the picture's edge, do not count.
    """
    inner = latents.float()[:, :, 2:-2, 2:-2]
    a, b, c, d = inner[..., :-1, :-1], inner[..., :-1, 1:], inner[..., 1:, :-1], inner[..., 1:, 1:]
    details = torch.stack([a + b - c - d, a - b + c - d, a - b - c + d]) / 2
    busy = details.square().mean((0, 2)).sqrt() > LEAST_DETAIL  # (B, places down, places across)
    if busy.sum() < max(LEAST_PLACES, LEAST_SHARE * busy.numel()):
        return None
    return (details if latents.shape[1] == 4 else a[None]).movedim(2, -1)[:, busy]


@functools.cache
def moments_of(name: str) -> torch.Tensor:
    """The matrices (bands, C, C) of a space in `MOMENTS`."""
    channels = next(channels for channels, spaces in MOMENTS.items() if name in spaces)
    bands = []
    for triangle in MOMENTS[channels][name]:
        upper = torch.zeros(channels, channels, dtype=torch.float64)
        upper[tuple(torch.triu_indices(channels, channels))] = torch.tensor(
            [*map(float, triangle.split())], dtype=torch.float64
        )
        bands.append(upper + upper.triu(1).T)
    return torch.stack(bands)


def log_likelihood(bands: torch.Tensor, moments: torch.Tensor) -> float:
    """Of `bands_of`, per place, under Student's t distribution with these second moments about zero, but for a constant."""
    inverse = torch.linalg.inv(moments).to(bands)
    distance = torch.einsum("npc,ncd,npd->np", bands, inverse, bands)
    spread = torch.log1p(distance / DEGREES).mean(1).sum().item() * (DEGREES + bands.shape[2]) / 2
    return -spread - torch.logdet(moments).sum().item() / 2


def doubt_about(latents: torch.Tensor, space: LatentSpace) -> str | None:
    """One line where scaled latents (B, C, h, w) look like those of another named space than `space`; None where they look
    right, or where nothing can be told: other channels, a space whose statistics are not known here, too plain a picture."""
    channels = latents.shape[1]
    known = MOMENTS.get(channels, {})
    bands = bands_of(latents) if space.name in known else None
    if bands is None:
        return None
    likely = {name: log_likelihood(bands, moments_of(name)) for name in known}
    best = max(likely, key=likely.get)
    if not likely[best] - likely[space.name] > CLEAR[channels]:
        return None
    return (
        f"these latents look like those of {best}, and this module takes those of {space.name} (log-likelihood per latent "
        f"{likely[best]:.2f} against {likely[space.name]:.2f}): encode with a VAE of {space.name}, or use a module for {best}"
    )


# ----------------------------------------------------------------------------------------------------------------------
# The pipeline


def require_pixel_range(image: torch.Tensor | None) -> None:
    """AlignError for an image whose values are 8-bit levels. One in [0, 1] cannot be told from one in [-1, 1]."""
    if image is not None and image.numel() and (largest := image.detach().abs().max().item()) > LARGEST_PIXEL:
        raise AlignError(f"image values up to {largest:g}: pass values in [-1, 1]; 8-bit levels become them by / 127.5 - 1")


class AlignPipeline:
    """A trained module and the two latent spaces that it joins. Works without either VAE.

    Attributes:
        module: the `AlignModule`. The dtype of its weights is the dtype in which `translate` computes.
        space1, space2: the `LatentSpace`s of VAE1 and VAE2; unnamed ones where the constructor is given none.
        figures: what an evaluation measured of the module, as plain JSON values; {} where nothing is known.
    """

    def __init__(
        self,
        module: AlignModule,
        space1: LatentSpace | None = None,
        space2: LatentSpace | None = None,
        figures: dict | None = None,
    ):
        config = module.config
        self.module = module.to(memory_format=torch.channels_last)  # the faster layout on CPUs and on tensor cores
        self.space1 = space1 or LatentSpace.from_scale(None, config.latent_channels, config.latent_stride)
        self.space2 = space2 or LatentSpace.from_scale(None, config.out_channels, config.out_stride)
        self.figures = figures or {}
        self._has_doubted = False
        _require_own_spaces(config, self.space1, self.space2)

    @property
    def config(self) -> AlignConfig:
        return self.module.config

    @property
    def device(self) -> torch.device:
        return self.module.out.weight.device

    @property
    def uses_image(self) -> bool:
        return "image" in self.config.input_types

    @property
    def uses_latents(self) -> bool:
        return "latent" in self.config.input_types

    def to(self, *args, **kwargs) -> AlignPipeline:
        """Move the module as `torch.nn.Module.to` does: to a device, a floating-point dtype, or both. AlignError for a dtype
        in which the module cannot compute."""
        for value in (*args, *kwargs.values()):
            if isinstance(value, torch.dtype) and value not in COMPUTE_DTYPES:
                raise AlignError(f"dtype {value}: the module computes in {', '.join(map(str, COMPUTE_DTYPES))}")
        self.module.to(*args, **kwargs)
        return self

    @torch.no_grad()
    def translate(
        self,
        latents: torch.Tensor | None = None,
        image: torch.Tensor | None = None,
        raw: bool = False,
        size: tuple[int, int] | None = None,
    ) -> torch.Tensor:
        """VAE1's latents (B, C1, h, w) -> VAE2's latents (B, C2, h', w'), with the device and dtype of what came in.

        Args:
            latents: VAE1's scaled latents, in any shape that `LatentSpace.from_pipeline` takes; or with `raw` its raw latents,
                with or without a dimension of one frame.
            image: float NCHW in [-1, 1]; modules that were trained with the image need it, the others ignore it.
            size: (height, width) of the image in pixels, for packed latents.
            raw: raw latents in, raw latents out. AlignError where the file does not say what a space's raw latents are.

        The computation runs on the module's device and in the dtype of its weights. Latents whose statistics are those of
        another named space with as many channels are translated all the same, and the log says so, once for each pipeline.
        """
        given = latents if self.uses_latents else image
        if given is None:
            self.module.check_inputs(latents, image)
        latents, image = latents if self.uses_latents else None, image if self.uses_image else None
        for name, tensor in (("latents", latents), ("image", image)):
            if tensor is not None and not (isinstance(tensor, torch.Tensor) and tensor.is_floating_point()):
                kind = getattr(tensor, "dtype", type(tensor).__name__)
                raise AlignError(f"{name} of type {kind}: pass a tensor of floating-point numbers")
        require_pixel_range(image)
        if raw:
            self._require_maps()
        if latents is not None:
            if not raw:
                latents = self.space1.from_pipeline(latents, size)
            elif latents.ndim == 5:
                self.space1._require_one_frame(tuple(latents.shape), latents.shape[2])
                latents = latents[:, :, 0]
            self._require_channels(latents, raw)
            latents = self.space1.to_scaled(latents.float()) if raw else latents
            self._doubt(latents)
        weight = self.module.out.weight
        latents, image = (each if each is None else each.to(weight.device, weight.dtype) for each in (latents, image))
        self.module.check_inputs(latents, image)
        translated = self.module(latents, image)
        return (self.space2.to_raw(translated.float()) if raw else translated).to(given.device, given.dtype)

    def _doubt(self, latents: torch.Tensor) -> None:
        """Say once, in one line of the log, that scaled latents look like those of another space than VAE1's."""
        doubt = None if self._has_doubted else doubt_about(latents, self.space1)
        if doubt:
            self._has_doubted = True
            log.warning("%s", doubt)

    def _require_channels(self, latents: torch.Tensor, raw: bool) -> None:
        """AlignError that names the space to which latents of another number of channels may belong."""
        own, other = (space.channels // (space.fold**2 if raw else 1) for space in (self.space1, self.space2))
        if latents.ndim == 4 and latents.shape[1] != own:
            named = CHANNELS.get(latents.shape[1])
            hint = f"; latents of {named} have {latents.shape[1]}" if named else ""
            if latents.shape[1] == other:
                hint = f"; these look like latents of {self.space2}, which this module gives and does not take"
            raise AlignError(f"latents have {latents.shape[1]} channels; this module takes {own}: {self.space1}{hint}")

    def _require_maps(self) -> None:
        spaces = {"VAE1": self.space1, "VAE2": self.space2} if self.uses_latents else {"VAE2": self.space2}
        for vae, space in spaces.items():
            if not space.map_is_known:
                raise AlignError(
                    f"raw=True: the file does not name {vae}'s latent space, so its raw latents are unknown. Pass scaled "
                    f"latents, or set pipeline.space{vae[-1]} to a LatentSpace"
                )

    def save_pretrained(self, path: str | os.PathLike, **more) -> Path:
        """Write the module, both spaces and the figures as one .safetensors file, and return its path.

        Args:
            path: a file if it ends in .safetensors, else a folder, which gets `model.safetensors`, a `config.json` with
                the same description, and a copy of this file, with which diffusers' `AutoModel` loads the folder. A file
                that is there is replaced, atomically.
            more: further plain JSON values for the description.

        The weights keep their dtype. Needs safetensors and numpy. AlignError when the file cannot be written.
        """
        path = Path(path)
        file = path if path.suffix == ".safetensors" else path / PRETRAINED_NAME
        description = {
            "format": CHECKPOINT_FORMAT,
            "format_number": FORMAT_NUMBER,
            "align_config": self.config.to_dict(),
            "space1": self.space1.to_dict(),
            "space2": self.space2.to_dict(),
            "figures": self.figures,
            **more,
        }
        try:
            content = _safetensors_bytes(self.module.state_dict(), description)
            if file != path:
                loading = {
                    "_class_name": AlignPipeline.__name__,
                    "auto_map": {"AutoModel": f"vae_align.{AlignPipeline.__name__}"},
                }
                text = json.dumps(loading | description, indent=2, ensure_ascii=False, allow_nan=False)
                _write_atomically(path / "config.json", (text + "\n").encode())
                _write_atomically(path / "vae_align.py", Path(__file__).read_bytes())
            _write_atomically(file, content)
        except ImportError as error:
            raise AlignError(f"{file}: cannot be written without {error.name}; install it") from None
        except OSError as error:
            raise AlignError(f"{file}: cannot be written ({_one_line(error)}); name another place") from None
        except (TypeError, ValueError) as error:  # of json: NaN, infinity, or an object that JSON does not know
            raise AlignError(
                f"{file}: its figures must be plain JSON values, None where undefined ({_one_line(error)})"
            ) from None
        return file

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike,
        into: str | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        **options,
    ) -> AlignPipeline:
        """The pipeline of a .safetensors file, of a folder that `save_pretrained` wrote, or of such a folder on the hub; or of
        two latent spaces, by their names, from the zoo beside this file.

        Args:
            path: a file, a folder, or the name of a model on the hub, owner/name, where there is no such file or folder. With
                `into` the name of VAE1's latent space, such as "sd15", or "image" for a module that takes the image instead.
            into: the name of VAE2's latent space, such as "flux1". `zoo_pairs` lists the names.
            device: of the module; dtype: of its weights, and so of the computation, whatever they are stored in.
            options: `cache_dir`, `force_download`, `local_files_only`, `revision` and `token` of the hub's download, and
                `torch_dtype`, diffusers' name for `dtype`. What else `AutoModel` hands on changes nothing here.
        """
        dtype = options.get("torch_dtype") or dtype
        if into is not None:
            return _pair_of_zoo(cls, path, into).to(device, dtype)
        name, path = str(path), Path(path)
        if HUB_NAME.fullmatch(name) and path.suffix not in (".safetensors", ".pth") and not os.path.lexists(path):
            path = _download(name, {option: options[option] for option in HUB_OPTIONS if options.get(option) is not None})
        return cls._from_content(read_checkpoint(path / PRETRAINED_NAME if os.path.isdir(path) else path), device, dtype)

    @classmethod
    def joined(cls, first: AlignPipeline | None, second: AlignPipeline) -> AlignPipeline:
        """The pipeline from `first`'s VAE1 to `second`'s VAE2: `first` draws the picture of its latents, and `second` makes of
        it the latents that it makes of an image.

        Args:
            first: of a module that draws, see `AlignConfig.draws`; None for a pipeline that takes the image instead.
            second: of another architecture than plain, trained without VAE1's latents or with none but its picture of them.

        AlignError where the two do not fit.
        """
        module = _joined_modules(first and first.module, second.module)
        return cls(module.eval(), first.space1 if first else second.space1, second.space2)

    @classmethod
    def from_checkpoint(
        cls, path: str | os.PathLike, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
    ) -> AlignPipeline:
        """The pipeline of a checkpoint of a training run (.pth), of a .safetensors file, or of the newest checkpoint in a
        folder. `device` and `dtype`: see `from_pretrained`. Executes no code from the file."""
        return cls._from_content(read_checkpoint(path), device, dtype)

    @classmethod
    def _from_content(cls, content: dict, device, dtype) -> AlignPipeline:
        return cls(module_of(content), *spaces_of(content), content["metrics"]).to(device, dtype)


def _joined_modules(first: AlignModule | None, second: AlignModule) -> AlignModule:
    """See `AlignPipeline.joined`; its weights are copies, its own map from latents is zero."""
    if first is not None and not first.config.draws:
        raise AlignError(
            "the first module draws no picture of its latents; join one of architecture tiny or whole, from latents alone"
        )
    if second.config.architecture == "plain" or not hasattr(second, "image_in"):
        raise AlignError("the second module looks at no picture; join one of architecture tiny or whole")
    if hasattr(second, "latent_in") and any(bool(weight.any()) for weight in second.latent_in.parameters()):
        raise AlignError("the second module was trained with latents of its own VAE1, so no other's can take their place")
    config, state = replace(second.config, input_types=("image",)), {}
    if first is not None:
        names = ("hidden_channels", "latent_channels", "latent_stride", "latent_fold", "pooled_decoder")
        own = {name: getattr(first.config, name) for name in names}
        if own["hidden_channels"] != config.hidden_channels:
            raise AlignError(
                f"hidden_channels {own['hidden_channels']} and {config.hidden_channels}: join two of the same width"
            )
        config = replace(config, input_types=("latent",), **own)
        state = {name: tensor for name, tensor in first.state_dict().items() if name.startswith("picture.")}
    module = AlignModule(config)
    for name, tensor in second.state_dict().items():
        if name.startswith(("image_in.", "blocks.", "out.")):
            state[name] = tensor
    if first is not None:
        state |= {name: torch.zeros_like(tensor) for name, tensor in module.state_dict().items() if name not in state}
    module.load_state_dict(state)
    return module


def module_of(content: dict) -> AlignModule:
    """The module of a checkpoint's content (see `read_checkpoint`), in eval mode, float32, on the CPU."""
    module = AlignModule(AlignConfig.from_dict(content["align_config"]))
    module.load_state_dict(content["state_dict"])
    return module.eval()


def spaces_of(content: dict) -> tuple[LatentSpace, LatentSpace]:
    """The latent spaces of VAE1 and VAE2 that a checkpoint's content records; unnamed ones in files that are older than
    names, with the scale and shift that those files hold."""

    def space(recorded):
        if "space" in recorded:
            return LatentSpace.from_dict(recorded["space"])
        scale, shift = recorded.get("scaling_factor", 1.0), recorded.get("shift_factor", 0.0)
        if not (_is_finite(scale) and _is_finite(shift) and scale > 0):
            raise AlignError(f"its scaling_factor {_shown(scale)} and shift_factor {_shown(shift)} are no scale and shift")
        return LatentSpace.from_scale(None, recorded["channels"], recorded["stride"], scale, shift)

    return space(content["vae1"]), space(content["vae2"])


def _require_own_spaces(config: AlignConfig, space1: LatentSpace, space2: LatentSpace) -> None:
    for space, side in ((space1, "latent"), (space2, "out")):
        for name in ("channels", "stride"):
            own, needed = getattr(space, name), getattr(config, f"{side}_{name}")
            if own != needed:
                raise AlignError(f"{name} {own} of the latent space {space} contradicts the module's {side}_{name} {needed}")


# ----------------------------------------------------------------------------------------------------------------------
# The zoo: a module from each latent space into itself, of which any two make a pair

ZOO = Path(__file__).resolve().parent / "assets" / "zoo"
ZOO_NAME = "zoo.json"
IMAGE = "image"  # in place of VAE1's space, for a module that takes the image


def read_zoo(folder: str | os.PathLike = ZOO) -> dict:
    """The manifest of a zoo. `spaces`: {name: {"file", "sha256", …}}; `pairs`: {VAE1's: {VAE2's: {"figures", …}}}.
    AlignError where there is none."""
    path = Path(folder) / ZOO_NAME
    try:
        manifest = json.loads(path.read_text("utf-8"))
        if not (isinstance(manifest["spaces"], dict) and isinstance(manifest["pairs"], dict)):
            raise ValueError("no spaces or no pairs in it")
    except FileNotFoundError:
        raise AlignError(f"{path}: no such file, so no module is known by its spaces' names; name a module's file") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AlignError(f"{path}: cannot be read ({_one_line(error)}); fetch it anew") from None
    return manifest


def zoo_pairs(folder: str | os.PathLike = ZOO) -> list[tuple[str, str]]:
    """What `AlignPipeline.from_pretrained` takes by the names of two spaces, [(VAE1's, VAE2's)]; [] where there is no zoo."""
    if not (Path(folder) / ZOO_NAME).is_file():
        return []
    return [(one, into) for one, pairs in read_zoo(folder)["pairs"].items() for into in pairs]


def _pair_of_zoo(cls, one: str, into: str, folder: Path = ZOO) -> AlignPipeline:
    manifest = read_zoo(folder)
    pair = manifest["pairs"].get(str(one), {}).get(str(into))
    if pair is None:
        known = ", ".join(f"{one} to {into}" for one, into in zoo_pairs(folder))
        raise AlignError(f"{_shown(str(one))} to {_shown(str(into))}: no such pair; there are {known}")

    def of(name):
        return AlignPipeline.from_checkpoint(Path(folder) / manifest["spaces"][name]["file"])

    joined = cls.joined(None if one == IMAGE else of(one), of(into))
    joined.figures = pair.get("figures", {})
    return joined


# ----------------------------------------------------------------------------------------------------------------------
# The file


def checkpoints_in(folder: str | os.PathLike) -> list[Path]:
    """The training checkpoints in a folder, newest first; a renamed copy has no time stamp and does not count."""
    return sorted(Path(folder).glob(f"{CHECKPOINT_PREFIX}_[0-9]*_[0-9]*.pth"), reverse=True)


def newest_checkpoint(folder: str | os.PathLike) -> tuple[Path, dict]:
    """(path, content) of the newest undamaged checkpoint in `folder`, or of its `model.safetensors` where it has no such
    training checkpoint; AlignError if there is neither."""
    failure = f"no {CHECKPOINT_PREFIX}_YYYYMMDD_HHMMSS.pth and no {PRETRAINED_NAME} in this folder"
    pretrained = Path(folder) / PRETRAINED_NAME
    found = checkpoints_in(folder) + [pretrained] * os.path.lexists(pretrained)
    for path in found:
        try:
            return path, read_checkpoint(path)
        except AlignError as error:
            failure = str(error)
            if path != found[-1]:
                log.warning("%s; trying the one before it", error)
    others = sorted(path.name for path in Path(folder).glob("*") if path.suffix in (".pth", ".safetensors"))
    remedy = "" if found or not others else f"; to use {', '.join(others[-2:])} name the file"
    raise AlignError(f"checkpoint {folder}: {failure}{remedy}")


def _download(name: str, options: dict) -> Path:
    """The weights of a model on the hub, from the hub client's cache where they are in it."""
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise AlignError(f"{name}: no such folder, and for the hub the package huggingface_hub is needed; install it") from None
    try:
        return Path(hf_hub_download(name, PRETRAINED_NAME, **options))
    except Exception as error:  # no network, no such model, no rights, a full disk: the client has no common base for them
        raise AlignError(f"{name}: no such folder here, and not to be had from the hub ({_one_line(error)})") from None


def read_checkpoint(path: str | os.PathLike) -> dict:
    """The content of a checkpoint as plain values and tensors on the CPU; of a folder, its newest undamaged one.

    A .pth file holds what a training run wrote. A .safetensors file gives a dict of the same keys, without what it does not
    carry: `config` is empty, `step` and `epoch` are 0, `metrics` are its figures. In both `align_config` and `state_dict`
    make the module (`module_of`), and `vae1` and `vae2` say what is known of the VAEs (`spaces_of`).

    AlignError if the file is not ours, newer than this code, or damaged: checksums are compared, and the parts must belong
    together, before any memory is taken for what the file claims. Executes no code from the file.
    """
    path = Path(path)
    if os.path.isdir(path):  # `Path.is_dir` fails for too long a name
        return newest_checkpoint(path)[1]
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe waits for a writer, a device may never end
            raise OSError("a pipe, socket or device, not a file")
        with open(path, "rb") as file:
            start = file.read(9)
    except FileNotFoundError:
        raise AlignError(f"checkpoint {path}: no such file") from None
    except (OSError, ValueError) as error:
        raise AlignError(f"checkpoint {path}: cannot be read ({_one_line(error)})") from None
    safetensors = path.suffix == ".safetensors" or start[8:] == b"{"
    content = _read_safetensors(path) if safetensors else _read_torch(path, zipped=start.startswith(b"PK"))
    if not isinstance(content, dict) or content.get("format") != CHECKPOINT_FORMAT:
        raise AlignError(f"checkpoint {path}: not a checkpoint of this tool; give a file that its training or export wrote")
    try:
        number = content.get("format_number", 0)
        _require_whole("format_number", number, 0, 1 << 40)
        if number > FORMAT_NUMBER:
            raise AlignError(f"its format is number {number}, this code knows {FORMAT_NUMBER}; use a newer version of it")
        if safetensors:
            content = _as_training_content(content)
        _check_content(content)
    except AlignError as error:
        raise AlignError(f"checkpoint {path}: {error}") from None
    except (AttributeError, KeyError, TypeError):
        raise AlignError(f"checkpoint {path}: incomplete; it was not written by this tool") from None
    return content


def _read_torch(path: Path, zipped: bool):
    if zipped:
        _compare_checksums(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        why = " (it asks to run code, which is refused)" if "GLOBAL" in str(error).upper() else ""
        raise AlignError(f"checkpoint {path}: not a checkpoint of this tool{why}") from None
    except Exception as error:  # truncated or foreign files fail inside zipfile, pickle or torch, each with its own error
        raise AlignError(f"checkpoint {path}: damaged or not a checkpoint ({_one_line(error)})") from None


def _compare_checksums(path: Path) -> None:
    """AlignError unless every part of a zipped checkpoint matches the CRC-32 that zip stores and `torch.load` ignores."""
    try:
        with zipfile.ZipFile(path) as parts:
            compressed = any(part.compress_type != zipfile.ZIP_STORED for part in parts.infolist())
            damaged = None if compressed else parts.testzip()
    except Exception as error:  # a damaged zip makes zipfile, struct and the codecs fail, each in its own way
        raise AlignError(f"checkpoint {path}: damaged ({_one_line(error)})") from None
    if compressed:
        raise AlignError(f"checkpoint {path}: not a checkpoint of this tool, which compresses nothing")
    if damaged:
        raise AlignError(f"checkpoint {path}: damaged ({damaged} does not match its checksum)")


def _read_safetensors(path: Path):
    """The description in the file's metadata, with the tensors as its `state_dict`; None for a file without one."""
    try:
        from safetensors import safe_open
    except ImportError:
        raise AlignError(f"checkpoint {path}: reading a .safetensors file needs the package safetensors; install it") from None
    try:
        with safe_open(path, "pt") as file:
            description = json.loads((file.metadata() or {}).get("vae_align", "null"))
            if not isinstance(description, dict):
                return None
            description["state_dict"] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        checksum = _crc_of_tensors(path.read_bytes())
    except Exception as error:  # whatever is wrong with the file, safetensors and json have errors of their own for it
        raise AlignError(f"checkpoint {path}: damaged or not a checkpoint ({_one_line(error)})") from None
    if description.get("crc32") != checksum:
        raise AlignError(f"checkpoint {path}: damaged (its tensors do not match their checksum)")
    return description


def _safetensors_bytes(tensors: dict, description: dict) -> bytes:
    """A .safetensors file with `description` as JSON in its metadata, beside a checksum of the tensors."""
    from safetensors.torch import save

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    description = description | {"crc32": _crc_of_tensors(save(tensors))}
    return save(tensors, {"format": "pt", "vae_align": json.dumps(description, allow_nan=False)})


def _crc_of_tensors(file: bytes) -> int:
    """CRC-32 of what follows a .safetensors file's header, whose length is in the file's first 8 bytes."""
    return zlib.crc32(memoryview(file)[8 + int.from_bytes(file[:8], "little") :])


def _as_training_content(description: dict) -> dict:
    """A .safetensors file's description with the keys of a training checkpoint."""
    vaes = {}
    for number, recorded in enumerate(description.get("vaes") or [None, None], 1):
        space = LatentSpace.from_dict(description[f"space{number}"])
        vaes[f"vae{number}"] = {
            "path": recorded,
            "subfolder": None,
            "channels": space.channels,
            "stride": space.stride,
            "space": space.to_dict(),
        }
    return {
        "format": CHECKPOINT_FORMAT,
        "format_number": description["format_number"],
        "align_config": description["align_config"],
        "state_dict": description["state_dict"],
        "config": {},
        "step": 0,
        "epoch": 0,
        "metrics": description["figures"],
    } | vaes


def _check_content(content: dict) -> None:
    """AttributeError, KeyError, TypeError or an AlignError unless a checkpoint's parts are of their kinds and agree."""
    config = AlignConfig.from_dict(content["align_config"])
    if not all(isinstance(content[name], dict) for name in ("state_dict", "vae1", "vae2", "config", "metrics")):
        raise TypeError
    for name, side in (("vae1", "latent"), ("vae2", "out")):
        recorded = content[name]
        if not all(isinstance(recorded[part], (str, type(None))) for part in ("path", "subfolder")):
            raise TypeError
        if any(recorded[part] != getattr(config, f"{side}_{part}") for part in ("channels", "stride")):
            raise AlignError(f"its description of {name} contradicts its module's")
    _require_own_spaces(config, *spaces_of(content))
    _require_whole("its step", content["step"], 0, 1 << 40)
    for name in ("seed", "image_size"):
        _require_whole(f"its {name}", content["config"].get(name, 0), 0, 1 << 40)
    if not isinstance(content["epoch"], (int, float)) or not isinstance(content["config"].get("precision", ""), str):
        raise TypeError
    _check_weights(content["state_dict"], config)


def _check_weights(weights: dict, config: AlignConfig) -> None:
    """AlignError unless these are a module's weights and buffers, of its shapes and finite."""
    misfit = "its weights do not fit its own description"
    if config.num_blocks > len(weights):  # also keeps what follows short
        raise AlignError(misfit)
    with torch.device("meta"):  # shapes without memory
        expected = AlignModule(config).state_dict()
    if weights.keys() != expected.keys():
        strange = sorted(map(str, weights.keys() ^ expected.keys()))
        raise AlignError(f"{misfit} ({strange[0]} is missing or has no place)")
    for name, tensor in weights.items():
        if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided or not tensor.is_floating_point():
            raise AlignError(f"{misfit} ({name} holds no weights)")
        if tensor.shape != expected[name].shape:
            raise AlignError(f"{misfit} ({name} is {tuple(tensor.shape)}, not {tuple(expected[name].shape)})")
        if tensor.is_meta or not tensor.isfinite().all():
            raise AlignError(f"{name} holds values that are not finite; give an earlier checkpoint")


def _write_atomically(path: Path, content: bytes) -> None:
    """A reader sees the old file or the whole new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# ----------------------------------------------------------------------------------------------------------------------
# Values and words


def _from_dict(cls, values: dict, what: str):
    """`cls(**values)`; AlignError names a key that `cls` does not know."""
    unknown = sorted(map(str, values.keys() - {field.name for field in fields(cls)}))
    if unknown:
        raise AlignError(f"unknown key {_shown(unknown[0])} in its {what}: written by a newer version, or by another tool")
    return cls(**values)


def _require_whole(name: str, value, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise AlignError(f"{name} {_shown(value)}: must be a whole number from {low} to {high}")


def _is_finite(value) -> bool:
    return not isinstance(value, bool) and isinstance(value, (int, float)) and abs(value) < 1e30 and math.isfinite(value)


def _shown(value) -> str:
    """`value` as an error message shows it: its repr, of at most a few hundred characters."""
    short = reprlib.Repr()
    short.maxstring = short.maxlong = short.maxother = 100
    return short.repr(value)


def _one_line(error: BaseException, limit: int = 300) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"
