"""What a run writes while it trains: TensorBoard's event files and metrics.jsonl, both in the run's own folder.

Points carry the number of optimizer steps done. So after a resume at step N every point up to N is kept and none comes twice.
"""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path

import numpy as np
from tqdm.contrib.logging import logging_redirect_tqdm

from evaluation.ladder import applicable_rows, comparison_sheets, evaluate, picture_names, reconstruct, translators
from evaluation.tables import decibels
from utils import UserError, atomic_file, printable

log = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
CHARTS = {"PSNR, dB": "psnr", "PSNR against VAE2, dB": "psnr_vs_vae2", "SSIM": "ssim", "latent MSE": "latent_mse"}
CHARTED = ("ceiling", "reencode", "linear", "aligned")  # with an untrained module's figures the others would lie in one line


def open_writer(folder: Path, step: int):
    """A SummaryWriter for a run in `folder` that has done `step` steps; what its logs hold beyond them is dropped.

    The custom scalars page draws the ladder's fixed rungs and the running curve in one chart.
    """
    from torch.utils.tensorboard import SummaryWriter

    drop_metrics_after(folder / METRICS_FILE, step)
    stamps = [int(file.name.split(".")[3]) for file in folder.glob("events.out.tfevents.*")]
    while stamps and int(time.time()) == max(stamps):
        time.sleep(0.05)  # readers sort a folder's event files by the second in their names
    writer = SummaryWriter(folder, purge_step=step + 1 if step else None)
    charts = {title: ["Multiline", [rf"eval_{metric}/({'|'.join(CHARTED)})"]] for title, metric in CHARTS.items()}
    writer.add_custom_scalars({"ladder": charts})
    return writer


def drop_metrics_after(path: Path, step: int) -> None:
    """Keep the lines of a metrics.jsonl whose evaluation came after at most `step` steps; a torn last line goes too."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    with atomic_file(path, "w", encoding="utf-8") as file:
        file.writelines(kept)


def evaluate_and_log(pipeline, eval_loader, writer, epoch, args, dtype) -> dict:
    """Evaluate the whole set; scalars to TensorBoard and a line to metrics.jsonl; returns {row: metrics} of the ladder.

    The rungs that training cannot move are measured the first time and drawn again as level lines from then on.
    """
    step = writer.step
    fixed = {row: figures for row, figures in pipeline.progress["metrics"].items() if row != "aligned"}
    rows = ("aligned",) if fixed else applicable_rows(pipeline)
    ladder = pipeline.progress["metrics"] = fixed | evaluate(pipeline, eval_loader, dtype, rows)["ladder"]
    for row, figures in ladder.items():
        for name in CHARTS.values():
            if figures[name] is not None:
                writer.add_scalar(f"eval_{name}/{row}", figures[name], step)
    aligned = ladder["aligned"]
    if aligned["latent_mse"] is None:
        raise UserError(f"the module's output is not finite at step {step}: lower --learning_rate or set --grad_clip 1")
    with open(Path(writer.log_dir) / METRICS_FILE, "a", encoding="utf-8") as file:
        file.write(json.dumps({"step": step, "epoch": epoch, "ladder": ladder}) + "\n")
    with logging_redirect_tqdm():
        log.info(
            "epoch %g: aligned PSNR %s dB (VAE2 itself %s, re-encoding %s), SSIM %.4f, latent MSE %.4f",
            round(epoch, 2), *(decibels(ladder[row]["psnr"]) for row in ("aligned", "ceiling", "reencode")),
            aligned["ssim"], aligned["latent_mse"],
        )  # fmt: skip
    return ladder


def log_model_stats(pipeline, eval_loader, writer, epoch, args, dtype) -> None:
    """Histograms of weights and of the last step's gradients per layer, and level and spread of the latents."""
    step = writer.step
    for name, parameter in pipeline.training_module.named_parameters():
        writer.add_histogram(f"weights/{name}", parameter.detach().float().cpu(), step)
        if parameter.grad is not None and parameter.grad.isfinite().all():
            writer.add_histogram(f"gradients/{name}", parameter.grad.float().cpu(), step)
    images = next(iter(eval_loader))["pixel_values"].to(pipeline.device)
    if len(images):
        made = reconstruct(pipeline, images, translators(pipeline, ("ceiling", "aligned"), dtype))
        for name, latents in (("aligned", made["aligned"][0]), ("target", made["ceiling"][0])):
            writer.add_scalar(f"latents_mean/{name}", latents.mean().item(), step)
            writer.add_scalar(f"latents_std/{name}", latents.std().item(), step)
            writer.add_histogram(f"latents/{name}", latents.cpu(), step)


def visualize_results(pipeline, eval_loader, writer, epoch, args, dtype) -> None:
    """The first --num_visualize_samples evaluation images as captioned sheets: reconstructions, differences, latents."""
    step, names, shown = writer.step, picture_names(), 0
    ways = translators(pipeline, [row for row in names if row != "vae1"], dtype)
    for batch in eval_loader:
        images = batch["pixel_values"][: args.num_visualize_samples - shown].to(pipeline.device)
        if not len(images):
            continue
        sheets = comparison_sheets(images, reconstruct(pipeline, images, ways), names, args.image_size)
        for number, sheet in enumerate(sheets, shown):
            writer.add_image(f"samples/{number}", np.asarray(sheet), step, dataformats="HWC")
        shown += len(images)
        if shown >= args.num_visualize_samples:
            break


def log_hparams(writer, config: dict, ladder: dict, step: int) -> None:
    """The run's flags beside its final metrics, for TensorBoard's HPARAMS page."""
    from torch.utils.tensorboard.summary import hparams

    flags = {name: value if isinstance(value, (bool, int, float)) else printable(str(value)) for name, value in config.items()}
    final = {f"final/{name}": ladder["aligned"][name] for name in CHARTS.values() if ladder["aligned"][name] is not None}
    for summary in hparams(flags, final):
        writer.file_writer.add_summary(summary)
    for name, value in final.items():
        writer.add_scalar(name, value, step)


def print_results(kept, metrics: dict, step: int, args) -> None:
    """What a run that ended after `step` steps has reached, and where it is; `kept` is its `RunCheckpoints`."""
    if metrics:
        psnr = {row: decibels(figures["psnr"]) for row, figures in metrics.items()}
        print(
            f"PSNR of the decoded image: untrained module {psnr['untrained']} dB -> aligned {psnr['aligned']} dB "
            f"(decode + re-encode {psnr['reencode']} dB, VAE2's own reconstruction {psnr['ceiling']} dB)"
        )
    print(f"checkpoint: {kept.last}")
    if kept.best and kept.best["step"] != step:
        print(f"best by {args.best_metric} (step {kept.best['step']}): {kept.best_path}")
    print(f"TensorBoard: tensorboard --logdir {args.log_dir}")
