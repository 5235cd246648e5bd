"""The codec: one frozen VAE that speaks scaled latents, and which named space they are of.

Raw latents are what a VAE's encoder gives. Scaled latents are what diffusion models work in: `(fold(raw) - mean) / std`, with
numbers for each channel. Outside this file latents are scaled latents.
"""

from __future__ import annotations

import functools
import logging
import math
from dataclasses import replace
from pathlib import Path

import torch

from utils import UserError, count_of, is_out_of_memory, release_memory
from vae_align import LatentSpace
from vaes.conventions import OwnMap
from vaes.families import FAMILIES, SPACES, Family, family_of, named_space, spaces_with, table_of_families
from vaes.loading import FrozenVAE

__all__ = ["FAMILIES", "SPACES", "Codec", "good_image_size", "named_space", "recognised", "table_of_families"]

log = logging.getLogger(__name__)

CPU_PIXELS = 256 * 256  # image pixels that a VAE handles at once on a CPU
HUB_OWNER_OF_TINY = "madebyollin/"  # whose hub ids end in what `Family.tiny` lists


def recognised(space: LatentSpace) -> LatentSpace:
    """The named space with these numbers, or `space` itself."""
    return next((known for known in SPACES.values() if _same_numbers(known, space)), space)


def _same_numbers(first: LatentSpace, second: LatentSpace) -> bool:
    if (first.channels, first.stride) != (second.channels, second.stride):
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
        self.channels = self.vae.channels
        self.stride = self.vae.stride
        family = self._wanted_family(path, space)
        self._map_given = self._settle_map(family)
        self.space = self._settle_space(family, space)
        self._images_at_once = None  # as many as come
        if path is not None:
            local = Path(path).expanduser()
            is_here = local.is_dir() or self.vae.folder == local
            path = str(local.resolve() if is_here else path)  # a relative folder means another one elsewhere
        self.identity = {
            "path": path,
            "subfolder": subfolder,
            "class": self.vae.class_name,
            "channels": self.channels,
            "stride": self.stride,
            "space": self.space.to_dict(),
        }

    def _wanted_family(self, path, wanted) -> Family | None:
        """The row of the space that was asked for, or that the place of the VAE's files tells. UserError if its shape is not
        the VAE's."""
        if isinstance(wanted, str):
            family = family_of(wanted)
        elif wanted is not None:
            family = next((family for family in FAMILIES if family.name == wanted.name), None)
        else:
            told = self.vae.space_name or self.vae.convention.space
            told = next((family for family in FAMILIES if family.name == told or _is_tiny(path, family)), None)
            fits = told and (told.channels, told.stride) == (self.channels, self.stride)
            return told if fits else None
        shape, vae = family or wanted, self.vae
        if (shape.channels, shape.stride) != (self.channels, self.stride):
            fitting = [family.name for family in spaces_with(self.channels, self.stride)]
            raise UserError(
                f"{vae.where}: its latents have {self.channels} channels and stride {self.stride}, those of {shape.name} have "
                f"{shape.channels} and {shape.stride}; spaces that fit: {', '.join(fitting) or 'none that is named'}"
            )
        return family

    def _settle_map(self, family: Family | None) -> OwnMap | None:
        """The VAE's map between raw and scaled latents, as far as its config or its family tells; None where the weights do."""
        if not self.vae.has_own_map:
            if family is None or family.space is None:
                names = [each.name for each in spaces_with(self.channels, self.stride) if each.vae == self.vae.class_name]
                raise UserError(
                    f"{self.vae.where}: the file does not say how its latents are scaled; name its latent space: "
                    f"{', '.join(names) or 'none with a name fits'}"
                )
            if self.vae.space_name not in (None, family.name):
                raise UserError(
                    f"{self.vae.where}: its scale and shift are those of {self.vae.space_name}, not of {family.name}"
                )
            return OwnMap(family.space.mean, family.space.std)
        if self.vae.convention.space:
            return None
        own = self.vae.convention.own_map(self.vae, self.vae.config, self.channels)
        if family and family.ignores_shift:
            own = OwnMap((0.0,) * self.channels, own.std, own.fold)
        return own

    def _settle_space(self, family: Family | None, given) -> LatentSpace:
        """The space of this VAE's latents: the one that was asked for, or the named one that its numbers tell.

        A VAE whose own map does nothing gives scaled latents. For it the recorded map is the named space's, which hosts that
        keep raw latents need; encoding and decoding do not use it. Likewise for a VAE whose statistics are in its weights.
        """
        own_map = self._map_given or OwnMap((0.0,) * self.channels, (1.0,) * self.channels)
        own = LatentSpace(None, self.channels, self.stride, own_map.mean, own_map.std)
        if family is None:
            if isinstance(given, LatentSpace) and (given.name or not own.map_is_known):
                return given
            return recognised(own)
        if family.space is None:
            if not own.map_is_known:
                raise UserError(
                    f"{self.vae.where}: the numbers of {family.name} are in its own VAE's config, which this is not"
                )
            return replace(own, name=family.name)
        if own.map_is_known and not _same_numbers(own, family.space):
            if given is None:  # the name of a file is a hint, the VAE's own numbers are facts
                return recognised(own)
            real = recognised(own).name or "a space without a name"
            raise UserError(f"{self.vae.where}: its scale and shift are those of {real}, not of {family.name}")
        return family.space

    @functools.cached_property
    def _map(self) -> LatentSpace:
        """The map between the VAE's own raw latents and scaled latents."""
        own = self._map_given or self.vae.convention.own_map(self.vae, self.vae.config, self.channels)
        return LatentSpace(None, self.channels, self.stride, own.mean, own.std, own.fold)

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
        if images.ndim != 4 or not images.is_floating_point():
            raise UserError(f"images of shape {tuple(images.shape)}, {images.dtype}: pass floats (B, 3, H, W) in [-1, 1]")
        if any(side % self.stride for side in images.shape[2:]):
            raise UserError(f"image of {tuple(images.shape[2:])} px: both sides must be multiples of {self.stride}")
        raw = self.vae.convention.raw_latents(self._encode_parts(images), sample, generator)
        return self._map.to_scaled(raw.float())

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Scaled latents (B, channels, h, w) -> images (B, 3, h·stride, w·stride), float32, about [-1, 1], not clamped.

        Gradients flow to the latents; the VAE's own weights take none.
        """
        raw = self._map.to_raw(latents.float())
        model, convention = self.vae.model, self.vae.convention
        return torch.cat(
            [convention.decode(model, self._input(part)).float() for part in self._parts(raw, self.vae.raw_stride)]
        )

    def _encode_parts(self, images: torch.Tensor) -> list:
        """What the VAE makes of `images`, piece by piece. Where memory runs out it goes on with half as many at once, and
        keeps to that; the result does not depend on it but for rounding."""
        while True:
            pieces = images.split(self._images_at_once or max(1, len(images)))
            parts = [part for piece in pieces for part in self._parts(piece, stride=1)]
            try:
                return [self.vae.convention.encode(self.vae.model, self._input(part)) for part in parts]
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
        if self.vae.convention.one_by_one:
            return tensor.split(1)
        if self.vae.device.type != "cpu":
            return [tensor]
        return tensor.split(max(1, CPU_PIXELS // (tensor.shape[2] * tensor.shape[3] * stride**2)))

    def _input(self, tensor):
        return tensor.to(self.vae.device, self.vae.dtype, memory_format=torch.channels_last)


@torch.no_grad()
def reencode(latents: torch.Tensor, codec1: Codec, codec2: Codec) -> torch.Tensor:
    """VAE1's scaled latents -> VAE2's of the picture that VAE1 decodes from them: the detour that a module saves."""
    return codec2.encode(decode_picture(latents, codec1))


@torch.no_grad()
def decode_picture(latents: torch.Tensor, codec: Codec) -> torch.Tensor:
    """Scaled latents -> the picture that a viewer sees of them, (B, 3, H, W) in [-1, 1]."""
    return codec.decode(latents).clamp(-1, 1)


def _is_tiny(path, family: Family) -> bool:
    """Whether a hub id is that of the family's tiny autoencoder, whose own scale is 1 and says nothing."""
    return str(path) in [HUB_OWNER_OF_TINY + name for name in family.tiny]


def good_image_size(size: int, *strides: int) -> int:
    """`size` if it is a multiple of every stride; otherwise UserError that names the nearest good one. Pixels."""
    step = math.lcm(*strides)
    if size > 0 and size % step == 0:
        return size
    nearest = max(step, round(size / step) * step)
    raise UserError(f"image_size {size}: must be a multiple of {step} (both VAEs' strides); the nearest is {nearest}")
