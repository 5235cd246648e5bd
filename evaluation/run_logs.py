"""What a training run left in its log folder: the evaluations' ladders and the loss, for the curves of the report.

A run appends JSON lines to two files: {"step", "epoch", "ladder": {rung: {metric: value}}} for each evaluation to
metrics.jsonl, and {"step", "loss", "learning_rate"} for each log entry to training.jsonl, which older runs lack. With a
discriminator the latter also hold "adversarial", "discriminator_loss" and "discriminator_accuracy", or the same after "latent_"
where it judges latents. Whatever is missing or damaged is left out: a report must not fail for want of a log.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

METRICS_FILE = "metrics.jsonl"  # a line for each evaluation
TRAINING_FILE = "training.jsonl"  # a line for each log entry of the training
RENAMED = {"ceiling": "vae2"}  # rungs by the names that older runs gave them
LONGEST_CURVE = 2000  # points; a longer one is thinned out, so that the page stays small


def run_folder(checkpoint: Path, content: dict) -> Path | None:
    """The log folder of the run that wrote `checkpoint`, whose content is `content`; None if it is not to be found.

    Looked for under the config's `log_dir` as it was given, and beside the checkpoint, to where both may have been moved.
    """
    run, log_dir = content.get("run"), content["config"].get("log_dir")
    if not isinstance(run, str) or not run or Path(run).name != run or not isinstance(log_dir, str):
        return None
    home = checkpoint.resolve().parent
    roots = [Path(log_dir), home / log_dir, home.parent / log_dir, home.parent / Path(log_dir).name]
    return next((root / name for root in roots for name in (run, f"align_{run}") if (root / name).is_dir()), None)


def read_lines(path: Path) -> list[dict]:
    """The objects in a file of JSON lines, in the order in which they were written; [] without that file."""
    entries = []
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    entry = json.loads(line)
                    entries.append(entry | {"step": int(entry["step"])})
                except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
                    continue  # cut off while it was written
    except OSError:
        pass
    return entries


def evaluation_curves(entries: list[dict]) -> dict:
    """{rung: {metric: [(step, value), …]}} of the evaluations among `entries`; of a step that was evaluated twice, as by a
    resumed run, the later line counts."""
    ladders = {entry["step"]: entry["ladder"] for entry in entries if isinstance(entry.get("ladder"), dict)}
    curves = {}
    for step, ladder in sorted(ladders.items()):
        for name, figures in ladder.items():
            rung = curves.setdefault(RENAMED.get(name, name), {})
            for metric, value in figures.items() if isinstance(figures, dict) else ():
                if _is_number(value):
                    rung.setdefault(metric, []).append((step, value))
    return {rung: figures for rung, figures in curves.items() if figures}


def loss_curve(entries: list[dict]) -> list[tuple[int, float]]:
    """[(step, training loss), …] among `entries`, of at most `LONGEST_CURVE` points."""
    losses = {entry["step"]: entry["loss"] for entry in entries if _is_number(entry.get("loss"))}
    points = sorted(losses.items())
    return points[:: -(-len(points) // LONGEST_CURVE) or 1]


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def read_curves(checkpoint: Path, content: dict) -> dict | None:
    """Curves of the run behind a checkpoint: {folder, evaluations: see `evaluation_curves`, loss: see `loss_curve`}.

    None when there is nothing to draw.
    """
    folder = run_folder(checkpoint, content)
    if folder is None:
        return None
    evaluations = evaluation_curves(read_lines(folder / METRICS_FILE))
    loss = loss_curve(read_lines(folder / TRAINING_FILE))
    return {"folder": str(folder), "evaluations": evaluations, "loss": loss} if evaluations or loss else None
