"""Latent spaces, the align modules, the pipeline that uses them, and the file that holds one.

This file needs torch alone, so any program can copy it. It imports safetensors only inside the functions that read or write a
.safetensors file, and huggingface_hub only to download a module.

    pipeline = AlignPipeline.pair("sd15", "flux1")             # from the zoo; or from_pretrained("module.safetensors")
    flux_latents = pipeline.translate(sd15_latents)            # scaled latents, as diffusers' denoisers take them
    flux_latents = pipeline.translate(sd15_latents, raw=True)  # raw latents, as VAEs give them and ComfyUI keeps them

Latents are *scaled* latents, the space in which diffusion models work, except where a name says `raw`.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import hashlib
import io
import itertools
import json
import logging
import math
import os
import re
import reprlib
import stat
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

log = logging.getLogger(__name__)

CHECKPOINT_FORMAT = "vae-align"
FORMAT_NUMBER = 1  # of both kinds of file; files without a number are older and read the same
CHECKPOINT_PREFIX = "align_pipeline"
PRETRAINED_NAME = "model.safetensors"  # the weights in a folder that `AlignPipeline.save_pretrained` writes
LARGEST_PIXEL = 8.0  # images in [-1, 1] stay below it, even unclamped ones from a VAE's decoder; 8-bit levels do not
STAGE_BLOCKS = 3  # a tiny autoencoder has this many blocks on each grid
POOL_GROUPS = 4  # groups of the normalisation in TAEF2's pooled blocks
GIT_LFS = b"version https://git-lfs"  # so begins the pointer that git leaves in place of a large file
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)  # owner/name
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "token")  # of `hf_hub_download`
COMPUTE_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
PIXELS_AT_ONCE = {"cpu": 256 * 256, "cuda": 1024 * 1024, "mps": 1024 * 1024}  # of a batch in `translate`; or one picture
LARGEST = {"channels": 8192, "stride": 4096, "fold": 16, "blocks": 1000, "times": 12}  # by the last word of a number's name
GRID_KEYS = ("latent_fold", "out_fold", "pooled_decoder", "pooled_encoder")
CHANNELS = {  # of scaled latents: the named spaces that have this number
    4: "sd15, sdxl, playground25",
    12: "mochi",
    16: "sd3, flux1, kandinsky5, glm-image, wan21, hunyuan-video, cogvideox, cogvideox-5b, easyanimate, cosmos1",
    32: "sana, hunyuan-video-1.5",
    48: "wan22",
    64: "hunyuan-image, qwen-image-2.1",
    128: "flux2, ltx, ltx2",
}
NORMALISED_BY_COMFYUI = {"flux2", "ltx", "ltx2"}  # its VAEs of these give scaled latents, folded where the family folds
OF_VIDEO = {  # spaces of VAEs whose latents have an axis of frames
    "wan21", "wan22", "qwen-image-2.1", "hunyuan-video", "hunyuan-video-1.5", "ltx", "ltx2", "mochi", "cosmos1", "cogvideox",
    "cogvideox-5b", "easyanimate",
}  # fmt: skip


class AlignError(ValueError):
    """Inputs or a file that cannot be used. The message is one printable line: the thing, its value, the remedy."""

    def __init__(self, message: str):
        super().__init__("".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in message.strip()))


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
        fold: `fold` x `fold` raw latents become one scaled latent with `fold**2` times the channels, in the order
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
            raise AlignError(f"latent space {shown(self.name)}: its name must be text of at most 64 letters")
        _require_whole_numbers(self, f" of latent space {self.name}")
        if self.channels % self.fold**2:
            raise AlignError(f"latent space {self.name}: {self.channels} channels cannot hold {self.fold}x{self.fold} latents")
        for name in ("mean", "std"):
            values = getattr(self, name)
            if not isinstance(values, (list, tuple)) or len(values) != self.channels or not all(map(is_finite, values)):
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
        """Whether raw latents are known. An unnamed space whose map does nothing belongs to a tiny autoencoder, which works
        on scaled latents and does not say what the raw latents of its space are."""
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
        return (folded - _per_channel(self.mean, raw.dtype, raw.device)) / _per_channel(self.std, raw.dtype, raw.device)

    def to_raw(self, scaled: torch.Tensor) -> torch.Tensor:
        """The inverse of `to_scaled`."""
        if scaled.ndim != 4 or scaled.shape[1] != self.channels:
            raise AlignError(f"scaled latents of shape {tuple(scaled.shape)}: the space {self} has {self.channels} channels")
        dtype, device = scaled.dtype, scaled.device
        folded = scaled * _per_channel(self.std, dtype, device) + _per_channel(self.mean, dtype, device)
        return F.pixel_shuffle(folded, self.fold) if self.fold > 1 else folded

    def from_pipeline(self, latents: torch.Tensor, size: tuple[int, int] | None = None) -> torch.Tensor:
        """Scaled latents as a diffusers pipeline returns them with `output_type="latent"` -> (B, channels, h, w).

        These shapes are taken: (B, channels, h, w); with one frame (B, channels, 1, h, w), from Wan and other video models,
        or (B, 1, channels, h, w), from CogVideoX; channels last (B, 1, h, w, channels), from Kandinsky 5; packed tokens
        (B, h·w, channels), from FLUX.2 and LTX-Video; packed 2x2 latents (B, h/2·w/2, 4·channels), from FLUX.1 and
        Qwen-Image. Tokens do not tell their grid: `size` is the image's (height, width) in pixels. AlignError for another
        shape, for several frames, or for a size that does not fit.
        """
        shape = tuple(latents.shape)
        if latents.ndim == 5 and self.channels in shape[1:]:
            latents = self.frames_from_pipeline(latents)
            if latents.shape[2] != 1:
                raise AlignError(f"latents of shape {shape} are {latents.shape[2]} frames of a video; pass one, a picture's")
            return latents[:, :, 0]
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

    def are_packed(self, latents: torch.Tensor, size: tuple[int, int] | None = None) -> bool:
        """Whether scaled latents of three dimensions are packed tokens (B, h·w, C), not one picture's (C, h, w): by a token's
        length or a batch of one. Where both fit, they are packed only if the image's `size` is given."""
        is_token = latents.shape[0] == 1 or latents.shape[2] in (self.channels, 4 * self.channels)
        return is_token and (size is not None or latents.shape[0] != self.channels)

    def frames_from_pipeline(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents with an axis of frames, in an order that `from_pipeline` takes -> (B, channels, frames, h, w)."""
        order = (1, 2, 4) if (self.name or "").startswith("cogvideox") else (1, 4, 2)  # a side may equal channels
        axis = next((axis for axis in order if latents.shape[axis] == self.channels), 1)
        return latents.movedim(axis, 1)

    def to_dict(self) -> dict:
        """Plain JSON values, from which `from_dict` makes the space again."""
        return asdict(self) | {"mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_dict(cls, values: dict) -> LatentSpace:
        return _from_dict(cls, values, "latent space")


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)  # a tensor made in inference mode would break a later backward pass
def _per_channel(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """(1, C, 1, 1). Cached, because copying it to a GPU waits for the GPU."""
    return torch.tensor(values, dtype=dtype, device=device).view(1, -1, 1, 1)


def pack(latents: torch.Tensor) -> torch.Tensor:
    """Scaled latents (B, C, h, w) -> the tokens (B, h/2 · w/2, 4 C) of FLUX.1's, Chroma's and Qwen-Image's transformers."""
    if latents.ndim != 4 or any(side % 2 for side in latents.shape[2:]):
        raise AlignError(f"latents of shape {tuple(latents.shape)}: only (B, C, h, w) with even h and w can be packed")
    return F.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2)


