"""Going on with an interrupted run: with which flags, from which state, with which images.

Whatever is random in a step is a function of (seed, step): the order of the images, their crops, posterior samples, the
decoded loss's window. So the state of a training is its tensors and its step, and no generator's.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re

import torch

from latents.spaces import Codec
from utils import UserError, one_line

# What a resumed run may be given anew: how long it goes on, where things are and what it says meanwhile. The other flags
# shape the weights, and come from the checkpoint.
MAY_CHANGE = frozenset({
    "epochs", "max_train_steps", "device", "num_workers", "compile", "cache_only", "max_bad_steps",
    "train_data_dir", "eval_data_dir", "latent_cache_dir", "log_dir", "save_dir", "config_save_path", "cache_dir", "proxy",
    "vae1_path", "vae1_subfolder", "vae2_path", "vae2_subfolder", "decoder_loss_path", "decoder_loss_subfolder",
    "log_frequency", "eval_frequency", "visualize_frequency", "save_frequency", "save_steps", "keep_last",
    "eval_batch_size", "num_visualize_samples",
})  # fmt: skip

OWN_NAME = re.compile(r"align_pipeline_\d{8}_\d{6}\.pth")  # of a checkpoint as a run writes it
ADAMW_STATE, MUON_STATE = {"step", "exp_avg", "exp_avg_sq"}, {"momentum"}  # what they keep for each parameter


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
        for name in ("class", "channels", "stride", "scaling_factor", "shift_factor"):
            if recorded.get(name) != space.identity[name]:
                raise UserError(
                    f"--vae{number}_path {space.identity['path']}: its {name} is {space.identity[name]}, the run to resume "
                    f"was trained with {recorded.get(name)} ({recorded['path']})"
                )


def data_order(train_loader, processes: int) -> dict:
    """What the order of the training images depends on besides the flags: {what: number}."""
    return {"images": len(train_loader.dataset), "steps in an epoch": len(train_loader), "processes": processes}


def require_same_order(recorded: dict, order: dict) -> None:
    """UserError if the images would come in another order than in the run that is resumed."""
    for name, number in order.items():
        if recorded[name] != number:
            raise UserError(f"--resume: the run had {recorded[name]} {name}, now {number}; resume it with as many")


def names_digest(paths) -> str:
    """A digest of the training images' names, in order and below the folder that they have in common; "" for a hub's."""
    if not isinstance(paths, list):
        return ""
    paths = [os.path.normpath(path) for path in paths]
    above = len(os.path.commonpath([os.path.dirname(paths[0]), os.path.dirname(paths[-1])]))
    return hashlib.sha256("\0".join(path[above:] for path in paths).encode(errors="surrogateescape")).hexdigest()[:16]


def require_same_files(training: dict, paths, processes: int, folder: str) -> None:
    """UserError, before anything is encoded, if these are not the images of the run that is resumed, or not its processes."""
    require_same_order(training["order"], {"processes": processes})
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
            and all(number(order[name]) and order[name] for name in ("images", "steps in an epoch", "processes"))
            and number(training["bad_steps"]) and number(training["bad_steps_in_a_row"])
            and all(training[name].shape == () for name in ("loss_sum", "summed_steps"))
            and isinstance(training["files"], str)
            and training["colours"].keys() in ({}.keys(), {"vae2_cast", "reference_shift"})
            and all(colours.shape == (3,) for colours in training["colours"].values())
            and training["state"].keys() == {"weights", "optimizer", "scheduler", "scaler"}
        )  # fmt: skip
    except (AttributeError, KeyError, TypeError):
        good = False
    if not good:
        raise UserError(f"checkpoint {path}: the state of its training was not written by this tool")


def training_state(trained, average, optimizer, scheduler, scaler) -> dict:
    """What goes on from step to step besides the weights that are judged; tensors on the CPU."""
    return {
        "weights": _on_cpu(trained.state_dict()) if average else None,  # without averages they are the judged ones
        "optimizer": _on_cpu(optimizer.state_dict()),
        "scheduler": scheduler.state_dict(),
        "scaler": scaler.state_dict() if scaler else None,
    }


def restore_training(state: dict, trained, average, optimizer, scheduler, scaler) -> None:
    """Undo `training_state`. The judged weights are already in place. UserError for a state that does not fit."""
    try:
        _restore(state, trained, average, optimizer, scheduler, scaler)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"--resume: the state of its training does not fit its module ({one_line(error)})") from None


def _restore(state, trained, average, optimizer, scheduler, scaler):
    if average:
        trained.load_state_dict(state["weights"])
    kinds = [MUON_STATE if "momentum" in group else ADAMW_STATE for group in optimizer.param_groups]
    optimizer.load_state_dict(state["optimizer"])
    if optimizer.state:  # not before the first step that was not skipped
        for names, group in zip(kinds, optimizer.param_groups):
            for parameter in group["params"]:
                _fit_moments(optimizer.state[parameter], parameter, names)
    scheduler.load_state_dict(state["scheduler"])
    if scaler and state["scaler"]:
        scaler.load_state_dict(state["scaler"])


def _fit_moments(moments: dict, parameter: torch.Tensor, names: set) -> None:
    """Give each moment its parameter's own memory layout, which a fused kernel relies on; it would not notice another shape."""
    if moments.keys() != names:
        raise ValueError(f"moments {sorted(map(str, moments))} instead of {sorted(names)}")
    for name, moment in moments.items():
        if moment.shape != (() if name == "step" else parameter.shape):
            raise ValueError(f"{name} of shape {tuple(moment.shape)}")
        if name != "step":
            moments[name] = torch.empty_like(parameter).copy_(moment)


def _on_cpu(value):
    if isinstance(value, dict):
        return {name: _on_cpu(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_on_cpu(item) for item in value]
    return value.detach().cpu().contiguous() if isinstance(value, torch.Tensor) else value
