"""Going on with an interrupted run: with which flags, from which state, with which images.

Whatever is random in a step is a function of (seed, step): the order of the images, their crops, posterior samples, the
decoded loss's window. So the state of a training is its tensors and its step, and no generator's.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import os
import re
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from training.budget import Budget
from training.checkpoints import OWN_NAME
from utils import UserError
from vae_align import AlignError
from vaes.codec import Codec
from vaes.pipeline import checkpoints_in, read_checkpoint

log = logging.getLogger(__name__)

# What a resumed run may be given anew: how long it goes on, where things are and what it says meanwhile. The other flags
# shape the weights, and come from the checkpoint.
MAY_CHANGE = frozenset({
    "epochs", "max_train_steps", "minutes", "device", "num_workers", "compile", "cache_only", "max_bad_steps",
    "train_data_dir", "eval_data_dir", "latent_cache_dir", "log_dir", "save_dir", "config_save_path", "cache_dir", "proxy",
    "vae1_path", "vae1_subfolder", "vae2_path", "vae2_subfolder", "decoder_loss_path", "decoder_loss_subfolder",
    "log_frequency", "profile", "eval_frequency", "visualize_frequency", "save_frequency", "save_steps", "keep_last",
    "eval_batch_size", "num_visualize_samples",
})  # fmt: skip


@dataclass(frozen=True)
class Start:
    """The checkpoint that a run starts from; its file is read once.

    Attributes:
        path: of the file. content: what `vae_align.read_checkpoint` returned.
        resumed: whether the run that wrote it goes on (--resume); otherwise a new run takes its weights (--load_checkpoint).
    """

    path: Path
    content: dict
    resumed: bool = False


def find_checkpoint(wanted: str, save_dir: str) -> Start | None:
    """The checkpoint that --resume means; None when there is nothing to resume.

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
        return Start(Path(wanted), content, resumed=True)
    folder = save_dir if wanted == "latest" else wanted
    for path, older in pairwise([*checkpoints_in(folder), None]):
        try:
            content = read_checkpoint(path)
            if "training" in content:
                require_training(content, path)
                return Start(path, content, resumed=True)
        except (UserError, AlignError) as error:
            log.warning("%s; %s", error, "trying the one before it" if older else "there is none before it")
    if wanted != "latest":
        raise UserError(f"--resume {wanted}: no checkpoint to resume from in this folder")
    return None


def adopt_flags(args: argparse.Namespace, config: dict) -> None:
    """Set `args` to the flags of the run that is resumed; UserError names a given flag that contradicts them."""
    for name, value in config.items():
        if not hasattr(args, name):
            continue
        given = name in args.given_flags
        if name in MAY_CHANGE:
            if not given and name != "device":  # which is chosen by what this machine has
                setattr(args, name, value)
        elif given and _comparable(getattr(args, name)) != _comparable(value):
            raise UserError(
                f"--{name} {getattr(args, name)}: the run to resume has {value}; leave the flag out, or start a new run "
                f"without --resume. What may change: {', '.join('--' + flag for flag in sorted(MAY_CHANGE))}"
            )
        else:
            setattr(args, name, value)


def _comparable(value):
    return sorted(set(value)) if isinstance(value, list) else value


def require_same_vaes(content: dict, space1: Codec, space2: Codec) -> None:
    """UserError unless both VAEs are, by kind, the ones that the checkpoint's run was trained with."""
    for number, space in ((1, space1), (2, space2)):
        recorded = content[f"vae{number}"]
        for name in ("class", "channels", "stride", "space"):
            if recorded.get(name) != space.identity[name]:
                raise UserError(
                    f"--vae{number}_path {space.identity['path']}: its {name} is {space.identity[name]}, the run to resume "
                    f"was trained with {recorded.get(name)} ({recorded['path']})"
                )


def data_order(train_loader, processes: int) -> dict:
    """What the order of the training images depends on besides the flags: {what: number, or numbers}."""
    shares = getattr(train_loader.dataset, "shares", [len(train_loader.dataset)])
    return {
        "processes": processes,
        "machines": len(shares),
        "images": len(train_loader.dataset),
        "images_of_each_machine": shares,
        "steps_per_epoch": len(train_loader),
    }


def require_same_order(recorded: dict, order: dict) -> None:
    """UserError if the images would come in another order than in the run that is resumed."""
    for name, number in order.items():
        if recorded.get(name, number) != number:
            what = name.replace("_", " ")
            raise UserError(f"--resume: the run had {recorded[name]} {what}, now {number}; resume it with as many")


def names_digest(paths) -> str:
    """A digest of the training images' names, in order and below the folder that they have in common; "" for a hub's."""
    if not isinstance(paths, list):
        return ""
    paths = [os.path.normpath(path) for path in paths]
    above = len(os.path.commonpath([os.path.dirname(paths[0]), os.path.dirname(paths[-1])]))
    return hashlib.sha256("\0".join(path[above:] for path in paths).encode(errors="surrogateescape")).hexdigest()[:16]


def require_same_files(training: dict, paths, among: dict, folder: str) -> None:
    """UserError, before anything is encoded, if these are not the images of the run that is resumed, or not its processes and
    machines, whose numbers are `among`."""
    require_same_order(training["order"], among)
    if isinstance(paths, list) and len(paths) < training["order"]["images"]:
        raise UserError(
            f"--train_data_dir {folder}: the run to resume had {training['order']['images']} images, now {len(paths)}; "
            "resume it with the same"
        )
    if training["files"] != names_digest(paths):
        raise UserError(f"--train_data_dir {folder}: not the files that the run to resume had; resume it with the same")


def require_training(content: dict, path) -> None:
    """UserError unless a checkpoint's `training` and `run` are of the form in which a run wrote them: names in them become
    paths, of files that are deleted too."""
    training, number = content["training"], lambda value: type(value) is int and value >= 0
    try:
        best, order = training["best"], training["order"]
        good = (
            re.fullmatch(r"align_\d{8}_\d{6}", content["run"])
            and all(OWN_NAME.fullmatch(name) for name in training["own"])
            and (best is None or (isinstance(best["value"], float) and number(best["step"])))
            and all(number(order[name]) and order[name] for name in ("images", "steps_per_epoch", "processes"))
            and number(training["bad_steps"]) and number(training["bad_steps_in_a_row"])
            and all(training[name].shape == () for name in ("loss_sum", "summed_steps"))
            and isinstance(training["files"], str)
            and training["colours"].keys() in ({}.keys(), {"vae2_bias", "shift"})
            and all(colours.ndim == 3 and len(colours) == 3 for colours in training["colours"].values())
            and isinstance(training.get("adversaries", {}), dict)
            and (training["places"] is None or len(training["places"]) == order["processes"])
            and training["budget"].keys() == Budget(0).state_dict().keys()
            and training["state"].keys() == {"weights", "optimizer", "scheduler", "scaler"}
        )  # fmt: skip
    except (AttributeError, KeyError, TypeError):
        good = False
    if not good:
        raise UserError(f"checkpoint {path}: the state of its training was not written by this tool")
