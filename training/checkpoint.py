"""What a run remembers, the checkpoints that keep it, and how a run goes on from one.

Everything random in a step is a function of (seed, step): the order of the images, their crops, posterior samples, the window
of the decoded loss. So a checkpoint holds tensors and the step, and the state of no random generator.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import time
import unicodedata
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from evaluation.ladder import FixedRungs
from evaluation.verdict import PERCEPTION_NOISE, PSNR_NOISE
from losses import Objective
from runtime.processes import gathered
from training.budget import Budget
from training.log import Meter
from training.optimizer import BadSteps, load_optimizer
from utils import UserError, next_stamp, one_line
from vae_align import PRETRAINED_NAME, AlignError, AlignModule
from vaes.codec import Codec
from vaes.pipeline import BEST_PREFIX, PipelineWithVAEs, checkpoints_in, read_checkpoint, write_module

log = logging.getLogger(__name__)

OWN_NAME = re.compile(r"align_pipeline_\d{8}_\d{6}\.pth")  # of a checkpoint as a run writes it
ABANDONED = 3600  # seconds since a temporary file last grew, after which its writer is no longer alive
BEST_METRICS = {"psnr": 1, "ssim": 1, "psnr_vs_vae2": 1, "latent_mse": -1, "both": 1}  # for --best_metric; -1: less is better
AXES = (("psnr", PSNR_NOISE), ("st_lpips_vgg", -PERCEPTION_NOISE))  # of "both": (metric, a gain that is just seen)
SAME = {  # beside settings, what a run must find again when it goes on: {what: (the flag that names it, its noun)}
    "processes": ("resume", ""),
    "images": ("train_data_dir", ""),
    "steps_per_epoch": ("train_data_dir", ""),
    "files": ("train_data_dir", "files"),
    "vae1": ("vae1_path", "VAE"),
    "vae2": ("vae2_path", "VAE"),
    "seen_through": ("seen_through", "VAEs"),
    "decoder": ("decoder_loss_path", "VAE"),
}


@dataclass
class Run:
    """One training run: everything that goes on from step to step, and the checkpoints that keep it.

    Attributes:
        pipeline: its `module` is judged and saved, its `training_module` is trained; the two differ where weights are averaged.
        module, optimizer: the trained module and its optimizer as Accelerate prepared them.
        data: what a run finds again when it goes on from a checkpoint: {"order": see `data_order`, "files": see
            `names_digest`, "vaes": see `vaes_of`}.
        config: the settings as they were asked for, as each checkpoint carries them. trained_on: {"device": its kind,
            "precision"} of this machine.
        folder: of the checkpoints. name: of the run, such as "align_20251231_034701".
        keep_last: number of this run's checkpoints to keep; 0: all. best_metric: key of `BEST_METRICS`.
        loss: mean training loss since the last log entry.
        step: optimizer steps done. saved_at: the step of the newest checkpoint, -1 without one.
        metrics: the newest evaluation, {rung: {metric: value}}. fixed: the rungs that training cannot move.
        places: each process's place in a stream of images; None where the step alone tells it.
        last: path of the newest checkpoint. best: {"value", "step", "psnr", "by": its metric, "images": a digest of those that
            it was measured on, "first": the figures of `AXES` at the first evaluation} of the best one. without_gain:
            evaluations since then. own: names of the checkpoints in `folder` that this run wrote and may delete, oldest first.
        last_inputs: the module's inputs in the last step.
    """

    pipeline: PipelineWithVAEs
    module: torch.nn.Module
    optimizer: object
    scheduler: torch.optim.lr_scheduler.LRScheduler
    objective: Objective
    budget: Budget
    bad_steps: BadSteps
    accelerator: object
    data: dict
    config: dict
    folder: Path
    name: str = ""
    keep_last: int = 0
    best_metric: str = "psnr"
    trained_on: dict = field(default_factory=dict)
    loss: Meter | None = None
    step: int = 0
    saved_at: int = -1
    metrics: dict = field(default_factory=dict)
    fixed: FixedRungs = field(default_factory=FixedRungs)
    places: list | None = None
    last: Path | None = None
    best: dict | None = None
    without_gain: int = 0
    own: list[str] = field(default_factory=list)
    last_inputs: dict | None = None

    def __post_init__(self):
        self.loss = Meter(self.accelerator.device)
        drop_abandoned(self.folder)

    @property
    def steps_per_epoch(self) -> int:
        return self.data["order"]["steps_per_epoch"]

    @property
    def epoch(self) -> float:
        """Epochs done, counted from the step."""
        return self.step / self.steps_per_epoch

    @property
    def average(self) -> AlignModule | None:
        """The running average of the weights, where there is one."""
        return None if self.pipeline.module is self.pipeline.training_module else self.pipeline.module

    @property
    def best_path(self) -> Path:
        """Where the best module of this run is kept."""
        return self.folder / f"{BEST_PREFIX}_{self.name.removeprefix('align_')}.pth"

    # ---- what is remembered

    def state_dict(self) -> dict:
        """A checkpoint's `training`. The judged weights, the step and the metrics stand beside it in the file."""
        self.bad_steps.read()
        scaler = self.accelerator.scaler
        return {
            "state": {
                "weights": on_cpu(self.pipeline.training_module.state_dict()) if self.average else None,
                "optimizer": on_cpu(self.optimizer.state_dict()),
                "scheduler": self.scheduler.state_dict(),
                "scaler": scaler.state_dict() if scaler else None,
            },
            **self.objective.state_dict(),
            **self.data,
            **self.loss.state_dict(),
            **self.bad_steps.state_dict(),
            "budget": self.budget.state_dict(),
            "places": self.places,
            "fixed": self.fixed.state_dict(),
            "best": self.best,
            "without_gain": self.without_gain,
            "own": list(self.own),
        }

    def load_state_dict(self, content: dict, path: Path) -> None:
        """Go on from the checkpoint at `path` with this `content`; its judged weights are already in place.

        UserError if the state does not fit the module.
        """
        training, state = content["training"], content["training"]["state"]
        try:
            if self.average:
                self.pipeline.training_module.load_state_dict(state["weights"])
            load_optimizer(self.optimizer.optimizer, state["optimizer"])
            self.scheduler.load_state_dict(state["scheduler"])
            if self.accelerator.scaler and state["scaler"]:
                self.accelerator.scaler.load_state_dict(state["scaler"])
            for part in (self.objective, self.loss, self.bad_steps):
                part.load_state_dict(training)
            self.budget.load_state_dict(training["budget"])
            self.fixed.load_state_dict(training["fixed"])
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise UserError(f"--resume {path}: the state of its training does not fit its module ({one_line(error)})") from None
        self.step = self.saved_at = content["step"]
        self.metrics, self.last = content["metrics"], path
        if training["best"]:  # older ones do not say what they were measured on
            told = {"by": content["config"].get("best_metric"), "images": self.fixed.images}
            self.best = told | training["best"]
        ended = training["budget"]["end"] <= self.step  # and is now to train on
        self.without_gain = 0 if ended else training.get("without_gain", 0)
        if path.parent.resolve() == self.folder.resolve():  # in another folder these names are another run's
            self.own = [*training["own"], *([path.name] if OWN_NAME.fullmatch(path.name) else [])]  # not the user's copy

    # ---- checkpoints

    def save(self) -> Path:
        """Write a checkpoint from which the run can go on; then delete this run's oldest ones beyond `keep_last`."""
        self.require_sound()
        self.last = self._write(training=self.state_dict())
        self.own.append(self.last.name)
        while self.keep_last and len(self.own) > self.keep_last:
            oldest = self.folder / self.own.pop(0)
            for file in (oldest, oldest.with_suffix(".json")):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(file)
        write_module(self.folder)
        return self.last

    def note_if_best(self) -> bool:
        """Whether this module is the run's best so far, by its `best_metric`. All processes call this together.

        Under "both" the value is the sum of the gains over the first evaluation in PSNR and in ST-LPIPS (VGG), each in units
        of the smallest difference that counts. A module that lost more than one unit in either is never the best.
        """
        aligned = self.metrics["aligned"]
        sign = BEST_METRICS[self.best_metric]
        on = {"by": self.best_metric, "images": self.fixed.images}
        if self.best and self.best != self.best | on:
            log.info("the best checkpoint is counted anew: evaluation images or metric are not those of step %d, until now the "
                     "best", self.best["step"])  # fmt: skip
            self.best = None
        first = (self.best or {}).get("first") or {metric: aligned.get(metric) for metric, _ in AXES}
        if self.best_metric == "both":
            measured = [(metric, unit) for metric, unit in AXES if None not in (aligned.get(metric), first[metric])]
            gains = [(aligned[metric] - first[metric]) / unit for metric, unit in measured]
            value = sum(gains) if gains and min(gains) >= -1 else None
        else:
            value = aligned[self.best_metric]
        if value is None or (self.best and sign * value <= sign * self.best["value"]):
            self.without_gain += 1
            return False
        self.best = {"value": value, "step": self.step, "psnr": aligned["psnr"], "first": first} | on
        self.without_gain = 0
        return True

    def save_best(self) -> None:
        """Keep this module beside the checkpoints as the run's best."""
        self._write(name=self.best_path.name)
        write_module(self.folder)

    def _write(self, **more) -> Path:
        return self.pipeline.save_checkpoint(
            self.folder, self.config, self.step, self.epoch, self.metrics, run=self.name, trained_on=self.trained_on, **more
        )

    def require_sound(self) -> None:
        """UserError if the module's output is not finite: a checkpoint of it would pass for the last good one."""
        # a batch that is not finite itself says nothing about the module
        if self.last_inputs is None or not all(values.isfinite().all() for values in self.last_inputs.values()):
            return
        with torch.no_grad():  # not through DDP, which would wait for the other processes: only the first one saves
            output = self.pipeline.training_module(**self.last_inputs).float()
        if not output.square().sum().isfinite():  # as errors are measured
            kept = self.last or (self.best and self.best_path)
            raise UserError(
                f"the module's output is not finite at step {self.step}: lower --learning_rate or set --grad_clip 1; "
                + (f"the last checkpoint is {kept}" if kept else "no checkpoint was written")
            )


