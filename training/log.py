"""What a run writes while it trains: TensorBoard's event files and two files of JSON lines, all in the run's own folder.

Points carry the number of optimizer steps done, so that a run resumed at step N keeps every point up to N and repeats none.
The training loop sets `writer.step` before it calls anything here:

    writer = RunLog(folder, step)
    writer.step = state.step
    metrics = evaluate_and_log(pipeline, eval_loader, writer, epoch, args, dtype)
    writer.log_training(loss=loss, learning_rate=learning_rate, images_per_second=rate)

`evaluate_and_log`, `log_model_stats` and `visualize_results` take TensorBoard's own `SummaryWriter` too; then the x-axis is
`epoch`, and there are no lines. `evaluation.tables` describes the lines; `evaluation.report` reads them back.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import shlex
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm.contrib.logging import logging_redirect_tqdm

from dataloader import eval_loader as whole_set
from evaluation.ladder import FixedRungs, Ladder
from evaluation.pictures import comparison_picture, comparisons
from evaluation.tables import METRICS_FILE, TRAINING_FILE, decibels
from utils import UserError, atomic_file, printable, require_regular
from vae_align import PRETRAINED_NAME
from vaes.pipeline import weights_digest

log = logging.getLogger(__name__)

SKIPPED = 2  # steps of a session before the first that is profiled: they start and compile things
TRACE = "profile_trace.json.gz"  # for chrome://tracing or ui.perfetto.dev
PARTS = ("waiting for data", "encoding", "module", "losses and decoding", "backward", "optimizer", "logging")
CHARTS = {"PSNR, dB": "psnr", "PSNR against VAE2, dB": "psnr_vs_vae2", "SSIM": "ssim", "latent MSE": "latent_mse"}
CHARTED = ("vae2", "reencode", "linear", "aligned")  # an untrained module's figures would flatten the other curves


class RunLog:
    """The writer of one run.

    Args:
        folder: of the run's logs; step: optimizer steps done. What the logs hold beyond that step is dropped.

    Attributes:
        step: under which everything is written; the training loop moves it.
        events: TensorBoard's `SummaryWriter`.
    """

    def __init__(self, folder: Path, step: int = 0):
        from torch.utils.tensorboard import SummaryWriter

        self.folder = Path(folder)
        self.step = step
        for name in (METRICS_FILE, TRAINING_FILE):
            drop_lines_after(self.folder / name, step)
        wait_for_a_new_second(self.folder)
        self.events = SummaryWriter(self.folder, purge_step=step + 1 if step else None)
        charts = {title: ["Multiline", [rf"eval_{metric}/({'|'.join(CHARTED)})"]] for title, metric in CHARTS.items()}
        self.events.add_custom_scalars({"ladder": charts})  # each draws the running curve among the level lines

    def add_scalar(self, tag: str, value: float) -> None:
        self.events.add_scalar(tag, value, self.step)

    def add_line(self, name: str, **values) -> None:
        """Append a line to the file of that name: the step, and `values`."""
        with open(self.folder / name, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": self.step} | values, allow_nan=False) + "\n")

    def log_training(self, loss: float, learning_rate: float, **more: float) -> None:
        """A log entry of the training: finite values as scalars `train/…`; loss and learning rate in training.jsonl too."""
        for name, value in ({"loss": loss, "learning_rate": learning_rate} | more).items():
            if math.isfinite(value):
                self.add_scalar(f"train/{name}", value)
        self.add_line(TRAINING_FILE, loss=loss if math.isfinite(loss) else None, learning_rate=learning_rate)

    def flush(self) -> None:
        self.events.flush()

    def close(self) -> None:
        self.events.close()


class Meter:
    """The mean of a figure since the last log entry, summed on the device. Steps that were not finite do not count."""

    def __init__(self, device: torch.device):
        self._sum = torch.zeros((), device=device)
        self._steps = torch.zeros((), device=device)

    def add(self, value: torch.Tensor, ok: torch.Tensor) -> None:
        """Add a step's value, if the step was `ok`."""
        self._sum += torch.where(ok, value.detach(), 0)
        self._steps += ok

    def read(self, accelerator) -> float:
        """The mean over steps and processes, nan where no step was counted; then counting starts anew. Waits for the device."""
        mean = accelerator.reduce(self._sum / self._steps, "mean").tolist()
        self._sum.zero_()
        self._steps.zero_()
        return mean

    def state_dict(self) -> dict:
        return {"loss_sum": self._sum.cpu(), "summed_steps": self._steps.cpu()}

    def load_state_dict(self, state: dict) -> None:
        """ValueError for anything but scalars."""
        if state["loss_sum"].shape or state["summed_steps"].shape:
            raise ValueError(f"sums of shape {tuple(state['loss_sum'].shape)} and {tuple(state['summed_steps'].shape)}")
        self._sum.copy_(state["loss_sum"])
        self._steps.copy_(state["summed_steps"])


