"""Which checkpoints a run leaves behind: the last few and the best one."""

from __future__ import annotations

import contextlib
import os
import re
import time
from dataclasses import dataclass, field
from pathlib import Path

from training.state import TrainingState
from vaes.pipeline import PipelineWithVAEs

OWN_NAME = re.compile(r"align_pipeline_\d{8}_\d{6}\.pth")  # of a checkpoint as a run writes it
ABANDONED = 3600  # seconds since a temporary file last grew, after which its writer is no longer alive
BEST_METRICS = {"psnr": 1, "ssim": 1, "psnr_vs_vae2": 1, "latent_mse": -1}  # what --best_metric knows; -1: less is better


@dataclass
class RunCheckpoints:
    """The checkpoints of one run.

    Attributes:
        pipeline: what is saved. config: the run's flags, which each checkpoint carries.
        folder: where they are. run: the run's name, such as "align_20251231_034701".
        keep_last: how many of the run's own to keep, older ones are deleted with their configs; 0: all.
        best_metric: key of `BEST_METRICS`; the module that stands best by it is kept as `align_best_{run}.pth`.
        last: path of the newest. best: {"value", "step"} of the best, or None.
        own: file names of those that this run wrote and may delete, oldest first.
    """

    pipeline: PipelineWithVAEs
    config: dict
    folder: Path
    run: str
    keep_last: int
    best_metric: str
    last: Path | None = None
    best: dict | None = None
    own: list[str] = field(default_factory=list)

    def __post_init__(self):
        drop_abandoned(self.folder)

    def load_state_dict(self, training: dict, path: Path) -> None:
        """Go on from the checkpoint at `path`, whose `training` is given."""
        self.last = path
        self.best = training["best"]
        self.own = list(training["own"])
        if OWN_NAME.fullmatch(path.name) and path.parent.resolve() == self.folder.resolve():
            self.own.append(path.name)  # a copy elsewhere or of another name is the user's

    @property
    def best_path(self) -> Path:
        return best_path(self.folder, self.run)

    def save(self, state: TrainingState, epoch: float) -> Path:
        """Write a checkpoint from which the run can be resumed; then delete the run's oldest beyond `keep_last`."""
        training = state.state_dict() | {"best": self.best, "own": list(self.own)}
        self.last = self._write(state, epoch, training=training)
        self.own.append(self.last.name)
        while self.keep_last and len(self.own) > self.keep_last:
            oldest = self.folder / self.own.pop(0)
            for file in (oldest, oldest.with_suffix(".json")):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(file)
        return self.last

    def save_if_best(self, state: TrainingState, epoch: float) -> None:
        """Keep this module as the run's best if its `best_metric` is better than any before."""
        value = state.metrics["aligned"][self.best_metric]
        sign = BEST_METRICS[self.best_metric]
        if value is None or (self.best and sign * value <= sign * self.best["value"]):
            return
        self.best = {"value": value, "step": state.step}
        self._write(state, epoch, name=self.best_path.name)

    def _write(self, state, epoch, **more):
        return self.pipeline.save_checkpoint(self.folder, self.config, state.step, epoch, state.metrics, run=self.run, **more)


def best_path(folder: Path, run: str) -> Path:
    """Where the best module of a run is kept."""
    return folder / f"align_best_{run.removeprefix('align_')}.pth"


def drop_abandoned(folder: Path) -> None:
    """Delete the half-written checkpoints that kills left in `folder`, before they fill the disk."""
    for file in folder.glob(".align_*.pth.*.tmp"):
        with contextlib.suppress(OSError):  # another process was quicker, or the file is another user's
            if time.time() - file.stat().st_mtime > ABANDONED:
                os.unlink(file)
