"""The named latent spaces, their conventions, and the codec: one frozen VAE that speaks scaled latents.

Raw latents are what a VAE's encoder gives. Scaled latents are what diffusion models work in: `(raw - shift) * scale`, with one
shift and scale per channel. Outside this file latents are scaled latents.
"""

from __future__ import annotations

import functools
import logging
import math
from pathlib import Path

import torch

from latents.vaes import FrozenVAE, raw_latents
from runtime.device import is_out_of_memory, release_memory
from utils import UserError, count_of, shown
from vae_align import LatentSpace

log = logging.getLogger(__name__)

CPU_PIXELS = 256 * 256  # image pixels that a VAE handles at once on a CPU
PLAYGROUND_MEAN = (-1.6574, 1.886, -1.383, 2.5155)
PLAYGROUND_STD = (8.4927, 5.9022, 6.5498, 5.2299)

# The constants are those of the families' own VAE configs; ComfyUI's latent formats have the same numbers.
SPACES = {
    space.name: space
    for space in (
        LatentSpace.from_scale("sd15", 4, 8, 0.18215),
        LatentSpace.from_scale("sdxl", 4, 8, 0.13025),
        LatentSpace.from_scale("sd3", 16, 8, 1.5305, 0.0609),
        LatentSpace.from_scale("flux1", 16, 8, 0.3611, 0.1159),
        LatentSpace("playground25", 4, 8, PLAYGROUND_MEAN, tuple(value / 0.5 for value in PLAYGROUND_STD)),
    )
}
# Tiny autoencoders give scaled latents, so their own scale is 1 and says nothing; these hub ids say which space it is.
TINY_AUTOENCODERS = {
    "madebyollin/taesd": "sd15",
    "madebyollin/taesdxl": "sdxl",
    "madebyollin/taesd3": "sd3",
    "madebyollin/taef1": "flux1",
}


def named_space(name: str) -> LatentSpace:
    """The latent space of that name; UserError lists the names."""
    if name not in SPACES:
        raise UserError(f"latent space {shown(name)}: unknown; choose from {', '.join(SPACES)}")
    return SPACES[name]


def recognised(space: LatentSpace) -> LatentSpace:
    """The named space with these numbers, or `space` itself."""
    return next((known for known in SPACES.values() if _same_numbers(known, space)), space)


def _same_numbers(first: LatentSpace, second: LatentSpace) -> bool:
    if (first.channels, first.stride, first.fold) != (second.channels, second.stride, second.fold):
        return False
    numbers = zip((*first.mean, *first.std), (*second.mean, *second.std))
    return all(math.isclose(one, other, rel_tol=1e-4, abs_tol=1e-6) for one, other in numbers)