class StepProfile:
    """torch's profile of a few steps of a session, of this process; a context around the training loop.

    The loop marks the parts of a step by `record_function`, with the names in `PARTS`, and calls `step` after each.

    Args:
        steps: number of steps that are profiled, after `SKIPPED` others; 0: none. folder: of the trace; None: no profile.

    Attributes:
        shares: {part: share of the steps' time}; {} before the last profiled step.
    """

    def __init__(self, steps: int, device: torch.device, folder: Path | None):
        self.shares, self._folder, self._profiler = {}, folder, None
        if steps and folder:
            activities = [torch.profiler.ProfilerActivity.CPU]
            activities += [torch.profiler.ProfilerActivity.CUDA] if device.type == "cuda" else []
            plan = torch.profiler.schedule(wait=SKIPPED - 1, warmup=1, active=steps, repeat=1)
            self._profiler = torch.profiler.profile(activities=activities, schedule=plan, on_trace_ready=self._read)

    def __enter__(self) -> StepProfile:
        if self._profiler:
            self._profiler.start()
        return self

    def __exit__(self, *_) -> None:
        if self._profiler:
            self._profiler.stop()

    def step(self) -> None:
        """A step has ended."""
        if self._profiler:
            self._profiler.step()

    def _read(self, profiler) -> None:
        profiler.export_chrome_trace(str(self._folder / TRACE))
        seconds = dict.fromkeys(PARTS, 0.0)
        for event in profiler.key_averages():
            if event.key in seconds:
                seconds[event.key] += max(event.cpu_time_total, getattr(event, "device_time_total", 0.0))
        total = sum(seconds.values())
        self.shares = {part: each / total for part, each in seconds.items()} if total else {}

    def text(self) -> str:
        """ "a step: 3 % waiting for data, …", the parts that take any time; "" without a profile."""
        shown = [f"{100 * share:.0f} % {part}" for part, share in self.shares.items() if share >= 0.005]
        return f"a step: {', '.join(shown)}; trace: {self._folder / TRACE}" if shown else ""


def wait_for_a_new_second(folder: Path) -> None:
    """Return when the second in which one of the folder's event files was last written is over: TensorBoard sorts a folder's
    event files by the second at which each was begun, and a resumed run's must come last."""
    newest = max((int(file.stat().st_mtime) for file in folder.glob("events.out.tfevents.*")), default=0)
    while int(time.time()) == newest:
        time.sleep(0.05)


def drop_lines_after(path: Path, step: int) -> None:
    """Keep the lines of a log that were written after at most `step` steps; a torn last line goes too."""
    if not path.exists():
        return
    require_regular(path)
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, RecursionError, TypeError):
            continue
    with atomic_file(path, "w", encoding="utf-8") as file:
        file.writelines(kept)


