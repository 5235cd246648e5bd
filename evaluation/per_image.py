"""What is measured on one image and its latents by a formula. Knows no model and no network.

Images are (B, 3, H, W) in [-1, 1] and are compared as the clamped 8-bit levels that a viewer sees; latents are scaled
latents (B, C, h, w). Every function returns a list with one item per image.
"""

from __future__ import annotations

import torch

MS_SSIM_SIDE = 176  # px: a sixteenth of it must exceed 10, or torchmetrics raises


def to_8bit(images: torch.Tensor) -> torch.Tensor:
    """Images in [-1, 1] -> levels 0..255, clamped and rounded, still float: what a viewer sees."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round()


def psnr(levels: torch.Tensor, reference: torch.Tensor) -> list[float]:
    """PSNR in dB between 8-bit levels (B, 3, H, W): infinite for equal images."""
    error = (levels - reference).square().cpu().mean(dim=(1, 2, 3), dtype=torch.float64)
    return (10 * torch.log10(255**2 / error)).tolist()


def colour_bias(levels: torch.Tensor, reference: torch.Tensor) -> list[list[float]]:
    """Mean of `levels` - `reference` (B, 3, H, W), for R, G and B each, in 8-bit levels."""
    return (levels - reference).cpu().mean(dim=(2, 3), dtype=torch.float64).tolist()


def ssim(levels: torch.Tensor, reference: torch.Tensor) -> list[float]:
    """SSIM of 8-bit levels (B, 3, H, W), as Wang et al. 2004 (11x11 Gaussian window, sigma 1.5; mirrored borders)."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    scores = structural_similarity_index_measure(levels, reference, data_range=255.0, reduction="none")
    return scores.reshape(-1).tolist()


def ms_ssim(levels: torch.Tensor, reference: torch.Tensor) -> list[float]:
    """MS-SSIM of 8-bit levels (B, 3, H, W) from five scales (Wang et al. 2003). Both sides at least `MS_SSIM_SIDE` px."""
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

    scores = multiscale_structural_similarity_index_measure(levels, reference, data_range=255.0, reduction="none")
    return scores.reshape(-1).tolist()


def latent_mse_by_channel(latents: torch.Tensor, target: torch.Tensor) -> list[list[float]]:
    """Mean squared error of each channel: B lists of C values."""
    return _squared_error_by_channel(latents, target).tolist()


def latent_mse(latents: torch.Tensor, target: torch.Tensor) -> list[float]:
    """Mean squared error over all channels and places."""
    return _squared_error_by_channel(latents, target).mean(dim=1).tolist()


def latent_l1(latents: torch.Tensor, target: torch.Tensor) -> list[float]:
    """Mean absolute error over all channels and places."""
    return (latents - target).float().abs().mean(dim=(1, 2, 3)).tolist()


def latent_cosine(latents: torch.Tensor, target: torch.Tensor) -> list[float]:
    """Cosine of the angle between the whole latents, each taken as one vector."""
    return torch.cosine_similarity(latents.float().flatten(1), target.float().flatten(1)).tolist()


def _squared_error_by_channel(latents, target):
    return (latents - target).float().square().mean(dim=(2, 3))
