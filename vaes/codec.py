"""The codec: one frozen VAE that encodes to scaled latents and decodes from them, and the named space of its latents.

A VAE's encoder gives raw latents. Diffusion models work in scaled latents: `(fold(raw) - mean) / std`, with one mean and one
deviation per channel. Outside this file latents are scaled latents.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from images.decoding import to_levels
from utils import UserError, count_of, file_digest, is_out_of_memory, read_json
from vae_align import LatentSpace
from vaes.families import FAMILIES, SPACES, Family, family_of, spaces_with
from vaes.loading import FrozenVAE

log = logging.getLogger(__name__)

CPU_PIXELS = 256 * 256  # image pixels that a VAE handles at once on a CPU
HUB_OWNER_OF_TINY = "madebyollin/"  # hub ids of tiny autoencoders: this and a name in `Family.tiny`


def _with_name(space: LatentSpace) -> LatentSpace:
    """The named space with these numbers, or `space` itself where no named space has them."""
    return next((known for known in SPACES.values() if same_numbers(known, space)), space)


def same_numbers(first: LatentSpace, second: LatentSpace) -> bool:
    """Whether two latent spaces have the same shape and the same map between raw and scaled latents, but for rounding."""
    if (first.channels, first.stride) != (second.channels, second.stride):
        return False
    numbers = zip((*first.mean, *first.std), (*second.mean, *second.std))
    return all(math.isclose(one, other, rel_tol=1e-4, abs_tol=1e-6) for one, other in numbers)


class Codec:
    """One frozen VAE behind the project's conventions: images in [-1, 1], scaled latents, float32 out.

    Attributes:
        vae: the `FrozenVAE`. space: the `LatentSpace` of its latents. channels, stride: of that space.
        path, subfolder: where it came from; None where that is not known.
    """

    def __init__(self, vae, path: str | None = None, subfolder: str | None = None, space: LatentSpace | str | None = None):
        """UserError if the VAE's shape or numbers contradict `space`.

        Args:
            vae: a `FrozenVAE` or a diffusers model.
            path, subfolder: where it came from.
            space: the latent space or its name, for a VAE whose numbers do not tell.
        """
        self.vae = vae if isinstance(vae, FrozenVAE) else FrozenVAE.of_model(vae)
        self.channels = self.vae.channels
        self.stride = self.vae.stride
        family = self._find_family(path, space)
        self._map_given = self._find_map(family)
        self.space = self._find_space(family, space)
        self._images_at_once = None  # the whole batch
        if path is not None:
            local = Path(path).expanduser()
            is_here = local.is_dir() or self.vae.place == local
            path = str(local.resolve() if is_here else path)  # another working directory has other relative folders
        self.path, self.subfolder = path, subfolder

    @property
    def identity(self) -> dict:
        """The VAE as a checkpoint stores it."""
        return {
            "path": self.path,
            "subfolder": self.subfolder,
            "class": self.vae.class_name,
            "channels": self.channels,
            "stride": self.stride,
            "space": self.space.to_dict(),
            "content": self.content,
        }

    def difference_from(self, recorded: dict) -> str | None:
        """What differs from the VAE that a checkpoint stores, such as "class"; None if it is the same. Its place does not
        count, nor does what an older checkpoint does not store."""
        names = ("class", "channels", "stride", "content" if "content" in recorded else "space")
        return next((name for name in names if name in recorded and recorded[name] != self.identity[name]), None)

    def warn_of_difference(self, recorded: dict, what: str) -> None:
        """Warn unless this is the VAE with which `what` was trained, as far as its checkpoint tells."""
        if other := self.difference_from(recorded):
            log.warning("%s was trained with another VAE than %s (another %s)", what, self.vae.where, other)

    def _find_family(self, path, wanted) -> Family | None:
        """The row of the wanted space, or of the space that the VAE's files or class tell. UserError if the wanted space has
        another shape than the VAE's latents."""
        shape = (self.channels, self.stride)
        if wanted is None:
            told = self.vae.space_name or self.vae.convention.space
            tiny = str(path).removeprefix(HUB_OWNER_OF_TINY) if str(path).startswith(HUB_OWNER_OF_TINY) else None
            family = next((family for family in FAMILIES if family.name == told or tiny in family.tiny), None)
            return family if family and (family.channels, family.stride) == shape else None
        if isinstance(wanted, str):
            family = wanted = family_of(wanted)
        else:
            family = next((family for family in FAMILIES if family.name == wanted.name), None)
        if (wanted.channels, wanted.stride) != shape:
            fitting = ", ".join(family.name for family in spaces_with(*shape))
            raise UserError(
                f"{self.vae.where}: its latents have {self.channels} channels and stride {self.stride}, those of {wanted.name} "
                f"have {wanted.channels} and {wanted.stride}; spaces that fit: {fitting or 'none that is named'}"
            )
        return family

    def _find_map(self, family: Family | None) -> LatentSpace | None:
        """The map between raw and scaled latents from the VAE's config or its family; None where its weights hold it."""
        if not self.vae.has_own_map:
            if family is None or family.space is None:
                names = [each.name for each in spaces_with(self.channels, self.stride) if each.vae == self.vae.class_name]
                raise UserError(
                    f"{self.vae.where}: the file does not say how its latents are scaled; name its latent space: "
                    f"{', '.join(names) or 'none with a name fits'}"
                )
            self._require_numbers_of(family, self.vae.space_name or family.name)
            return family.space
        if self.vae.convention.space:
            return None
        own = self.vae.convention.own_map(self.vae)
        return replace(own, mean=(0.0,) * self.channels) if family and family.ignores_shift else own

    def _find_space(self, family: Family | None, given) -> LatentSpace:
        """The space of this VAE's latents: the given one, or the named one with its numbers.

        A VAE whose own map changes nothing gives scaled latents. Its space then has the named space's map, for hosts that keep
        raw latents; encoding and decoding do not use it. The same holds for a VAE with its statistics in its weights.
        """
        own = self._map_given or LatentSpace.from_scale(None, self.channels, self.stride)
        own = replace(own, name=None, fold=1)
        if family is None:
            if isinstance(given, LatentSpace) and (given.name or not own.map_is_known):
                return given
            return _with_name(own)
        if family.space is None:
            if not own.map_is_known:
                raise UserError(
                    f"{self.vae.where}: the numbers of {family.name} are in its own VAE's config, which this is not"
                )
            return replace(own, name=family.name)
        if own.map_is_known and not same_numbers(own, family.space):
            if given is None:  # the VAE's numbers count for more than a file's name
                return _with_name(own)
            self._require_numbers_of(family, _with_name(own).name or "a space without a name")
        return family.space

    def _require_numbers_of(self, family: Family, found: str) -> None:
        if found != family.name:
            raise UserError(f"{self.vae.where}: its scale and shift are those of {found}, not of {family.name}")

    @functools.cached_property
    def _map(self) -> LatentSpace:
        """The map between the VAE's own raw latents and scaled latents."""
        return self._map_given or self.vae.convention.own_map(self.vae)

    def adopt_name_of(self, recorded: LatentSpace) -> None:
        """Take the named space that a checkpoint records for this VAE, unless the VAE's own numbers tell one."""
        same_shape = (recorded.channels, recorded.stride) == (self.channels, self.stride)
        if recorded.name and same_shape and not self.space.map_is_known:
            self.space = recorded

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the VAE's config and weights: of the files if there are any, otherwise of the tensors."""
        digest = hashlib.sha256()
        for file in self.vae.files:
            digest.update(file.name.encode() + file_digest(file))
        if not self.vae.files:
            digest.update(repr(sorted(self.vae.config.items())).encode())
            for name, tensor in self.vae.model.state_dict().items():
                digest.update(name.encode() + tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    @functools.cached_property
    def content(self) -> str:
        """SHA-256 of the VAE's config and weights, wherever its files are and whatever they are called. In a config, keys such
        as `_diffusers_version` do not count."""

        def digest(file):
            if file.suffix != ".json":
                return file_digest(file)
            told = {name: value for name, value in read_json(file).items() if not name.startswith("_")}
            return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).digest()

        files = self.vae.files
        return hashlib.sha256(b"".join(sorted(map(digest, files)))).hexdigest() if files else self.fingerprint

    @torch.no_grad()
    def encode(self, images: torch.Tensor, sample: bool = False, generator: torch.Generator | None = None) -> torch.Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> scaled latents (B, channels, H/stride, W/stride), float32.

        The posterior mean, or with `sample` a draw from the posterior. A tiny autoencoder has no posterior; both give its
        latents. UserError for another shape or dtype, and for sides that are no multiples of the stride.
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

    def decode_with_features(self, latents: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The images of `decode`, and the outputs of the decoder's stages, coarse to fine, without the finest stage.

        Each output is (N, C, h, w) in the VAE's precision, or (N, C, frames, h, w) for a VAE of frames. N is B, or 2 B for a
        ConsistencyDecoderVAE, which decodes in two steps. Gradients flow to the latents.
        """
        outputs = {}  # in the order in which the stages run: AutoencoderDC lists them from the finest

        def keep(stage, inputs, output):
            # the blocks of some VAEs of frames also return a cache
            outputs.setdefault(stage, []).append(output[0] if isinstance(output, tuple) else output)

        stages = self.vae.convention.decoder_stages(self.vae.model)
        hooks = [stage.register_forward_hook(keep) for stage in stages]
        try:
            images = self.decode(latents)
        finally:
            for hook in hooks:
                hook.remove()
        return images, [torch.cat(kept) for kept in outputs.values()][:-1]

    def _encode_parts(self, images: torch.Tensor) -> list:
        """The VAE's results for `images`, piece by piece. When memory runs out, this and all later calls encode half as many
        images at once. The results change only by rounding."""
        while True:
            pieces = images.split(self._images_at_once or max(1, len(images)))
            parts = [part for piece in pieces for part in self._parts(piece, stride=1)]
            try:
                return [self.vae.convention.encode(self.vae.model, self._input(part)) for part in parts]
            except Exception as error:
                largest = max(map(len, parts))
                if not is_out_of_memory(error) or largest == 1:
                    raise
            torch.cuda.empty_cache()  # after the except block, so that the error no longer holds the tensors
            self._images_at_once = largest // 2
            log.warning("out of memory: encoding at most %s at once", count_of(self._images_at_once, "image"))

    def _parts(self, tensor: torch.Tensor, stride: int):
        """`tensor` in the pieces in which the VAE runs fastest. A CPU takes at most `CPU_PIXELS` image pixels at once: the
        features of a larger batch do not fit its cache (almost twice the time at 16 images of 256 px)."""
        if self.vae.convention.one_by_one:
            return tensor.split(1)
        if self.vae.device.type != "cpu":
            return [tensor]
        return tensor.split(max(1, CPU_PIXELS // (tensor.shape[2] * tensor.shape[3] * stride**2)))

    def _input(self, tensor):
        return tensor.to(self.vae.device, self.vae.dtype, memory_format=torch.channels_last)


@dataclass(eq=False)
class SeenThrough:
    """Images as they are, or as one of several VAEs decodes their latents. A hash of an image's own pixels chooses, so cached
    and uncached training agree.

    Attributes:
        codecs: the codecs of the N frozen VAEs.
    """

    codecs: list[Codec]

    def places(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W) in [-1, 1] of 8-bit levels -> each one's place in `codecs`, or N for the image itself: (B)."""
        return to_levels(images).sum(dim=(1, 2, 3)) % (len(self.codecs) + 1)

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W) in [-1, 1] of 8-bit levels -> the chosen pictures, same shape and range."""
        places, pictures = self.places(images), images.clone()
        for place, codec in enumerate(self.codecs):
            chosen = (places == place).nonzero().flatten()
            if len(chosen):
                pictures[chosen] = decode_picture(codec.encode(images[chosen]), codec).to(pictures)
        return pictures


@torch.no_grad()
def reencode(latents: torch.Tensor, codec1: Codec, codec2: Codec) -> torch.Tensor:
    """VAE1's scaled latents -> VAE2's scaled latents, by decoding with VAE1 and encoding with VAE2."""
    return codec2.encode(decode_picture(latents, codec1))


@torch.no_grad()
def decode_picture(latents: torch.Tensor, codec: Codec) -> torch.Tensor:
    """Scaled latents (B, channels, h, w) -> the picture that a viewer sees, (B, 3, H, W), clamped to [-1, 1]."""
    return codec.decode(latents).clamp(-1, 1)


def good_image_size(size: int, *strides: int) -> int:
    """`size` in pixels if it is a multiple of every stride; otherwise UserError that names the nearest good size."""
    step = math.lcm(*strides)
    if size > 0 and size % step == 0:
        return size
    nearest = max(step, round(size / step) * step)
    raise UserError(f"image_size {size}: must be a multiple of {step} (both VAEs' strides); the nearest is {nearest}")
