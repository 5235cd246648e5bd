"""Judge a trained align module on a folder of images.

    python eval_align.py --checkpoint ckpt_align/align_pipeline_20251231_034701.pth --eval_data_dir eval_images \\
        --output_dir eval_results --save_visualizations

The checkpoint says which VAEs it joins and how; nothing else is needed. Prints the ladder of baselines and a verdict, and
writes report.html (one file, opens from disk), metrics.json and metrics.csv (a row per image and rung). Several checkpoints
between the same two VAEs are judged side by side; the verdict is about the first. PSNR and SSIM are taken per image on clamped
8-bit values and then averaged. The modules run under autocast to --precision, in which they were trained; `translate` computes
in float32, which --precision float32 judges.

    # several GPUs or processes share the images, and find the same figures
    accelerate launch eval_align.py --checkpoint ckpt_align --eval_data_dir eval_images

    # a module trained on tiny autoencoders, judged with the full VAEs of the same two latent spaces
    python eval_align.py --checkpoint ckpt_align --eval_data_dir eval_images --vae1_path sd-legacy/stable-diffusion-v1-5 \\
        --vae2_path black-forest-labs/FLUX.1-dev --vae1_subfolder vae --vae2_subfolder vae
"""

from __future__ import annotations

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # some Pythons leave it out, such as an embedded one

from runtime.before_imports import before_imports

if __name__ == "__main__":
    before_imports()

import contextlib
import logging
import re
import shlex
from datetime import datetime
from pathlib import Path

import torch

from dataloader import ImageDataset, eval_loader, find_images, require_memory
from evaluation import report, tables
from evaluation.figures import finite
from evaluation.judge import PLACES, judge, open_checkpoints
from evaluation.ladder import Ladder
from evaluation.metrics import CHOICES, DEFAULT_CHOICES, Measures
from evaluation.pictures import comparison_picture, comparisons, is_sheet, save_sheet
from evaluation.verdict import as_text, verdict
from runtime.cli import Parser, alone_in, claim_writable_folder, integer, naming, run, use_proxy
from runtime.processes import create_accelerator, gathered, place_of
from utils import (
    PRECISIONS,
    UserError,
    compute_policy,
    count_of,
    get_dtype,
    keep_freed_memory,
    memory_advice,
    one_line,
    plain_stem,
    printable,
    resolve_device,
    resolve_precision,
)
from vaes.codec import good_image_size
from vaes.pipeline import compare_vaes, module_in, read_checkpoint

log = logging.getLogger(__name__)

METRICS_FORMAT = "vae-align metrics 3"
HALF_WRITTEN = re.compile(r".*/\.(\d+_[^/]*\.png|report\.html|metrics\.(csv|json))\.[0-9a-f]{8}\.tmp")  # by `atomic_file`
COMPARED = 8  # images whose latents tell whether the VAEs are the module's


def build_parser() -> Parser:
    parser = Parser(description=__doc__)
    parser.add_argument(
        "--checkpoint",
        nargs="+",
        required=True,
        help="file written by train_align_with_args.py, or a folder: its best module; further ones, between the same two "
        "VAEs, are judged beside the first",
    )
    parser.add_argument("--eval_data_dir", required=True, help="folder of images, searched recursively (or see --dataset_type)")
    parser.add_argument("--output_dir", default="eval_results", help="where the report, the figures and the pictures go")
    parser.add_argument("--save_visualizations", action="store_true", help="also write one comparison picture per image")
    parser.add_argument("--num_samples", type=integer(0, 1000), default=9, help="images shown in the report; 0: none")
    parser.add_argument(
        "--metrics",
        nargs="+",
        choices=CHOICES,
        default=list(DEFAULT_CHOICES),
        help="beyond the plain ones; lpips downloads AlexNet's weights once; rfid needs torch-fidelity and its weights",
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


def command_line(argv: list[str]) -> str:
    """The command that makes this report again, without the proxy, whose URL may hold a password."""
    kept, words = [], iter(argv)
    for word in words:
        if word == "--proxy":
            next(words, None)
        elif not word.startswith("--proxy="):
            kept.append(word)
    return shlex.join(["python", "eval_align.py", *kept])


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device} ({count_of(torch.get_num_threads(), 'thread')})" if device.type == "cpu" else str(device)