# ----------------------------------------------------------------------------------------------------------------------
# The modules


@dataclass(frozen=True)
class AlignConfig:
    """Everything that shapes a module; `align_module` makes the module.

    Attributes:
        input_types: "latent" for VAE1's latents, "image", or both.
        latent_channels, latent_stride: of VAE1; out_channels, out_stride: of VAE2. Strides are image pixels per latent.
        hidden_channels: width of the blocks; num_blocks: their number, after the first three in tiny and whole.
        downsample_times: how often the image encoder halves its grid.
        architecture: "plain" (`PlainModule`), "tiny" (`TinyModule`) or "whole" (`WholeModule`).
        latent_fold, out_fold: one scaled latent holds fold x fold raw latents, 2x2 in FLUX.2's space. The module works on the
            raw grid. Architecture plain knows only 1.
        pooled_decoder, pooled_encoder: whether VAE1's decoder and VAE2's encoder have TAEF2's blocks, which see the whole
            picture, on their coarsest grid. Architecture plain ignores them.
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
            raise AlignError(f"input_types {shown(list(self.input_types))}: choose from image, latent, or both")
        object.__setattr__(self, "input_types", types)
        _require_whole_numbers(self)
        if self.architecture not in ARCHITECTURES:
            raise AlignError(f"architecture {shown(self.architecture)}: choose from {', '.join(ARCHITECTURES)}")
        if self.architecture != "plain" and self.downsample_times == 0:
            raise AlignError(f"downsample_times 0: an image encoder of architecture {self.architecture} halves at least once")
        for name in ("pooled_decoder", "pooled_encoder"):
            if not isinstance(getattr(self, name), bool):
                raise AlignError(f"{name} {shown(getattr(self, name))}: must be true or false")
        for kind in ("latent", "out"):
            channels, stride, fold = (getattr(self, f"{kind}_{what}") for what in ("channels", "stride", "fold"))
            if fold > 1 and self.architecture == "plain":
                raise AlignError(f"{kind}_fold {fold}: architecture plain does not work on unfolded latents")
            if channels % fold**2 or stride % fold:
                raise AlignError(
                    f"{kind}_fold {fold}: {channels} channels of stride {stride} do not hold {fold}x{fold} latents"
                )
        if self.has_decoder and self.latent_stride & (self.latent_stride - 1):
            raise AlignError(f"latent_stride {self.latent_stride}: architecture {self.architecture} needs a power of 2")
        for stride in (self.out_stride, self.grid_stride):
            if max(self.latent_stride, stride) % min(self.latent_stride, stride):
                raise AlignError(f"strides {self.latent_stride} and {stride}: one must be a multiple of the other")

    @property
    def uses_latents(self) -> bool:
        return "latent" in self.input_types

    @property
    def uses_image(self) -> bool:
        """Whether the caller must pass the image."""
        return "image" in self.input_types

    @property
    def has_decoder(self) -> bool:
        """Whether the module decodes VAE1's latents itself, and then encodes the picture."""
        return self.architecture != "plain" and not self.uses_image

    @property
    def has_image_encoder(self) -> bool:
        return self.uses_image or self.has_decoder

    @property
    def grid_stride(self) -> int:
        """Image pixels per place of the grid on which the blocks work."""
        return self.out_stride // self.out_fold

    def to_dict(self) -> dict:
        """Plain JSON values, from which `from_dict` makes the config again. Keys that older versions do not know are left out
        at their default."""
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


class StageBlock(nn.Module):
    """relu(x + conv(relu(conv(relu(conv(x)))))): the block of tiny autoencoders (TAESD), whose weights it can take. With
    `pooled`, TAEF2's block: x + pool(x) takes the place of x, and its normalisation sees the whole picture."""

    def __init__(self, channels: int, pooled: bool = False):
        super().__init__()
        convolutions = [nn.Conv2d(channels, channels, 3, padding=1) for _ in range(3)]
        self.conv = nn.Sequential(convolutions[0], nn.ReLU(), convolutions[1], nn.ReLU(), convolutions[2])
        self.pool = None
        if pooled:
            wide = 4 * channels
            self.pool = nn.Sequential(
                nn.Conv2d(channels, wide, 1, bias=False),
                nn.GroupNorm(POOL_GROUPS, wide),
                nn.ReLU(),
                nn.Conv2d(wide, channels, 1, bias=False),
            )

    def forward(self, x):
        x = x if self.pool is None else x + self.pool(x)
        return F.relu(x + self.conv(x))


class Clamp(nn.Module):
    """3 · tanh(x / 3), as tiny autoencoders' decoders do: latents beyond ±3 are noise to them."""

    def forward(self, x):
        return torch.tanh(x / 3) * 3


class UnitRange(nn.Module):
    """[-1, 1] -> [0, 1], the range of tiny autoencoders. Beyond the edge they see black."""

    def forward(self, x):
        return x * 0.5 + 0.5


def _stage_blocks(channels: int, count: int = STAGE_BLOCKS, pooled: bool = False) -> list[nn.Module]:
    return [StageBlock(channels, pooled) for _ in range(count)]


def _halving_stages(channels: int, halvings: int) -> list[nn.Module]:
    """Blocks and halvings of a tiny autoencoder's encoder: one block on the finest grid, three on the others."""
    layers = []
    for halved in range(halvings):
        layers += _stage_blocks(channels, STAGE_BLOCKS if halved else 1)
        layers.append(nn.Conv2d(channels, channels, 3, stride=2, padding=1, bias=False))
    return layers


