"""What is taken from some training images before the first step: the closed-form linear map, and VAE2's colours."""

from __future__ import annotations

from decoded_loss import DecodedImageLoss
from ridge import RidgeRegression
from vae_align import AlignPipeline

RIDGE_IMAGES = 512  # half a million equations at 256 px
COLOUR_WINDOWS = 256  # which give VAE2's mean colours to a fifth of an 8-bit level


def fit_ridge(pipeline: AlignPipeline, loader, accelerator) -> None:
    """Fit the map between a pipeline's latents; its module keeps it beside the weights."""
    regression = RidgeRegression(pipeline.module.linear.in_channels, pipeline.config.out_channels)
    for inputs, target, _ in encoded_batches(pipeline, loader, accelerator, RIDGE_IMAGES):
        regression.add(pipeline.module.on_output_grid(inputs["latents"]), target)
    if accelerator.num_processes > 1:  # every process adds what it saw, and all start from the same map
        for name in ("xx", "xy"):
            setattr(regression, name, accelerator.reduce(getattr(regression, name).to(accelerator.device), "sum").cpu())
    if regression.xx.any():
        pipeline.module.remember_ridge(*regression.solve())


def fit_colours(decoded: DecodedImageLoss, pipeline: AlignPipeline, loader, accelerator) -> None:
    """Measure the cast of VAE2's reconstruction, to which the decoded loss leads the aligned images; where that is itself the
    reference it has none."""
    if decoded.reference == "vae2":
        return
    batches = encoded_batches(pipeline, loader, accelerator, COLOUR_WINDOWS, decoded.batch_size)
    decoded.measure_vae2(((target, batch.get("pixel_values")) for _, target, batch in batches), accelerator)


def encoded_batches(pipeline: AlignPipeline, loader, accelerator, images: int, of_each: int | None = None):
    """(inputs, target, batch) as from `AlignPipeline.encode_batch`, of about so many training images over all processes;
    of each batch the first `of_each` count. A batch that is not finite is left out, as its training step would be."""
    wanted = min(images, len(loader.dataset))
    for batch in loader:
        inputs, target = pipeline.encode_batch(batch)
        if all(tensor.isfinite().all() for tensor in (target, *inputs.values())):
            yield inputs, target, batch
        wanted -= min(len(target), of_each or len(target)) * accelerator.num_processes
        if wanted <= 0:
            break
