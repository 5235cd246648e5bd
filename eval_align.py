"""Judge a trained align module on a folder of images.

    python eval_align.py --checkpoint ckpt_align/align_pipeline_20251231_034701.pth --eval_data_dir eval_images \\
        --output_dir eval_results --save_visualizations

The checkpoint says which VAEs it joins and how; nothing else is needed. Prints the ladder of baselines and a verdict, and
writes report.html (one file, opens from disk), metrics.json and metrics.csv (a row per image and rung). Several checkpoints
are judged side by side, the first being the one the verdict is about. PSNR and SSIM are taken per image on clamped 8-bit
values and then averaged.

    # a module trained on tiny autoencoders, judged with the full VAEs of the same two latent spaces
    python eval_align.py --checkpoint ckpt_align --eval_data_dir eval_images --vae1_path sd-legacy/stable-diffusion-v1-5 \\
        --vae2_path black-forest-labs/FLUX.1-dev --vae1_subfolder vae --vae2_subfolder vae
"""

from __future__ import annotations

import logging
import shlex
import signal
import sys
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback of the imports, which take seconds

import torch
from tqdm import tqdm

from dataloader import ImageDataset, eval_loader, find_images, require_memory
from evaluation import page, pictures, tables
from evaluation.ladder import applicable_rows, comparison_sheets, evaluate, label_of, picture_names, reconstruct, translators
from evaluation.metrics import (
    DEFAULT_OPTIONAL,
    ErrorSpectrum,
    LatentHistograms,
    OptionalMetrics,
    finite,
)
from evaluation.metrics import OPTIONAL as OPTIONAL_METRICS
from evaluation.run_logs import read_curves
from evaluation.verdict import verdict
from latents.pipeline import PipelineWithVAEs
from latents.spaces import good_image_size
from runtime.cli import Parser, claim_writable_folder, integer, naming, run, use_proxy
from runtime.device import PRECISIONS, get_dtype, keep_freed_memory, memory_advice, resolve_device, resolve_precision
from utils import UserError, atomic_file, count_of, one_line, plain_stem
from vae_align import newest_checkpoint, read_checkpoint

log = logging.getLogger(__name__)

METRICS_FORMAT = "vae-align metrics 1"


def build_parser() -> Parser:
    parser = Parser(description=__doc__)
    parser.add_argument(
        "--checkpoint",
        nargs="+",
        required=True,
        help="file written by train_align_with_args.py, or a folder: its newest; further ones are judged beside the first",
    )
    parser.add_argument("--eval_data_dir", required=True, help="folder of images, searched recursively (or see --dataset_type)")
    parser.add_argument("--output_dir", default="eval_results", help="where the report, the figures and the pictures go")
    parser.add_argument("--save_visualizations", action="store_true", help="also write one comparison picture per image")
    parser.add_argument("--num_samples", type=integer(0, 1000), default=9, help="images shown in the report; 0: none")
    parser.add_argument(
        "--metrics",
        nargs="+",
        choices=OPTIONAL_METRICS,
        default=list(DEFAULT_OPTIONAL),
        help="beyond the plain ones; lpips needs torchvision, rfid torch-fidelity, both with weights already on this machine",
    )
    parser.add_argument("--eval_batch_size", type=integer(1, 4096), default=4, help="images per batch")
    parser.add_argument("--num_workers", type=integer(0, 256), default=4, help="processes that decode images; 0: none")
    parser.add_argument("--image_size", type=integer(1, 16384), help="side of the square judged, px (default: as trained)")
    parser.add_argument("--dataset_type", choices=("default", "imagenet"), default="default", help="layout of the folder")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N, mps or cpu")
    parser.add_argument("--precision", choices=PRECISIONS, help="of VAEs and autocast (default: as trained)")
    for number in (1, 2):
        parser.add_argument(f"--vae{number}_path", help=f"folder or hub id of VAE{number} (default: as in the checkpoint)")
        parser.add_argument(f"--vae{number}_subfolder", help=f"VAE{number}'s place in it (default: as in the checkpoint)")
    parser.add_argument("--cache_dir", help="where the hub client keeps downloads")
    parser.add_argument("--proxy", help="URL of a proxy for hub access")
    return parser


