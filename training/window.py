"""Where a step looks: a random window of latents, and how it is cut out of latents and images."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Window:
    """A rectangle in latents, and the number of items at the start of a batch that are looked at in it.

    Attributes:
        items: of the batch. top, left, height, width: of the rectangle, latents. whole: height and width of all latents.
    """

    items: int
    top: int
    left: int
    height: int
    width: int
    whole: tuple[int, int]

    def cut(self, tensor: torch.Tensor, scale: int = 1) -> torch.Tensor:
        """The window of a batch (B, C, h, w) that has `scale` values where latents have one."""
        rows = slice(self.top * scale, (self.top + self.height) * scale)
        return tensor[: self.items][..., rows, self.left * scale : (self.left + self.width) * scale]

    def inner(self, margin: int, stride: int) -> tuple:
        """The index of the part of a decoded window (height · stride, width · stride) that is at least `margin` latents
        from what the decoder could not see. At an edge of the image the decoder sees all that there is: nothing is left out."""
        margin = min(margin, (min(self.height, self.width) - 1) // 2) * stride
        below, right = self.whole[0] - self.top - self.height, self.whole[1] - self.left - self.width
        above, under, before, after = (margin * (room > 0) for room in (self.top, below, self.left, right))
        return ..., slice(above, self.height * stride - under), slice(before, self.width * stride - after)


def draw_window(whole: tuple[int, int], side: int, items: int, seed: int, step: int) -> Window:
    """The window of a step on latents of that height and width, `side` latents wide (0: all of them). It depends on (seed,
    step) alone."""
    high, wide = (min(side or length, length) for length in whole)
    # the place is drawn from half a window beyond the edges and then moved inside, so that the outermost latents are
    # decoded in a quarter of the steps; drawn from inside alone, they would be decoded in one of many
    at = 2 * np.random.default_rng((seed, step)).random(2) - 0.5
    top, left = (round(place * slack) for place, slack in zip(at.clip(0, 1), (whole[0] - high, whole[1] - wide)))
    return Window(items, top, left, high, wide, tuple(whole))