class AlignModule(nn.Module):
    """What the modules of all architectures share; `align_module` makes the one that a config asks for.

    A module turns VAE1's scaled latents, the image, or both into VAE2's scaled latents. It has convolutions and no batch
    statistics: it takes any size and aspect ratio, and computes the same in training and in use. Only TAEF2's blocks see the
    whole picture.

    `forward(latents, image)` checks nothing, so that exporters can trace it with open sizes. `check_inputs` says in words
    what does not fit.

    Attributes:
        config: the `AlignConfig`.
        ridge_weight, ridge_bias: buffers with the closed-form linear map, see `remember_ridge`; where latents are an input.
        image_in: the image encoder, where `config.has_image_encoder`. latent_in: the convolution that takes VAE1's latents.
        blocks, out: the layers behind both.
    """

    def __init__(self, config: AlignConfig):
        super().__init__()
        self.config = config
        if config.uses_latents:
            self.register_buffer("ridge_weight", torch.zeros(config.out_channels, self._channels_on(config.out_stride), 3, 3))
            self.register_buffer("ridge_bias", torch.zeros(config.out_channels))

    def _features(self, latents: torch.Tensor | None, image: torch.Tensor | None) -> torch.Tensor:
        """The sum of both inputs' features, on the blocks' grid."""
        features = self.latent_in(self._on_grid(latents, self.config.grid_stride)) if self.config.uses_latents else 0
        return features + self._encoded(image) if self.config.has_image_encoder else features

    def _encoded(self, image: torch.Tensor) -> torch.Tensor:
        """The image's features, on the blocks' grid. The config alone chooses the operation, and sizes are only handed on: an
        exporter can leave them open."""
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
        config, inputs, sizes = self.config, [], []
        if config.uses_latents:
            inputs.append(("latents", latents, config.latent_channels, config.latent_stride))
        if config.uses_image:
            inputs.append(("image", image, 3, 1))
        for name, tensor, channels, stride in inputs:
            if tensor is None:
                wanted = "VAE1's latents" if name == "latents" else "the image, float NCHW in [-1, 1]"
                raise AlignError(f"this module takes {wanted}; pass {name}=")
            if tensor.ndim != 4 or tensor.shape[1] != channels:
                raise AlignError(f"{name} of shape {tuple(tensor.shape)}: this module takes (B, {channels}, height, width)")
            sizes.append([side * stride for side in tensor.shape[2:]])
        if len(inputs) == 2 and len(latents) != len(image):
            raise AlignError(f"batches of {len(latents)} latents and {len(image)} images: pass one image for each latent")
        if sizes[-1] != sizes[0]:
            latent_size, image_size = ("x".join(map(str, size)) for size in sizes)
            raise AlignError(f"an image of {image_size} px does not belong to latents that stand for {latent_size} px")
        if not all(side > 0 and side % config.out_stride == 0 for side in sizes[0]):
            unit = max(config.out_stride, config.latent_stride)
            raise AlignError(f"the inputs cover {sizes[0][0]}x{sizes[0][1]} px; both sides must be multiples of {unit} px")

    def on_output_grid(self, latents: torch.Tensor) -> torch.Tensor:
        """VAE1's latents on VAE2's grid. A finer grid is folded into channels, which loses nothing; a coarser one repeated."""
        return self._on_grid(latents, self.config.out_stride)

    def _on_grid(self, latents: torch.Tensor, stride: int) -> torch.Tensor:
        finer, coarser = stride // self.config.latent_stride, self.config.latent_stride // stride
        if finer > 1:
            return F.pixel_unshuffle(latents, finer)
        return F.interpolate(latents, scale_factor=coarser, mode="nearest") if coarser > 1 else latents

    def _channels_on(self, stride: int) -> int:
        return self.config.latent_channels * max(1, stride // self.config.latent_stride) ** 2

    def hidden_weights(self) -> list[nn.Parameter]:
        """Weights of the convolutions in blocks and image encoder, which an optimizer may treat as matrices."""
        parts = [self.blocks, self.image_in] if self.config.has_image_encoder else [self.blocks]
        return [layer.weight for part in parts for layer in part.modules() if isinstance(layer, nn.Conv2d)]

    def remember_ridge(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
        """Keep the closed-form linear map (a 3x3 convolution's weight and bias) beside the weights."""
        self.ridge_weight.copy_(weight)
        self.ridge_bias.copy_(bias)

    def start_from_ridge(self) -> None:
        """Nothing: only architecture plain has a linear path to set."""

    @property
    def has_ridge(self) -> bool:
        return self.config.uses_latents and bool(self.ridge_weight.any())

    def linear_map(self, latents: torch.Tensor) -> torch.Tensor:
        """VAE1's latents through the closed-form linear map alone."""
        return F.conv2d(self.on_output_grid(latents), self.ridge_weight, self.ridge_bias, padding=1)


class PlainModule(AlignModule):
    """Residual blocks on VAE2's grid, beside a linear path.

    z1 (B, C1, H/s1, W/s1) ──┬────────────────────── linear 3x3 ──────────────────────┐
                             └─ conv 3x3 ─┐                                           │
                                          + ── num_blocks residual blocks ── conv ──── + ── z2 (B, C2, H/s2, W/s2)
    image (B, 3, H, W) ── image_in ───────┘
    """

    def __init__(self, config: AlignConfig):
        super().__init__(config)
        hidden = config.hidden_channels
        if config.uses_latents:
            self.linear = nn.Conv2d(self._channels_on(config.out_stride), config.out_channels, 3, padding=1)
            self.latent_in = nn.Conv2d(self._channels_on(config.grid_stride), hidden, 3, padding=1)
        if config.uses_image:
            self.image_in = self._image_encoder(hidden, config.downsample_times)
        self.blocks = nn.Sequential(*(ResidualBlock(hidden) for _ in range(config.num_blocks)), nn.SiLU())
        self.out = nn.Conv2d(hidden, config.out_channels, 3, padding=1)

    @staticmethod
    def _image_encoder(hidden: int, halvings: int) -> nn.Sequential:
        """Narrow on fine grids, `hidden` channels at the end."""
        widths = [max(16, hidden >> level) for level in reversed(range(1, halvings))] + [hidden]
        if halvings == 0:
            return nn.Sequential(nn.Conv2d(3, hidden, 3, padding=1))
        # the first halving is free: 2x2 pixels become 12 channels, so no convolution runs at full resolution
        layers = [nn.PixelUnshuffle(2), nn.Conv2d(12, widths[0], 3, padding=1)]
        for narrow, wide in itertools.pairwise(widths):
            layers += [ResidualBlock(narrow), nn.SiLU(), nn.Conv2d(narrow, wide, 3, stride=2, padding=1)]
        return nn.Sequential(*layers)

    def forward(self, latents: torch.Tensor | None = None, image: torch.Tensor | None = None) -> torch.Tensor:
        aligned = self.out(self.blocks(self._features(latents, image)))
        return aligned + self.linear(self.on_output_grid(latents)) if self.config.uses_latents else aligned

    @torch.no_grad()
    def start_from_ridge(self) -> None:
        """Set the linear path to the remembered closed-form map and the deep path to zero: training starts where linear
        methods end. Without latents among the inputs there is no such path, and nothing happens."""
        if self.config.uses_latents:
            self.linear.weight.copy_(self.ridge_weight)
            self.linear.bias.copy_(self.ridge_bias)
            nn.init.zeros_(self.out.weight)
            nn.init.zeros_(self.out.bias)


class TinyModule(AlignModule):
    """The parts of tiny autoencoders, whose weights are the usual start (`training/starts.py`).

        z1 ── conv 3x3 ──────┐
                             + ── 3 + num_blocks stage blocks ── conv ── z2
        image ── image_in ───┘

    Without the image as input, `picture` decodes z1 into an image (B, 3, H, W) in [-1, 1], and `image_in` encodes that.
    `picture` holds VAE1's decoder, frozen. A caller that has already decoded z1 may pass the picture as `image`.
    """

    def __init__(self, config: AlignConfig):
        super().__init__(config)
        hidden = config.hidden_channels
        if config.uses_latents:
            self.latent_in = nn.Conv2d(self._channels_on(config.grid_stride), hidden, 3, padding=1)
        if config.has_decoder:
            self.picture = self._decoder(config).requires_grad_(False)
        if config.has_image_encoder:
            self.image_in = self._image_encoder(hidden, config.downsample_times)
        further = _stage_blocks(hidden, config.num_blocks)
        self.blocks = nn.Sequential(*_stage_blocks(hidden, pooled=config.pooled_encoder), *further)
        self.out = nn.Conv2d(hidden, config.out_channels // config.out_fold**2, 3, padding=1)

    @staticmethod
    def _decoder(config: AlignConfig) -> nn.Sequential:
        """The layers of a tiny autoencoder's decoder."""
        hidden, fold = config.hidden_channels, config.latent_fold
        layers = [nn.PixelShuffle(fold)] if fold > 1 else []
        layers += [Clamp(), nn.Conv2d(config.latent_channels // fold**2, hidden, 3, padding=1), nn.ReLU()]
        for doubled in range((config.latent_stride // fold).bit_length() - 1):
            layers += _stage_blocks(hidden, pooled=config.pooled_decoder and doubled == 0)
            layers += [nn.Upsample(scale_factor=2), nn.Conv2d(hidden, hidden, 3, padding=1, bias=False)]
        return nn.Sequential(*layers, StageBlock(hidden), nn.Conv2d(hidden, 3, 3, padding=1), nn.Hardtanh())

    @staticmethod
    def _image_encoder(hidden: int, halvings: int) -> nn.Sequential:
        """A tiny autoencoder's encoder, cheaper where its grid is finest: no convolution at full resolution, one block at
        half."""
        head = [nn.PixelUnshuffle(2), nn.Conv2d(12, hidden, 3, padding=1), nn.ReLU(), nn.Conv2d(hidden, hidden, 3, padding=1)]
        return nn.Sequential(*head, *_halving_stages(hidden, halvings - 1))

    def forward(self, latents: torch.Tensor | None = None, image: torch.Tensor | None = None) -> torch.Tensor:
        if self.config.has_decoder and image is None:
            image = self.picture(latents)
        aligned = self.out(self.blocks(self._features(latents, image)))
        return F.pixel_unshuffle(aligned, self.config.out_fold) if self.config.out_fold > 1 else aligned


class WholeModule(TinyModule):
    """A `TinyModule` whose image encoder has every layer of a tiny autoencoder's, except its last blocks."""

    @staticmethod
    def _image_encoder(hidden: int, halvings: int) -> nn.Sequential:
        return nn.Sequential(UnitRange(), nn.Conv2d(3, hidden, 3, padding=1), *_halving_stages(hidden, halvings))


ARCHITECTURES = {"plain": PlainModule, "tiny": TinyModule, "whole": WholeModule}


def align_module(config: AlignConfig) -> AlignModule:
    """A module with random weights, of the class that `config.architecture` names."""
    return ARCHITECTURES[config.architecture](config)


# ----------------------------------------------------------------------------------------------------------------------
# The pipeline


class AlignPipeline:
    """A trained module and the two latent spaces between which it translates. It needs neither VAE.

    Attributes:
        module: the `AlignModule`. `translate` computes in the dtype of its weights.
        space1, space2: the `LatentSpace`s of VAE1 and VAE2; unnamed ones where the constructor is given none.
        figures: an evaluation's figures of the module, as plain JSON values; {} where nothing is known.
        remarks: what the log has said about inputs that look wrong, {"latents" or "image": a line}. What is in it is not
            said again.
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
        self.remarks = {}
        require_own_spaces(config, self.space1, self.space2)

    @property
    def config(self) -> AlignConfig:
        return self.module.config

    @property
    def device(self) -> torch.device:
        return self.module.out.weight.device

    @property
    def uses_image(self) -> bool:
        return self.config.uses_image

    @property
    def uses_latents(self) -> bool:
        return self.config.uses_latents

    def to(self, *args, **kwargs) -> AlignPipeline:
        """Move the module as `torch.nn.Module.to` does: to a device, a floating-point dtype (or its name), or both. AlignError
        for a dtype in which the module cannot compute, and for a device that is not there."""
        args, kwargs = list(map(_dtype_named, args)), {name: _dtype_named(value) for name, value in kwargs.items()}
        try:
            self.module.to(*args, **kwargs)
        except torch.cuda.OutOfMemoryError:  # hosts free memory and try again
            raise
        except (AssertionError, NotImplementedError, RuntimeError, TypeError) as error:
            place = " ".join(map(str, (*args, *kwargs.values())))
            raise AlignError(f"{place}: the module cannot move there ({_one_line(error)}); name another place") from None
        return self

    @torch.no_grad()
    def translate(
        self,
        latents: torch.Tensor | None = None,
        image: torch.Tensor | None = None,
        raw: bool | str = False,
        size: tuple[int, int] | None = None,
    ) -> torch.Tensor:
        """Translate VAE1's latents (B, C1, h, w) into VAE2's latents (B, C2, h', w') of the same image.

        Args:
            latents: VAE1's scaled latents, in any shape that `LatentSpace.from_pipeline` takes, with any number of frames. With
                `raw`, VAE1's raw latents (B, C, h, w), or (B, C, frames, h, w). One picture's (C, h, w) give (C2, h', w');
                `LatentSpace.are_packed` tells them from packed tokens.
            image: (B, 3, H, W), floats in [-1, 1]. Modules that were trained with the image need it, the others ignore it.
            raw: take and return raw latents; "comfyui": as ComfyUI keeps latents, raw ones except in the spaces of
                `NORMALISED_BY_COMFYUI`. Its all-zero latents are empty and stay so, and latents of video always have frames.
            size: (height, width) of the image in pixels. Packed latents need it.

        The result has the device and dtype of the input. The module computes on its own device, in the dtype of its weights, a
        part of the batch at once. Each of several frames is a picture: the result is (B, C2, frames, h', w') if VAE2 is of
        video, otherwise (B · frames, C2, h', w').
        Latents that look like those of another named space, or raw where they are not given so, or the reverse, and images that
        look as if in [0, 1] are translated all the same; the log and `remarks` say it, once for each pipeline. AlignError in
        one line for inputs that do not fit, and for `raw` where a space's map is unknown.
        """
        given = latents if self.uses_latents or (raw == "comfyui" and latents is not None) else image
        if given is None:
            self.module.check_inputs(latents, image)
        if raw:
            self._require_maps()
        may_be_packed = given is latents and not raw
        if isinstance(given, torch.Tensor) and given.ndim == 3 and not (may_be_packed and self.space1.are_packed(given, size)):
            batch = (each[None] if isinstance(each, torch.Tensor) and each.ndim == 3 else each for each in (latents, image))
            return self.translate(*batch, raw, size)[0]
        raw1, raw2 = (raw and not (raw == "comfyui" and of.name in NORMALISED_BY_COMFYUI) for of in (self.space1, self.space2))
        frames = given.shape[2] if raw == "comfyui" and given.ndim == 5 else 1
        latents, image = latents if self.uses_latents else None, image if self.uses_image else None
        for name, tensor in (("latents", latents), ("image", image)):
            if tensor is not None and not (isinstance(tensor, torch.Tensor) and tensor.is_floating_point()):
                kind = getattr(tensor, "dtype", type(tensor).__name__)
                raise AlignError(f"{name} of type {kind}: pass a tensor of floating-point numbers")
        if image is not None and image.numel():
            low, high = torch.stack(image.aminmax()).tolist()
            if (largest := max(-low, high)) > LARGEST_PIXEL:
                raise AlignError(f"image values up to {largest:g}: pass values in [-1, 1], 8-bit levels by / 127.5 - 1")
            # in [-1, 1] no part of such a picture is darker than mid-grey
            if raw != "comfyui" and 0 <= low < 0.1 and 0.7 < high <= 1:
                self._remark("image", "no image value is below 0: pass values in [-1, 1], those in [0, 1] by * 2 - 1")
        if latents is not None:
            if latents.ndim == 5:
                latents = latents if raw else self.space1.frames_from_pipeline(latents)
                frames, latents = latents.shape[2], latents.movedim(2, 1).flatten(0, 1)
            elif not raw:
                latents = self.space1.from_pipeline(latents, size)
            self._require_channels(latents, raw1)
            if "latents" not in self.remarks and (found := detect_wrong_space(latents, self.space1, raw1)):
                self._remark("latents", found)
            latents = self.space1.to_scaled(latents.float()) if raw1 else latents
        self.module.check_inputs(latents, image)
        finish = (lambda scaled: self.space2.to_raw(scaled.float())) if raw2 else (lambda scaled: scaled)
        translated = self._in_pieces({"latents": latents, "image": image}, finish, given)
        if raw == "comfyui" and self.uses_latents and not given.any():
            translated = torch.zeros_like(translated)
        keeps_frames = self.space2.name in OF_VIDEO and (frames > 1 or raw == "comfyui")
        return translated.unflatten(0, (-1, frames)).movedim(1, 2) if keeps_frames else translated

    def _remark(self, subject: str, line: str) -> None:
        if subject not in self.remarks:
            self.remarks[subject] = line
            log.warning("%s", line)

    def _in_pieces(self, inputs: dict, finish: Callable, like: torch.Tensor) -> torch.Tensor:
        """The module's result, through `finish`, with the device and dtype of `like`. Pieces of the batch follow each other, so
        that memory holds the activations of one; where it runs out, pieces of half the pictures are tried."""
        weight, inputs = self.module.out.weight, {name: each for name, each in inputs.items() if each is not None}
        (name, places), *_ = inputs.items()
        pixels = places.shape[2] * places.shape[3] * (self.config.latent_stride**2 if name == "latents" else 1)
        at_once = max(1, min(PIXELS_AT_ONCE.get(weight.device.type, 0) // pixels, len(places)))
        while True:
            try:
                pieces = ((part.to(weight.device, weight.dtype) for part in each.split(at_once)) for each in inputs.values())
                parts = (self.module(**dict(zip(inputs, piece))) for piece in zip(*pieces))
                return torch.cat([finish(part).to(like.device, like.dtype) for part in parts])
            except (MemoryError, RuntimeError):  # of a CPU's memory torch says no more than RuntimeError
                if at_once == 1:
                    raise
            at_once //= 2

    def _require_channels(self, latents: torch.Tensor, raw: bool) -> None:
        """AlignError for another number of channels than VAE1's; it names the spaces that have this number."""
        own, other = (space.channels // (space.fold**2 if raw else 1) for space in (self.space1, self.space2))
        if latents.ndim == 4 and latents.shape[1] != own:
            named = CHANNELS.get(latents.shape[1])
            hint = f"; latents of {named} have {latents.shape[1]}" if named else ""
            if latents.shape[1] == other:
                hint = f"; these look like latents of {self.space2}, which this module gives and does not take"
            hint = hint and f"{hint}: use a module from their space"
            if latents.shape[3] == own:
                hint = f"; if they are channels last, permute them to (B, {own}, h, w){hint and ', else' + hint[1:]}"
            raise AlignError(f"latents have {latents.shape[1]} channels; this module takes {own}: {self.space1}{hint}")

    def _require_maps(self) -> None:
        spaces = {"VAE1": self.space1, "VAE2": self.space2} if self.uses_latents else {"VAE2": self.space2}
        for vae, space in spaces.items():
            if not space.map_is_known:
                raise AlignError(
                    f"the file does not name {vae}'s latent space, so its raw latents are unknown: pass scaled latents, or set "
                    f"pipeline.space{vae[-1]} to a LatentSpace"
                )

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike,
        into: str | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | str = torch.float32,
        **options,
    ) -> AlignPipeline:
        """The pipeline of a .safetensors file, of a folder with a `model.safetensors`, such as a training run leaves, of such a
        folder on the hub, or of a pair of the zoo.

        Args:
            path: a file or folder; where there is none, a pair such as "sd15:flux1", or the name of a model on the hub,
                owner/name, which the log says.
            into: with it, the call is `AlignPipeline.pair(path, into)`.
            device: of the module; dtype: of its weights, and so of the computation, whatever they are stored in; or its name;
                or "auto", in which they are stored.
            options: `cache_dir`, `force_download`, `local_files_only`, `revision` and `token` of the hub's download, and
                `torch_dtype`, diffusers' name for `dtype`. `AutoModel` passes further ones, which change nothing.
        """
        dtype = options.get("torch_dtype") or dtype
        if pair := pair_named(path) if into is None else (str(path), into):
            return cls.pair(*pair, device, dtype)
        pipeline = cls.from_checkpoint(or_from_hub(path, options), device=device, dtype=dtype)
        warn_of_half(path, pipeline.space1.name, pipeline.space2.name)
        return pipeline

    @classmethod
    def from_checkpoint(
        cls, path: str | os.PathLike, device: str | torch.device = "cpu", dtype: torch.dtype | str = torch.float32
    ) -> AlignPipeline:
        """The pipeline of a .safetensors file, or of the `model.safetensors` in a folder; never from the hub. `device` and
        `dtype`: see `from_pretrained`. Executes no code from the file."""
        path = Path(path, PRETRAINED_NAME) if os.path.isdir(path) else Path(path)  # `is_dir` fails for too long a name
        content = read_safetensors(path)
        if content["step"]:
            log.info("%s: the module of step %d", path, content["step"])
        spaces = (LatentSpace.from_dict(content[name]) for name in ("space1", "space2"))
        dtype = content["state_dict"]["out.weight"].dtype if dtype == "auto" else dtype
        return cls(module_of(content), *spaces, content["figures"]).to(device, dtype)

    @classmethod
    def pair(
        cls, source: str, target: str, device: str | torch.device = "cpu", dtype: torch.dtype | str = torch.float32
    ) -> AlignPipeline:
        """The pipeline between two latent spaces by their names, from the zoo beside this file; `zoo_pairs` lists the names.

        Args:
            source: VAE1's latent space, such as "sd15", or "image" for a module that takes the image instead.
            target: VAE2's latent space, such as "flux1". Both also by another name, such as "SD1.5", see `names_in_zoo`.
            device, dtype: see `from_pretrained`.

        AlignError where the zoo has no such pair, or another file than its manifest describes.
        """
        manifest = read_zoo()
        names, asked = names_in_zoo(manifest), [letters_of(name) for name in (source, target)]
        one, into = map(names.get, asked)
        entry = manifest["pairs"].get(one, {}).get(into)
        if entry is None:
            near = [names[each] for name in asked if name not in names for each in difflib.get_close_matches(name, names)]
            known = ", ".join(dict.fromkeys(near or manifest["pairs"].get(one) or names.values()))
            raise AlignError(
                f"{shown(source)} to {shown(target)}: no such pair; {'nearest in name' if near else 'known'}: {known}"
            )
        first, second = (None if name == IMAGE else _from_zoo(manifest["spaces"][name], dtype) for name in (one, into))
        pipeline = cls.compose(first, second)
        pipeline.figures = entry.get("figures", {})
        return pipeline.to(device, second.module.out.weight.dtype)

    @classmethod
    def compose(cls, first: AlignPipeline | None, second: AlignPipeline) -> AlignPipeline:
        """The pipeline from `first`'s VAE1 to `second`'s VAE2: `first`'s decoder, and behind it `second`'s encoder.

        Args:
            first: its module has a decoder, see `AlignConfig.has_decoder`; None for a pipeline that takes the image instead.
            second: of architecture tiny or whole, trained without VAE1's latents, or only on their decoded picture.

        The weights are copies. AlignError where the two do not fit.
        """
        config = second.config
        if first is not None and not first.config.has_decoder:
            raise AlignError("the first module has no decoder; compose one of architecture tiny or whole, from latents alone")
        if config.architecture == "plain":
            raise AlignError("the second module encodes no picture; compose one of architecture tiny or whole")
        if config.uses_latents and any(bool(weight.any()) for weight in second.module.latent_in.parameters()):
            raise AlignError("the second module was trained with latents of its own VAE1, so no other's can take their place")
        config = replace(config, input_types=("image",))
        weights = _weights_of(second.module, "image_in.", "blocks.", "out.")
        if first is not None:
            own = first.config
            if own.hidden_channels != config.hidden_channels:
                raise AlignError(f"hidden_channels {own.hidden_channels} and {config.hidden_channels}: compose equal widths")
            names = ("latent_channels", "latent_stride", "latent_fold", "pooled_decoder")
            config = replace(config, input_types=("latent",), **{name: getattr(own, name) for name in names})
            weights |= _weights_of(first.module, "picture.")
        module = align_module(config).eval()
        zeros = {name: torch.zeros_like(tensor) for name, tensor in module.state_dict().items() if name not in weights}
        module.load_state_dict(weights | zeros)
        return cls(module, first.space1 if first else second.space1, second.space2)

    def description(self) -> dict:
        """Everything but the weights, as plain JSON values."""
        return {
            "format": CHECKPOINT_FORMAT,
            "format_number": FORMAT_NUMBER,
            "align_config": self.config.to_dict(),
            "space1": self.space1.to_dict(),
            "space2": self.space2.to_dict(),
            "figures": self.figures,
        }

    def save_pretrained(self, path: str | os.PathLike, **more) -> Path:
        """Write the module, both spaces and the figures as one .safetensors file, and return its path.

        Args:
            path: a file if it ends in .safetensors, else a folder, which gets `model.safetensors`, a `config.json` with
                the same description, and a copy of this file, with which diffusers' `AutoModel` loads the folder. An
                existing file is replaced, atomically.
            more: further plain JSON values for the description.

        The weights keep their dtype. Needs safetensors and numpy. AlignError when the file cannot be written.
        """
        path = Path(path)
        file = path if path.suffix == ".safetensors" else path / PRETRAINED_NAME
        description = self.description() | more
        try:
            content = _safetensors_bytes(self.module.state_dict(), description)
            if file != path:
                name = AlignPipeline.__name__
                loading = {"_class_name": name, "auto_map": {"AutoModel": f"vae_align.{name}"}}
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


def _weights_of(module: AlignModule, *prefixes: str) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in module.state_dict().items() if name.startswith(prefixes)}


def require_own_spaces(config: AlignConfig, space1: LatentSpace, space2: LatentSpace) -> None:
    """AlignError unless the spaces have the channels and strides of the config."""
    for space, side in ((space1, "latent"), (space2, "out")):
        for name in ("channels", "stride"):
            own, needed = getattr(space, name), getattr(config, f"{side}_{name}")
            if own != needed:
                raise AlignError(f"{name} {own} of the latent space {space} contradicts the module's {side}_{name} {needed}")


# ----------------------------------------------------------------------------------------------------------------------
# The zoo: a module from each latent space into itself, of which any two compose a pair

ZOO = Path(__file__).resolve().parent / "assets" / "zoo"
ZOO_NAME = "zoo.json"
IMAGE = "image"  # in place of VAE1's space, for a module that takes the image


def read_zoo(folder: str | os.PathLike = ZOO) -> dict:
    """The manifest of a zoo. `spaces`: {name: {"file", "sha256", "aliases", …}}; `pairs`: {VAE1's: {VAE2's: {"figures", …}}}.
    AlignError where there is none, or one with a file outside the folder."""
    path = Path(folder) / ZOO_NAME
    try:
        require_regular(path)
        manifest = json.loads(path.read_text("utf-8"))
        spaces, pairs = manifest["spaces"], manifest["pairs"]
        if not all(re.fullmatch(r"\w[\w.-]*", entry["file"]) and entry["sha256"] for entry in spaces.values()):
            raise ValueError("a file in another folder, or without its sha256")
        for one, targets in pairs.items():
            if not {one, *targets} <= {IMAGE, *spaces} or not all(isinstance(entry, dict) for entry in targets.values()):
                raise ValueError("a pair of spaces that are not in it")
    except FileNotFoundError:
        raise AlignError(f"{path}: no such file, so no module is known by its spaces' names; name a module's file") from None
    except (AttributeError, OSError, ValueError, KeyError, RecursionError, TypeError) as error:
        raise AlignError(f"{path}: cannot be read ({_one_line(error)}); fetch it anew") from None
    return manifest


def zoo_pairs(folder: str | os.PathLike = ZOO) -> list[tuple[str, str]]:
    """The names that `AlignPipeline.pair` takes, [(VAE1's, VAE2's)]; [] where there is no zoo."""
    if not (Path(folder) / ZOO_NAME).is_file():
        return []
    return [(one, into) for one, targets in read_zoo(folder)["pairs"].items() for into in targets]


def names_in_zoo(manifest: dict) -> dict[str, str]:
    """{a name or alias, as `letters_of` gives it: the space in a zoo that has it}."""
    spaces = {IMAGE: {}} | manifest["spaces"]
    return {letters_of(name): space for space, entry in spaces.items() for name in (space, *entry.get("aliases", ()))}


def pair_named(name: str | os.PathLike) -> tuple[str, str] | None:
    """The two spaces that a text such as "sd15:flux1" or "sd15 to flux1" names; None if it is a file or folder, or names no
    space of the zoo. AlignError for one space alone."""
    spaces = re.split(" to |:", str(name))
    if os.path.lexists(name) or len(spaces) > 2 or re.search(r"[/\\]", str(name)) or not (ZOO / ZOO_NAME).is_file():
        return None
    if names_in_zoo(read_zoo()).keys().isdisjoint(map(letters_of, spaces)):
        return None
    if len(spaces) == 1:
        raise AlignError(f"{name}: a latent space, and no file; name a pair, such as sd15:flux1")
    return tuple(spaces)


def warn_of_half(path: str | os.PathLike, one: str | None, into: str | None) -> None:
    """Log that a file's module goes from a named space into itself, as the zoo's files do: two of them make a pair."""
    if one and one == into:
        log.warning("%s: a module from %s into itself; a pair is named by its two spaces, such as sd15:flux1", path, one)


def letters_of(name: str) -> str:
    """The letters and digits of a name, in lower case: what counts of the names of latent spaces."""
    return "".join(letter for letter in str(name).lower() if letter.isalnum())


def _from_zoo(entry: dict, dtype: torch.dtype | str) -> AlignPipeline:
    """The module of one of a zoo's spaces. AlignError unless its file is the one that the manifest's figures are about."""
    path = ZOO / entry["file"]
    pipeline = AlignPipeline.from_checkpoint(path, dtype=dtype)
    if hashlib.sha256(path.read_bytes()).hexdigest() != entry["sha256"]:
        raise AlignError(f"checkpoint {path}: not the file that {ZOO_NAME} describes; fetch both anew")
    return pipeline


# ----------------------------------------------------------------------------------------------------------------------
# The file


def read_safetensors(path: Path) -> dict:
    """The content of a .safetensors file: `align_config` and `state_dict`, which make the module (`module_of`); `space1`,
    `space2` and `figures` as `save_pretrained` wrote them; `step`, of the training or 0; `vaes` and `vae_digests`, the places
    and digests of both or None.

    AlignError if the file is not ours, newer than this code, or damaged: checksums are compared, and the parts must belong
    together. No memory is taken for what the file claims before that.
    """
    of_training = "; PipelineWithVAEs.from_checkpoint(path).save_pretrained(output) of vaes/pipeline.py makes one"
    try:
        from safetensors import safe_open
    except ImportError:
        raise AlignError(f"checkpoint {path}: reading a .safetensors file needs the package safetensors; install it") from None
    try:
        require_regular(path)
        with safe_open(path, "pt") as file:
            description = json.loads((file.metadata() or {}).get("vae_align", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        checksum = _crc_of_tensors(path.read_bytes())
    except FileNotFoundError:
        remedy = of_training if any(path.parent.glob(f"{CHECKPOINT_PREFIX}_*.pth")) else ""
        raise AlignError(f"checkpoint {path}: no such file{remedy}") from None
    except Exception as error:  # whatever is wrong with the file, safetensors and json have errors of their own for it
        remedy = of_training if path.suffix == ".pth" else ""
        raise AlignError(f"checkpoint {path}: damaged or no .safetensors checkpoint ({_one_line(error)}){remedy}") from None
    with errors_naming(path):
        require_format(description)
        if description.get("crc32") != checksum:
            raise AlignError("damaged (its tensors do not match their checksum)")
        parts = ("format", "format_number", "align_config", "space1", "space2", "figures")
        of_vaes = {name: description.get(name) or [None, None] for name in ("vaes", "vae_digests")}
        content = {name: description[name] for name in parts} | of_vaes
        content |= {"state_dict": tensors, "step": description.get("step", 0)}
        require_whole("its step", content["step"], 0, 1 << 40)
        kinds_fit = all(len(each) == 2 and {*map(type, each)} <= {str, type(None)} for each in of_vaes.values())
        if not kinds_fit or not isinstance(content["figures"], dict):
            raise TypeError
        config = AlignConfig.from_dict(content["align_config"])
        require_own_spaces(config, *(LatentSpace.from_dict(content[name]) for name in ("space1", "space2")))
        check_weights(tensors, config)
    return content


def module_of(content: dict) -> AlignModule:
    """The module of a file's content (`align_config` and `state_dict`), in eval mode, float32, on the CPU."""
    module = align_module(AlignConfig.from_dict(content["align_config"]))
    module.load_state_dict(content["state_dict"])
    return module.eval()


@contextlib.contextmanager
def errors_naming(path: str | os.PathLike):
    """Within this context, every AlignError names the file, and a part that is missing or of another kind is one too."""
    try:
        yield
    except AlignError as error:
        raise AlignError(f"checkpoint {path}: {error}") from None
    except (AttributeError, KeyError, TypeError):
        raise AlignError(f"checkpoint {path}: incomplete; it was not written by this tool") from None


def require_format(content) -> None:
    """AlignError unless a file's content is of this tool's format, and not newer than this code."""
    if not isinstance(content, dict) or content.get("format") != CHECKPOINT_FORMAT:
        raise AlignError("not a checkpoint of this tool; give a file that its training or export wrote")
    number = content.get("format_number", 0)
    if not isinstance(number, int) or number > FORMAT_NUMBER:
        raise AlignError(f"format_number {shown(number)}: this code knows up to {FORMAT_NUMBER}; use a newer version of it")


def check_weights(weights: dict[str, torch.Tensor], config: AlignConfig) -> None:
    """AlignError unless these are a module's weights and buffers, of its shapes and finite. Views that claim more numbers than
    their storages hold are refused before memory is taken for them."""
    held = {weight.untyped_storage().data_ptr(): weight.untyped_storage().nbytes() for weight in weights.values()}
    if sum(weight.numel() * weight.element_size() for weight in weights.values()) > sum(held.values()):
        raise AlignError("its weights claim more numbers than it holds; it was not written by this tool")
    with torch.device("meta"):  # shapes without memory
        expected = align_module(config).state_dict()
    for name in [*expected, *weights]:
        own, needed = (tuple(each[name].shape) if name in each else "missing" for each in (weights, expected))
        if own != needed or not weights[name].is_floating_point():
            raise AlignError(f"its weights do not fit its own description ({name} is {own}, and {needed} there)")
        if not weights[name].isfinite().all():
            raise AlignError(f"{name} holds values that are not finite; give an earlier checkpoint")


def _safetensors_bytes(tensors: dict, description: dict) -> bytes:
    """A .safetensors file with `description` as JSON in its metadata, beside a checksum of the tensors."""
    from safetensors.torch import save

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    description = description | {"crc32": _crc_of_tensors(save(tensors))}
    return save(tensors, {"format": "pt", "vae_align": json.dumps(description, allow_nan=False)})


def _crc_of_tensors(file: bytes) -> int:
    """CRC-32 of the bytes behind a .safetensors file's header, whose length is in the file's first 8 bytes."""
    return zlib.crc32(memoryview(file)[8 + int.from_bytes(file[:8], "little") :])


def _write_atomically(path: Path, content: bytes) -> None:
    """A reader sees the old file or the whole new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.urandom(4).hex()}.tmp")
    try:
        with open(temporary, "xb") as file:  # never through a link that lies there
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def or_from_hub(path: str | os.PathLike, options: dict) -> str | os.PathLike:
    """`path`, or the weights of the model on the hub that it names, owner/name, if there is no such file or folder: from the
    hub client's cache where they are in it. Of `options`, those in `HUB_OPTIONS` count."""
    name = str(path)
    if not HUB_NAME.fullmatch(name) or Path(path).suffix in (".safetensors", ".pth") or os.path.lexists(path):
        return path
    log.warning("%s: no such file or folder here; looking for a model of that name on the hub", name)
    options = {option: options[option] for option in HUB_OPTIONS if options.get(option) is not None}
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise AlignError(f"{name}: no such folder, and for the hub the package huggingface_hub is needed; install it") from None
    try:
        return Path(hf_hub_download(name, PRETRAINED_NAME, **options))
    except Exception as error:  # no network, no such model, no rights, a full disk: the client has no common base for them
        with contextlib.suppress(Exception):
            found = Path(hf_hub_download(name, PRETRAINED_NAME, **options | {"local_files_only": True}))
            log.warning("%s: an earlier download is used; the hub gives none (%s)", name, _one_line(error))
            return found
        raise AlignError(f"{name}: no such folder here, and not to be had from the hub ({_one_line(error)})") from None


# ----------------------------------------------------------------------------------------------------------------------
# Values and words


def _from_dict(cls, values: dict, what: str):
    """`cls(**values)`; AlignError names a key that `cls` does not know."""
    unknown = sorted(map(str, values.keys() - {field.name for field in fields(cls)}))
    if unknown:
        raise AlignError(f"unknown key {shown(unknown[0])} in its {what}: written by a newer version, or by another tool")
    return cls(**values)


def _require_whole_numbers(record, owner: str = "") -> None:
    """AlignError unless the numbers of a dataclass are whole and not beyond `LARGEST`. This tool writes no others."""
    for name, value in vars(record).items():
        largest = LARGEST.get(name.rpartition("_")[2])
        if largest:
            require_whole(name + owner, value, 0 if name in ("num_blocks", "downsample_times") else 1, largest)


def require_whole(name: str, value, low: int, high: int) -> None:
    """AlignError unless a value is a whole number from `low` to `high`."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise AlignError(f"{name} {shown(value)}: must be a whole number from {low} to {high}")


def is_finite(value) -> bool:
    """Whether a value is a number that float32 can hold."""
    return not isinstance(value, bool) and isinstance(value, (int, float)) and abs(value) < 1e30 and math.isfinite(value)


def _dtype_named(value):
    """The torch dtype of a name such as "bfloat16"; what is no dtype unchanged. AlignError for one that computes nothing."""
    dtype = getattr(torch, str(value).removeprefix("torch."), None)
    if isinstance(dtype, torch.dtype) and dtype not in COMPUTE_DTYPES:
        raise AlignError(f"dtype {value}: the module computes in {', '.join(map(str, COMPUTE_DTYPES))}")
    return dtype if isinstance(dtype, torch.dtype) else value


def require_regular(path: str | os.PathLike) -> None:
    """OSError unless `path` is a regular file with its own content: opening a pipe waits for a writer, reading a device may
    never end, and git leaves a pointer in place of a large file where git-lfs is not installed."""
    status = os.stat(path)
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError("a folder, not a file")
    if not stat.S_ISREG(status.st_mode):
        raise io.UnsupportedOperation("a pipe, socket or device, not a file")  # an OSError
    if 0 < status.st_size < 1024:  # as long as a pointer may be
        with open(path, "rb") as file:
            if file.read(len(GIT_LFS)) == GIT_LFS:
                raise OSError("a git-lfs pointer in place of the file; fetch the file with `git lfs pull`")


def shown(value) -> str:
    """`value` as an error message shows it: its repr, of at most a few hundred characters."""
    short = reprlib.Repr()
    short.maxstring = short.maxlong = short.maxother = 100
    return short.repr(value)


def _one_line(error: BaseException, limit: int = 300) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"


# ----------------------------------------------------------------------------------------------------------------------
# Wrong spaces

CLEAR = {4: 0.3, 16: 2.0}  # by channels: right latents hardly ever show this difference of log-likelihoods, nor do drawings
WHITE = 0.2  # latents tell nothing if white noise is more likely by this
DETAIL = {4: 0.22, 16: 0.1}  # by channels: the least detail that counts, of the latents' root mean square
LEAST_SHARE, LEAST_PLACES = 0.25, 48  # this share and number of places must have it
# Between scaled and raw latents: the logarithm of their root mean square, with 16 channels as `MOMENTS` weighs them. Those of
# sd3 are too near to each other.
HALF_WAY = {"sd15": 0.8, "sdxl": 1.1, "flux1": 1.47}
LEAST_DISTANCE = 0.12  # from half way


def detect_wrong_space(latents: torch.Tensor, space: LatentSpace, raw: bool = False) -> str | None:
    """One line if latents (B, C, h, w), scaled or `raw` ones, look like those of another named space, or like the other kind.

    None if they look right, or if nothing can be told: other channels, a space whose statistics are not known here, too plain
    a picture, noise.
    """
    known = MOMENTS.get(latents.shape[1], {}) if latents.ndim == 4 else {}
    if space.name not in known:
        return None
    channels = latents.shape[1]
    features, counts, size = space_features(latents)
    inverses = [inverse_moments_of(name, features.dtype, features.device) for name in known]
    distances = [torch.einsum("npc,ncd,npd->np", features, inverse, features) for inverse in inverses]
    logs = [torch.where(counts, each.log(), 0).sum() for each in (*distances, features.square().sum(-1))]
    count, size, *logs = torch.stack([counts.sum(), size, *logs]).tolist()  # the one wait for the device
    if count < max(LEAST_PLACES, LEAST_SHARE * counts.numel()):
        return None
    # log-likelihood per latent, up to a constant, of its direction alone (Tyler 1987): no scale changes their differences
    likely = dict(zip((*known, "white noise"), (-each / count * channels / 2 for each in logs)))
    best = max(known, key=likely.get)
    if not likely[best] > likely["white noise"] - WHITE:
        return None
    best = best if likely[best] - likely[space.name] > CLEAR[channels] else space.name
    level = math.log(size) if channels == 4 else -likely[best] / channels
    beyond = level - HALF_WAY.get(best, level)
    looks_raw = beyond > 0 if abs(beyond) > LEAST_DISTANCE else raw
    look, given = ("raw" if each else "scaled" for each in (looks_raw, raw))
    if best != space.name:
        return (
            f"these latents look like {'those' if look == given else look + ' ones'} of {best}, and this module takes those of "
            f"{space.name} (log-likelihood per latent {likely[best]:.2f} against {likely[space.name]:.2f}): encode with a VAE "
            f"of {space.name}, or use a module for {best}{'' if look == given else ' with' + 'out' * raw + ' raw=True'}"
        )
    remedy = "pass raw=True" if looks_raw else "leave raw out; in ComfyUI pass them as its VAEs give them"
    line = f"these latents look like {look} ones of {best}, given as {given} ones (root mean square {size:.2g}): {remedy}"
    return line if look != given else None


def space_features(latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The numbers (bands, places, C), float32, that tell the spaces of latents (B, C, h, w) apart; which of the places count,
    (places,), because they have any detail; and the latents' root mean square.

    Latents with 16 channels count themselves. Latents with 4 channels count by the details of a Haar transform in overlapping
    2x2 windows (down, across, diagonal): SD 1.5's and SDXL's have similar colours and different textures. The two outer rows
    and columns, where encoders see the picture's edge, do not count.
    """
    channels, inner = latents.shape[1], latents.float()[:, :, 2:-2, 2:-2]
    a, b, c, d = inner[..., :-1, :-1], inner[..., :-1, 1:], inner[..., 1:, :-1], inner[..., 1:, 1:]
    details = torch.stack([a + b - c - d, a - b + c - d, a - b - c + d]) / 2
    size = inner.square().mean().sqrt()
    counts = details.square().mean((0, 2)).sqrt() > DETAIL.get(channels, 0) * size  # (B, places down, places across)
    return (details if channels == 4 else a[None]).movedim(2, -1).flatten(1, 3), counts.flatten(), size


@functools.cache
def moments_of(name: str) -> torch.Tensor:
    """The matrices (bands, C, C) of a space in `MOMENTS`."""
    channels = next(channels for channels, spaces in MOMENTS.items() if name in spaces)
    numbers = [[float(number) for number in triangle.split()] for triangle in MOMENTS[channels][name]]
    upper = torch.zeros(len(numbers), channels, channels, dtype=torch.float64)
    rows, columns = torch.triu_indices(channels, channels)
    upper[:, rows, columns] = torch.tensor(numbers, dtype=torch.float64)
    return upper + upper.triu(1).mT


@functools.cache
def inverse_moments_of(name: str, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Their inverses, of determinant 1. Cached, because copying them to a GPU waits for the GPU."""
    moments = moments_of(name)
    volume = torch.linalg.det(moments) ** (1 / len(moments[0]))
    return (torch.linalg.inv(moments) * volume[:, None, None]).to(device, dtype)


# Second moments of scaled latents of photos, measured by tools/make/measure_spaces.py. {channels: {space: for each band of
# `space_features` the upper triangle of a matrix, row by row}}
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