@dataclass
class Pair:
    """Checkpoints between the same two VAEs: the first one's pipeline, and the others', which share its VAEs."""

    pipeline: PipelineWithVAEs
    others: list[PipelineWithVAEs]
    suffix: str  # of its rows in the ladder: "" for the main checkpoint's pair, then "@2", "@3", …


def load_pairs(args, device: torch.device, dtype: torch.dtype) -> tuple[list[Pair], list[dict], list[dict]]:
    """The checkpoints of `args` by pair of VAEs, what the report says of each, and what each file holds."""
    pairs, checkpoints, contents = {}, [], []
    places = {
        f"vae{number}_{what}": getattr(args, f"vae{number}_{what}") for number in (1, 2) for what in ("path", "subfolder")
    }
    for given in args.checkpoint:
        path, content = newest_checkpoint(given) if Path(given).is_dir() else (Path(given), read_checkpoint(given))
        recorded = {f"{vae}_{what}": content[vae][what] for vae in ("vae1", "vae2") for what in ("path", "subfolder")}
        key = tuple(recorded[name] if place is None else place for name, place in places.items())
        options = {"device": device, "dtype": dtype, "cache_dir": args.cache_dir}
        options |= {name: place for name, place in places.items() if name.endswith("subfolder")}
        if key in pairs:
            pair = pairs[key]
            vaes = (pair.pipeline.vae1, pair.pipeline.vae2)
            pair.others.append(PipelineWithVAEs.from_checkpoint(path, *vaes, **options))
            row = f"aligned_{len(pair.others) + 1}{pair.suffix}"
        else:
            pipeline = PipelineWithVAEs.from_checkpoint(path, args.vae1_path, args.vae2_path, **options)
            pair = pairs[key] = Pair(pipeline, [], f"@{len(pairs) + 1}" if pairs else "")
            row = f"aligned{pair.suffix}"
        config = {name: value for name, value in content["config"].items() if name != "proxy"}
        described = {"row": row, "name": path.stem, "path": str(path), "run": content.get("run")}
        checkpoints.append(described | {"step": content["step"], "epoch": content["epoch"], "config": config})
        contents.append(content)
    return list(pairs.values()), checkpoints, contents


def judge(pairs: list[Pair], loader, dtype, names, size: int, visit) -> dict:
    """`evaluate` on every pair, as one dict with the further pairs' rows behind the first one's, and beside it `spectrum` and
    `histograms` (see `metrics`), `indices` of the images in the data set, and `left_out_metrics`."""
    optional = [OptionalMetrics(names, size, pair.pipeline.device) for pair in pairs]
    for name, why in optional[0].left_out.items():
        log.warning("%s is left out: %s", name, why)
    results = {}
    for pair, metrics_of_pair in zip(pairs, optional):
        aligned = [row for row in applicable_rows(pair.pipeline, pair.others) if row.startswith("aligned")]
        spectrum = ErrorSpectrum(size, ["ceiling", "reencode", *aligned])
        histograms, indices = LatentHistograms(["ceiling", *aligned]), []

        def look(batch, made, pair=pair, spectrum=spectrum, histograms=histograms, indices=indices):
            indices += batch["index"].tolist()
            spectrum.add(batch["pixel_values"].to(pair.pipeline.device), {row: made[row][1] for row in spectrum.errors})
            histograms.add({row: made[row][0] for row in histograms.rows})
            if visit and not pair.suffix:
                visit(batch, made)

        figures = evaluate(pair.pipeline, loader, dtype, visit=look, costs=True, optional=metrics_of_pair, others=pair.others)
        figures |= {"spectrum": spectrum.result(), "histograms": histograms.result(), "indices": indices}
        if not results:
            results = figures | {"left_out_metrics": metrics_of_pair.left_out}
            continue
        if figures["paths"] != results["paths"]:
            raise UserError("an image became unreadable between two passes; run it again")
        for part in ("ladder", "summary", "per_image"):
            results[part] |= {f"{row}{pair.suffix}": value for row, value in figures[part].items()}
        for row, figures_of_row in figures["ladder"].items():
            figures_of_row["label"] = f"{label_of(row)}, pair {pair.suffix[1:]}"
        for name in ("rows", "detail"):
            results["spectrum"][name] |= {f"{row}{pair.suffix}": line for row, line in figures["spectrum"][name].items()}
    return results


