"""The loss that looks at the picture: what VAE2's frozen decoder shows of the aligned latents."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

KINDS = {"l1": F.l1_loss, "mse": F.mse_loss}


class DecodedImageLoss:
    """Mean difference, in image values [-1, 1], between the decoded aligned latents and a reference picture.

    Gradients flow through the frozen decoder into the aligned latents. To stay affordable it decodes the first
    `batch_size` items of a batch, of each a random window of `window` x `window` latents (0: the whole).

    Args:
        space: `vae_align.LatentSpace` to decode with: VAE2's, or a cheaper one that shares its latents.
        kind: "l1" takes the absolute difference, "mse" the squared one.
        reference: "original" compares with the image that was encoded, "vae2" with the decoder's view of VAE2's latents.
        margin: latents at the window's edge that are decoded but not compared, since the decoder lacks their surroundings.
    """

    def __init__(self, space, batch_size: int, window: int, reference: str, seed: int, margin: int = 1, kind: str = "l1"):
        self.space, self.batch_size, self.window, self.reference = space, batch_size, window, reference
        self.seed, self.margin, self.difference = seed, margin, KINDS[kind]

    def __call__(self, aligned: torch.Tensor, target: torch.Tensor, images: torch.Tensor | None, step: int) -> torch.Tensor:
        """Aligned and target latents (B, C, h, w), images (B, 3, H, W) in [-1, 1] -> scalar. The window depends on
        (seed, step) alone, so that a resumed run draws the same."""
        stride = self.space.stride
        height, width = aligned.shape[2:]
        high, wide = min(self.window or height, height), min(self.window or width, width)
        at = np.random.default_rng((self.seed, step)).random(2)
        top, left = int(at[0] * (height - high + 1)), int(at[1] * (width - wide + 1))

        def windowed(tensor, scale=1):
            tensor = tensor[: self.batch_size]
            return tensor[..., top * scale : (top + high) * scale, left * scale : (left + wide) * scale]

        shown = self.space.decode(windowed(aligned))
        if self.reference == "vae2":
            with torch.no_grad():
                wanted = self.space.decode(windowed(target))
        else:
            wanted = windowed(images.to(shown.device), stride)
        # an edge of the window that is an edge of the image has nothing beyond it to miss
        trim = [self.margin * stride * (cut > 0) for cut in (top, height - top - high, left, width - left - wide)]
        inner = (..., slice(trim[0], shown.shape[2] - trim[1]), slice(trim[2], shown.shape[3] - trim[3]))
        return self.difference(shown[inner], wanted[inner])