def curves_of(writer, epoch: float) -> tuple:
    """(the `SummaryWriter` behind a writer, the x-axis of its points): a `RunLog`'s step, otherwise the epoch."""
    return (writer.events, writer.step) if isinstance(writer, RunLog) else (writer, epoch)


def evaluate_and_log(pipeline, eval_loader, writer, epoch: float, args, dtype, accelerator=None, fixed=None) -> dict:
    """Evaluate the whole set; scalars to TensorBoard; returns {rung: metrics} of the ladder. A `RunLog` gets a line in
    metrics.jsonl too.

    `fixed`, a `FixedRungs`, remembers the rungs that training cannot move from one call to the next. They are measured once and
    drawn again as level lines, and measured anew when the evaluation images have changed; without `fixed`, in each call.
    UserError when the module's output is not finite.

    Several processes evaluate together: each calls this with its `accelerator` and its share of the images. One whose `writer`
    is None logs nothing.
    """
    fixed = fixed or FixedRungs()
    named = set(fixed.unreadable)
    choices = ("ssim", "st_lpips") if args.best_metric == "both" else ("ssim",)
    ladder = fixed.evaluate(pipeline, eval_loader, dtype, accelerator, choices, args.image_size)
    ladder["aligned"]["weights"] = weights_digest(pipeline.module)  # of these figures; a checkpoint may be of a later step
    if not writer:
        return ladder
    in_a_run, (curves, place) = isinstance(writer, RunLog), curves_of(writer, epoch)
    for message in fixed.unreadable:
        if message not in named:
            with logging_redirect_tqdm():
                log.warning("left out of the evaluation: %s", message)
    for rung, figures in ladder.items():
        for name in CHARTS.values():
            if figures[name] is not None:
                curves.add_scalar(f"eval_{name}/{rung}", figures[name], place)
    aligned = ladder["aligned"]
    if aligned["latent_mse"] is None:
        where = f"{'step' if in_a_run else 'epoch'} {place}"
        raise UserError(f"the module's output is not finite at {where}: lower --learning_rate or set --grad_clip 1")
    if in_a_run:
        writer.add_line(METRICS_FILE, epoch=epoch, ladder=ladder)
    with logging_redirect_tqdm():
        log.info(
            "%s: aligned PSNR %s dB (VAE2 itself %s, re-encoding %s), SSIM %.4f, latent MSE %.4f",
            "at the start" if in_a_run and not place else f"epoch {round(epoch, 2):g}",
            *(decibels(ladder[rung]["psnr"]) for rung in ("aligned", "vae2", "reencode")),
            aligned["ssim"], aligned["latent_mse"],
        )  # fmt: skip
    return ladder


def log_model_stats(pipeline, eval_loader, writer, epoch: float, args, dtype) -> None:
    """Histograms of weights and of the last step's gradients per layer; mean and spread of the latents of one batch."""
    curves, place = curves_of(writer, epoch)
    for name, parameter in pipeline.training_module.named_parameters():
        curves.add_histogram(f"weights/{name}", parameter.detach().float().cpu(), place)
        if parameter.grad is not None and parameter.grad.isfinite().all():
            curves.add_histogram(f"gradients/{name}", parameter.grad.float().cpu(), place)
    images = next(iter(whole_set(eval_loader.dataset, args.eval_batch_size, 0, device=pipeline.device)))["pixel_values"]
    if len(images):
        made = Ladder(pipeline, dtype, only=("aligned",)).reconstruct(images)
        for name, rung in (("aligned", "aligned"), ("target", "vae2")):
            latents = made[rung].latents
            curves.add_scalar(f"latents_mean/{name}", latents.mean().item(), place)
            curves.add_scalar(f"latents_std/{name}", latents.std().item(), place)
            curves.add_histogram(f"latents/{name}", latents.cpu(), place)