@torch.inference_mode()
def report_strips(pairs: list[Pair], dataset: ImageDataset, dtype, results: dict, wanted: int) -> list[dict]:
    """The pictures of the report: about `wanted` images, worst, median and best, made anew so that none had to be kept."""
    chosen = [(group, place) for group, places in pictures.chosen_images(results, wanted).items() for place in places]
    per_image, strips = results["per_image"], []
    panels_on_page = len(chosen) * sum(1 + 3 * len(picture_names(pair.others)) for pair in pairs)
    for group, place in tqdm(chosen, desc="pictures", unit="image", leave=False, disable=not chosen):
        pixels = dataset[results["indices"][place]]["pixel_values"]
        if pixels is None:
            log.warning("%r can no longer be read; it is left out of the pictures", results["paths"][place])
            continue
        grids = []
        for pair in pairs:
            names = picture_names(pair.others)
            ways = translators(pair.pipeline, [row for row in names if row != "vae1"], dtype, pair.others)
            images = pixels[None].to(pair.pipeline.device)
            made = {row: (latents[0], shown[0]) for row, (latents, shown) in reconstruct(pair.pipeline, images, ways).items()}
            if pair.suffix:
                names = {row: f"{name}, pair {pair.suffix[1:]}" for row, name in names.items()}
            grids.append(pictures.page_panels(pictures.comparison_rows(images[0], made, names), panels_on_page))
        shown = {"ceiling": "VAE2", "reencode": "decode + re-encode"}
        shown |= {each: each.replace("_", " ").replace("@", ", pair ") for each in per_image if each.startswith("aligned")}
        figures = "; ".join(f"{name} {tables.decibels(per_image[row]['psnr'][place])}" for row, name in shown.items())
        name = tables.shown_name(results["paths"][place], results["settings"]["eval_data_dir"])
        strips.append({"group": group, "name": name, "figures": f"PSNR in dB: {figures}", "grids": grids})
    return strips


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device} ({count_of(torch.get_num_threads(), 'thread')})" if device.type == "cpu" else str(device)


def command_line(argv: list[str]) -> str:
    """The command that makes this report again, without the proxy, whose URL may hold a password."""
    kept, skip = [], False
    for word in argv:
        if not skip and not word.startswith("--proxy="):
            skip = word == "--proxy"
            kept += [] if skip else [word]
        else:
            skip = False
    return shlex.join(["python", "eval_align.py", *kept])


def say(text: str) -> None:
    """Print, whatever bytes a file name may hold."""
    print(text.encode(errors="backslashreplace").decode())


