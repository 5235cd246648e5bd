"""Translate ComfyUI's LATENT. Needs torch and `vae_align.py`, nothing from ComfyUI.

A LATENT is a dict: `samples` is (B, C, h, w), or (B, C, frames, h, w) for video VAEs; other nodes may add further entries.
"""

import torch

from .vae_align import AlignError, AlignPipeline, LatentSpace

TITLES = {"sd15": "SD1.5", "sdxl": "SDXL", "sd3": "SD3", "flux1": "FLUX.1", "flux2": "FLUX.2", "playground25": "Playground 2.5"}
OLD_GRID = ("downscale_ratio_spacial", "downscale_ratio_temporal")  # of the VAE, in ComfyUI's empty latents


def align_latent(pipeline: AlignPipeline, latent: dict, image: torch.Tensor | None = None) -> dict:
    """VAE1's LATENT -> VAE2's LATENT on the same device; `noise_mask`, `batch_index` and other entries are kept.

    Args:
        image: ComfyUI's IMAGE (B, H, W, 3) in [0, 1], for modules that take it: the source of the latents.

    Each frame is translated alone. If VAE2 is a video VAE, frames stay frames of their video; otherwise each becomes a picture
    of the batch. AlignError for latents of another space.
    """
    samples = latent["samples"]
    if getattr(samples, "is_nested", False) or not isinstance(samples, torch.Tensor) or samples.ndim not in (4, 5):
        raise AlignError("these latents are no pictures' latents (sound, or several parts in one): no module takes them")
    if pipeline.uses_image:
        image = _pixels(pipeline, image, len(samples) * (samples.shape[2] if samples.ndim == 5 else 1))
    aligned = pipeline.translate(samples, image, raw="comfyui")
    lost = OLD_GRID if len(aligned) == len(samples) else (*OLD_GRID, "batch_index")  # it counts videos, not frames
    kept = {name: value for name, value in latent.items() if name not in lost}
    return kept | {"samples": aligned.contiguous()}


def describe(pipeline: AlignPipeline) -> str:
    """One line: the two spaces and the inputs, such as "SD1.5 -> FLUX.1, from latents"."""
    inputs = " and ".join([*["latents"] * pipeline.uses_latents, *["the image"] * pipeline.uses_image])
    return f"{_title(pipeline.space1)} -> {_title(pipeline.space2)}, from {inputs}"


def _title(space: LatentSpace) -> str:
    return TITLES.get(space.name, space.name or f"a space of {space.channels} channels")


def _pixels(pipeline: AlignPipeline, image: torch.Tensor | None, count: int) -> torch.Tensor:
    """IMAGE -> (B, 3, H, W) in [-1, 1], with VAEEncode's crop around the centre; one image serves a whole batch."""
    if image is None:
        raise AlignError("this module was trained with the image: connect the image that the latents were encoded from")
    stride = max(pipeline.space1.stride, pipeline.space2.stride) if not pipeline.uses_latents else pipeline.space1.stride
    for axis in (1, 2):
        side = image.shape[axis]
        image = image.narrow(axis, side % stride // 2, side // stride * stride)
    pixels = image[..., :3].movedim(-1, 1).float() * 2 - 1
    return pixels.expand(count, -1, -1, -1) if len(pixels) == 1 else pixels
