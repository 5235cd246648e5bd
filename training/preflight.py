"""What is checked before hours go into a run: that its outputs can be written, that its flags make sense together, and that its
processes have the same images."""

from __future__ import annotations

import argparse
import logging
import os

from losses import draws_pictures
from runtime.cli import claim_writable_file, claim_writable_folder
from runtime.processes import gathered
from training.resume import names_digest
from training.schedule import total_steps
from utils import UserError

log = logging.getLogger(__name__)


def claim_outputs(args: argparse.Namespace) -> None:
    """UserError unless everything that is to be written can be. A dry run creates nothing to find out."""
    if args.cache_only and not args.cache_latents:
        raise UserError("--cache_only: with --no_cache_latents there is no cache to build; leave one of them out")
    if args.init_module and args.init != "vaes":
        raise UserError(f"--init_module {args.init_module}: add --init vaes, whose start it goes on from")
    if draws_pictures(args) and args.init != "vaes" and not (args.load_checkpoint or args.resume):
        raise UserError(
            f"--architecture {args.architecture}: from latents alone it looks at the picture that VAE1 decodes; add --init vaes"
        )
    try:
        args.log_dir.encode()
    except UnicodeEncodeError:
        raise UserError(f"--log_dir {args.log_dir}: TensorBoard needs a name in UTF-8; name another folder") from None
    folders = ["save_dir", "log_dir"]
    if args.cache_latents and not os.path.isdir(args.latent_cache_dir):  # a complete cache that is there is only read
        folders.append("latent_cache_dir")
    for name in folders:
        claim_writable_folder(getattr(args, name), f"--{name}", create=not args.dry_run)
    if args.config_save_path and not args.dry_run:
        claim_writable_file(args.config_save_path, "--config_save_path")


def require_same_everywhere(datasets, accelerator) -> None:
    """UserError unless every process has found the same training and evaluation images, by number and names."""
    found = gathered([(len(dataset), names_digest(dataset.source.paths)) for dataset in datasets], accelerator)
    for flag, *sets in zip(("train", "eval"), *found):
        if len(set(sets)) > 1:
            counts = ", ".join(str(count) for count, _ in sets)
            raise UserError(
                f"--{flag}_data_dir: the processes have not found the same files ({counts} images); give each machine the same"
            )


def warn_of_odd_flags(args: argparse.Namespace, images: int, processes: int) -> None:
    """Warn of flags that are allowed and probably a mistake; `images`: how many there are to train on."""
    batch_size = args.train_batch_size * processes
    if batch_size > images:
        log.warning("--train_batch_size: %d images a step of %d; some come twice in each", batch_size, images)
    steps = total_steps(args, -(-images // batch_size))
    if args.warmup_steps > steps:
        log.warning("--warmup_steps %d: the run has %d, so it ends before --learning_rate is reached", args.warmup_steps, steps)
    start, weights = args.adversarial_start_step, ("adversarial_weight", "latent_adversarial_weight")
    if start >= steps and any(getattr(args, name) for name in weights):
        log.warning("--adversarial_start_step %d: the run has %d, so no discriminator ever plays", start, steps)
