"""The ladder of baselines: what people could do instead of the module, and how near each rung comes to the original."""

from __future__ import annotations

import time

import torch
from tqdm import tqdm

from evaluation.metrics import OptionalMetrics, finite, image_metrics, latent_metrics, mean_of, summarise
from evaluation.pictures import comparison_picture, comparison_rows
from latents.pipeline import PipelineWithVAEs
from runtime.device import autocast
from utils import UserError
from vae_align import AlignModule

LADDER = {
    "vae1": "VAE1 reconstruction",
    "ceiling": "VAE2 reconstruction (ceiling)",
    "reencode": "decode with VAE1, re-encode with VAE2",
    "linear": "closed-form linear map",
    "untrained": "untrained module",
    "aligned": "aligned",
}


def label_of(row: str) -> str:
    """What a row of the ladder is called: "aligned_2" is another module between the same VAEs."""
    return LADDER.get(row) or f"aligned, checkpoint {row.rpartition('_')[2]}"


def applicable_rows(pipeline: PipelineWithVAEs, others=()) -> tuple[str, ...]:
    """The rungs of the ladder that mean something for this pipeline: without latents there is no linear map."""
    has_ridge = any(each.module.has_ridge for each in (pipeline, *others))
    rungs = tuple(row for row in LADDER if row != "linear" or has_ridge)
    return rungs + tuple(f"aligned_{number}" for number, _ in enumerate(others, 2))


def untrained_module(pipeline: PipelineWithVAEs) -> AlignModule:
    """The pipeline's module as it would start at random, from its run's seed."""
    with torch.random.fork_rng():
        torch.manual_seed(pipeline.progress["config"].get("seed", 42))
        return AlignModule(pipeline.config).to(pipeline.device).eval()


def translators(pipeline: PipelineWithVAEs, rows, dtype: torch.dtype, others=()) -> dict:
    """{row: function (VAE1's latents, images) -> VAE2's scaled latents, float32} for rows that lead to VAE2's latents.

    `others`: see `evaluate`. Each function that is not made of VAEs has as its attribute `parameters` how many it uses.
    """
    space1, space2 = pipeline.codec1, pipeline.codec2
    linear = next((each.module for each in (pipeline, *others) if each.module.has_ridge), None)

    def by_module(module):
        def translate(latents, images):
            given = {"latent": latents, "image": images}
            given = [given[kind] if kind in module.config.input_types else None for kind in ("latent", "image")]
            with autocast(pipeline.device, dtype):
                return module(*given).float()

        translate.parameters = sum(parameter.numel() for parameter in module.parameters())
        return translate

    def by_linear_map(latents, images):
        return linear.linear_map(latents)

    if linear:
        by_linear_map.parameters = linear.ridge_weight.numel() + linear.ridge_bias.numel()

    ways = {
        "ceiling": lambda latents, images: space2.encode(images),
        "reencode": lambda latents, images: space2.encode(space1.decode(latents).clamp(-1, 1)),
        "linear": by_linear_map,
        "aligned": by_module(pipeline.module),
    }
    ways |= {f"aligned_{number}": by_module(other.module) for number, other in enumerate(others, 2)}
    if "untrained" in rows:
        ways["untrained"] = by_module(untrained_module(pipeline))
    return {row: ways[row] for row in rows if row in ways}


@torch.inference_mode()
def reconstruct(pipeline: PipelineWithVAEs, images: torch.Tensor, ways: dict) -> dict:
    """What each rung of the ladder makes of `images` (B, 3, H, W) in [-1, 1].

    `ways` is from `translators`. Returns {row: (scaled latents in VAE2's space, decoded images)}, with "vae1" as VAE1's
    own latents and reconstruction.
    """
    latents1 = pipeline.codec1.encode(images)
    made = {"vae1": (latents1, pipeline.codec1.decode(latents1))}
    for row, translate in ways.items():
        latents = translate(latents1, images)
        made[row] = (latents, pipeline.codec2.decode(latents))
    return made


@torch.inference_mode()
def measure_costs(pipeline: PipelineWithVAEs, image_size: int, ways: dict, repeats: int = 3) -> dict:
    """What it costs to come by VAE2's latents of one image: {row: {milliseconds, parameters, macs}}.

    For "ceiling" from the image, for the others from VAE1's latents (and the image, where the module takes it); decoding
    with VAE2, which all have in common, is not in it. `macs` are multiply-adds of convolutions and matrix products, the
    time is the fastest of a few runs at batch size 1.
    """
    from torch.utils.flop_counter import FlopCounterMode

    def size(*modules):
        return sum(parameter.numel() for module in modules if module is not None for parameter in module.parameters())

    def half(vae, coder, quant):
        return size(getattr(vae, coder), getattr(vae, quant, None))

    images = torch.zeros(1, 3, image_size, image_size, device=pipeline.device)
    latents1 = pipeline.codec1.encode(images)
    encoder2 = half(pipeline.vae2, "encoder", "quant_conv")
    parameters = {
        "ceiling": encoder2,
        "reencode": half(pipeline.vae1, "decoder", "post_quant_conv") + encoder2,
    }
    costs = {}
    for row, translate in ways.items():
        with FlopCounterMode(display=False) as counter:
            translate(latents1, images)
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            translate(latents1, images)[0, 0, 0, 0].item()  # reading a value waits for the device
            times.append(time.perf_counter() - start)
        costs[row] = {
            "milliseconds": 1e3 * min(times),
            "parameters": getattr(translate, "parameters", None) or parameters[row],
            "macs": counter.get_total_flops() // 2,
        }
    return costs


