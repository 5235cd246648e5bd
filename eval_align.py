"""Judge a trained align module on a folder of images.

    python eval_align.py --checkpoint ckpt_align/align_pipeline_20251231_034701.pth --eval_data_dir eval_images \\
        --output_dir eval_results --save_visualizations

The checkpoint says which VAEs it joins and how; nothing else is needed. Prints the ladder of baselines and writes
metrics.json. PSNR and SSIM are taken per image on clamped 8-bit values and then averaged.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path

import torch
from tqdm import tqdm

import report
from cli import Parser, integer, run
from dataloader import ImageDataset, eval_loader, open_dataset
from device import PRECISIONS, autocast, get_dtype, keep_freed_memory, resolve_device, resolve_precision
from metrics import OptionalMetrics, finite, image_metrics, latent_metrics, mean_of, summarise
from utils import UserError, claim_writable_folder, count_of, use_proxy, write_json
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


def label_of(row: str) -> str:
    """What a row of the ladder is called: "aligned_2" is another module between the same VAEs."""
    return LADDER.get(row) or f"aligned, checkpoint {row.rpartition('_')[2]}"


def applicable_rows(pipeline: AlignPipeline, others=()) -> tuple[str, ...]:
    """The rungs of the ladder that mean something for this pipeline: without latents there is no linear map."""
    has_ridge = any(each.module.has_ridge for each in (pipeline, *others))
    rungs = tuple(row for row in LADDER if row != "linear" or has_ridge)
    return rungs + tuple(f"aligned_{number}" for number, _ in enumerate(others, 2))


def untrained_module(pipeline: AlignPipeline) -> AlignModule:
    """The pipeline's module as it would start at random, from its run's seed."""
    with torch.random.fork_rng():
        torch.manual_seed(pipeline.progress["config"].get("seed", 42))
        return AlignModule(pipeline.config).to(pipeline.device).eval()


def translators(pipeline: AlignPipeline, rows, dtype: torch.dtype, others=()) -> dict:
    """{row: function (VAE1's latents, images) -> VAE2's scaled latents, float32} for rows that lead to VAE2's latents.

    `others`: see `evaluate`. Each function that is not made of VAEs has as its attribute `parameters` how many it uses.
    """
    space1, space2 = pipeline.space1, pipeline.space2
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
    pipeline: AlignPipeline,
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
    source = open_dataset(args.eval_data_dir, args.dataset_type, False, "--eval_data_dir", args.cache_dir)
    loader = eval_loader(ImageDataset(source, size), args.eval_batch_size, args.num_workers)
    log.info("%s at %d px from %s", count_of(len(loader.dataset), "image"), size, args.eval_data_dir)

    def save_pictures(batch, made):
        rows = comparison_panels(batch["pixel_values"].to(pipeline.device), made)
        for number, (path, index) in enumerate(zip(batch["path"], batch["index"].tolist())):
            name = f"{index:05d}_{Path(path).stem[:80]}.png"
            report.comparison_picture(rows[2 * number : 2 * number + 2], size).save(output_dir / name)

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
