"""The conventions of latent spaces: which numbers make latents scaled latents, and a frozen VAE behind them."""

from __future__ import annotations

import functools
import hashlib
import logging
import math
from pathlib import Path

import torch

from latents.vaes import LazyVAE, freeze, image_stride
from runtime.device import is_out_of_memory, release_memory
from utils import UserError, count_of, file_digest, shown

log = logging.getLogger(__name__)

CPU_PIXELS = 256 * 256  # image pixels that a VAE handles at once on a CPU


class Codec:
    """One frozen VAE behind the project's conventions: images in [-1, 1], scaled latents, float32 out.

    `identity` is what a checkpoint stores of it: where it came from, its class, channels, stride, scale and shift.
    """

    def __init__(self, vae, path: str | None = None, subfolder: str | None = None):
        self.vae = vae if isinstance(vae, LazyVAE) else freeze(vae)
        config = vae.config
        class_name = vae.model_class.__name__ if isinstance(vae, LazyVAE) else type(vae).__name__
        self.channels = config["latent_channels"]
        self.stride = image_stride(vae)
        scale, shift = config.get("scaling_factor"), config.get("shift_factor")
        scale, shift = 1.0 if scale is None else scale, 0.0 if shift is None else shift
        for name, value, low in (("scaling_factor", scale, 0), ("shift_factor", shift, -1e6)):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not low < value < 1e6:
                where = f"{vae.flag} {vae.folder}" if isinstance(vae, LazyVAE) else class_name
                raise UserError(f"{where}: {name} {shown(value)} of its config.json must be a number above {low:g}")
        self.scaling_factor, self.shift_factor = float(scale), float(shift)
        self._images_at_once = None  # as many as come
        self._settled = set()  # which of encode and decode were seen to work in this precision
        if path is not None:
            local = Path(path).expanduser()
            path = str(local.resolve() if local.is_dir() else path)  # a relative folder means another one elsewhere
        self.identity = {
            "path": path,
            "subfolder": subfolder,
            "class": class_name,
            "channels": self.channels,
            "stride": self.stride,
            "scaling_factor": self.scaling_factor,
            "shift_factor": self.shift_factor,
        }

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the VAE's config and weights: of the files where they are not loaded yet, else of the tensors."""
        digest = hashlib.sha256()
        if isinstance(self.vae, LazyVAE):
            for file in self.vae.files:
                digest.update(file.name.encode() + file_digest(file))
        else:
            digest.update(repr(sorted(self.vae.config.items())).encode())
            for name, tensor in self.vae.state_dict().items():
                digest.update(name.encode() + tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    @torch.no_grad()
    def encode(self, images: torch.Tensor, sample: bool = False, generator: torch.Generator | None = None) -> torch.Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> scaled latents (B, channels, H/stride, W/stride), float32.

        The posterior mean, or with `sample` a draw from the posterior (a tiny autoencoder has none: its mean).
        """
        if any(side % self.stride for side in images.shape[2:]):
            raise UserError(f"image of {tuple(images.shape[2:])} px: both sides must be multiples of {self.stride}")
        self._settle_precision("encode", images)
        encoded = self._encode_parts(images)
        if hasattr(encoded[0], "latents"):
            raw = torch.cat([part.latents for part in encoded])
        else:
            posterior = type(encoded[0].latent_dist)(torch.cat([part.latent_dist.parameters for part in encoded]))
            raw = posterior.sample(generator=generator) if sample else posterior.mode()
        return (raw.float() - self.shift_factor) * self.scaling_factor

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Scaled latents (B, channels, h, w) -> images (B, 3, h·stride, w·stride), float32, about [-1, 1], not clamped.

        Gradients flow to the latents; the VAE's own weights take none.
        """
        raw = latents.float() / self.scaling_factor + self.shift_factor
        self._settle_precision("decode", raw)
        parts = self._parts(raw, stride=self.stride)
        return torch.cat([self.vae.decode(self._input(part)).sample.float() for part in parts])

    def _encode_parts(self, images: torch.Tensor) -> list:
        """What the VAE makes of `images`, piece by piece. Where memory runs out it goes on with half as many at once, and
        keeps to that; what comes out does not depend on it but for rounding."""
        while True:
            pieces = images.split(self._images_at_once or max(1, len(images)))
            parts = [part for piece in pieces for part in self._parts(piece, stride=1)]
            try:
                return [self.vae.encode(self._input(part)) for part in parts]
            except Exception as error:
                largest = max(map(len, parts))
                if not is_out_of_memory(error) or largest == 1:
                    raise
            release_memory()  # out here, where the error no longer holds on to what it was about
            self._images_at_once = largest // 2
            log.warning("out of memory: encoding at most %s at once", count_of(self._images_at_once, "image"))

    @torch.no_grad()
    def _settle_precision(self, what: str, batch: torch.Tensor) -> None:
        """Before the first batch in float16, see on one of its images, or raw latents, whether this VAE's activations stay
        within float16's range (those of SDXL's do not); where they overflow, float32 it is from then on."""
        if what in self._settled or self.vae.dtype != torch.float16 or not len(batch):
            return
        raw = batch[:1]
        if what == "decode" and not raw.isfinite().all():
            return  # says nothing of the decoder
        self._settled |= {what, "decode"}
        if what == "encode":
            (encoded,) = self._encode_parts(raw)
            raw = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()
        if not (raw.isfinite().all() and self.vae.decode(self._input(raw)).sample.isfinite().all()):
            if isinstance(self.vae, LazyVAE):
                self.vae.widen()
            else:
                log.warning("%s overflows in float16: running it in float32", self.identity["class"])
                self.vae.float()

    def _parts(self, tensor: torch.Tensor, stride: int):
        """`tensor` in the pieces in which the VAE runs fastest: whole, but on a CPU of at most `CPU_PIXELS` image pixels,
        since the features of a larger batch fall out of its cache (almost twice the time at 16 images of 256 px)."""
        if self.vae.device.type != "cpu":
            return [tensor]
        return tensor.split(max(1, CPU_PIXELS // (tensor.shape[2] * tensor.shape[3] * stride**2)))

    def _input(self, tensor):
        return tensor.to(self.vae.device, self.vae.dtype, memory_format=torch.channels_last)


def good_image_size(size: int, *strides: int) -> int:
    """`size` if it is a multiple of every stride; otherwise UserError that names the nearest good one. Pixels."""
    step = math.lcm(*strides)
    if size > 0 and size % step == 0:
        return size
    nearest = max(step, round(size / step) * step)
    raise UserError(f"--image_size {size}: must be a multiple of {step} (both VAEs' strides); the nearest is {nearest}")
