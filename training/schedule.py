"""The clock of a run, which counts optimizer steps: the learning rate at each, and what is due after which."""

from __future__ import annotations

import argparse
import math

import torch

from training.budget import UNKNOWN, Budget


def total_steps(args: argparse.Namespace, steps_per_epoch: int) -> int:
    """Optimizer steps in the whole run; `UNKNOWN` where its time ends it."""
    steps = UNKNOWN if args.minutes else args.epochs * steps_per_epoch
    return min(steps, args.max_train_steps) if args.max_train_steps else steps


def setup_scheduler(
    optimizer: torch.optim.Optimizer, args: argparse.Namespace, steps_per_epoch: int = 1, budget: Budget | None = None
) -> torch.optim.lr_scheduler.LambdaLR:
    """Warm-up by steps times StepLR by epochs; to be stepped once per optimizer step, on one process or many.

        lr(step) = learning_rate · min(1, (step + 1) / warmup_steps) · gamma^(epoch // step_size)

    with epoch = step // steps_per_epoch; at the default of 1 the scheduler is to be stepped once per epoch, as torch's own are.
    Under `--scheduler cosine` the last factor is (1 + cos(pi · step / total_steps)) / 2 instead. Under `--minutes` the schedule
    of --epochs epochs is laid out over the time: step / total_steps and epoch / epochs are the `position` of `budget`.
    """

    def factor(step):
        warmup = min(1.0, (step + 1) / args.warmup_steps) if args.warmup_steps else 1.0
        by_time = args.minutes and budget
        if args.scheduler == "cosine":
            position = budget.position(step) if by_time else min(1.0, step / total_steps(args, steps_per_epoch))
            return warmup * (1 + math.cos(math.pi * position)) / 2
        epoch = int(budget.position(step) * args.epochs) if by_time else step // steps_per_epoch
        return warmup * args.scheduler_gamma ** (epoch // args.scheduler_step_size)

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def is_due(epoch: float, last: bool, frequency: int) -> bool:
    """Whether something that happens every `frequency` epochs (0: never) happens now; the last step always counts."""
    return frequency > 0 and (last or epoch % frequency == 0)


def save_is_due(step: int, epoch: float, last: bool, args: argparse.Namespace) -> bool:
    """Whether a checkpoint is written after `step` steps."""
    by_steps = args.save_steps and step % args.save_steps == 0
    return last or bool(step and (by_steps or is_due(epoch, last, args.save_frequency)))
