"""A target beside VAE2's own: what decoding with VAE1 and encoding with VAE2 makes of VAE1's latents.

VAE1's latents do not hold all that VAE2's do, so a module that regresses on VAE2's latents learns the mean of all that could
have been there, and blurs. Re-encoded latents are a function of VAE1's latents alone: regressing on them needs no mean, and
they have the texture that VAE1's decoder invents. With weight W the target is `(1 - W) · VAE2's + W · re-encoded`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from latents.spaces import Codec, decode_picture


@dataclass
class Reencoded:
    """What decode + re-encode makes of a batch.

    Attributes:
        latents: VAE2's, of the picture that VAE1 decodes, (B, channels, h, w). picture: that, (B, 3, H, W) in [-1, 1], or None
            where a cache has left it out because nothing reads it. weight: W.
    """

    latents: torch.Tensor
    picture: torch.Tensor | None
    weight: float


@dataclass
class Reencoder:
    """Decodes with VAE1 and encodes with VAE2, without gradients, what the latent cache has not.

    Attributes:
        codec1, codec2: the frozen VAEs. weight: W in [0, 1), the share of what is re-encoded in the target.
    """

    codec1: Codec
    codec2: Codec
    weight: float

    def __call__(self, batch: dict, source: torch.Tensor | None) -> Reencoded:
        """A training batch and VAE1's latents of it (B, channels, h, w), which may be None where the batch has the picture."""
        if "reencoded" not in batch:
            picture = batch["decoded"] if "decoded" in batch else decode_picture(source, self.codec1)
            return Reencoded(self.codec2.encode(picture), picture, self.weight)
        device = self.codec2.vae.device
        latents, picture = (
            batch[name].to(device, non_blocking=True) if name in batch else None for name in ("reencoded", "decoded")
        )
        return Reencoded(latents, picture, self.weight)
