"""What a training run left in its log folder: the evaluations' ladders and the loss, for the curves of the report.

A run writes one JSON line per evaluation to metrics.jsonl, {"step", "epoch", "ladder": {row: {metric: value}}}, and
TensorBoard event files. Whatever is missing or damaged is left out: a report must not fail for want of a log.
"""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

from utils import one_line

log = logging.getLogger(__name__)


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


def read_evaluations(folder: Path) -> dict:
    """{row: {metric: [(step, value), …]}} from metrics.jsonl; of a step that was evaluated twice, as by a resumed run, the
    later line counts. Without that file, what the event files hold of it."""
    lines = {}
    try:
        with open(folder / "metrics.jsonl", encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    entry = json.loads(line)
                    lines[int(entry["step"])] = dict(entry["ladder"])
                except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
                    continue  # cut off while it was written
    except OSError:
        pass
    curves = {}
    for step, ladder in sorted(lines.items()):
        for row, figures in ladder.items():
            for metric, value in figures.items() if isinstance(figures, dict) else ():
                if _is_number(value):
                    curves.setdefault(row, {}).setdefault(metric, []).append((step, value))
    if not curves:
        for tag, points in read_scalars(folder, "eval_").items():
            metric, _, row = tag.removeprefix("eval_").rpartition("/")
            curves.setdefault(row, {})[metric] = points
    return curves


def read_scalars(folder: Path, prefix: str) -> dict:
    """{tag: [(step, value), …]} of the TensorBoard scalars whose tag begins with `prefix`; {} without event files."""
    if not any(folder.glob("events.out.tfevents.*")):
        return {}
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it tells of every file it has come to the end of
        # pictures and histograms are read past, and long curves are thinned out by the library itself
        sizes = {"scalars": 2000, "images": 1, "histograms": 1, "compressedHistograms": 1, "tensors": 1, "audio": 1}
        events = EventAccumulator(str(folder), size_guidance=sizes)
        events.Reload()
        tags = [tag for tag in events.Tags()["scalars"] if tag.startswith(prefix)]
        curves = {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in tags}
    except Exception as error:  # not installed, another version, a damaged file: the curves are a courtesy
        log.warning("%s: its event files cannot be read (%s)", folder, one_line(error))
        return {}
    return {tag: [point for point in sorted(points.items()) if _is_number(point[1])] for tag, points in curves.items()}


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def read_curves(checkpoint: Path, content: dict) -> dict | None:
    """Curves of the run behind a checkpoint: {folder, evaluations: see `read_evaluations`, loss: [(step, value), …]}.

    None when there is nothing to draw.
    """
    folder = run_folder(checkpoint, content)
    if folder is None:
        return None
    evaluations, loss = read_evaluations(folder), read_scalars(folder, "train/loss").get("train/loss", [])
    return {"folder": str(folder), "evaluations": evaluations, "loss": loss} if evaluations or loss else None