def main(argv: list[str] | None = None) -> dict:
    """Judge and write the report; returns what metrics.json holds, whose keys are stable while `format` stays the same:

    format: `METRICS_FORMAT`; images, unreadable, ladder, summary, per_image, paths: see `evaluate`, with the rows
        of further checkpoints ("aligned_2") and of further pairs of VAEs ("aligned@2", "ceiling@2") behind the first ones;
    indices: place of each image in the data set; image_size: px;
    checkpoint: the first one as it was given; checkpoints: [{row, name, path, run, step, epoch, config}];
    verdict: see `verdict.verdict`; left_out_metrics: {name: why it could not be measured};
    spectrum: see `metrics.ErrorSpectrum.result`; histograms: see `metrics.LatentHistograms.result`, of the first pair;
    settings: {created, command, eval_data_dir, trained_image_size, vae1, vae2, device, precision, metrics, torch}.

    What is infinite or undefined is null.
    """
    args = build_parser().parse(argv)
    use_proxy(args.proxy)
    output_dir = claim_writable_folder(args.output_dir, "--output_dir")
    with naming("--device"):
        device = resolve_device(args.device, "device" in args.typed_flags)
    keep_freed_memory(device)
    first = read_checkpoint(args.checkpoint[0])["config"]
    precision = resolve_precision(args.precision or first.get("precision", "bfloat16"), device, args.precision is not None)
    dtype = get_dtype(precision)
    pairs, checkpoints, contents = load_pairs(args, device, dtype)
    strides = [space.stride for pair in pairs for space in (pair.pipeline.codec1, pair.pipeline.codec2)]
    size = good_image_size(args.image_size or first.get("image_size", 256), *strides)
    require_memory(args.eval_batch_size, size, "--eval_batch_size")
    source = find_images(args.eval_data_dir, args.dataset_type, False, "--eval_data_dir", args.cache_dir)
    dataset = ImageDataset(source, size)
    loader = eval_loader(dataset, args.eval_batch_size, args.num_workers)
    log.info("%s at %d px from %s", count_of(len(dataset), "image"), size, args.eval_data_dir)

    def save_pictures(batch, made):
        sheets = comparison_sheets(batch["pixel_values"].to(device), made, picture_names(pairs[0].others), size)
        for sheet, path, index in zip(sheets, batch["path"], batch["index"].tolist()):
            with atomic_file(output_dir / f"{index:05d}_{plain_stem(path)}.png") as file:
                sheet.save(file, "PNG")

    with memory_advice("evaluating", eval_batch_size=args.eval_batch_size, image_size=size, precision=precision):
        results = judge(pairs, loader, dtype, args.metrics, size, save_pictures if args.save_visualizations else None)
    for number, checkpoint in enumerate(checkpoints[1:], 2):
        results["ladder"][checkpoint["row"]]["label"] = f"aligned {number}: {checkpoint['name']}"
    identities = [space.identity for space in (pairs[0].pipeline.codec1, pairs[0].pipeline.codec2)]
    results |= {
        "format": METRICS_FORMAT,
        "checkpoint": str(args.checkpoint[0]),
        "checkpoints": checkpoints,
        "image_size": size,
        "settings": {
            "created": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %z"),
            "command": command_line(sys.argv[1:] if argv is None else argv),
            "eval_data_dir": args.eval_data_dir,
            "trained_image_size": first.get("image_size"),
            "vae1": identities[0]["path"],
            "vae2": identities[1]["path"],
            "device": device_name(device),
            "precision": precision,
            "metrics": list(args.metrics),
            "torch": torch.__version__,
        },
    }
    results = finite(results)  # whatever a config may hold: the file must not fail now
    results["verdict"] = verdict(results)
    say(tables.ladder_table(results))
    for message in results["unreadable"]:
        log.warning("left out: %s", message)
    strips = report_strips(pairs, dataset, dtype, results, args.num_samples)
    curves = read_curves(Path(checkpoints[0]["path"]), contents[0])
    html = page.render(results, strips, curves)
    try:
        tables.write_files(output_dir, results, html)
    except OSError as error:
        raise UserError(f"--output_dir {output_dir}: the results cannot be written ({one_line(error)})") from None
    say(" ".join(results["verdict"]["sentences"]))
    say(f"{count_of(results['images'], 'image')} judged; report: {output_dir / 'report.html'}")
    return results


if __name__ == "__main__":
    run(main)
