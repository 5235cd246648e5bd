"""How each class of VAEs in diffusers is called: frames, colours, the result of `encode`, and where its statistics are."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from utils import UserError, shown
from vae_align import LatentSpace

COSMOS_SIGMA_DATA = 0.5  # of the scheduler that Cosmos 1 is used with (EDMEulerScheduler)
PROBE = 128  # pixels of the image from which channels and stride are read; a multiple of every stride in use


@dataclass(frozen=True)
class Convention:
    """How a class of VAEs is called and what it returns.

    Attributes:
        own_map: `FrozenVAE` -> the map between its raw and scaled latents, as a `LatentSpace` without a name.
        output: the attribute of `encode`'s result that holds a posterior ("latent_dist") or latents.
        decoder: the attribute of the model that holds its decoder.
        frames: images and latents have a dimension of frames (B, C, T, H, W); an image is one frame.
        alpha: images have a fourth channel of opacity; ours are opaque.
        fold: 2 where 2x2 raw latents become one scaled latent; None where the config holds the factor.
        space: the named space of every VAE of this class whose statistics are in its weights; None where the config has them.
        decoder_noise: decoding draws noise.
        one_by_one: the model takes one image at a time only.
        shape_of_config: config -> (channels, stride) of raw latents, for classes that do not run on the meta device.
    """

    own_map: Callable
    output: str = "latent_dist"
    decoder: str = "decoder"
    frames: bool = False
    alpha: bool = False
    fold: int | None = 1
    space: str | None = None
    decoder_noise: bool = False
    one_by_one: bool = False
    shape_of_config: Callable | None = None

    def encode(self, model: nn.Module, images: torch.Tensor):
        """RGB images (B, 3, H, W) in [-1, 1] -> the result of the model's `encode`."""
        if self.alpha:
            images = torch.cat([images, torch.ones_like(images[:, :1])], dim=1)
        return model.encode(images.unsqueeze(2) if self.frames else images)

    def raw_latents(self, encoded: list, sample: bool = False, generator: torch.Generator | None = None) -> torch.Tensor:
        """Results of `encode`, one for each piece of a batch -> raw latents (B, C, h, w).

        The posterior mean, or with `sample` one draw for the whole batch. Without a posterior both give the latents."""
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

    def decoder_stages(self, model: nn.Module) -> list[nn.Module]:
        """The layers whose outputs are the decoder's features: its up blocks; in a tiny autoencoder the layer before each
        upsampling and the last one."""
        decoder = getattr(model, self.decoder)
        if hasattr(decoder, "up_blocks"):
            return list(decoder.up_blocks)
        layers = getattr(decoder, "layers", decoder)  # the author's format has no module around them
        coarse = [layer for layer, following in itertools.pairwise(layers) if isinstance(following, nn.Upsample)]
        return [*coarse, layers[-1]]

    def measure(self, plan: nn.Module) -> tuple[int, int]:
        """(channels, stride) of a model's raw latents; the model is on the meta device, which computes shapes only.

        ValueError unless it encodes an RGB image to latents on a grid that divides the image, and decodes them to such an
        image."""
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


def map_of_config(vae) -> LatentSpace:
    """`(raw - shift_factor) * scaling_factor`, or with `latents_mean` and `latents_std` in the config
    `(raw - latents_mean) * scaling_factor / latents_std`, as in diffusers' SDXL pipeline. Such an AutoencoderKL of other than
    SDXL's 4 channels (GLM-Image) is used without its scaling_factor: pipeline_glm_image.py reads none."""
    scale, shift = vae.config.get("scaling_factor"), vae.config.get("shift_factor")
    scale = 1.0 if scale is None else scale
    shift = 0.0 if shift is None else shift
    for name, value, low in (("scaling_factor", scale, 0), ("shift_factor", shift, -1e6)):
        _require_number(vae, name, value, low)
    mean, std = vae.config.get("latents_mean"), vae.config.get("latents_std")
    if mean is None and std is None:
        return LatentSpace.from_scale(None, vae.channels, vae.stride, scale, shift)
    _require_moments(vae, mean, std, vae.channels)
    if vae.class_name == "AutoencoderKL" and vae.channels != 4:
        scale = 1.0
    return _map_by_channel(vae, mean, [value / scale for value in std])


def map_of_first_frame(vae) -> LatentSpace:
    """Cosmos 1: one mean and deviation for each channel and frame, and `* sigma_data`: pipeline_cosmos_video2world.py."""
    mean, std = vae.config.get("latents_mean"), vae.config.get("latents_std")
    if mean is None or std is None:
        return LatentSpace.from_scale(None, vae.channels, vae.stride, COSMOS_SIGMA_DATA)
    frames = max(1, len(mean) // vae.channels) if isinstance(mean, (list, tuple)) else 1
    _require_moments(vae, mean, std, vae.channels * frames)
    return _map_by_channel(vae, mean[::frames], [float(value) / COSMOS_SIGMA_DATA for value in std[::frames]])


def map_of_batch_norm(vae) -> LatentSpace:
    """FLUX.2: batch normalisation of 2x2 folded latents with its running statistics: pipeline_flux2.py."""
    bn = vae.model.bn
    std = torch.sqrt(bn.running_var.double() + vae.config["batch_norm_eps"])
    return _map_by_channel(vae, bn.running_mean.double().tolist(), std.tolist(), fold=2)


def map_of_buffers(vae) -> LatentSpace:
    """LTX: `(raw - latents_mean) * scaling_factor / latents_std`, where mean and std are buffers: pipeline_ltx.py."""
    mean, std = (getattr(vae.model, name).double().tolist() for name in ("latents_mean", "latents_std"))
    return _map_by_channel(vae, mean, [value / vae.config["scaling_factor"] for value in std])


def map_of_nothing(vae) -> LatentSpace:
    """Tiny autoencoders in their author's format, which give scaled latents; TAEF2's are FLUX.2's, unfolded."""
    return _map_by_channel(vae, (0.0,) * vae.channels, (1.0,) * vae.channels, vae.fold)


def _map_by_channel(vae, mean, std, fold: int = 1) -> LatentSpace:
    return LatentSpace(None, vae.channels, vae.stride, mean, std, fold)


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
        decoder="decoder_unet",
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
