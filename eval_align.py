"""Judge a trained align module on a folder of images.

    python eval_align.py --checkpoint ckpt_align/align_pipeline_20251231_034701.pth --eval_data_dir eval_images \\
        --output_dir eval_results --save_visualizations

The checkpoint says which VAEs it joins and how; nothing else is needed. Prints the ladder of baselines and writes
metrics.json. PSNR and SSIM are taken per image on clamped 8-bit values and then averaged.
"""

from __future__ import annotations

import logging
import math
import time

import torch
from tqdm import tqdm

import report
from cli import Parser, integer, run
from dataloader import ImageDataset, eval_loader, open_dataset, require_memory
from device import PRECISIONS, autocast, get_dtype, keep_freed_memory, memory_advice, resolve_device, resolve_precision
from utils import UserError, claim_writable_folder, count_of, plain_stem, use_proxy, write_json
from vae_align import AlignModule, AlignPipeline, good_image_size

log = logging.getLogger(__name__)

LADDER = {
    "vae1": "VAE1 reconstruction",
    "ceiling": "VAE2 reconstruction (ceiling)",
    "reencode": "decode with VAE1, re-encode with VAE2",
    "linear": "closed-form linear map",
    "untrained": "untrained module",
    "aligned": "aligned",
}


def applicable_rows(pipeline: AlignPipeline) -> tuple[str, ...]:
    """The rungs of the ladder that mean something for this pipeline: without latents there is no linear map."""
    return tuple(row for row in LADDER if row != "linear" or pipeline.module.has_ridge)


def untrained_module(pipeline: AlignPipeline) -> AlignModule:
    """The pipeline's module as it would start at random, from its run's seed."""
    with torch.random.fork_rng():
        torch.manual_seed(pipeline.progress["config"].get("seed", 42))
        return AlignModule(pipeline.config).to(pipeline.device).eval()


def translators(pipeline: AlignPipeline, rows, dtype: torch.dtype) -> dict:
    """{row: function (VAE1's latents, images) -> VAE2's scaled latents, float32} for rows that lead to VAE2's latents."""
    space1, space2 = pipeline.space1, pipeline.space2

    def by_module(module):
        def translate(latents, images):
            with autocast(pipeline.device, dtype):
                return module(latents if pipeline.uses_latents else None, images if pipeline.uses_image else None).float()

        return translate

    ways = {
        "ceiling": lambda latents, images: space2.encode(images),
        "reencode": lambda latents, images: space2.encode(space1.decode(latents).clamp(-1, 1)),
        "linear": lambda latents, images: pipeline.module.linear_map(latents),
        "aligned": by_module(pipeline.module),
    }
    if "untrained" in rows:
        ways["untrained"] = by_module(untrained_module(pipeline))
    return {row: ways[row] for row in rows if row in ways}


@torch.inference_mode()
def reconstruct(pipeline: AlignPipeline, images: torch.Tensor, ways: dict) -> dict:
    """What each rung of the ladder makes of `images` (B, 3, H, W) in [-1, 1].

    `ways` is from `translators`. Returns {row: (scaled latents in VAE2's space, decoded images)}, with "vae1" as VAE1's
    own latents and reconstruction.
    """
    latents1 = pipeline.space1.encode(images)
    made = {"vae1": (latents1, pipeline.space1.decode(latents1))}
    for row, translate in ways.items():
        latents = translate(latents1, images)
        made[row] = (latents, pipeline.space2.decode(latents))
    return made


@torch.inference_mode()
def measure_costs(pipeline: AlignPipeline, image_size: int, ways: dict, repeats: int = 3) -> dict:
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
    latents1 = pipeline.space1.encode(images)
    encoder2 = half(pipeline.vae2, "encoder", "quant_conv")
    parameters = {
        "ceiling": encoder2,
        "reencode": half(pipeline.vae1, "decoder", "post_quant_conv") + encoder2,
        "linear": pipeline.module.ridge_weight.numel() + pipeline.module.ridge_bias.numel() if "linear" in ways else 0,
        "untrained": size(pipeline.module),
        "aligned": size(pipeline.module),
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
            "parameters": parameters[row],
            "macs": counter.get_total_flops() // 2,
        }
    return costs


