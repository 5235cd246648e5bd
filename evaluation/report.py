"""report.html: one file that opens from disk and asks the network for nothing. `report.html.j2` is its text and style.

The verdict comes first, then the ladder, pictures, charts, and how it was measured. The template escapes every value, file
names above all.
"""

from __future__ import annotations

import json
import logging
from collections import ChainMap
from pathlib import Path

import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from tqdm import tqdm

from evaluation import charts, pictures, tables
from evaluation.ladder import Ladder
from evaluation.metrics import METRICS, Metric
from runtime.processes import gathered, is_main, place_of
from utils import printable
from vae_align import is_finite

OTHER_COLOURS = 3  # for further checkpoints' lines
COLUMNS = [metric for metric in METRICS.values() if metric.text]  # of the ladder
RENAMED = {"ceiling": "vae2"}  # rungs by the names that older runs gave them
COSTS = 3  # images whose pictures take as long as `Ladder.costs`
LONGEST_CURVE = 2000  # points; a longer one is thinned out, so that the page stays small

log = logging.getLogger(__name__)


def render(results: dict, strips: list[dict], curves: dict | None) -> str:
    """The page.

    Args:
        results: the content of metrics.json, see `eval_align.main`.
        strips: the images to show, see `report_strips`.
        curves: of the training run, see `read_curves`; None: no such section.
    """
    ladder = results["ladder"]
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=StrictUndefined,
        finalize=lambda value: value if isinstance(value, Markup) else printable(str(value)),
    )
    return environment.get_template("report.html.j2").render(
        results=results,
        ladder=ladder,
        columns=COLUMNS,
        metrics=METRICS,
        measured={name for rung in ladder.values() for name, value in rung.items() if value is not None},
        strips=strips,
        series=chart_series(results),
        curves=curves,
        evaluations=evaluation_series(ladder, curves["evaluations"] if curves else {}),
        charts=charts,
        pictures=pictures,
        tables=tables,
        figure_text=figure_text,
        preformatted=preformatted,
    )


def preformatted(value: str | dict) -> Markup:
    """Text, or a dict as JSON, for <pre>: line ends stay, other signs that cannot be shown become escapes."""
    text = value if isinstance(value, str) else json.dumps(value, indent=2, ensure_ascii=False)
    return Markup("\n").join(printable(line) for line in text.split("\n"))


def colours_of(ladder: dict) -> dict:
    """{rung: class of its bars and lines}; further checkpoints have their own."""
    further = [name for name, rung in ladder.items() if rung["kind"] == "aligned" and name != "aligned"]
    own = {name: f"c-other{number % OTHER_COLOURS}" for number, name in enumerate(further)}
    return {name: own.get(name, f"c-{rung['kind']}") for name, rung in ladder.items()}


def figure_text(metric: Metric, value) -> str:
    """A figure as the page's tables show it, with a minus sign in place of the hyphen."""
    return tables.figure_text(metric, value).replace("-", "−")


def chart_series(results: dict) -> dict[str, list[tuple]]:
    """{name: the points, bars or series of a chart}, as the functions of `charts` take them."""
    ladder, spectrum, histograms = results["ladder"], results["spectrum"], results["histograms"]
    colours = colours_of(ladder)

    def bars(metric, kinds):
        return [
            (rung["label"], rung.get(metric), figure_text(METRICS[metric], rung.get(metric)), colours[name])
            for name, rung in ladder.items()
            if not kinds or rung["kind"] in kinds
        ]

    def lines(metric, kinds):
        return [
            (rung["label"], rung[metric], colours[name])
            for name, rung in ladder.items()
            if rung["kind"] in kinds and rung.get(metric)
        ]

    def shares(label, name):
        counts = [sum(of_bin) for of_bin in zip(*histograms["rows"][name])]
        return label, [count / (sum(counts) or 1) for count in counts], f"c-{name}"

    def over(low, high, series):  # with the middles of equal bins from `low` to `high`
        return [
            (label, [(low + (place + 0.5) / len(values) * (high - low), value) for place, value in enumerate(values)], colour)
            for label, values, colour in series
        ]

    limit = histograms["limit"]
    return {
        "perception": [
            (rung["caption"], rung["st_lpips_vgg"], rung["psnr"], colours[name])
            for name, rung in ladder.items()
            if None not in (rung.get("st_lpips_vgg"), rung.get("psnr"))
        ],
        "psnr": bars("psnr", ()),
        "latent_mse": bars("latent_mse", ("reencode", "linear", "aligned")),
        "channels": lines("latent_mse_by_channel", ("reencode", "aligned")),
        "errors": over(0, 0.5, [(ladder[name]["label"], powers, colours[name]) for name, powers in spectrum["rows"].items()]),
        "values": over(-limit, limit, [shares("aligned", "aligned"), shares("VAE2's own", "vae2")]),
        "latent_powers": over(0, 0.5, lines("latent_spectrum", ("vae2", "reencode", "aligned"))),
    }


