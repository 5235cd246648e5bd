"""How each class of VAEs in diffusers is spoken to: frames, colours, what `encode` returns, and where its statistics are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from utils import UserError, shown

COSMOS_SIGMA_DATA = 0.5  # of the scheduler that Cosmos 1 is used with (EDMEulerScheduler)
PROBE = 128  # pixels of the image from which channels and stride are read; a multiple of every stride in use


@dataclass(frozen=True)
class OwnMap:
    """A VAE's own map from raw to scaled latents: `(fold(raw) - mean) / std`, with numbers for each scaled channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    fold: int = 1


@dataclass(frozen=True)
class Convention:
    """What a class of VAEs expects and gives.

    Attributes:
        output: the attribute of what `encode` returns: a posterior as "latent_dist", or latents.
        frames: images and latents have a dimension of frames (B, C, T, H, W); an image is one frame.
        alpha: images have a fourth channel of opacity; ours are opaque.
        own_map: (vae, config, channels of the scaled latents) -> `OwnMap`.
        fold: 2 where 2x2 raw latents become one scaled latent; None where the config says it.
        space: the named space of every VAE of this class whose statistics are in its weights; None where the config has them.
        decoder_noise: decoding draws noise.
        one_by_one: the model takes one image at a time only.
        shape_of_config: config -> (channels, stride) of raw latents, for classes that do not run on the meta device.
    """

    own_map: Callable
    output: str = "latent_dist"
    frames: bool = False
    alpha: bool = False
    fold: int | None = 1
    space: str | None = None
    decoder_noise: bool = False
    one_by_one: bool = False
    shape_of_config: Callable | None = None

    def fold_of(self, config) -> int:
        return config["fold"] if self.fold is None else self.fold

    def encode(self, model: nn.Module, images: torch.Tensor):
        """RGB images (B, 3, H, W) in [-1, 1] -> whatever the model's `encode` returns."""
        if self.alpha:
            images = torch.cat([images, torch.ones_like(images[:, :1])], dim=1)
        return model.encode(images.unsqueeze(2) if self.frames else images)

    def raw_latents(self, encoded: list, sample: bool = False, generator: torch.Generator | None = None) -> torch.Tensor:
        """The raw latents (B, C, h, w) of what `encode` returned for the pieces of a batch: the posterior mean, or with
        `sample` one draw for the whole batch. A VAE without a posterior gives its latents as they are."""
        parts = [getattr(part, self.output) for part in encoded]
        if self.output != "latent_dist":
            latents = torch.cat(parts)
        else:
            posterior = type(parts[0])(torch.cat([part.parameters for part in parts]))
            latents = posterior.sample(generator=generator) if sample else posterior.mode()
        return latents[:, :, 0] if self.frames else latents

    def decode(self, model: nn.Module, raw: torch.Tensor) -> torch.Tensor:
        """Raw latents (B, C, h, w) -> RGB images (B, 3, H, W)."""
        more = {}
        if self.decoder_noise:  # the same noise each time, so that a judgement can be repeated
            more["generator"] = torch.Generator(raw.device).manual_seed(0)
        if model.config.get("timestep_conditioning"):  # of LTX: the time at which no noise is left
            more["temb"] = raw.new_zeros(len(raw))
        images = model.decode(raw.unsqueeze(2) if self.frames else raw, **more).sample
        images = images[:, :, 0] if self.frames else images
        return images[:, :3] if self.alpha else images

    def measure(self, plan: nn.Module) -> tuple[int, int]:
        """(channels, stride) of a model's raw latents. ValueError unless it turns an RGB image into latents on a grid that its
        sides are multiples of, and those into an image. For a model on the meta device, which computes shapes only."""
        if self.shape_of_config:
            return self.shape_of_config(plan.config)
        image = torch.empty(1, 3, PROBE, PROBE, device="meta")
        latents = self.raw_latents([self.encode(plan, image)])
        side = latents.shape[2]
        if latents.shape[3] != side or side < 1 or PROBE % side:
            raise ValueError(f"its latents of a {PROBE} px image are {tuple(latents.shape)}")
        if self.decode(plan, latents).shape != image.shape:
            raise ValueError("it decodes to another size or number of channels than RGB")
        return latents.shape[1], PROBE // side


# ----------------------------------------------------------------------------------------------------------------------
# Where the statistics are


def map_of_config(vae, config, channels: int) -> OwnMap:
    """`(raw - shift_factor) * scaling_factor`, or with `latents_mean` and `latents_std` in the config
    `(raw - latents_mean) * scaling_factor / latents_std`, as diffusers' SDXL pipeline takes them. AutoencoderKLs of other
    than SDXL's 4 channels (GLM-Image) are used without their scaling_factor then: pipeline_glm_image.py reads none."""
    scale, shift = config.get("scaling_factor"), config.get("shift_factor")
    scale = 1.0 if scale is None else scale
    shift = 0.0 if shift is None else shift
    for name, value, low in (("scaling_factor", scale, 0), ("shift_factor", shift, -1e6)):
        _require_number(vae, name, value, low)
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is None and std is None:
        return OwnMap((float(shift),) * channels, (1 / scale,) * channels)
    _require_moments(vae, mean, std, channels)
    if vae.class_name == "AutoencoderKL" and channels != 4:
        scale = 1.0
    return OwnMap(tuple(map(float, mean)), tuple(value / scale for value in std))