def on_cpu(value):
    """`value` with every tensor in its dicts and lists as a contiguous one on the CPU."""
    if isinstance(value, dict):
        return {name: on_cpu(item) for name, item in value.items()}
    if isinstance(value, list):
        return [on_cpu(item) for item in value]
    return value.detach().cpu().contiguous() if isinstance(value, torch.Tensor) else value


def drop_abandoned(folder: Path) -> None:
    """Delete the half-written files that kills left in `folder`, before they fill the disk."""
    for file in (*folder.glob(".align_*.tmp"), *folder.glob(f".{PRETRAINED_NAME}.*.tmp")):
        with contextlib.suppress(OSError):  # another process was quicker, or the file is another user's
            if time.time() - file.stat().st_mtime > ABANDONED:
                os.unlink(file)


def claim_name(log_dir: Path, save_dir: Path, resumed: str | None = None) -> tuple[str, FileLock | None]:
    """The name of a run, which no other process takes while the lock beside it lives; None where the disk knows no locks.

    A new run's name is that of a new folder in `log_dir`. UserError if another process goes on with the run `resumed`.
    """
    while True:
        name = resumed or f"align_{max(next_stamp(log_dir, 'align'), next_stamp(save_dir, 'align_best'))}"
        if not resumed:
            try:
                (log_dir / name).mkdir(parents=True)
            except FileExistsError:  # another run of this second was quicker
                continue
        lock = FileLock(save_dir / f".{name}.lock")
        try:
            lock.acquire(timeout=0)
            return name, lock
        except Timeout:
            if resumed:
                raise UserError(
                    f"{resumed}: another process is going on with this run; wait until it ends, or stop it"
                ) from None
            (log_dir / name).rmdir()  # a run that logs elsewhere has this name in `save_dir`
            time.sleep(0.1)
        except (OSError, NotImplementedError):
            return name, None


