"""The align module, the two latent spaces it joins, and the checkpoint that carries it.

This is the only file that knows latent conventions. Everywhere else latents are *scaled* latents,
`(z - shift_factor) * scaling_factor`: the space in which diffusion models work (diffusers' own convention, see
`StableDiffusionPipeline` and `FluxPipeline`). Raw latents never leave `LatentSpace`.

    pipeline = AlignPipeline.from_checkpoint("ckpt_align/align_pipeline_20251231_034701.pth")
    flux_latents = pipeline.translate(sd15_latents)
"""

from __future__ import annotations

import itertools
import logging
import os
import pickle
import zipfile
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from utils import UserError, count_of, one_line, require_regular, shown

log = logging.getLogger(__name__)

CHECKPOINT_FORMAT = "vae-align"
CHECKPOINT_PREFIX = "align_pipeline"
RANGES = {  # of an `AlignConfig`'s whole numbers; a checkpoint beyond them is no one's
    "latent_channels": (1, 8192),
    "out_channels": (1, 8192),
    "hidden_channels": (1, 8192),
    "num_blocks": (0, 1000),
    "downsample_times": (0, 12),
    "latent_stride": (1, 4096),
    "out_stride": (1, 4096),
}
CPU_PIXELS = 256 * 256  # image pixels that a VAE handles at once on a CPU


# ----------------------------------------------------------------------------------------------------------------------
# The module


@dataclass(frozen=True)
class AlignConfig:
    """Everything that shapes an `AlignModule`.

    `latent_channels` and `latent_stride` are VAE1's, `out_channels` and `out_stride` VAE2's (stride: image pixels per
    latent). The image branch halves `downsample_times` times and starts at a fraction of `hidden_channels`.
    """

    input_types: tuple[str, ...] = ("image", "latent")
    latent_channels: int = 4
    out_channels: int = 16
    hidden_channels: int = 64
    num_blocks: int = 2
    downsample_times: int = 3
    latent_stride: int = 8
    out_stride: int = 8

    def __post_init__(self):
        types = tuple(kind for kind in ("image", "latent") if kind in self.input_types)
        if not types or not all(kind in types for kind in self.input_types):
            raise UserError(f"input_types {shown(list(self.input_types))}: choose from image, latent, or both")
        object.__setattr__(self, "input_types", types)
        for name, (low, high) in RANGES.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise UserError(f"{name} {shown(value)}: must be a whole number from {low} to {high}")
        if max(self.latent_stride, self.out_stride) % min(self.latent_stride, self.out_stride):
            raise UserError(f"strides {self.latent_stride} and {self.out_stride}: one must be a multiple of the other")


class ResidualBlock(nn.Module):
    """x + conv(act(conv(act(x)))). No normalisation: latents carry their meaning in their level."""

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


