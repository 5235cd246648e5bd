"""Which checkpoints a run leaves behind: the last few, the best one, and the one that --resume goes on from."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from pathlib import Path

from latents.pipeline import PipelineWithVAEs
from training.resume import OWN_NAME, require_training
from utils import UserError
from vae_align import checkpoints_in, read_checkpoint

log = logging.getLogger(__name__)

ABANDONED = 3600  # seconds since a temporary file last grew, after which its writer is no longer alive
BEST_METRICS = {"psnr": 1, "ssim": 1, "psnr_vs_vae2": 1, "latent_mse": -1}  # what --best_metric knows; -1: less is better


class RunCheckpoints:
    """The checkpoints of one run.

    Args:
        pipeline: what is saved; run: the run's name, such as "align_20251231_034701".
        keep_last: how many of the run's own to keep, older ones are deleted with their configs; 0: all.
        best_metric: key of `BEST_METRICS`; the module that stands best by it is kept as `align_best_{run}.pth`.
        resumed: the checkpoint's `training` that the run goes on from, or None; path: where it was.

    Attributes:
        last: path of the newest; best: {"value", "step"} of the best, or None.
    """

    def __init__(self, pipeline: PipelineWithVAEs, folder, run: str, keep_last: int, best_metric: str, resumed=None, path=None):
        self.pipeline, self.folder, self.run = pipeline, Path(folder), run
        self.keep_last, self.best_metric = keep_last, best_metric
        self.last = path
        self.best = resumed["best"] if resumed else None
        self._own = list(resumed["own"]) if resumed else []
        if resumed and OWN_NAME.fullmatch(path.name) and path.parent.resolve() == self.folder.resolve():
            self._own.append(path.name)  # a copy elsewhere or of another name is the user's
        drop_abandoned(self.folder)

    @property
    def best_path(self) -> Path:
        return self.folder / f"align_best_{self.run.removeprefix('align_')}.pth"

    def save(self, config: dict, step: int, epoch: float, metrics: dict, training: dict) -> Path:
        """Write a checkpoint from which the run can be resumed; then delete the run's oldest beyond `keep_last`."""
        training = training | {"best": self.best, "own": list(self._own)}
        self.last = self.pipeline.save_checkpoint(self.folder, config, step, epoch, metrics, run=self.run, training=training)
        self._own.append(self.last.name)
        while self.keep_last and len(self._own) > self.keep_last:
            oldest = self.folder / self._own.pop(0)
            for file in (oldest, oldest.with_suffix(".json")):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(file)
        return self.last

    def save_if_best(self, config: dict, step: int, epoch: float, metrics: dict) -> None:
        """Keep this module as the run's best if its `best_metric` is better than any before."""
        value, sign = metrics["aligned"][self.best_metric], BEST_METRICS[self.best_metric]
        if value is None or (self.best and sign * value <= sign * self.best["value"]):
            return
        self.best = {"value": value, "step": step}
        self.pipeline.save_checkpoint(self.folder, config, step, epoch, metrics, name=self.best_path.name, run=self.run)


def drop_abandoned(folder: Path) -> None:
    """Delete the half-written checkpoints that kills left in `folder`, before they fill the disk."""
    for file in folder.glob(".align_*.pth.*.tmp"):
        with contextlib.suppress(OSError):  # another process was quicker, or the file is another user's
            if time.time() - file.stat().st_mtime > ABANDONED:
                os.unlink(file)


def find_checkpoint(wanted: str, save_dir: str) -> tuple[Path, dict] | None:
    """(path, content) of the checkpoint that --resume means; None when there is nothing to resume.

    "latest" is the newest one in `save_dir` that is undamaged and holds the state of its training; damaged ones are named
    on the way. UserError for a path that is not such a checkpoint.
    """
    if wanted != "latest" and not Path(wanted).is_dir():
        content = read_checkpoint(wanted)
        if "training" not in content:
            raise UserError(
                f"--resume {wanted}: this checkpoint holds weights but not the state of its training; "
                "--load_checkpoint starts a new run from them"
            )
        require_training(content, wanted)
        return Path(wanted), content
    folder = save_dir if wanted == "latest" else wanted
    for path in checkpoints_in(folder):
        try:
            content = read_checkpoint(path)
            if "training" in content:
                require_training(content, path)
                return path, content
        except UserError as error:
            log.warning("%s; trying the one before it", error)
    if wanted != "latest":
        raise UserError(f"--resume {wanted}: no checkpoint to resume from in this folder")
    return None