def visualize_results(pipeline, eval_loader, writer, epoch: float, args, dtype) -> Image.Image | None:
    """The first `args.num_visualize_samples` evaluation images, each as three captioned sheets: original and reconstructions,
    their differences, their latents. Returns the first image's sheets as one picture, or None without an image."""
    curves, place = curves_of(writer, epoch)
    ladder = Ladder(pipeline, dtype)
    captions = ladder.captions
    shown, first = 0, None
    for batch in whole_set(eval_loader.dataset, args.eval_batch_size, 0, device=pipeline.device):
        images = batch["pixel_values"][: args.num_visualize_samples - shown].to(pipeline.device)
        if not len(images):
            continue
        for number, rows in enumerate(comparisons(images, ladder.reconstruct(images, only=captions), captions), shown):
            first = first or comparison_picture(rows, args.image_size)
            for tag, row in zip(("samples", "differences", "latents"), rows):
                sheet = np.asarray(comparison_picture([row], args.image_size))
                curves.add_image(f"{tag}/{number}", sheet, place, dataformats="HWC")
        shown += len(images)
        if shown >= args.num_visualize_samples:
            break
    return first


def log_hparams(writer: RunLog, config: dict, ladder: dict) -> None:
    """The run's flags beside its final metrics, for TensorBoard's HPARAMS page."""
    from torch.utils.tensorboard.summary import hparams

    flags = {name: value if isinstance(value, (bool, int, float)) else printable(str(value)) for name, value in config.items()}
    final = {f"final/{name}": ladder["aligned"][name] for name in CHARTS.values() if ladder["aligned"][name] is not None}
    for summary in hparams(flags, final):
        writer.events.file_writer.add_summary(summary)
    for name, value in final.items():
        writer.add_scalar(name, value)


def print_results(run, log_dir: str, *speed: str) -> None:
    """Print the result of a finished `Run` and where its files are; `speed`: further lines, empty ones left out."""
    if run.metrics:
        rungs = ("untrained", "aligned", "reencode", "vae2")
        untrained, aligned, reencode, vae2 = (decibels(run.metrics.get(rung, {}).get("psnr")) for rung in rungs)
        print(
            f"PSNR of the decoded image: at the start {decibels(psnr_at_the_start(run, log_dir))} dB -> aligned {aligned} dB "
            f"(random weights {untrained} dB, decode + re-encode {reencode} dB, VAE2's own reconstruction {vae2} dB)"
        )
    for line in filter(None, speed):
        print(line)
    print(f"checkpoint: {run.last}")
    if run.best and run.best["step"] != run.step:
        print(f"best by {run.best_metric} (step {run.best['step']}): {run.best_path}")
    if (sample := run.folder / f"{run.name}.png").exists():
        print(f"sample picture: {sample}")
    folder, photos = map(shlex.quote, (str(run.folder), "PHOTOS" if run.config["hold_out"] else run.config["eval_data_dir"]))
    print(f"to use: {run.folder / PRETRAINED_NAME}, by AlignPipeline.from_pretrained({str(run.folder)!r})")
    print(f"to judge: python eval_align.py --checkpoint {folder} --eval_data_dir {photos}")
    print(
        f"TensorBoard: tensorboard --logdir {shlex.quote(log_dir)} (open CUSTOM SCALARS first: the curves beside the baselines)"
    )
    if sys.prefix != sys.base_prefix and "VIRTUAL_ENV" not in os.environ:
        print(f"before these commands: . {sys.prefix}/bin/activate")


def psnr_at_the_start(run, log_dir: str) -> float | None:
    """PSNR, dB, from which training started; None where the log lacks it or has it of other images."""
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):  # the log of a resumed run may be elsewhere, or old
        first = json.loads((Path(log_dir) / run.name / METRICS_FILE).read_text(encoding="utf-8").partition("\n")[0])
        if first["step"] == 0 and first["ladder"]["vae2"]["psnr"] == run.metrics["vae2"]["psnr"]:
            return first["ladder"]["aligned"]["psnr"]
