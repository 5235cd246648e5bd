"""The power of planes by spatial frequency."""

from __future__ import annotations

import torch


def power(planes: torch.Tensor) -> torch.Tensor:
    """The power of each frequency of planes (…, H, W), under a Hann window. All frequencies together give the sum of squares
    of what is under the window (Parseval)."""
    high, wide = (torch.hann_window(side, dtype=planes.dtype, device=planes.device) for side in planes.shape[-2:])
    return torch.fft.fft2(planes * (high[:, None] * wide[None, :]), norm="ortho").abs().square()


def radial_frequency(size: tuple[int, int]) -> torch.Tensor:
    """Of each coefficient of `power` for planes of that height and width: its frequency, in cycles per sample."""
    high, wide = (torch.fft.fftfreq(side) for side in size)
    return torch.sqrt(high[:, None] ** 2 + wide[None, :] ** 2)


def without_mean(planes: torch.Tensor) -> torch.Tensor:
    """Planes (…, H, W), each less its mean."""
    return planes - planes.mean(dim=(-2, -1), keepdim=True)
