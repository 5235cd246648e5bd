"""ComfyUI's LATENT in, ComfyUI's LATENT out. Needs torch and `vae_align.py`, nothing of ComfyUI.

A LATENT is a dict: `samples` (B, C, h, w), or (B, C, frames, h, w) of video VAEs, and beside it what other nodes attached.
"""

import torch

from .vae_align import AlignError, AlignPipeline, LatentSpace

TITLES = {"sd15": "SD1.5", "sdxl": "SDXL", "sd3": "SD3", "flux1": "FLUX.1", "flux2": "FLUX.2", "playground25": "Playground 2.5"}
CHANNELS = {
    4: "SD1.5 or SDXL",
    12: "Mochi",
    16: "FLUX.1, SD3, Wan or Qwen-Image",
    32: "DC-AE",
    48: "Wan 2.2",
    128: "FLUX.2 or LTX",
}
NORMALISED_BY_HOST = {"flux2", "ltx", "ltx2"}  # ComfyUI's VAEs of these give scaled latents, folded where the family folds
OF_VIDEO = {  # spaces whose LATENT has an axis of frames
    "wan21", "wan22", "qwen-image-2.1", "hunyuan-video", "hunyuan-video-1.5", "ltx", "ltx2", "mochi", "cosmos1", "cogvideox",
    "cogvideox-5b", "easyanimate",
}  # fmt: skip
OF_THE_OLD_GRID = ("downscale_ratio_spacial", "downscale_ratio_temporal")  # what ComfyUI's empty latents say of their VAE


def align_latent(pipeline: AlignPipeline, latent: dict, image: torch.Tensor | None = None) -> dict:
    """VAE1's LATENT -> VAE2's LATENT on the same device; `noise_mask`, `batch_index` and other entries are kept.

    Args:
        image: ComfyUI's IMAGE (B, H, W, 3) in [0, 1], for modules that take it: the one that the latents were encoded from.

    Frames are carried one by one. Where VAE2 is a video's, each stays a frame of its video; else it becomes a picture of the
    batch. AlignError in one line for latents of another space. An all-zero LATENT is ComfyUI's empty one and stays empty.
    """
    samples = latent["samples"]
    if getattr(samples, "is_nested", False) or not isinstance(samples, torch.Tensor) or samples.ndim not in (4, 5):
        raise AlignError("these latents are no pictures' latents (sound, or several parts in one): no module takes them")
    for space in (pipeline.space1, pipeline.space2)[not pipeline.uses_latents :]:
        if not space.map_is_known:
            raise AlignError("the module's file does not name its latent spaces, so ComfyUI's raw latents are unknown to it")
    frames = samples.shape[2] if samples.ndim == 5 else 1
    flat = samples.movedim(2, 1).flatten(0, 1) if samples.ndim == 5 else samples
    _require_space(pipeline, flat)
    if pipeline.uses_image:
        image = _pixels(pipeline, image, len(flat))
    scaled = pipeline.translate(_to_scaled(pipeline.space1, flat.float()) if pipeline.uses_latents else None, image)
    aligned = _from_scaled(pipeline.space2, scaled.to(samples.device)).to(samples.dtype)
    if pipeline.uses_latents and not samples.any():
        aligned = torch.zeros_like(aligned)
    if pipeline.space2.name in OF_VIDEO:
        aligned = aligned.unflatten(0, (-1, frames)).movedim(1, 2)
    lost = OF_THE_OLD_GRID if len(aligned) == len(samples) else (*OF_THE_OLD_GRID, "batch_index")  # which counts videos
    kept = {name: value for name, value in latent.items() if name not in lost}
    return kept | {"samples": aligned.contiguous()}


def describe(pipeline: AlignPipeline) -> str:
    """One line: the two spaces, and whether the module takes the image."""
    inputs = " and ".join([*["latents"] * pipeline.uses_latents, *["the image"] * pipeline.uses_image])
    return f"{_title(pipeline.space1)} -> {_title(pipeline.space2)}, from {inputs}"


def _title(space: LatentSpace) -> str:
    return TITLES.get(space.name, space.name or f"a space of {space.channels} channels")


def _to_scaled(space: LatentSpace, latents: torch.Tensor) -> torch.Tensor:
    return latents if space.name in NORMALISED_BY_HOST else space.to_scaled(latents)


def _from_scaled(space: LatentSpace, latents: torch.Tensor) -> torch.Tensor:
    return latents if space.name in NORMALISED_BY_HOST else space.to_raw(latents)


def _require_space(pipeline: AlignPipeline, samples: torch.Tensor) -> None:
    channels, own = samples.shape[1], pipeline.space1
    if not pipeline.uses_latents or channels == own.channels:
        return
    look = _title(pipeline.space2) if channels == pipeline.space2.channels else CHANNELS.get(channels)
    raise AlignError(
        f"this module takes {_title(own)} latents ({own.channels} channels); these have {channels} channels"
        + (f" and look like {look} latents" if look else "")
        + ". Choose a module from their space"
    )


def _pixels(pipeline: AlignPipeline, image: torch.Tensor | None, count: int) -> torch.Tensor:
    """IMAGE -> (B, 3, H, W) in [-1, 1], cropped around its centre as VAEEncode crops; one image serves a whole batch."""
    if image is None:
        raise AlignError("this module was trained with the image: connect the image that the latents were encoded from")
    stride = max(pipeline.space1.stride, pipeline.space2.stride) if not pipeline.uses_latents else pipeline.space1.stride
    for axis in (1, 2):
        side = image.shape[axis]
        image = image.narrow(axis, side % stride // 2, side // stride * stride)
    pixels = image[..., :3].movedim(-1, 1).float() * 2 - 1
    return pixels.expand(count, -1, -1, -1) if len(pixels) == 1 else pixels