class Codec:
    """One frozen VAE behind the project's conventions: images in [-1, 1], scaled latents, float32 out.

    Attributes:
        vae: the `FrozenVAE`. space: the `LatentSpace` of its latents. channels, stride: of that space.
        identity: what a checkpoint stores of it: where it came from, its class, channels, stride and space.
    """

    def __init__(self, vae, path: str | None = None, subfolder: str | None = None, space: LatentSpace | str | None = None):
        """`vae`: a `FrozenVAE` or a diffusers model; `path`, `subfolder`: where it came from; `space`: the latent space, or its
        name, of a VAE whose numbers do not tell. UserError if the VAE's shape or numbers contradict it."""
        self.vae = vae if isinstance(vae, FrozenVAE) else FrozenVAE.of_model(vae)
        self._mean, self._scale = _own_map(self.vae)
        self.space = self._settle_space(path, space)
        self.channels = self.space.channels
        self.stride = self.space.stride
        self._images_at_once = None  # as many as come
        if path is not None:
            local = Path(path).expanduser()
            path = str(local.resolve() if local.is_dir() else path)  # a relative folder means another one elsewhere
        self.identity = {
            "path": path,
            "subfolder": subfolder,
            "class": self.vae.class_name,
            "channels": self.channels,
            "stride": self.stride,
            "space": self.space.to_dict(),
        }

    def _settle_space(self, path, wanted) -> LatentSpace:
        """The space of this VAE's latents: the one that was asked for, or the named one that its numbers tell.

        A VAE whose own map does nothing gives scaled latents. For it the recorded map is the named space's, which hosts that
        keep raw latents need; encoding and decoding do not use it.
        """
        channels, stride = self.vae.config["latent_channels"], self.vae.stride
        std = [1 / value for value in _per_channel(self._scale, channels)]
        own = LatentSpace(None, channels, stride, _per_channel(self._mean, channels), std)
        if wanted is None:
            tiny = TINY_AUTOENCODERS.get(str(path))
            return SPACES[tiny] if tiny and not own.map_is_known else recognised(own)
        wanted = named_space(wanted) if isinstance(wanted, str) else wanted
        fitting = [name for name, space in SPACES.items() if (space.channels, space.stride) == (channels, stride)]
        if (wanted.channels, wanted.stride) != (channels, stride):
            raise UserError(
                f"{self.vae.where}: its latents have {channels} channels and stride {stride}, those of {wanted.name} have "
                f"{wanted.channels} and {wanted.stride}; spaces that fit: {', '.join(fitting) or 'none that is named'}"
            )
        if own.map_is_known and wanted.name and not _same_numbers(own, wanted):
            real = recognised(own).name or "a space without a name"
            raise UserError(f"{self.vae.where}: its scale and shift are those of {real}, not of {wanted.name}")
        return wanted if wanted.name else recognised(own)

    def adopt_name_of(self, recorded: LatentSpace) -> None:
        """Take the named space that a checkpoint records of this VAE, if the VAE's own numbers do not tell one."""
        same_shape = (recorded.channels, recorded.stride) == (self.channels, self.stride)
        if recorded.name and same_shape and not self.space.map_is_known:
            self.space = recorded
            self.identity["space"] = recorded.to_dict()

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the VAE's config and weights."""
        return self.vae.digest()

    @torch.no_grad()
    def encode(self, images: torch.Tensor, sample: bool = False, generator: torch.Generator | None = None) -> torch.Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> scaled latents (B, channels, H/stride, W/stride), float32.

        The posterior mean, or with `sample` a draw from the posterior (a tiny autoencoder has none: its mean).
        """
        if any(side % self.stride for side in images.shape[2:]):
            raise UserError(f"image of {tuple(images.shape[2:])} px: both sides must be multiples of {self.stride}")
        raw = raw_latents(self._encode_parts(images), sample, generator)
        return (raw.float() - self._on_device(self._mean)) * self._on_device(self._scale)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Scaled latents (B, channels, h, w) -> images (B, 3, h·stride, w·stride), float32, about [-1, 1], not clamped.

        Gradients flow to the latents; the VAE's own weights take none.
        """
        raw = latents.float() / self._on_device(self._scale) + self._on_device(self._mean)
        parts = self._parts(raw, stride=self.stride)
        return torch.cat([self.vae.model.decode(self._input(part)).sample.float() for part in parts])

    def _encode_parts(self, images: torch.Tensor) -> list:
        """What the VAE makes of `images`, piece by piece. Where memory runs out it goes on with half as many at once, and
        keeps to that; the result does not depend on it but for rounding."""
        while True:
            pieces = images.split(self._images_at_once or max(1, len(images)))
            parts = [part for piece in pieces for part in self._parts(piece, stride=1)]
            try:
                return [self.vae.model.encode(self._input(part)) for part in parts]
            except Exception as error:
                largest = max(map(len, parts))
                if not is_out_of_memory(error) or largest == 1:
                    raise
            release_memory()  # after the except block, so that the error no longer holds the tensors
            self._images_at_once = largest // 2
            log.warning("out of memory: encoding at most %s at once", count_of(self._images_at_once, "image"))

    def _parts(self, tensor: torch.Tensor, stride: int):
        """`tensor` in the pieces in which the VAE runs fastest: whole, but on a CPU of at most `CPU_PIXELS` image pixels,
        since the features of a larger batch do not fit its cache (almost twice the time at 16 images of 256 px)."""
        if self.vae.device.type != "cpu":
            return [tensor]
        return tensor.split(max(1, CPU_PIXELS // (tensor.shape[2] * tensor.shape[3] * stride**2)))

    def _input(self, tensor):
        return tensor.to(self.vae.device, self.vae.dtype, memory_format=torch.channels_last)

    def _on_device(self, numbers):
        """A number as it is; one number per channel as a tensor that broadcasts over latents."""
        if isinstance(numbers, float):
            return numbers
        return torch.tensor(numbers, device=self.vae.device).view(1, -1, 1, 1)


def _own_map(vae: FrozenVAE) -> tuple:
    """(mean, scale) of a VAE's `(raw - mean) * scale`: numbers, or tuples of one per channel. UserError for a bad config.

    `latents_mean` and `latents_std`, where the config has them, are taken as diffusers' SDXL pipeline takes them:
    `(raw - latents_mean) * scaling_factor / latents_std`.
    """
    config = vae.config
    scale, shift = config.get("scaling_factor"), config.get("shift_factor")
    scale = 1.0 if scale is None else scale
    shift = 0.0 if shift is None else shift
    for name, value, low in (("scaling_factor", scale, 0), ("shift_factor", shift, -1e6)):
        _require_number(vae, name, value, low)
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is None and std is None:
        return float(shift), float(scale)
    for name, values, low in (("latents_mean", mean, -1e6), ("latents_std", std, 0)):
        if not isinstance(values, (list, tuple)) or len(values) != config["latent_channels"]:
            raise UserError(
                f"{vae.where}: {name} {shown(values)} of its config.json must be {config['latent_channels']} numbers, one for "
                "each channel"
            )
        for value in values:
            _require_number(vae, name, value, low)
    return tuple(map(float, mean)), tuple(scale / value for value in std)


def _require_number(vae, name, value, low):
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low < value < 1e6:
        raise UserError(f"{vae.where}: {name} {shown(value)} of its config.json must be a number above {low:g}")


def _per_channel(numbers, channels: int) -> tuple:
    return (numbers,) * channels if isinstance(numbers, float) else numbers


def good_image_size(size: int, *strides: int) -> int:
    """`size` if it is a multiple of every stride; otherwise UserError that names the nearest good one. Pixels."""
    step = math.lcm(*strides)
    if size > 0 and size % step == 0:
        return size
    nearest = max(step, round(size / step) * step)
    raise UserError(f"image_size {size}: must be a multiple of {step} (both VAEs' strides); the nearest is {nearest}")