def evaluate(
    pipeline: PipelineWithVAEs,
    loader,
    dtype: torch.dtype,
    rows=None,
    visit=None,
    costs=False,
    show_progress=True,
    optional: OptionalMetrics | None = None,
    others=(),
) -> dict:
    """Judge rungs of the ladder on every image of `loader`.

    Args:
        dtype: precision of the module's autocast.
        rows: keys of `LADDER`; by default all that apply.
        visit: called with (batch, what `reconstruct` returned) for each batch, for pictures and for what is summed up.
        costs: also measure what each rung costs (see `measure_costs`).
        optional: which metrics beyond the plain ones; by default SSIM alone.
        others: pipelines of the same two VAEs whose modules are judged too, as "aligned_2", "aligned_3", …

    Returns a dict of plain values:
        images: how many were judged; unreadable: the messages of those that could not be.
        ladder: {row: {label, latent_mse, latent_l1, latent_cosine, latent_mse_by_channel, psnr, ssim, psnr_vs_vae2,
            ssim_vs_vae2, colour_bias, further optional metrics, and with `costs` milliseconds, parameters, macs}}: means
            over images. What begins with `latent` is against VAE2's posterior mean; `psnr` (dB), `ssim` and the further
            ones are against the original, `psnr_vs_vae2`, `ssim_vs_vae2` and `colour_bias` (signed 8-bit levels of
            R, G, B) against VAE2's own reconstruction. None where undefined or not measured.
        summary: {row: {metric: {mean, std, worst, worst_image}}}, see `metrics.summarise`.
        per_image: {row: {metric: [value per image]}}, paths: the images' names in the same order.
    """
    optional = optional or OptionalMetrics()
    ssim = "ssim" in optional.names
    rows = applicable_rows(pipeline, others) if rows is None else rows
    values = {row: {} for row in rows}
    paths, unreadable = [], []
    was_training = pipeline.module.training
    pipeline.module.eval()
    ways = translators(pipeline, dict.fromkeys((*rows, "ceiling")), dtype, others)
    for batch in tqdm(loader, desc="evaluate", unit="batch", leave=False, disable=not show_progress):
        unreadable += batch["unreadable"]
        if not batch["path"]:
            continue
        images = batch["pixel_values"].to(pipeline.device)
        made = reconstruct(pipeline, images, ways)
        target, shown = made["ceiling"]
        optional.begin_batch(images)
        for row in rows:
            latents, decoded = made[row]
            figures = image_metrics(decoded, images, ssim)
            against_vae2 = image_metrics(decoded, shown, ssim)
            figures |= {f"{name}_vs_vae2": against_vae2[name] for name in ("psnr", "ssim") if name in against_vae2}
            figures["colour_bias"] = against_vae2["colour_bias"]
            figures |= optional.measure(row, decoded, images)
            if row != "vae1":
                figures |= latent_metrics(latents, target)
            for name, per_image in figures.items():
                values[row].setdefault(name, []).extend(per_image)
        paths += batch["path"]
        if visit:
            visit(batch, made)
    if not paths:
        raise UserError(f"no image could be evaluated; the last failure: {(unreadable or ['the folder is empty'])[-1]}")
    ladder = {
        row: {"label": label_of(row)}
        | dict.fromkeys(("latent_mse", "latent_l1", "latent_cosine", "latent_mse_by_channel", "ssim", "ssim_vs_vae2"))
        | {name: mean_of(numbers) for name, numbers in values[row].items()}
        | finite(optional.of_the_set(row))
        for row in rows
    }
    if costs:
        for row, cost in measure_costs(pipeline, images.shape[-1], {row: ways[row] for row in rows if row in ways}).items():
            ladder[row] |= cost
    pipeline.module.train(was_training)
    return {
        "images": len(paths),
        "unreadable": unreadable,
        "ladder": ladder,
        "summary": summarise(values),
        "per_image": finite(values),
        "paths": paths,
    }


def picture_names(others=()) -> dict:
    """{row: what it is called below a picture}, of the rows that are shown; `others`: see `evaluate`."""
    names = {"vae1": "VAE1", "ceiling": "VAE2", "reencode": "re-encode", "aligned": "aligned"}
    return names | {f"aligned_{number}": f"aligned {number}" for number, _ in enumerate(others, 2)}


def comparison_sheets(images: torch.Tensor, made: dict, names: dict, size: int):
    """For each of `images` (B, 3, S, S) what `reconstruct` made of it as one captioned sheet of `size` px panels."""
    for index, original in enumerate(images):
        of_image = {row: (made[row][0][index], made[row][1][index]) for row in names}
        yield comparison_picture(comparison_rows(original, of_image, names), size)
