"""Images as VAEs show them: what a module is trained on that is to stand behind the decoders of several latent spaces."""

from __future__ import annotations

import torch

from images.decoding import to_levels
from vaes.codec import Codec, decode_picture


class SeenThrough:
    """Images as they are or as one of several VAEs decodes their latents. Which of these, an image's own pixels draw, so that
    the cache and training without it show the same.

    Attributes:
        codecs: of the N frozen VAEs.
    """

    def __init__(self, codecs: list[Codec]):
        self.codecs = codecs

    def places(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W) in [-1, 1], of 8-bit levels -> of each the place of its VAE in `codecs`, or N for none: (B)."""
        return to_levels(images).sum(dim=(1, 2, 3)) % (len(self.codecs) + 1)

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W) in [-1, 1], of 8-bit levels -> their pictures, alike."""
        places, pictures = self.places(images), images.clone()
        for place, codec in enumerate(self.codecs):
            chosen = (places == place).nonzero().flatten()
            if len(chosen):
                pictures[chosen] = decode_picture(codec.encode(images[chosen]), codec).to(pictures)
        return pictures
