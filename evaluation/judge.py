"""A whole judgement of checkpoints between the same two VAEs: their ladder, and the figures of the report's charts."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch

from evaluation.figures import Sample, error_bands, error_spectrum, finite, latent_histograms
from evaluation.ladder import Ladder, evaluate
from evaluation.metrics import Measures
from runtime.processes import is_main
from utils import UserError
from vae_align import is_finite
from vaes.pipeline import PipelineWithVAEs, spaces_of, weights_digest

log = logging.getLogger(__name__)

PLACES = ("vae1_path", "vae1_subfolder", "vae2_path", "vae2_subfolder")  # where a checkpoint's VAEs are


@dataclass(frozen=True)
class JudgedCheckpoint:
    """A checkpoint that is judged: its rung in the ladder, its file, the file's content, and its pipeline."""

    rung: str
    label: str
    path: Path
    content: dict
    pipeline: PipelineWithVAEs

    def description(self) -> dict:
        """Its entry in metrics.json: the config as trained, without the URL of a proxy, which may hold a password."""
        config = self.content["config"] | self.content.get("trained_on", {})
        config = {name: value for name, value in config.items() if name != "proxy"}
        newest = self.content.get("newest", self.content)
        training = newest["training"] if isinstance(newest.get("training"), dict) else {}  # a stranger's may hold anything
        budget = training["budget"] if isinstance(training.get("budget"), dict) else {}
        trained = {"steps": newest["step"], "epochs": newest["epoch"], "seconds": budget.get("seconds")}
        trained["without_gain"] = training.get("without_gain")
        return {
            "row": self.rung,
            "name": self.path.stem,
            "path": str(self.path),
            "weights": weights_digest(self.pipeline.module),
            "run": self.content.get("run"),
            "step": self.content["step"],
            "epoch": self.content["epoch"],
            "trained": {name: value if is_finite(value) else None for name, value in trained.items()},
            "config": config,
        }


def open_checkpoints(
    read: list[tuple[Path, dict]], places: dict, device: torch.device, dtype: torch.dtype, cache_dir, labels
) -> list[JudgedCheckpoint]:
    """The checkpoints that were `read`, [(path, content)], with their VAEs; they share the first one's. UserError when one goes
    between other VAEs than the first, unless both name the same latent spaces.

    Args:
        places: {one of `PLACES`: the place to use; None: the one that the checkpoints record}.
        device, dtype: of the VAEs. cache_dir: where the hub client keeps downloads.
        labels: the names of a checkpoint, VAE1 and VAE2 in errors.
    """
    judged, first = [], None
    for number, (path, content) in enumerate(read, 1):
        recorded = {place: content[place[:4]][place[5:]] for place in places}
        found = {place: (recorded[place] if named is None else named) or "" for place, named in places.items()}
        spaces = [space.name for space in spaces_of(content)]
        first = first or (found, spaces)
        if found != first[0]:
            vaes = " → ".join(str(found[place]) for place in ("vae1_path", "vae2_path"))
            if not all(spaces) or spaces != first[1]:
                raise UserError(f"{labels[0]} {path}: goes between other VAEs ({vaes}) than the first one; judge it by itself")
            log.info("%s: made with %s; judged with the first one's VAEs, of the same latent spaces", path, vaes)
        opened = judged and judged[0].pipeline
        vaes = [opened.codec1.vae, opened.codec2.vae] if opened else [places["vae1_path"], places["vae2_path"]]
        options = {"vae1_subfolder": places["vae1_subfolder"], "vae2_subfolder": places["vae2_subfolder"]}
        pipeline = PipelineWithVAEs.from_checkpoint(
            content, *vaes, device=device, dtype=dtype, cache_dir=cache_dir, labels=labels[1:], **options
        )
        rung, name = ("aligned", "aligned") if number == 1 else (f"aligned_{number}", f"aligned {number}: {path.stem}")
        judged.append(JudgedCheckpoint(rung, name, path, content, pipeline))
    return judged


def judge(ladder: Ladder, loader, measures: Measures, image_size: int, visit=None, accelerator=None) -> dict:
    """`evaluate`, and the figures of the report's charts beside its results; on the main process with `Ladder.costs`.

    Args:
        image_size: side of the images, px. visit, accelerator: see `evaluate`.

    Returns what `evaluate` returns, and:
        spectrum: {frequency: see `figures.error_bands`, rows: {rung: see `figures.error_spectrum`}}.
        histograms: {limit, rows: {rung: counts}}, see `figures.latent_histograms`.
        left_out_metrics: {name: why it was not measured}.
    """
    modules = [name for name, rung in ladder.rungs.items() if rung.kind == "aligned"]
    rungs_of = {error_spectrum(image_size): ("vae2", "reencode", *modules), latent_histograms(): ("vae2", *modules)}

    def look(batch, made):
        images, index, vae2 = batch["pixel_values"], tuple(batch["index"].tolist()), made["vae2"]
        for figure, rungs in rungs_of.items():
            for name in rungs:
                figure.add(name, Sample(images, made[name].picture, made[name].latents, vae2.picture, vae2.latents, index))
        if visit:
            visit(batch, made)

    for name, why in measures.left_out.items():
        log.warning("%s is left out: %s", name, why)
    results = evaluate(ladder, loader, measures, look, accelerator=accelerator)
    found = [(figure.result(accelerator), rungs) for figure, rungs in rungs_of.items()]
    spectra, histograms = ({name: of_rung[name][0] for name in rungs} for of_rung, rungs in found)
    # on one process, so that times can be compared; the others go on to the report's pictures meanwhile
    for name, cost in ladder.costs(image_size).items() if is_main(accelerator) else ():
        results["ladder"][name] |= cost
    return results | {
        "spectrum": {"frequency": error_bands(image_size), "rows": finite(spectra)},
        "histograms": {
            "limit": histograms["vae2"]["limit"],
            "rows": {name: histogram["counts"] for name, histogram in histograms.items()},
        },
        "left_out_metrics": measures.left_out,
    }