def evaluation_series(ladder: dict, evaluations: dict) -> dict[str, list[tuple]]:
    """{metric: the series of its chart over the training's steps}; empty where there is none of the module."""
    return {
        metric: [
            (ladder.get(name, {}).get("label", name), evaluations[name][metric], f"c-{name}")
            for name in rungs
            if "aligned" in evaluations and metric in evaluations.get(name, {})
        ]
        for metric, rungs in (("psnr", ("aligned", "reencode", "vae2")), ("latent_mse", ("aligned", "reencode")))
    }


# ----------------------------------------------------------------------------------------------------------------------
# Pictures


@torch.inference_mode()
def report_strips(ladder: Ladder, dataset, results: dict, folder: str, wanted: int, accelerator=None) -> list[dict]:
    """The pictures of the report: about `wanted` images, worst, median and best. They are made again, so that none has to be
    kept while the set is judged. Several processes share them; all call this together, and each gets all.

    Args:
        dataset: the images that were judged; results: of `judge.judge`; folder: where the images are.

    Returns [{group: "worst", "median" or "best"; name; figures: text; panels: see `pictures.page_panels`}].
    """
    groups = pictures.chosen_images(results, wanted)
    chosen = [(group, index) for group, indices in groups.items() for index in indices]
    captions = ladder.captions
    panels_on_page = len(chosen) * (1 + 3 * len(captions))
    rank, world = place_of(accelerator)
    turns = [*range(1, world)] * COSTS + [*range(world)] * len(chosen)  # the main process has measured costs meanwhile
    own = [image for image, turn in zip(chosen, turns) if turn == rank]
    strips = {}
    for group, index in tqdm(own, desc="pictures", unit="image", leave=False, disable=not (own and is_main(accelerator))):
        path, pixels = results["paths"][index], dataset[results["indices"][index]]["pixel_values"]
        if pixels is None:
            continue
        made = ladder.reconstruct(pixels[None].to(ladder.pipeline.device), only=captions)
        made = {rung: (each.latents[0].cpu(), each.picture[0].cpu()) for rung, each in made.items()}
        panels = pictures.page_panels(pictures.comparison_rows(pixels, made, captions), panels_on_page)
        figures = "; ".join(
            f"{caption} {tables.decibels(results['per_image'][rung]['psnr'][index])}"
            for rung, caption in captions.items()
            if rung != "vae1"
        )
        name = tables.shown_name(path, folder)
        strips[index] = {"group": group, "name": name, "figures": f"PSNR in dB: {figures}", "panels": panels}
    strips = dict(ChainMap(*gathered(strips, accelerator)))
    for _, index in chosen:
        if index not in strips:
            log.warning("%r can no longer be read; it is left out of the pictures", results["paths"][index])
    return [strips[index] for _, index in chosen if index in strips]


# ----------------------------------------------------------------------------------------------------------------------
# The log of the training run. Missing or damaged parts are left out: a report must not fail for want of a log.


def read_curves(checkpoint: Path, content: dict) -> dict | None:
    """Curves of the run behind a checkpoint: {folder, evaluations: see `evaluation_curves`, loss: see `loss_curve`}.

    None when there is nothing to draw. `tables.METRICS_FILE` describes the lines of a log.
    """
    folder = run_folder(checkpoint, content)
    if folder is None:
        return None
    evaluations = evaluation_curves(read_lines(folder / tables.METRICS_FILE))
    loss = loss_curve(read_lines(folder / tables.TRAINING_FILE))
    return {"folder": str(folder), "evaluations": evaluations, "loss": loss} if evaluations or loss else None


def run_folder(checkpoint: Path, content: dict) -> Path | None:
    """The log folder of the run that wrote `checkpoint`, whose content is `content`; None if there is none.

    It is looked for under the config's `log_dir` as given, and beside the checkpoint: both may have been moved.
    """
    run, log_dir = content.get("run"), content["config"].get("log_dir")
    if not isinstance(run, str) or not run or Path(run).name != run or not isinstance(log_dir, str):
        return None
    home = checkpoint.resolve().parent
    roots = [Path(log_dir), home / log_dir, home.parent / log_dir, home.parent / Path(log_dir).name]
    return next((root / name for root in roots for name in (run, f"align_{run}") if (root / name).is_dir()), None)


def read_lines(path: Path) -> list[dict]:
    """The objects in a file of JSON lines, in the order of writing; [] without that file."""
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
    """{rung: {metric: [(step, value), …]}} of the evaluations among `entries`. A resumed run may evaluate a step again: the
    later line counts."""
    ladders = {entry["step"]: entry["ladder"] for entry in entries if isinstance(entry.get("ladder"), dict)}
    curves = {}
    for step, ladder in sorted(ladders.items()):
        for name, figures in ladder.items():
            rung = curves.setdefault(RENAMED.get(name, name), {})
            for metric, value in figures.items() if isinstance(figures, dict) else ():
                if is_finite(value):
                    rung.setdefault(metric, []).append((step, value))
    return {rung: figures for rung, figures in curves.items() if figures}


def loss_curve(entries: list[dict]) -> list[tuple[int, float]]:
    """[(step, training loss), …] among `entries`, at most `LONGEST_CURVE` points."""
    losses = {entry["step"]: entry["loss"] for entry in entries if is_finite(entry.get("loss"))}
    points = sorted(losses.items())
    return points[:: -(-len(points) // LONGEST_CURVE) or 1]
