"""Figures as text: the ladder's table, metrics.csv, metrics.json, and how numbers are written."""

from __future__ import annotations

import contextlib
import csv
import json
import os
from pathlib import Path

from utils import atomic_file


def ladder_table(results: dict) -> str:
    """The baseline ladder as aligned text: one line a row, a dash where a figure has no meaning."""
    columns = {
        "latent MSE": ("latent_mse", "{:.4f}".format),
        "PSNR dB": ("psnr", "{:.2f}".format),
        "SSIM": ("ssim", "{:.4f}".format),
        "colour bias": ("colour_bias", lambda bias: " ".join("–" if level is None else f"{level:+.1f}" for level in bias)),
        "ms": ("milliseconds", "{:.2f}".format),
        "M params": ("parameters", lambda count: f"{count / 1e6:.2f}"),
        "G MACs": ("macs", lambda count: f"{count / 1e9:.2f}"),
    }
    lines = [("", *columns)]
    for row in results["ladder"].values():
        cells = [form(row[key]) if row.get(key) is not None else "–" for key, form in columns.values()]
        lines.append((row["label"], *cells))
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:]))])
        for line in lines
    )


def csv_rows(results: dict):
    """metrics.csv, row by row: a header, then one row per image and rung; nothing where a figure has no meaning."""
    plain, triples = {}, {}
    for metrics in results["per_image"].values():
        for name, numbers in metrics.items():
            if not isinstance(numbers[0], list):
                plain[name] = None
            elif name == "colour_bias":
                triples[name] = ("r", "g", "b")
    yield ["image", "rung", *plain, *(f"{name}_{part}" for name, parts in triples.items() for part in parts)]
    for place, path in enumerate(results["paths"]):
        for row, metrics in results["per_image"].items():
            figures = [metrics[name][place] if name in metrics else None for name in plain]
            figures += [part for name in triples for part in metrics[name][place]]
            yield [path, row, *("" if figure is None else figure for figure in figures)]


def write_files(folder: Path, results: dict, page: str) -> None:
    """metrics.json, metrics.csv and report.html in `folder`; bytes of a file name that are no UTF-8 come out as escapes.

    Whatever is there of the three tells of one evaluation, at every moment and after a kill: all new files are whole before
    the old ones go, and these have gone before the first new one gets its name. The page comes last.
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


def signed(value: float | None) -> str:
    return "–" if value is None else f"{value:+.1f}".replace("-", "−")


def percent(fraction: float) -> str:
    """A share in per cent, to two digits; never 0% for what is not nothing."""
    return f"{100 * fraction:.0f}%" if fraction >= 0.1 else f"{100 * fraction:.2g}%"


def shown_name(path: str, folder: str) -> str:
    """An image's name as people know it: its path below the folder that was judged."""
    return os.path.relpath(path, folder) if os.path.isabs(path) == os.path.isabs(folder) and os.path.dirname(path) else path
