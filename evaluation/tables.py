"""Figures as text: the ladder's table, the files of an evaluation, and how numbers are written."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import textwrap
from pathlib import Path

from evaluation.metrics import METRICS, Metric
from utils import atomic_file, printable

# The log of a training run, which `report.read_curves` reads back.
METRICS_FILE = "metrics.jsonl"  # each evaluation: {"step", "epoch", "ladder": {rung: {metric: value}}}
ARROWS = {+1: "↑", -1: "↓", 0: ""}  # by `Metric.better`
TRAINING_FILE = "training.jsonl"  # each log entry: {"step", "loss", "learning_rate"}; older runs lack this file


def ladder_table(results: dict) -> str:
    """The baseline ladder as aligned text: one line a rung, a dash where a figure has no meaning, and a legend. The figures on
    which the verdict rests have their 95% intervals. A metric that was not measured has no column."""
    ladder = results["ladder"]
    measured = {name for rung in ladder.values() for name, value in rung.items() if value is not None}
    columns = [metric for metric in METRICS.values() if metric.heading and metric.name in measured]
    lines = [("", *(f"{metric.heading} {ARROWS[metric.better]}".strip() for metric in columns))]
    for name, rung in ladder.items():
        intervals = results.get("intervals", {}).get(name, {})
        cells = (
            figure_text(metric, rung.get(metric.name)) + (interval_text(metric, intervals) if metric.decides else "")
            for metric in columns
        )
        lines.append((printable(rung["label"]), *cells))
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    table = [
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:]))])
        for line in lines
    ]
    notes = [f"{metric.heading}: {metric.note}" for metric in columns if metric.note]
    legend = "; ".join(["↑ more, ↓ less is better; ±: 95% interval", *notes])
    return "\n".join([*table, *textwrap.wrap(legend, max(map(len, table)), break_on_hyphens=False)])


def figure_text(metric: Metric, value) -> str:
    """A figure of the ladder as tables show it; a dash where there is none."""
    return "–" if value is None else metric.text(value)


def interval_text(metric: Metric, intervals: dict) -> str:
    """The ± of a figure, from the intervals of its rung; empty where it has none."""
    interval = intervals.get(metric.name)
    return "" if interval is None else f" ±{metric.text(interval)}"


def csv_rows(results: dict):
    """metrics.csv, row by row: a header, then one row per image and rung; nothing where a figure has no meaning.

    A metric with several numbers, such as the colour bias, has a column for each; one by latent channel has none.
    """
    per_image = results["per_image"]
    measured = {name for figures in per_image.values() for name in figures}
    columns = [metric for metric in METRICS.values() if metric.name in measured and metric.components is not None]
    header = ["image", "rung"]
    for metric in columns:
        header += [f"{metric.name}_{component}" for component in metric.components] or [metric.name]
    yield header
    for index, path in enumerate(results["paths"]):
        for rung, figures in per_image.items():
            cells = []
            for metric in columns:
                value = figures[metric.name][index] if metric.name in figures else None
                if metric.components:
                    cells += value or [None] * len(metric.components)
                else:
                    cells.append(value)
            yield [path, rung, *("" if cell is None else cell for cell in cells)]


def write_files(folder: Path, results: dict, page: str) -> None:
    """Write metrics.json, metrics.csv and report.html into `folder`; bytes of a file name that are not UTF-8 become escapes.

    At every moment, and after a kill, the files in the folder belong to one evaluation: the new files are complete before the
    old ones are deleted, and the old ones are deleted before the first new one gets its name. The page comes last.
    """
    paths = [folder / name for name in ("report.html", "metrics.csv", "metrics.json")]
    with contextlib.ExitStack() as stack:  # which renames them in the reverse order
        options = {"encoding": "utf-8", "errors": "backslashreplace", "newline": ""}
        files = [stack.enter_context(atomic_file(path, "w", **options)) for path in paths]
        files[0].write(page)
        csv.writer(files[1]).writerows(csv_rows(results))
        files[2].write(json.dumps(results, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
        for file in files:
            file.flush()
            os.fsync(file.fileno())
        for path in paths:
            path.unlink(missing_ok=True)


def decibels(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def percent(fraction: float) -> str:
    """A fraction in per cent, to two digits, so that a small one is not shown as 0%."""
    return f"{100 * fraction:.0f}%" if fraction >= 0.1 else f"{100 * fraction:.2g}%"


def shown_name(path: str, folder: str) -> str:
    """An image's name for people: its path below the folder that was judged."""
    return os.path.relpath(path, folder) if os.path.isabs(path) == os.path.isabs(folder) and os.path.dirname(path) else path
