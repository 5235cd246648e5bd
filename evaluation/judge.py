"""A whole judgement of checkpoints between the same two VAEs: the ladder, its charts' figures, the report's pictures."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from evaluation import pictures, tables
from evaluation.histograms import LatentHistograms
from evaluation.ladder import Ladder, evaluate
from evaluation.metrics import Measures
from evaluation.spectrum import ErrorSpectrum
from utils import UserError
from vaes.pipeline import PipelineWithVAEs, newest_checkpoint, read_checkpoint

log = logging.getLogger(__name__)

LABELS = ("checkpoint", "VAE1", "VAE2")
PLACES = ("vae1_path", "vae1_subfolder", "vae2_path", "vae2_subfolder")  # where a checkpoint's VAEs are


@dataclass(frozen=True)
class JudgedCheckpoint:
    """A checkpoint that is judged: its rung in the ladder, its file, what the file holds, and its pipeline."""

    rung: str
    label: str
    path: Path
    content: dict
    pipeline: PipelineWithVAEs

    def description(self) -> dict:
        """What metrics.json says of it; a proxy's URL, which may hold a password, stays out."""
        config = {name: value for name, value in self.content["config"].items() if name != "proxy"}
        return {
            "row": self.rung,
            "name": self.path.stem,
            "path": str(self.path),
            "run": self.content.get("run"),
            "step": self.content["step"],
            "epoch": self.content["epoch"],
            "config": config,
        }


def read_checkpoints(given: list[str]) -> list[tuple[Path, dict]]:
    """(path, content) of each of `given`: files, or folders of which the newest counts."""
    return [newest_checkpoint(one) if Path(one).is_dir() else (Path(one), read_checkpoint(one)) for one in given]


def open_checkpoints(
    read: list[tuple[Path, dict]], places: dict, device: torch.device, dtype: torch.dtype, cache_dir=None, labels=LABELS
) -> list[JudgedCheckpoint]:
    """The checkpoints that were `read` (see `read_checkpoints`) with their VAEs; they share the first one's.

    Args:
        places: {one of `PLACES`: in place of what the checkpoints record, or None}.
        device, dtype: of the VAEs. cache_dir: where the hub client keeps downloads.
        labels: what errors call a checkpoint, VAE1 and VAE2.

    UserError when one goes between other VAEs than the first.
    """
    judged = []
    first = None
    for number, (path, content) in enumerate(read, 1):
        recorded = {place: content[place[:4]][place[5:]] for place in PLACES}
        found = {place: recorded[place] if places[place] is None else places[place] for place in PLACES}
        first = first or found
        if found != first:
            vaes = " → ".join(str(found[place]) for place in ("vae1_path", "vae2_path"))
            raise UserError(f"{labels[0]} {path}: goes between other VAEs ({vaes}) than the first one; judge it by itself")
        vaes = [judged[0].pipeline.vae1, judged[0].pipeline.vae2] if judged else [places["vae1_path"], places["vae2_path"]]
        options = {"vae1_subfolder": places["vae1_subfolder"], "vae2_subfolder": places["vae2_subfolder"]}
        pipeline = PipelineWithVAEs.from_checkpoint(
            content, *vaes, device=device, dtype=dtype, cache_dir=cache_dir, labels=labels[1:], **options
        )
        rung, name = ("aligned", "aligned") if number == 1 else (f"aligned_{number}", f"aligned {number}: {path.stem}")
        judged.append(JudgedCheckpoint(rung, name, path, content, pipeline))
    return judged


def ladder_of(checkpoints: list[JudgedCheckpoint], dtype: torch.dtype) -> Ladder:
    """The ladder of the first checkpoint, with the further ones as its last rungs."""
    main, *others = checkpoints
    return Ladder(main.pipeline, dtype, {other.label: other.pipeline for other in others})


def judge(ladder: Ladder, loader, measures: Measures, image_size: int, visit=None, accelerator=None) -> dict:
    """`evaluate` with costs, and beside what it returns: `spectrum` (see `ErrorSpectrum.result`), `histograms` (see
    `LatentHistograms.result`), and `left_out_metrics` {name: why}.

    Args:
        image_size: side of the images, px. visit, accelerator: see `evaluate`.
    """
    device = ladder.pipeline.device
    modules = [name for name, rung in ladder.rungs.items() if rung.kind == "aligned"]
    spectrum = ErrorSpectrum(image_size, ["vae2", "reencode", *modules])
    histograms = LatentHistograms(["vae2", *modules])

    def look(batch, made):
        spectrum.add(batch["pixel_values"].to(device), {rung: made[rung].picture for rung in spectrum.rungs})
        histograms.add({rung: made[rung].latents for rung in histograms.rungs})
        if visit:
            visit(batch, made)

    for name, why in measures.left_out.items():
        log.warning("%s is left out: %s", name, why)
    results = evaluate(ladder, loader, measures, look, costs=True, accelerator=accelerator)
    spectrum.gather(accelerator)
    histograms.gather(accelerator)
    charts = {"spectrum": spectrum.result(), "histograms": histograms.result()}
    return results | charts | {"left_out_metrics": measures.left_out}


@torch.inference_mode()
def report_strips(ladder: Ladder, dataset, results: dict, folder: str, wanted: int) -> list[dict]:
    """The pictures of the report, as `page.render` takes them: about `wanted` images, worst, median and best. They are made
    anew, so that none has to be kept while the set is judged.

    Args:
        dataset: the images that were judged; results: what `judge` returned; folder: where the images are.
    """
    groups = pictures.chosen_images(results, wanted)
    chosen = [(group, index) for group, indices in groups.items() for index in indices]
    captions = ladder.captions
    per_image = results["per_image"]
    panels_on_page = len(chosen) * (1 + 3 * len(captions))
    strips = []
    for group, index in tqdm(chosen, desc="pictures", unit="image", leave=False, disable=not chosen):
        pixels = dataset[results["indices"][index]]["pixel_values"]
        if pixels is None:
            log.warning("%r can no longer be read; it is left out of the pictures", results["paths"][index])
            continue
        images = pixels[None].to(ladder.pipeline.device)
        made = {rung: (each.latents[0], each.picture[0]) for rung, each in ladder.reconstruct(images, only=captions).items()}
        panels = pictures.page_panels(pictures.comparison_rows(images[0], made, captions), panels_on_page)
        psnr = {captions[rung]: per_image[rung]["psnr"][index] for rung in captions if rung != "vae1"}
        figures = "; ".join(f"{caption} {tables.decibels(value)}" for caption, value in psnr.items())
        name = tables.shown_name(results["paths"][index], folder)
        strips.append({"group": group, "name": name, "figures": f"PSNR in dB: {figures}", "panels": panels})
    return strips