class AlignModule(nn.Module):
    """VAE1's latents, the image, or both -> VAE2's latents. All latents are scaled latents.

        z1 (B, C1, H/s1, W/s1) ──┬────────────────────── linear 3x3 ──────────────────────┐
                                 └─ conv 3x3 ─┐                                           │
                                              + ── num_blocks residual blocks ── conv ──── + ── z2 (B, C2, H/s2, W/s2)
        image (B, 3, H, W) ── ImageBranch ────┘

    Convolutions only and no batch statistics: any size and aspect ratio, the same in training and in use. The buffers
    `ridge_weight` and `ridge_bias` keep the closed-form linear map that `start_from_ridge` was given.
    """

    def __init__(self, config: AlignConfig):
        super().__init__()
        self.config = config
        hidden = config.hidden_channels
        if "latent" in config.input_types:
            # a finer VAE1 grid is folded into channels, which loses nothing; a coarser one is repeated
            self.fold = max(1, config.out_stride // config.latent_stride)
            folded = config.latent_channels * self.fold**2
            self.linear = nn.Conv2d(folded, config.out_channels, 3, padding=1)
            self.latent_in = nn.Conv2d(folded, hidden, 3, padding=1)
            self.register_buffer("ridge_weight", torch.zeros_like(self.linear.weight))
            self.register_buffer("ridge_bias", torch.zeros_like(self.linear.bias))
        if "image" in config.input_types:
            self.image_in = ImageBranch(hidden, config.downsample_times)
        self.blocks = nn.Sequential(*(ResidualBlock(hidden) for _ in range(config.num_blocks)))
        self.out = nn.Conv2d(hidden, config.out_channels, 3, padding=1)

    def forward(self, latents: torch.Tensor | None = None, image: torch.Tensor | None = None) -> torch.Tensor:
        grid = self._output_grid(latents, image)
        hidden, skip = 0, 0
        if "latent" in self.config.input_types:
            latents = self.on_output_grid(latents)
            skip = self.linear(latents)
            hidden = self.latent_in(latents)
        if "image" in self.config.input_types:
            features = self.image_in(image)
            if features.shape[2:] != grid:
                mode = "bilinear" if features.shape[2] < grid[0] else "area"  # bilinear would skip pixels of a finer grid
                features = F.interpolate(features, size=grid, mode=mode)
            hidden = hidden + features
        return skip + self.out(F.silu(self.blocks(hidden)))

    def _output_grid(self, latents, image) -> torch.Size:
        """The height and width of VAE2's latents for these inputs; UserError for inputs that do not fit."""
        config, grids = self.config, []
        for kind, name, tensor in (("latent", "latents", latents), ("image", "image", image)):
            if kind in config.input_types and tensor is not None and tensor.ndim != 4:
                raise UserError(f"{name} of shape {tuple(tensor.shape)}: pass a batch, four dimensions")
        if "latent" in config.input_types:
            if latents is None:
                raise UserError("this module takes VAE1's latents as input; pass latents=")
            if latents.shape[1] != config.latent_channels:
                raise UserError(f"latents have {latents.shape[1]} channels; this module takes {config.latent_channels}")
            grids.append([side * config.latent_stride / config.out_stride for side in latents.shape[2:]])
        if "image" in config.input_types:
            if image is None:
                raise UserError("this module takes the image as input; pass image=, float NCHW in [-1, 1]")
            if image.shape[1] != 3:
                raise UserError(f"the image has {image.shape[1]} channels; this module takes RGB")
            if "latent" in config.input_types and len(latents) != len(image):
                raise UserError(f"{count_of(len(latents), 'latent')} and {count_of(len(image), 'image')}: must be as many")
            grids.append([side / config.out_stride for side in image.shape[2:]])
        height, width = grids[0]
        if grids[-1] != grids[0]:
            raise UserError(
                f"an image of {image.shape[2]}x{image.shape[3]} px does not belong to latents of "
                f"{latents.shape[2]}x{latents.shape[3]}"
            )
        if not (height.is_integer() and width.is_integer()):
            raise UserError(
                f"the inputs cover {height:g}x{width:g} of VAE2's latents; image sides must be multiples of its stride"
            )
        return torch.Size((int(height), int(width)))

    def on_output_grid(self, latents: torch.Tensor) -> torch.Tensor:
        """VAE1's latents on VAE2's grid: folded into channels where VAE1's is finer, repeated where it is coarser."""
        if self.fold > 1:
            return F.pixel_unshuffle(latents, self.fold)
        coarser = self.config.latent_stride // self.config.out_stride
        return F.interpolate(latents, scale_factor=coarser, mode="nearest") if coarser > 1 else latents

    def hidden_weights(self) -> list[nn.Parameter]:
        """The weights of the convolutions of blocks and image branch, which an optimizer may treat as matrices."""
        parts = [self.image_in, self.blocks] if "image" in self.config.input_types else [self.blocks]
        return [layer.weight for part in parts for layer in part.modules() if isinstance(layer, nn.Conv2d)]

    def remember_ridge(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
        """Keep the closed-form linear map (a 3x3 convolution's weight and bias) beside the weights."""
        self.ridge_weight.copy_(weight)
        self.ridge_bias.copy_(bias)

    @torch.no_grad()
    def start_from_ridge(self) -> None:
        """Set the linear path to the remembered closed-form map and the deep path to zero: training starts where linear
        methods end."""
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
# The file


def checkpoints_in(folder: str | os.PathLike) -> list[Path]:
    """The checkpoints in a folder, newest first; a renamed copy has no time stamp and does not count."""
    return sorted(Path(folder).glob(f"{CHECKPOINT_PREFIX}_[0-9]*_[0-9]*.pth"), reverse=True)


def newest_checkpoint(folder: str | os.PathLike) -> tuple[Path, dict]:
    """(path, content) of the newest checkpoint in `folder` that is undamaged; UserError if there is none."""
    failure = f"no {CHECKPOINT_PREFIX}_YYYYMMDD_HHMMSS.pth in this folder"
    for path in checkpoints_in(folder):
        try:
            return path, read_checkpoint(path)
        except UserError as error:
            failure = str(error)
            log.warning("%s; trying the one before it", error)
    raise UserError(f"checkpoint {folder}: {failure}")


def read_checkpoint(path: str | os.PathLike) -> dict:
    """The content of a checkpoint as plain values and tensors on the CPU; of a folder, its newest undamaged one.

    UserError if it is not ours or damaged: the checksum of every part is compared (CRC-32, which the file's zip format
    stores and `torch.load` ignores), and that the parts belong together, before any memory is taken for them.
    """
    path = Path(path)
    if os.path.isdir(path):  # `Path.is_dir` fails for too long a name
        return newest_checkpoint(path)[1]
    try:
        require_regular(path)
        with open(path, "rb") as file:
            zipped = file.read(2) == b"PK"
    except FileNotFoundError:
        raise UserError(f"checkpoint {path}: no such file") from None
    except (OSError, ValueError) as error:
        raise UserError(f"checkpoint {path}: cannot be read ({one_line(error)})") from None
    if zipped:
        _compare_checksums(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        why = " (it asks to run code, which is refused)" if "GLOBAL" in str(error).upper() else ""
        raise UserError(f"checkpoint {path}: not a checkpoint of this tool{why}") from None
    except Exception as error:  # truncated or foreign files fail inside zipfile, pickle or torch, each with its own error
        raise UserError(f"checkpoint {path}: damaged or not a checkpoint ({one_line(error)})") from None
    if not isinstance(content, dict) or content.get("format") != CHECKPOINT_FORMAT:
        raise UserError(f"checkpoint {path}: not a checkpoint of this tool; give a file that train_align_with_args.py wrote")
    try:
        known = {field.name for field in fields(AlignConfig)}
        content["align_config"] = {name: value for name, value in content["align_config"].items() if name in known}
        _check_content(content, AlignConfig(**content["align_config"]))
    except UserError as error:
        raise UserError(f"checkpoint {path}: {error}") from None
    except (AttributeError, KeyError, TypeError):
        raise UserError(f"checkpoint {path}: incomplete; it was not written by this tool") from None
    return content


def _compare_checksums(path: Path) -> None:
    """UserError unless every part of a zipped checkpoint matches its checksum."""
    try:
        with zipfile.ZipFile(path) as parts:
            if any(part.compress_type != zipfile.ZIP_STORED for part in parts.infolist()):
                raise UserError(f"checkpoint {path}: not a checkpoint of this tool, which compresses nothing")
            damaged = parts.testzip()
    except UserError:
        raise
    except Exception as error:  # a damaged zip makes zipfile, struct and the codecs fail, each in its own way
        raise UserError(f"checkpoint {path}: damaged ({one_line(error)})") from None
    if damaged:
        raise UserError(f"checkpoint {path}: damaged ({damaged} does not match its checksum)")


def _check_content(content: dict, config: AlignConfig) -> None:
    """AttributeError, KeyError, TypeError or a UserError unless a checkpoint's parts are of their kinds and agree."""
    if not all(isinstance(content[name], dict) for name in ("state_dict", "vae1", "vae2", "config", "metrics")):
        raise TypeError
    for name, side in (("vae1", "latent"), ("vae2", "out")):
        recorded = content[name]
        if not all(isinstance(recorded[part], (str, type(None))) for part in ("path", "subfolder")):
            raise TypeError
        if any(recorded[part] != getattr(config, f"{side}_{part}") for part in ("channels", "stride")):
            raise UserError(f"its description of {name} contradicts its module's")
    numbers = {"step": content["step"], "seed": content["config"].get("seed", 0)}
    for name, value in (numbers | {"image_size": content["config"].get("image_size", 0)}).items():
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 40:
            raise UserError(f"its {name} is {shown(value)}")
    if not isinstance(content["epoch"], (int, float)) or not isinstance(content["config"].get("precision", ""), str):
        raise TypeError

    weights = content["state_dict"]
    misfit = UserError("its weights do not fit its own description")
    if config.num_blocks > len(weights):  # also keeps what follows short
        raise misfit
    with torch.device("meta"):  # shapes without memory
        expected = AlignModule(config).state_dict()
    if weights.keys() != expected.keys():
        strange = sorted(map(str, weights.keys() ^ expected.keys()))
        raise UserError(f"{misfit} ({strange[0]} is missing or has no place)")
    for name, tensor in weights.items():
        if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided or not tensor.is_floating_point():
            raise UserError(f"{misfit} ({name} holds no weights)")
        if tensor.shape != expected[name].shape:
            raise UserError(f"{misfit} ({name} is {tuple(tensor.shape)}, not {tuple(expected[name].shape)})")
        if tensor.is_meta or not tensor.isfinite().all():
            raise UserError(f"{name} holds values that are not finite; give an earlier checkpoint")