def map_of_first_frame(vae, config, channels: int) -> OwnMap:
    """Cosmos 1: one mean and deviation for each channel and frame, and `* sigma_data`: pipeline_cosmos_video2world.py."""
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is None or std is None:
        return OwnMap((0.0,) * channels, (1 / COSMOS_SIGMA_DATA,) * channels)
    frames = max(1, len(mean) // channels) if isinstance(mean, (list, tuple)) else 1
    _require_moments(vae, mean, std, channels * frames)
    first = [tuple(map(float, values[::frames])) for values in (mean, std)]
    return OwnMap(first[0], tuple(value / COSMOS_SIGMA_DATA for value in first[1]))


def map_of_batch_norm(vae, config, channels: int) -> OwnMap:
    """FLUX.2: batch normalisation of 2x2 folded latents with its running statistics: pipeline_flux2.py."""
    bn = vae.model.bn
    std = torch.sqrt(bn.running_var.double() + config["batch_norm_eps"])
    return OwnMap(tuple(bn.running_mean.double().tolist()), tuple(std.tolist()), fold=2)


def map_of_buffers(vae, config, channels: int) -> OwnMap:
    """LTX: `(raw - latents_mean) * scaling_factor / latents_std`, both of them buffers: pipeline_ltx.py."""
    mean, std = (getattr(vae.model, name).double().tolist() for name in ("latents_mean", "latents_std"))
    return OwnMap(tuple(mean), tuple(value / config["scaling_factor"] for value in std))


def map_of_nothing(vae, config, channels: int) -> OwnMap:
    """Tiny autoencoders in their author's format, which give scaled latents. TAEF2's 32 channels are FLUX.2's, unfolded."""
    return OwnMap((0.0,) * channels, (1.0,) * channels, config["fold"])


def _require_moments(vae, mean, std, count: int) -> None:
    for name, values, low in (("latents_mean", mean, -1e6), ("latents_std", std, 0)):
        if not isinstance(values, (list, tuple)) or len(values) != count:
            raise UserError(
                f"{vae.where}: {name} {shown(values)} of its config.json must be {count} numbers, one for each channel"
            )
        for value in values:
            _require_number(vae, name, value, low)


def _require_number(vae, name, value, low):
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low < value < 1e6:
        raise UserError(f"{vae.where}: {name} {shown(value)} of its config.json must be a number above {low:g}")


# ----------------------------------------------------------------------------------------------------------------------
# The table

CONVENTIONS = {  # by the `_class_name` of a config.json
    "AutoencoderKL": Convention(map_of_config),
    "AutoencoderTiny": Convention(map_of_config, output="latents"),
    "TinyAutoencoder": Convention(map_of_nothing, output="latents", fold=None),  # ours, of the author's files
    "AsymmetricAutoencoderKL": Convention(map_of_config),
    "ConsistencyDecoderVAE": Convention(
        map_of_config,
        decoder_noise=True,
        shape_of_config=lambda config: (config["latent_channels"], 2 ** (len(config["encoder_block_out_channels"]) - 1)),
    ),
    "AutoencoderDC": Convention(map_of_config, output="latent"),
    "AutoencoderKLFlux2": Convention(map_of_batch_norm, fold=2, space="flux2"),
    "AutoencoderKLHunyuanImage": Convention(map_of_config),
    "AutoencoderKLWan": Convention(map_of_config, frames=True),
    "AutoencoderKLQwenImage": Convention(map_of_config, frames=True),
    "AutoencoderKLQwenImage21": Convention(map_of_config, frames=True, alpha=True),
    "AutoencoderKLHunyuanVideo": Convention(map_of_config, frames=True),
    "AutoencoderKLHunyuanVideo15": Convention(map_of_config, frames=True, one_by_one=True),
    "AutoencoderKLLTXVideo": Convention(map_of_buffers, frames=True, space="ltx"),
    "AutoencoderKLLTX2Video": Convention(map_of_buffers, frames=True, space="ltx2"),
    "AutoencoderKLCogVideoX": Convention(map_of_config, frames=True),
    "AutoencoderKLMagvit": Convention(map_of_config, frames=True),
    "AutoencoderKLMochi": Convention(map_of_config, frames=True),
    "AutoencoderKLCosmos": Convention(
        map_of_first_frame,
        frames=True,
        shape_of_config=lambda config: (config["latent_channels"], config["spatial_compression_ratio"]),
    ),
}