def image_metrics(image: torch.Tensor, original: torch.Tensor) -> dict:
    """Per image PSNR in dB, SSIM and the mean shift of R, G, B in 8-bit levels: lists of B values, B x 3 for the shift.

    Both (B, 3, H, W) in [-1, 1]; compared as clamped 8-bit values. SSIM as Wang et al. 2004 (11x11 Gaussian, sigma 1.5;
    mirrored borders).
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    image, original = report.to_8bit(image), report.to_8bit(original)
    error = (image - original).square().mean(dim=(1, 2, 3), dtype=torch.float64)
    ssim = structural_similarity_index_measure(image, original, data_range=255.0, reduction="none")
    return {
        "psnr": (10 * torch.log10(255**2 / error)).tolist(),
        "ssim": ssim.reshape(-1).tolist(),
        "colour_bias": (image - original).mean(dim=(2, 3), dtype=torch.float64).tolist(),
    }


def evaluate(
    pipeline: AlignPipeline, loader, dtype: torch.dtype, rows=None, visit=None, costs=False, show_progress=True
) -> dict:
    """Judge rungs of the ladder on every image of `loader`.

    Args:
        dtype: precision of the module's autocast.
        rows: keys of `LADDER`; by default all that apply.
        visit: called with (batch, what `reconstruct` returned) for each batch, for pictures.
        costs: also measure what each rung costs (see `measure_costs`).

    Returns a dict of plain values:
        images: how many were judged; unreadable: the messages of those that could not be.
        ladder: {row: {label, latent_mse, psnr, ssim, psnr_vs_vae2, ssim_vs_vae2, colour_bias, and with `costs`
            milliseconds, parameters, macs}}: means over images. `latent_mse` is against VAE2's posterior mean; `psnr` (dB)
            and `ssim` against the original, `psnr_vs_vae2`, `ssim_vs_vae2` and `colour_bias` (signed 8-bit levels of
            R, G, B) against VAE2's own reconstruction. None where undefined.
        per_image: {row: {metric: [value per image]}}, paths: the images' names in the same order.
    """
    rows = applicable_rows(pipeline) if rows is None else rows
    values = {row: {} for row in rows}
    paths, unreadable = [], []
    was_training = pipeline.module.training
    pipeline.module.eval()
    ways = translators(pipeline, dict.fromkeys((*rows, "ceiling")), dtype)
    for batch in tqdm(loader, desc="evaluate", unit="batch", leave=False, disable=not show_progress):
        unreadable += batch["unreadable"]
        if not batch["path"]:
            continue
        images = batch["pixel_values"].to(pipeline.device)
        made = reconstruct(pipeline, images, ways)
        target, shown = made["ceiling"]
        for row in rows:
            latents, decoded = made[row]
            figures = image_metrics(decoded, images)
            against_vae2 = image_metrics(decoded, shown)
            figures |= {"psnr_vs_vae2": against_vae2["psnr"], "ssim_vs_vae2": against_vae2["ssim"]}
            figures["colour_bias"] = against_vae2["colour_bias"]
            if row != "vae1":
                figures["latent_mse"] = (latents - target).square().mean(dim=(1, 2, 3)).tolist()
            for name, per_image in figures.items():
                values[row].setdefault(name, []).extend(per_image)
        paths += batch["path"]
        if visit:
            visit(batch, made)
    if not paths:
        raise UserError(f"no image could be evaluated; the last failure: {(unreadable or ['the folder is empty'])[-1]}")
    ladder = {
        row: {"label": LADDER[row], "latent_mse": None} | {name: _mean(numbers) for name, numbers in values[row].items()}
        for row in rows
    }
    if costs:
        for row, cost in measure_costs(pipeline, images.shape[-1], {row: ways[row] for row in rows if row in ways}).items():
            ladder[row] |= cost
    pipeline.module.train(was_training)
    return {"images": len(paths), "unreadable": unreadable, "ladder": ladder, "per_image": _finite(values), "paths": paths}


def _mean(numbers):
    """Mean over images, per component for lists; None if it is not finite (the PSNR of identical images is infinite)."""
    if isinstance(numbers[0], list):
        return [_mean(component) for component in zip(*numbers)]
    mean = math.fsum(numbers) / len(numbers)
    return mean if math.isfinite(mean) else None


def _finite(value):
    """`value` with every number that JSON cannot hold replaced by None."""
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return value if not isinstance(value, float) or math.isfinite(value) else None


def comparison_panels(images: torch.Tensor, made: dict) -> list[list[tuple[str, torch.Tensor]]]:
    """Two captioned rows of panels per image: pictures, then differences and latents. For `report.comparison_picture`."""
    gain = report.DIFFERENCE_GAIN
    target, aligned = report.latents_as_rgb(made["ceiling"][0]), report.latents_as_rgb(made["aligned"][0])
    rows = []
    for index, original in enumerate(images):
        pictures = {row: made[row][1][index].clamp(-1, 1) for row in ("vae1", "ceiling", "aligned")}
        rows.append(
            [
                ("original", original),
                ("VAE1", pictures["vae1"]),
                ("VAE2", pictures["ceiling"]),
                ("aligned", pictures["aligned"]),
            ]
        )
        rows.append(
            [
                ("VAE2 latents", target[index]),
                ("aligned latents", aligned[index]),
                (f"VAE2 - original, x{gain}", report.difference_map(pictures["ceiling"], original)),
                (f"aligned - VAE2, x{gain}", report.difference_map(pictures["aligned"], pictures["ceiling"])),
            ]
        )
    return rows


def build_parser() -> Parser:
    parser = Parser(description=__doc__)
    parser.add_argument("--checkpoint", required=True, help="file written by train_align_with_args.py, or a folder: its newest")
    parser.add_argument("--eval_data_dir", required=True, help="folder of images, searched recursively (or see --dataset_type)")
    parser.add_argument("--output_dir", default="eval_results", help="where metrics.json and the pictures go")
    parser.add_argument("--save_visualizations", action="store_true", help="also write one comparison picture per image")
    parser.add_argument("--eval_batch_size", type=integer(1, 4096), default=4, help="images per batch")
    parser.add_argument("--num_workers", type=integer(0, 256), default=4, help="processes that decode images; 0: none")
    parser.add_argument("--image_size", type=integer(1, 16384), help="side of the square judged, px (default: as trained)")
    parser.add_argument("--dataset_type", choices=("default", "imagenet"), default="default", help="layout of the folder")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N, mps or cpu")
    parser.add_argument("--precision", choices=PRECISIONS, help="of VAEs and autocast (default: as trained)")
    for number in (1, 2):
        parser.add_argument(f"--vae{number}_path", help=f"folder or hub id of VAE{number} (default: as in the checkpoint)")
    parser.add_argument("--cache_dir", help="where the hub client keeps downloads")
    parser.add_argument("--proxy", help="URL of a proxy for hub access")
    return parser


def main(argv: list[str] | None = None) -> dict:
    args = build_parser().parse(argv)
    use_proxy(args.proxy)
    output_dir = claim_writable_folder(args.output_dir, "--output_dir")
    device = resolve_device(args.device, "device" in args.typed_flags)
    keep_freed_memory(device)
    pipeline = AlignPipeline.from_checkpoint(args.checkpoint)
    trained = pipeline.progress["config"]
    precision = args.precision or trained.get("precision", "bfloat16")
    dtype = get_dtype(resolve_precision(precision, device, args.precision is not None))
    vaes = {"vae1": args.vae1_path, "vae2": args.vae2_path}
    pipeline = AlignPipeline.from_checkpoint(args.checkpoint, **vaes, device=device, dtype=dtype, cache_dir=args.cache_dir)
    size = good_image_size(args.image_size or trained.get("image_size", 256), pipeline.space1.stride, pipeline.space2.stride)
    require_memory(args.eval_batch_size, size, "--eval_batch_size")
    source = open_dataset(args.eval_data_dir, args.dataset_type, False, "--eval_data_dir", args.cache_dir)
    loader = eval_loader(ImageDataset(source, size), args.eval_batch_size, args.num_workers)
    log.info("%s at %d px from %s", count_of(len(loader.dataset), "image"), size, args.eval_data_dir)

    def save_pictures(batch, made):
        rows = comparison_panels(batch["pixel_values"].to(pipeline.device), made)
        for number, (path, index) in enumerate(zip(batch["path"], batch["index"].tolist())):
            name = f"{index:05d}_{plain_stem(path)}.png"
            report.comparison_picture(rows[2 * number : 2 * number + 2], size).save(output_dir / name)

    with memory_advice("evaluating", eval_batch_size=args.eval_batch_size, image_size=size, precision=precision):
        results = evaluate(pipeline, loader, dtype, visit=save_pictures if args.save_visualizations else None, costs=True)
    results["checkpoint"] = str(args.checkpoint)
    results["image_size"] = size
    write_json(output_dir / "metrics.json", results)
    print(report.ladder_table(results))
    for message in results["unreadable"]:
        log.warning("left out: %s", message)
    print(f"{count_of(results['images'], 'image')} judged; results in {output_dir}")
    return results


if __name__ == "__main__":
    run(main)