def say(text: str) -> None:
    """Print lines that may hold file names; what a terminal would not show, or take for a command, becomes escapes."""
    if "↑↓".encode(sys.stdout.encoding or "utf-8", "replace") == b"??":
        text = text.translate(str.maketrans("↑↓", "^v"))
    print("\n".join(map(printable, text.split("\n"))))


def some_images(dataset: ImageDataset) -> torch.Tensor:
    """At most `COMPARED` of the images, (B, 3, S, S) in [-1, 1]; without those that cannot be read."""
    items = [dataset[index] for index in range(0, len(dataset), -(-len(dataset) // COMPARED))]
    return torch.stack([item["pixel_values"] for item in items if item["pixel_values"] is not None] or [torch.zeros(3, 0, 0)])


def picture_name(index: int, path: str) -> str:
    """The file name of an image's comparison picture."""
    return f"{index:05d}_{plain_stem(path)}.png"


def drop_older(output_dir: Path, kept: set[str]) -> None:
    """Delete the pictures that older evaluations wrote into this folder, killed ones too, except those of these names: beside
    the new report they would pass for its own. Delete what the killed ones had half written."""
    older = [path for path in output_dir.glob("[0-9]*_*.png") if path.name not in kept and is_sheet(path)]
    for path in (*older, *filter(HALF_WRITTEN.fullmatch, map(str, output_dir.glob(".*.tmp")))):
        with contextlib.suppress(OSError):
            os.unlink(path)


def main(argv: list[str] | None = None) -> dict:
    """Judge and write the report; returns the content of metrics.json, whose keys are stable while `format` stays the same:

    format: `METRICS_FORMAT`; images, unreadable, ladder, summary, intervals, per_image, paths: see `ladder.evaluate`, with the
        rungs of further checkpoints ("aligned_2") behind the others;
    indices: place of each image in the data set; image_size: px; enlarged: number of images that were smaller;
    wrong_spaces, remarks: sentences on VAEs that are not the module's, or may not be, see `vaes.pipeline.compare_vaes`;
    checkpoint: the first one as it was given; checkpoints: [{row: its rung, name, path, weights: a digest, run, step,
        epoch, trained: the steps, epochs and seconds of its run and its last evaluations without gain, config}];
    verdict: see `verdict.verdict`; spectrum, histograms, left_out_metrics: see `judge.judge`;
    settings: {created, command, eval_data_dir, trained_image_size, vae1, vae2, device, precision, metrics, torch}.

    Infinite and undefined numbers are null.
    """
    argv = sys.argv[1:] if argv is None else argv
    args = build_parser().parse(argv)
    use_proxy(args.proxy)
    output_dir = claim_writable_folder(args.output_dir, "--output_dir")
    with naming("--device"):
        device = resolve_device(args.device, "device" in args.typed_flags)
    keep_freed_memory(device)
    compute_policy(device)

    # ---- load
    contents = [
        module_in(given) if os.path.isdir(given) else (Path(given), read_checkpoint(given)) for given in args.checkpoint
    ]
    trained = contents[0][1]["config"]
    wanted = args.precision or (trained | contents[0][1].get("trained_on", {})).get("precision", "bfloat16")
    precision = resolve_precision(wanted, device, args.precision is not None)
    accelerator = create_accelerator(device, precision)
    with alone_in(output_dir, "--output_dir", "evaluation") if accelerator.is_main_process else contextlib.nullcontext():
        accelerator.wait_for_everyone()
        return evaluate_into(output_dir, args, argv, contents, precision, accelerator)


def evaluate_into(output_dir: Path, args, argv: list[str], contents: list, precision: str, accelerator) -> dict:
    """`main` once nobody else writes into `output_dir`; `contents`: [(path, content)] of the checkpoints."""
    trained, dtype = contents[0][1]["config"], get_dtype(precision)
    device, main_process = accelerator.device, accelerator.is_main_process
    places = {place: getattr(args, place) for place in PLACES}
    checkpoints = open_checkpoints(
        contents, places, device, dtype, args.cache_dir, ("--checkpoint", "--vae1_path", "--vae2_path")
    )
    ladder = Ladder(checkpoints[0].pipeline, dtype, {other.label: other.pipeline for other in checkpoints[1:]})
    codecs = ladder.pipeline.codec1, ladder.pipeline.codec2
    with naming("--image_size"):
        size = good_image_size(args.image_size or trained.get("image_size", 256), *(codec.stride for codec in codecs))
    require_memory(args.eval_batch_size, size, "--eval_batch_size")
    source = find_images(args.eval_data_dir, args.dataset_type, False, "--eval_data_dir", args.cache_dir)
    dataset = ImageDataset(source, size)
    loader = eval_loader(dataset, args.eval_batch_size, args.num_workers, *place_of(accelerator), device)
    log.info("%s at %d px from %s", count_of(len(dataset), "image"), size, args.eval_data_dir)

    # ---- judge
    enlarged = []

    def visit(batch, made):  # each process its own images
        enlarged.extend(batch["enlarged"])
        if args.save_visualizations:
            of_each = comparisons(batch["pixel_values"].to(device), made, ladder.captions)
            for rows, path, index in zip(of_each, batch["path"], batch["index"].tolist()):
                save_sheet(comparison_picture(rows, size), output_dir / picture_name(index, path))

    with (
        naming("--num_workers"),
        memory_advice("evaluating", eval_batch_size=args.eval_batch_size, image_size=size, precision=precision),
    ):
        wrong_spaces, remarks = compare_vaes(checkpoints[0].content, ladder.pipeline, lambda: some_images(dataset))
        for sentence in (*wrong_spaces, *remarks):
            log.warning("%s", sentence)
        measures = Measures(args.metrics, size, device)
        results = judge(ladder, loader, measures, size, visit, accelerator)
    enlarged = sum(map(sum, gathered(enlarged, accelerator)))
    if main_process:
        say(tables.ladder_table(results))
    strips = report.report_strips(ladder, dataset, results, args.eval_data_dir, args.num_samples, accelerator)
    if not main_process:
        return results
    results |= {
        "format": METRICS_FORMAT,
        "checkpoint": str(args.checkpoint[0]),
        "checkpoints": [checkpoint.description() for checkpoint in checkpoints],
        "image_size": size,
        "enlarged": enlarged,
        "wrong_spaces": wrong_spaces,
        "remarks": remarks,
        "settings": {
            "created": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %z"),
            "command": command_line(argv),
            "eval_data_dir": args.eval_data_dir,
            "trained_image_size": trained.get("image_size"),
            "vae1": codecs[0].path,
            "vae2": codecs[1].path,
            "device": device_name(device),
            "precision": precision,
            "metrics": list(args.metrics),
            "torch": torch.__version__,
        },
    }
    results = finite(results)  # a checkpoint's config may hold a number that JSON cannot
    results["verdict"] = verdict(results)

    # ---- write
    curves = report.read_curves(checkpoints[0].path, checkpoints[0].content)
    of_this = {picture_name(index, path) for index, path in zip(results["indices"], results["paths"])}
    drop_older(output_dir, of_this if args.save_visualizations else set())
    page = report.render(results, strips, curves)
    try:
        tables.write_files(output_dir, results, page)
    except OSError as error:
        raise UserError(f"--output_dir {output_dir}: the results cannot be written ({one_line(error)})") from None
    say(as_text(results["verdict"], said=[*wrong_spaces, *remarks]))
    say(f"{count_of(results['images'], 'image')} judged; report: {output_dir / 'report.html'}")
    return results


if __name__ == "__main__":
    run(main)