def release_name(lock: FileLock | None) -> None:
    """Let another process go on with the run."""
    if lock:
        with contextlib.suppress(OSError):
            os.unlink(lock.lock_file)
        lock.release()


# ----------------------------------------------------------------------------------------------------------------------
# Going on


def find_checkpoint(wanted: str, save_dir: str) -> tuple[Path, dict] | None:
    """(path, content) of the checkpoint that --resume means; None when there is nothing to resume.

    "latest" is the newest undamaged one in `save_dir` that holds the state of its training; damaged ones are named on the way.
    UserError for a path that is no such checkpoint.
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
    for path, older in pairwise([*checkpoints_in(save_dir if wanted == "latest" else wanted), None]):
        try:
            content = read_checkpoint(path)
            if "training" in content:
                require_training(content, path)
                return path, content
        except (UserError, AlignError) as error:
            log.warning("%s; %s", error, "trying the one before it" if older else "there is none before it")
    if wanted != "latest":
        raise UserError(f"--resume {wanted}: no checkpoint to resume from in this folder")
    return None


def require_training(content: dict, path) -> None:
    """UserError unless `training` and `run` of a checkpoint are as a run wrote them: their names become paths of files."""
    training, number = content["training"], lambda value: type(value) is int and value >= 0
    try:
        best, order = training["best"], training["order"]
        good = (
            re.fullmatch(r"align_\d{8}_\d{6}", content["run"])
            and all(OWN_NAME.fullmatch(name) for name in training["own"])
            and (best is None or (isinstance(best["value"], float) and number(best["step"])))
            and all(number(order[name]) and order[name] for name in ("images", "steps_per_epoch", "processes"))
            and number(training["bad_steps"])
            and number(training.get("without_gain", 0))
            and number(training["bad_steps_in_a_row"])
            and isinstance(training["files"], str)
            and isinstance(training.get("vaes", {}), dict)
            and training["colours"].keys() in ({}.keys(), {"vae2_bias", "shift"})
            and all(colours.ndim == 3 and len(colours) == 3 for colours in training["colours"].values())
            and (training["places"] is None or len(training["places"]) == order["processes"])
            and training["budget"].keys() | {"paused"} == Budget(0).state_dict().keys()
            and training["state"].keys() == {"weights", "optimizer", "scheduler", "scaler"}
        )
    except (AttributeError, KeyError, TypeError):
        good = False
    if not good:
        raise UserError(f"checkpoint {path}: the state of its training was not written by this tool")


def vaes_of(objective: Objective) -> dict:
    """The further VAEs of a run, by content: {"seen_through": [a digest of each], "decoder": of the one that losses use}."""
    seen, decoded = objective.seen_through, objective.decoded
    return {
        "seen_through": [codec.content for codec in seen.codecs] if seen else [],
        "decoder": decoded.codec.content if decoded else "",
    }


def require_same(content: dict, found: dict, args) -> None:
    """UserError unless a run finds what the checkpoint's run had. What an older checkpoint does not record is not compared.

    `found`: {some of `SAME`: what was found, a codec for VAE1 and VAE2}. `args`: the flags."""
    training = content["training"]
    recorded = training["order"] | {"files": training["files"]} | training.get("vaes", {})
    for what, now in found.items():
        flag, noun = SAME[what]
        had, why = recorded.get(what, now), f"not the {noun} that the run to resume had"
        if isinstance(now, Codec):
            had, now = now.difference_from(content[what]), None
            why = f"{why} (another {had})"
        elif not noun:
            why = f"the run to resume had {had} {what.replace('_', ' ')}, now {now}"
        if str(had) != str(now):  # not the values themselves: a hostile file's may be tensors
            raise UserError(f"--{flag} {getattr(args, flag)}: {why}; resume it with the same, wherever that is now")


def data_order(train_loader, processes: int) -> dict:
    """What the order of the training images depends on besides the settings: {what: number}."""
    return {"processes": processes, "images": len(train_loader.dataset), "steps_per_epoch": len(train_loader)}


def names_digest(paths, recorded: str = "") -> str:
    """A digest of the training images' names, in order and below their common folder; "" for a hub data set's.

    Names in NFC and NFD, as a Mac writes them, are the same. Earlier versions did not know that: `recorded` comes back if it is
    the digest of the names as they are."""
    if not isinstance(paths, list):
        return ""
    paths = [os.path.normpath(path) for path in paths]
    above = len(os.path.commonpath([os.path.dirname(paths[0]), os.path.dirname(paths[-1])]))
    names = "\0".join(path[above:] for path in paths)
    same, as_written = (
        hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:16]
        for text in (unicodedata.normalize("NFC", names), names)
    )
    return recorded if recorded == as_written else same


def require_same_everywhere(datasets, accelerator) -> None:
    """UserError unless every process has found the same training and evaluation images, by number and names."""
    found = gathered([(len(dataset), names_digest(dataset.source.paths)) for dataset in datasets], accelerator)
    for flag, *sets in zip(("train", "eval"), *found):
        if len(set(sets)) > 1:
            counts = ", ".join(str(count) for count, _ in sets)
            raise UserError(
                f"--{flag}_data_dir: the processes have not found the same files ({counts} images); give each machine the same"
            )
