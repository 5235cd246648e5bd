"""Going on with an interrupted run: from which checkpoint, with which flags, and how a run lets itself be interrupted."""

from __future__ import annotations

import argparse
import contextlib
import logging
import signal
from pathlib import Path

import torch

from utils import UserError
from vae_align import checkpoints_in, read_checkpoint

log = logging.getLogger(__name__)

# What a resumed run may be given anew: how long it goes on, where it runs and what it says meanwhile. The other flags shape
# the weights, and come from the checkpoint.
MAY_CHANGE = frozenset(
    """resume dry_run epochs max_train_steps device num_workers train_data_dir eval_data_dir vae1_path vae2_path
    vae1_subfolder vae2_subfolder cache_dir proxy latent_cache_dir log_dir save_dir config_save_path decoder_loss_path
    decoder_loss_subfolder eval_batch_size log_frequency eval_frequency save_frequency save_steps keep_last
    visualize_frequency num_visualize_samples best_metric max_bad_steps""".split()
)


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
        return Path(wanted), content
    folder = save_dir if wanted == "latest" else wanted
    for path in checkpoints_in(folder):
        try:
            content = read_checkpoint(path)
        except UserError as error:
            log.warning("%s; trying the one before it", error)
            continue
        if "training" in content:
            return path, content
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
            if not given:
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


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Load an optimizer's state, each moment in its parameter's memory layout, which fused kernels rely on."""
    optimizer.load_state_dict(state)
    for parameter, moments in optimizer.state.items():
        for name, moment in moments.items():
            if moment.shape == parameter.shape:
                moments[name] = torch.empty_like(parameter).copy_(moment)


class StopRequest:
    """Within this context SIGINT and SIGTERM ask the run to stop instead of stopping it: `signal` says which came.

    The second signal acts as if this context were not there, so that it ends the process at once.
    """

    def __init__(self):
        self.signal: int | None = None
        self._before = {}

    def __enter__(self):
        with contextlib.suppress(ValueError):  # not in the main thread: whoever runs us there handles signals
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number, frame):
        self.signal = number
        for other in self._before:
            signal.signal(other, signal.SIG_DFL)
        log.warning("%s: finishing the step and saving; once more to leave at once", signal.Signals(number).name)

    def __exit__(self, *exception):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def exit_code(self) -> int:
        """The customary exit code of a process that a signal ended."""
        return 128 + self.signal
