"""Train a small network that turns one frozen VAE's latents into another's.

    # a smoke run on the embedded default: two to three minutes on two CPU cores, no network
    python train_align_with_args.py --load_config config/demo.json

    # SD1.5 -> FLUX.1
    python train_align_with_args.py --vae1_path sd-legacy/stable-diffusion-v1-5 --vae2_path black-forest-labs/FLUX.1-dev \\
        --train_data_dir train_images --eval_data_dir eval_images --epochs 200 --learning_rate 1e-3

    # from a config, with one value changed; start from another run's weights; several processes
    python train_align_with_args.py --load_config config/align_training_config.json --epochs 50
    python train_align_with_args.py --load_checkpoint ckpt_align/align_pipeline_20251231_034701.pth --learning_rate 1e-4
    accelerate launch train_align_with_args.py --load_config config/align_training_config.json

    # judge the result
    python eval_align.py --checkpoint ckpt_align/align_pipeline_20251231_034701.pth --eval_data_dir eval_images
"""

from __future__ import annotations

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # some Pythons leave it out, such as an embedded one

from runtime.before_imports import before_imports

if __name__ == "__main__":
    before_imports()

import argparse
import contextlib
import copy
import logging
import math
import re
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.profiler import record_function
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

import dataloader
from cache.build import CacheOptions, cache_latents
from evaluation.pictures import save_sheet
from losses import KINDS, LOSSES, PERCEPTUAL_LOSSES, Encoded, Objective, decoded_image_loss, get_loss_function
from runtime.cli import Parser, claim_writable_folder, integer, load_config, naming, real, use_proxy
from runtime.cli import run as as_program
from runtime.processes import create_accelerator, from_first, gathered, together
from training import checkpoint
from training.budget import LOOK_SECONDS, UNKNOWN, Budget, is_due, time_of_day
from training.checkpoint import BEST_METRICS, Run
from training.log import (
    RunLog,
    StepProfile,
    evaluate_and_log,
    log_hparams,
    log_model_stats,
    print_results,
    visualize_results,
)
from training.optimizer import BadSteps, Muon, update_average
from training.starts import fit_ridge, grids_of, start_from_shipped, start_from_vaes
from utils import (
    PRECISIONS,
    StopRequest,
    StopWaiting,
    UserError,
    compute_policy,
    count_of,
    get_dtype,
    keep_freed_memory,
    memory_advice,
    next_stamp,
    one_line,
    peak_memory,
    require_compiler,
    resolve_device,
    resolve_precision,
    write_json,
)
from vae_align import ARCHITECTURES, CHECKPOINT_PREFIX, AlignConfig, align_module, detect_wrong_space
from vaes.codec import Codec, SeenThrough, good_image_size
from vaes.loading import load_vae_model
from vaes.pipeline import PipelineWithVAEs, encoded_batches, read_checkpoint, require_memory_for, spaces_of

__all__ = [  # the functions of the specification
    "create_align_pipeline", "create_data_loaders", "evaluate_and_log", "get_dtype", "get_loss_function", "load_config",
    "load_vae_model", "log_model_stats", "main", "parse_args", "save_config", "setup_optimizer", "setup_scheduler",
    "train_align_pipeline", "visualize_results",
]  # fmt: skip

log = logging.getLogger("train_align")


# ----------------------------------------------------------------------------------------------------------------------
# Flags


def build_parser() -> Parser:
    parser = Parser(description=__doc__)

    group = parser.add_argument_group("general")
    group.add_argument("--load_config", help="JSON file of flags; what is typed on the command line wins over it")
    group.add_argument(
        "--config_save_path", default="", help="where to write the flags as a config (default: beside each checkpoint)"
    )
    group.add_argument("--seed", type=integer(0, 2**32 - 1), default=42, help="of weights, order and crops")
    group.add_argument("--resume", nargs="?", const="latest", metavar="PATH",
                       help="go on with an interrupted run: the newest in --save_dir, or this checkpoint")  # fmt: skip
    group.add_argument(
        "--dry_run", action="store_true", help="try some steps and evaluation batches, print the plan, write nothing"
    )

    group = parser.add_argument_group("VAEs (frozen)")
    group.add_argument("--vae1_path", default="black-forest-labs/FLUX.1-dev", help="VAE to come from: folder or hub id")
    group.add_argument("--vae2_path", default="sd-legacy/stable-diffusion-v1-5", help="VAE to go to: folder or hub id")
    group.add_argument("--vae1_subfolder", default="vae", help="where VAE1 is in its folder; if not there, the folder itself")
    group.add_argument("--vae2_subfolder", default="vae", help="where VAE2 is in its folder; if not there, the folder itself")
    for number in (1, 2):
        group.add_argument(
            f"--vae{number}_space", help=f"name of VAE{number}'s latent space, such as sd15, sdxl, sd3 or flux1, where its own "
            "numbers do not tell: a tiny autoencoder's"
        )  # fmt: skip
    parser.add_switch(group, "sample_posterior", False, "draw latents from the posterior instead of taking its mean")
    group.add_argument("--cache_dir", help="where the hub client keeps downloads")
    group.add_argument("--proxy", help="URL of a proxy for hub access, such as http://127.0.0.1:7890")

    group = parser.add_argument_group("align module")
    group.add_argument("--hidden_channels", type=integer(1, 8192), default=64, help="width of the module, channels")
    group.add_argument(
        "--out_channels", type=integer(1, 8192), default=16, help="VAE2's latent channels, read from VAE2 unless typed"
    )
    group.add_argument("--num_blocks", type=integer(0, 1000), default=2, help="residual blocks; 0: none")
    group.add_argument("--downsample_times", type=integer(0, 12), default=3, help="how often the image branch halves; 0: never")
    group.add_argument(
        "--input_types", nargs="+", choices=("image", "latent"), default=["image", "latent"], help="what goes in"
    )
    group.add_argument("--seen_through", nargs="+", metavar="VAE",
                       help="with --input_types image: show the module some images as they are and the others each as one of "
                       "these VAEs decodes it, so that it can stand behind their decoders: folders or hub ids")  # fmt: skip
    group.add_argument("--architecture", choices=ARCHITECTURES, default="plain",
                       help="plain: residual blocks on VAE2's grid; tiny: the stages of tiny autoencoders, the finest cut "
                       "down; whole: all of them")  # fmt: skip
    group.add_argument("--init", choices=("ridge", "vaes", "random", "shipped"), default="ridge",
                       help="ridge: start at the closed-form linear map (latent inputs only); vaes: at VAE1's decoder and "
                       "VAE2's encoder (tiny autoencoders, --architecture tiny or whole); random: anywhere; shipped: at the "
                       "shipped module of these spaces and this architecture, else as vaes, or as ridge if plain")  # fmt: skip
    group.add_argument("--init_module", help="with --init vaes: then take the trained layers of the module in this file, which "
                       "has the same width and the image among its inputs")  # fmt: skip
    group.add_argument("--load_checkpoint", help="start from these weights, whose architecture comes along: a file, a "
                       "folder's best module, a pair such as sd15:flux1, a shipped module such as taesd_to_taef1")  # fmt: skip

    group = parser.add_argument_group("data")
    group.add_argument("--train_data_dir", default="train_images", help="folder of training images, searched recursively")
    group.add_argument("--eval_data_dir", default="eval_images", help="folder of evaluation images, searched recursively")
    group.add_argument("--hold_out", type=real(0, 0.9), default=0.0,
                       help=f"share of the training images, at most {dataloader.MOST_HELD_OUT}, to judge by and not to train "
                       "on, in place of --eval_data_dir, which switches it off when typed; 0: none")  # fmt: skip
    group.add_argument("--dataset_type", choices=("default", "imagenet"), default="default",
                       help="default: any folder; imagenet: train/nXXXXXXXX/*.JPEG or a hub data set id")  # fmt: skip
    group.add_argument("--train_batch_size", type=integer(1, 65536), default=4, help="images per step and process")
    group.add_argument("--eval_batch_size", type=integer(1, 65536), default=4, help="images per evaluation batch")
    group.add_argument("--num_workers", type=integer(0, 256), default=4, help="processes that decode images; 0: none")
    group.add_argument("--image_size", type=integer(1, 16384), default=256, help="side of the square crops, px")
    parser.add_switch(group, "streaming", False, "--train_data_dir names .tar shards (path, glob or URL) or a 🤗 data set, "
                      "which are read as they are needed, without a latent cache")  # fmt: skip
    group.add_argument("--shuffle_buffer", type=integer(1), default=1000,
                       help="images that a process takes from a stream at a time and shuffles; 1: as they come")  # fmt: skip
    group.add_argument("--epoch_images", type=integer(0), default=0,
                       help="images of a stream that count as an epoch; 0: the number that it states, or 10000")  # fmt: skip
    parser.add_switch(group, "random_flip", True, "mirror half of the training images")
    parser.add_switch(group, "cache_latents", True, "encode each training image once and keep its latents on disk")
    group.add_argument("--cache_views", type=integer(1, 1000), default=4,
                       help="random crops and flips per training image; without a latent cache new in each epoch")  # fmt: skip
    group.add_argument("--latent_cache_dir", default="latent_cache", help="folder of latent caches; safe to delete when unused")
    group.add_argument("--cache_only", action="store_true", help="build the latent cache and stop")

    group = parser.add_argument_group("training")
    group.add_argument("--epochs", type=integer(1), default=200, help="passes over the training images")
    group.add_argument(
        "--max_train_steps", type=integer(0), default=0, help="stop after this many optimizer steps; 0: no limit"
    )
    group.add_argument("--minutes", type=real(0), default=0.0,
                       help="of training, with evaluations, pictures and saving; encoding the images comes before them. In "
                       "place of --epochs, whose schedule is then laid out over them; 0: by --epochs")  # fmt: skip
    group.add_argument("--warmup_steps", type=integer(0), default=100, help="steps of linear learning-rate warm-up; 0: none")
    group.add_argument("--device", default="cuda", help="cuda, cuda:N, mps or cpu; the default falls back to what there is")
    group.add_argument(
        "--precision", choices=PRECISIONS, default="bfloat16", help="of the VAEs and of autocast; weights stay float32"
    )

    group = parser.add_argument_group("optimizer")
    group.add_argument("--optimizer", choices=("adamw", "muon"), default="adamw",
                       help="muon: it for most convolutions, AdamW for the rest; as good in fewer steps at 3e-3")  # fmt: skip
    group.add_argument("--learning_rate", type=real(0, 1e3), default=1e-3, help="after warm-up")
    group.add_argument("--weight_decay", type=real(0, 1e3), default=1e-4, help="decoupled weight decay; 0: none")
    group.add_argument("--grad_clip", type=real(0), default=0.0, help="largest gradient norm; 0: no clipping")
    group.add_argument("--ema_decay", type=real(0, 0.99999), default=0.0,
                       help="per step, of the averaged weights that are judged and saved; 0: no averaging")  # fmt: skip
    group.add_argument("--max_bad_steps", type=integer(1), default=10,
                       help="steps in a row without finite loss and gradient that end the run; fewer are skipped")  # fmt: skip
    parser.add_switch(group, "compile", False, "torch.compile the module: slower to start, faster to run")

    group = parser.add_argument_group("schedule")
    group.add_argument("--scheduler", choices=("step", "cosine"), default="step",
                       help="step: decays by epochs as below; cosine: to zero over the whole run")  # fmt: skip
    group.add_argument("--scheduler_step_size", type=integer(1), default=50, help="epochs between decays of the learning rate")
    group.add_argument("--scheduler_gamma", type=real(0, 1, above=True), default=0.5, help="factor of each decay; 1: none")

    group = parser.add_argument_group("loss")
    group.add_argument("--loss_type", choices=LOSSES, default="mse", help="between aligned and VAE2's scaled latents")
    group.add_argument("--loss_weight", type=real(0, 1e6, above=True), default=1.0, help="factor of the loss")
    group.add_argument("--reencode_target", type=real(0, 0.999), default=0.0,
                       help="share of decode + re-encode in what latents and decoded image should be; 0: none")  # fmt: skip
    group.add_argument("--moments_loss_weight", type=real(0, 1e6), default=0.0,
                       help="factor of a loss on mean and standard deviation of each channel of a batch; 0: none")  # fmt: skip
    group.add_argument("--decoder_loss_weight", type=real(0, 1e6), default=0.0,
                       help="factor of a loss on the image that VAE2 decodes; 0: none")  # fmt: skip
    group.add_argument("--decoder_loss_start", type=real(0, 0.999), default=0.0,
                       help="share of the run after which all losses on the decoded image begin")  # fmt: skip
    group.add_argument("--decoder_loss_type", choices=KINDS, default="l1", help="between that image and the reference")
    group.add_argument("--decoder_loss_batch", type=integer(1, 65536), default=4, help="images of each batch that are decoded")
    group.add_argument("--decoder_loss_window", type=integer(0, 4096), default=16,
                       help="side of the random window that is decoded, latents; 0: the whole image")  # fmt: skip
    group.add_argument("--decoder_loss_reference", choices=("original", "vae2"), default="original",
                       help="what it should look like: the image in VAE2's colours, or VAE2's reconstruction")  # fmt: skip
    group.add_argument("--perceptual_loss", choices=PERCEPTUAL_LOSSES, default="decoder",
                       help="on the decoded image too: the decoder's features, LPIPS, or ST-LPIPS (AlexNet)")  # fmt: skip
    group.add_argument("--perceptual_loss_weight", type=real(0, 1e6), default=0.0, help="factor of that loss; 0: none")
    group.add_argument("--decoder_loss_path", help="a cheaper VAE of VAE2's latent space to decode with: folder or hub id")
    group.add_argument("--decoder_loss_subfolder", default="vae", help="where that VAE is in its folder")

    group = parser.add_argument_group("logging, evaluation, checkpoints")
    group.add_argument("--log_dir", default="runs", help="TensorBoard logs; each run gets a folder of its own in it")
    group.add_argument("--save_dir", default="ckpt_align", help="checkpoints, each beside its config")
    group.add_argument("--log_frequency", type=integer(1), default=10, help="steps between log entries")
    group.add_argument("--profile", type=integer(0, 1000), default=0,
                       help="steps whose time is taken part by part, soon after the start; 0: none")  # fmt: skip
    group.add_argument("--eval_frequency", type=integer(0), default=1, help="epochs between evaluations; 0: never")
    group.add_argument("--save_frequency", type=integer(0), default=1, help="epochs between checkpoints; 0: only at the end")
    group.add_argument("--save_steps", type=integer(0), default=0, help="steps between further checkpoints; 0: none")
    group.add_argument("--keep_last", type=integer(0), default=0, help="checkpoints of this run to keep; 0: all")
    group.add_argument("--best_metric", choices=BEST_METRICS, default="psnr",
                       help="by which the best checkpoint is kept; both: PSNR and ST-LPIPS (VGG)")  # fmt: skip
    group.add_argument("--patience", type=integer(0), default=0,
                       help="evaluations without a new best after which the run ends; 0: never")  # fmt: skip
    group.add_argument("--visualize_frequency", type=integer(0), default=1, help="epochs between pictures; 0: never")
    group.add_argument("--num_visualize_samples", type=integer(0, 256), default=4, help="evaluation images to show; 0: none")
    return parser


PARSER = build_parser()
PARSER.retired = {
    "adversarial_weight": 0.0, "latent_adversarial_weight": 0.0, "adversarial_lr": None, "adversarial_start_step": None,
    "adversarial_warmup_steps": None, "cache_per_machine": False,
}  # fmt: skip
SETTINGS = PARSER.settings().keys() - {"load_config", "resume", "dry_run"}  # what a config holds
# Of flags that may change on resume, those that never come from the checkpoint: what is written or deleted, and where; the
# network; this machine. A checkpoint may be a stranger's.
PLACES = frozenset({"log_dir", "save_dir", "config_save_path", "latent_cache_dir", "cache_dir", "proxy", "keep_last"})
NEVER_TAKEN = PLACES | {"device", "num_workers", "cache_only", "profile"}
# The others: run length, logging, and where its data and VAEs are, whose content `checkpoint.require_same` compares. All flags
# that are not listed here shape the weights and come from the checkpoint.
MAY_CHANGE = NEVER_TAKEN | {
    "epochs", "max_train_steps", "minutes", "compile", "max_bad_steps", "train_data_dir", "eval_data_dir", "vae1_path",
    "vae1_subfolder", "vae2_path", "vae2_subfolder", "decoder_loss_path", "decoder_loss_subfolder", "seen_through",
    "init_module", "load_checkpoint", "log_frequency", "eval_frequency", "visualize_frequency", "save_frequency", "save_steps",
    "best_metric", "patience", "eval_batch_size", "num_visualize_samples",
}  # fmt: skip


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags as given: parser default < --load_config < typed. `typed_flags` names the typed ones."""
    return PARSER.parse(argv)


def save_config(args: argparse.Namespace, save_path) -> None:
    """Write the settings as JSON that --load_config reads back, as they were asked for; a proxy's password stays out."""
    write_json(save_path, config_dict(args))


def config_dict(args: argparse.Namespace) -> dict:
    """The settings as plain values that a checkpoint or a config may hold, as they were asked for: on another machine they
    mean what that machine has."""
    config = {name: value for name, value in (vars(args) | getattr(args, "asked", {})).items() if name in SETTINGS}
    if config.get("proxy"):
        config["proxy"] = re.sub(r"^([\w+.-]+://)?.*@", r"\1", config["proxy"])
    return config


# ----------------------------------------------------------------------------------------------------------------------
# Settings


class Settings(argparse.Namespace):
    """The settings of a run, one attribute for each flag; AttributeError for code that tries to change one.

    Functions that are part of this script's interface take them as `args`, or the plain result of `parse_args`. `asked` keeps
    what was asked for where the machine, VAE2 or another flag decides.
    """

    def __init__(self, values: dict):
        self.__dict__.update(values)

    def __setattr__(self, name, value):
        raise AttributeError(f"{name}: settings never change; see `resolve`")

    def but(self, **changes) -> Settings:
        """Other settings, which differ in these."""
        return Settings(vars(self) | changes)


def resolve(args: argparse.Namespace) -> tuple[Settings, tuple[Path, dict] | None, list]:
    """What the flags mean on this machine: (the settings, the checkpoint to start from, [VAE1, VAE2]).

    In this order: flags as parsed; the device; with --resume the checkpoint's settings, with --load_checkpoint its
    architecture; the precision, which on the same kind of device is that of the run to resume; VAE2's channels. The checkpoint
    is (path, content), or None for a fresh start. The weights of the VAEs are read when something first needs them. UserError
    names a flag that contradicts another or the machine.
    """
    use_proxy(args.proxy)
    if "eval_data_dir" in args.typed_flags or args.streaming:  # before a run to resume, which had it so, is compared
        args = argparse.Namespace(**vars(args) | {"hold_out": 0.0})
    values = dict(vars(args))
    with naming("--device"):
        device = resolve_device(args.device, "device" in args.typed_flags)
    resumed, start = find_start(args, device)
    if resumed:
        values |= settings_of_run(args, *start)
    elif start:
        values |= architecture_of(args, start[1])
    values["resume"] = args.resume if resumed else None
    values["asked"] = {name: values[name] for name in ("device", "precision", "out_channels", "cache_latents")}
    values["device"] = str(device)
    trained_on = start[1].get("trained_on", {}) if resumed else {}
    same_device = trained_on.get("device") == device.type
    precision = trained_on["precision"] if same_device else values["precision"]
    values["precision"] = resolve_precision(precision, device, same_device or "precision" in args.typed_flags)
    if values["streaming"] and values["cache_latents"]:
        log.info("--streaming: images are encoded as they come, there is no latent cache")
        values["cache_latents"] = False
    settings = Settings(values)
    check_flags(settings, fresh=start is None)
    folders = [name for name, read in (("train", not settings.streaming), ("eval", not settings.hold_out)) if read]
    for name in (f"{folder}_data_dir" for folder in folders):  # before the hub is asked for a VAE
        dataloader.require_place(getattr(settings, name), settings.dataset_type, f"--{name}")
    vaes = load_vaes(settings)
    settings = settings.but(out_channels=out_channels(settings, Codec(vaes[1])))
    return settings, start, vaes


def find_start(args: argparse.Namespace, device: torch.device) -> tuple[bool, tuple[Path, dict] | None]:
    """(whether --resume found it, the checkpoint that --resume or --load_checkpoint means: (path, content) or None).

    The first process reads it for all: another machine may have another disk.
    """
    for name in ("resume", "load_checkpoint"):
        if getattr(args, name) == "":  # an unset variable in a job's script
            raise UserError(f"--{name} '': names nothing; leave the flag out to start anew")
    if not (args.resume or args.load_checkpoint):
        return False, None
    accelerator = create_accelerator(device, "float32")
    if args.resume:
        start = from_first(lambda: checkpoint.find_checkpoint(args.resume, args.save_dir), accelerator)
        if start:
            return True, start
        log.warning("--resume: no checkpoint in %s that can be resumed, starting fresh", args.save_dir)
    if args.load_checkpoint:
        return False, from_first(lambda: (Path(args.load_checkpoint), read_checkpoint(args.load_checkpoint)), accelerator)
    return False, None


def settings_of_run(args: argparse.Namespace, path: Path, content: dict) -> dict:
    """The settings that a resumed run takes from its checkpoint; UserError names a given flag that contradicts them."""
    config = {name: value for name, value in content["config"].items() if name in SETTINGS | PARSER.retired.keys()}
    found, others, trained_on = {}, [], content.get("trained_on", {})
    for name, value in PARSER.check_config(config, f"--resume {path}").items():
        given = name in args.given_flags
        if name in NEVER_TAKEN:
            if name in PLACES and getattr(args, name) != value:
                others.append(f"--{name} {getattr(args, name)} (there {value})")
        elif name in MAY_CHANGE:
            if not given:
                found[name] = value
        elif name == "hold_out" and value and "eval_data_dir" in args.typed_flags:
            raise UserError("--eval_data_dir: the run to resume judges by some of its training images; leave the flag out")
        elif given and (name == "out_channels" or (name == "precision" and args.precision == trained_on.get("precision"))):
            continue  # VAE2 tells its channels; the precision may be that of the training instead of the one asked for
        elif given and _comparable(getattr(args, name)) != _comparable(value):
            raise UserError(
                f"--{name} {getattr(args, name)}: the run to resume has {value}; leave the flag out, or start a new run "
                "without --resume"
            )
        else:
            found[name] = value
    if others:
        log.info("--resume %s: these stay as they are here, not as in the checkpoint: %s", path, ", ".join(others))
    return found


def architecture_of(args: argparse.Namespace, content: dict) -> dict:
    """The module's settings of the checkpoint whose weights a new run takes; UserError if a typed one contradicts."""
    config, found = AlignConfig.from_dict(content["align_config"]), {}
    for name in ("input_types", "architecture", "hidden_channels", "num_blocks", "downsample_times"):
        value = getattr(config, name)
        found[name] = list(value) if isinstance(value, tuple) else value
        if name in args.typed_flags and _comparable(getattr(args, name)) != _comparable(found[name]):
            raise UserError(
                f"--{name} {getattr(args, name)}: --load_checkpoint brings its own architecture, with {found[name]}; "
                "leave the flag out"
            )
    return found


def _comparable(value):
    return sorted(set(value)) if isinstance(value, list) else value


def out_channels(args: argparse.Namespace, codec2: Codec) -> int:
    """VAE2's latent channels; UserError if --out_channels was typed and contradicts."""
    if args.out_channels != codec2.channels:
        if "out_channels" in args.typed_flags:
            raise UserError(
                f"--out_channels {args.out_channels}: VAE2 ({args.vae2_path}) has {codec2.channels} latent channels; "
                "leave the flag out"
            )
        log.info("out_channels: %d, as VAE2 has", codec2.channels)
    return codec2.channels


def check_flags(settings: Settings, fresh: bool) -> None:
    """UserError where flags contradict each other; `fresh`: whether no checkpoint gives the run its weights."""
    if settings.cache_only and not settings.cache_latents:
        raise UserError("--cache_only: with --no_cache_latents there is no cache to build; leave one of them out")
    if settings.init_module and settings.init != "vaes":
        raise UserError(f"--init_module {settings.init_module}: add --init vaes, whose start it goes on from")
    if draws_pictures(settings) and settings.init not in ("vaes", "shipped") and fresh:
        raise UserError(
            f"--architecture {settings.architecture}: from latents alone it looks at the picture that VAE1 decodes; add "
            "--init vaes"
        )
    if settings.seen_through and "latent" in settings.input_types:
        raise UserError("--seen_through: a module that takes VAE1's latents sees VAE1's picture; add --input_types image")


def check_outputs(settings: Settings) -> None:
    """UserError unless everything that is to be written can be. A dry run creates nothing to find out."""
    if os.fsencode(settings.log_dir) != settings.log_dir.encode(errors="replace"):
        raise UserError(
            f"--log_dir {settings.log_dir}: TensorBoard needs a name in UTF-8, and this locale writes it in "
            f"{sys.getfilesystemencoding()}; name another folder, or set PYTHONUTF8=1"
        )
    folders = ["save_dir", "log_dir"]
    if settings.cache_latents and not Path(settings.latent_cache_dir).is_dir():  # a complete cache that is there is only read
        folders.append("latent_cache_dir")
    for name in folders:
        claim_writable_folder(getattr(settings, name), f"--{name}", create=not settings.dry_run)
    if settings.config_save_path and not settings.dry_run:
        if os.path.isdir(settings.config_save_path):
            raise UserError(f"--config_save_path {settings.config_save_path}: a folder; name a file")
        claim_writable_folder(Path(settings.config_save_path).parent, "--config_save_path")
    for folder, prefix in (("log_dir", "align"), ("save_dir", "align_best"), ("save_dir", CHECKPOINT_PREFIX)):
        next_stamp(getattr(settings, folder), prefix)


def warn_of_odd_flags(settings: Settings, images: int, processes: int) -> None:
    """Warn of flags that are allowed and probably a mistake; `images`: number of training images."""
    batch_size = settings.train_batch_size * processes
    if batch_size > images:
        log.warning("--train_batch_size: %d images a step of %d; some come twice in each", batch_size, images)
    steps = steps_of(settings, -(-images // batch_size))
    if settings.warmup_steps > steps:
        log.warning(
            "--warmup_steps %d: the run has %d, so it ends before --learning_rate is reached", settings.warmup_steps, steps
        )


def steps_of(args: argparse.Namespace, steps_per_epoch: int) -> int:
    """Optimizer steps in the whole run; `UNKNOWN` where its time ends it."""
    steps = UNKNOWN if args.minutes else args.epochs * steps_per_epoch
    return min(steps, args.max_train_steps) if args.max_train_steps else steps


def budget_of(args: argparse.Namespace, steps_per_epoch: int) -> Budget:
    """The end of the whole run."""
    frequencies = filter(None, (args.eval_frequency, args.visualize_frequency))
    return Budget(steps_of(args, steps_per_epoch), args.minutes, min(frequencies, default=0) * steps_per_epoch)


def decodes_pictures(args: argparse.Namespace) -> bool:
    """Whether a loss looks at decoded pictures."""
    return bool(args.decoder_loss_weight or args.perceptual_loss_weight)


def needs_pixels(args: argparse.Namespace) -> bool:
    """Whether training batches must carry the image beside its latents."""
    compared = decodes_pictures(args) and args.decoder_loss_reference == "original"
    return ("image" in args.input_types and not args.seen_through) or compared


def draws_pictures(args: argparse.Namespace) -> bool:
    """Whether the module looks at the picture that VAE1 decodes."""
    return args.architecture != "plain" and set(args.input_types) == {"latent"}


def needs_decoded(args: argparse.Namespace) -> bool:
    """Whether training batches must carry that picture, or the one of --seen_through."""
    return draws_pictures(args) or bool(args.seen_through) or (bool(args.reencode_target) and decodes_pictures(args))


# ----------------------------------------------------------------------------------------------------------------------
# Parts


def load_vaes(args: argparse.Namespace) -> list:
    """[VAE1, VAE2], whose weights are read when something first needs them."""
    sides = (
        (args.vae1_path, args.vae1_subfolder, "--vae1_path"),
        (args.vae2_path, args.vae2_subfolder, "--vae2_path"),
    )
    options = (args.cache_dir, torch.device(args.device), get_dtype(args.precision))
    return [load_vae_model(*place, *options, label, is_typed(args, label)) for *place, label in sides]


def is_typed(args: argparse.Namespace, flag: str) -> bool:
    """Whether the user chose the value of a flag; a resumed run takes from its checkpoint what is left out."""
    return not args.resume or flag.removeprefix("--") in args.given_flags


def create_align_pipeline(vae1, vae2, args: argparse.Namespace, start: tuple[Path, dict] | None = None) -> PipelineWithVAEs:
    """The pipeline between two frozen VAEs, with the architecture of `args` and fresh weights, or those of `start`.

    Channels, strides and device are the VAEs'. `start`: (path, content) of a checkpoint, by default that of --load_checkpoint.
    """
    if start is None and args.load_checkpoint:
        start = Path(args.load_checkpoint), read_checkpoint(args.load_checkpoint)
        args = Settings(vars(args) | architecture_of(args, start[1]))
    codec1 = Codec(vae1, args.vae1_path, args.vae1_subfolder, args.vae1_space)
    codec2 = Codec(vae2, args.vae2_path, args.vae2_subfolder, args.vae2_space)
    if start:  # a space that the checkpoint names need not be typed again
        for codec, recorded in zip((codec1, codec2), spaces_of(start[1])):
            codec.adopt_name_of(recorded)
    if start and args.resume:
        checkpoint.require_same(start[1], {"vae1": codec1, "vae2": codec2}, args)
    elif start:
        for name, codec in (("vae1", codec1), ("vae2", codec2)):
            codec.warn_of_difference(start[1][name], f"--load_checkpoint {start[0]}")
    trained_for = AlignConfig.from_dict(start[1]["align_config"]) if start else None
    config = AlignConfig(
        input_types=tuple(args.input_types),
        architecture=args.architecture,
        hidden_channels=args.hidden_channels,
        num_blocks=args.num_blocks,
        downsample_times=args.downsample_times,
        latent_channels=codec1.channels,
        latent_stride=codec1.stride,
        out_channels=out_channels(args, codec2),
        out_stride=codec2.stride,
        **grids_of(codec1, codec2, args.architecture, trained_for),
    )
    with naming("--hidden_channels"):
        require_memory_for(config)
    module = align_module(config)
    if start:
        for name in ("latent_channels", "latent_stride", "out_channels", "out_stride"):
            if getattr(config, name) != getattr(trained_for, name):
                raise UserError(
                    f"--load_checkpoint {start[0]}: trained for VAEs with {name} {getattr(trained_for, name)}, "
                    f"these have {getattr(config, name)}"
                )
        module.load_state_dict(start[1]["state_dict"])
    return PipelineWithVAEs(module, codec1, codec2).to(resolve_device(str(codec2.vae.device), typed=False))


def create_objective(pipeline: PipelineWithVAEs, args: argparse.Namespace) -> Objective:
    """The weighted sum of losses that the flags ask for."""
    codec, decoded = pipeline.codec2, None
    if decodes_pictures(args):
        if args.decoder_loss_path:
            label = "--decoder_loss_path"
            place = (args.decoder_loss_path, args.decoder_loss_subfolder)
            options = (args.cache_dir, codec.vae.device, codec.vae.dtype, label, is_typed(args, label))
            codec = Codec(load_vae_model(*place, *options), *place)
            if (codec.channels, codec.stride) != (pipeline.codec2.channels, pipeline.codec2.stride):
                raise UserError(f"{label} {place[0]}: its latent space is not VAE2's (other channels or stride)")
        with naming("--perceptual_loss", "--decoder_loss_window", "--image_size"):
            decoded = decoded_image_loss(
                codec,
                args.image_size,
                pixel_weight=args.decoder_loss_weight,
                pixel_kind=args.decoder_loss_type,
                perceptual_weight=args.perceptual_loss_weight,
                perceptual_loss=args.perceptual_loss,
                batch_size=args.decoder_loss_batch,
                window=args.decoder_loss_window,
                reference=args.decoder_loss_reference,
                seed=args.seed,
            )
    with naming("--reencode_target"):
        return Objective(
            pipeline,
            loss_type=args.loss_type,
            loss_weight=args.loss_weight,
            moments_weight=args.moments_loss_weight,
            reencode_weight=args.reencode_target,
            decoded=decoded,
            decoded_start=args.decoder_loss_start,
            seen_through=seen_through(args, pipeline.codec2.vae),
        )


def seen_through(args: argparse.Namespace, vae2) -> SeenThrough | None:
    """The VAEs of --seen_through, on VAE2's device and in its dtype; None without the flag."""
    if not args.seen_through:
        return None
    places = [(place, args.vae1_subfolder) for place in args.seen_through]
    options = (args.cache_dir, vae2.device, vae2.dtype, "--seen_through", is_typed(args, "--seen_through"))
    return SeenThrough([Codec(load_vae_model(*place, *options), *place) for place in places])


def open_datasets(args: argparse.Namespace) -> tuple[dataloader.ImageDataset, dataloader.ImageDataset]:
    """(training set, evaluation set). UserError when a folder is missing, empty, or holds no readable image."""
    dataloader.require_memory(args.eval_batch_size, args.image_size, "--eval_batch_size")
    if needs_pixels(args) or not args.cache_latents:
        dataloader.require_memory(args.train_batch_size, args.image_size, "--train_batch_size")
    datasets, held_out, label = [], None, ""
    for name, train in (("train_data_dir", True), ("eval_data_dir", False)):
        folder = getattr(args, name)
        label = label if held_out else f"--{name} {folder}"
        if train and args.streaming:
            with dataloader.waiting_for(folder):
                stream = dataloader.open_stream(folder, f"--{name}", args.cache_dir)
                dataset = dataloader.StreamDataset(stream, args.image_size, args.random_flip, args.seed, args.epoch_images)
                dataset.look_at_first(label)
        else:
            source = held_out or dataloader.find_images(folder, args.dataset_type, train, f"--{name}", args.cache_dir)
            if train and args.hold_out:
                source, held_out = dataloader.hold_out(source, args.hold_out, args.seed, label)
            options = {"random_crop": True, "random_flip": args.random_flip, "seed": args.seed} if train else {}
            dataset = dataloader.ImageDataset(source, args.image_size, **options)
            dataset.require_readable(label)
            dataset.warn_of_small(label)
        datasets.append(dataset)
    return tuple(datasets)


def create_data_loaders(args: argparse.Namespace, vae1=None, vae2=None, accelerator=None, datasets=None):
    """(training loader, evaluation loader) of this process, over `datasets` as from `open_datasets`, which is called if None.

    With --streaming the training images are read as they come. With --cache_latents and both VAEs, training batches come from
    the latent cache, which is built first where it is not complete; otherwise they are decoded as they are drawn. The training
    loader is endless and its length is the number of steps in an epoch; both give dicts with `pixel_values` (B, 3, S, S) in
    [-1, 1] or the latents in its place. Training batches are on the accelerator's device.
    """
    train_set, eval_set = datasets or open_datasets(args)
    place = {"rank": accelerator.process_index, "world": accelerator.num_processes} if accelerator else {}
    place["device"] = accelerator and accelerator.device
    judged_images = dataloader.eval_loader(eval_set, args.eval_batch_size, args.num_workers, **place)
    options = (args.train_batch_size, args.num_workers, args.seed)
    if args.streaming:
        return dataloader.stream_loader(train_set, *options, args.shuffle_buffer, **place), judged_images
    if args.cache_latents and vae1 is not None and vae2 is not None:
        kept = CacheOptions(
            args.latent_cache_dir,
            args.cache_views,
            with_images=needs_pixels(args),
            reencoded=bool(args.reencode_target),
            decoded=needs_decoded(args),
            seen_through=seen_through(args, vae2),
            sample=args.sample_posterior,
            note=f"--minutes {args.minutes:g} begin after the encoding, and its duration is not known yet" * bool(args.minutes),
        )
        with naming("--latent_cache_dir", "--num_workers"):
            train_set = cache_latents(train_set, Codec(vae1), Codec(vae2), kept, args.num_workers, accelerator)
        if place["device"] is None or place["device"].type != "cuda":  # nothing to decode, and nothing else to do meanwhile
            options = (args.train_batch_size, 0, args.seed)
        return dataloader.train_loader(train_set, *options, args.cache_views, **place), judged_images
    return dataloader.train_loader(train_set, *options, **place), judged_images


def setup_optimizer(pipeline: PipelineWithVAEs, args: argparse.Namespace) -> torch.optim.Optimizer:
    """The optimizer that --optimizer names, over the align module's parameters and no others; AdamW in one fused kernel
    where the device has it."""
    module = pipeline.training_module
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    options = {"lr": args.learning_rate, "weight_decay": args.weight_decay, "fused": pipeline.device.type in ("cuda", "cpu")}
    if args.optimizer == "adamw":
        return torch.optim.AdamW(trained, **options)
    matrices = module.hidden_weights()
    known = {id(weight) for weight in matrices}
    return Muon(matrices, [parameter for parameter in trained if id(parameter) not in known], **options)


def setup_scheduler(
    optimizer: torch.optim.Optimizer, args: argparse.Namespace, steps_per_epoch: int | None = None, budget: Budget | None = None
) -> torch.optim.lr_scheduler.LambdaLR:
    """Warm-up by optimizer steps times StepLR by epochs, on one process or many:

        lr(step) = learning_rate · min(1, (step + 1) / warmup_steps) · gamma^(epoch // step_size)

    With `steps_per_epoch` the scheduler is to be stepped after each optimizer step, and epoch = step // steps_per_epoch.
    Without, it is to be stepped after each epoch, as torch's own are, and the warm-up follows `optimizer.step()` by itself;
    stepped after each optimizer step, it would decay after `step_size` steps.

    Under `--scheduler cosine` the last factor is (1 + cos(pi · step / steps)) / 2 instead, or that of epoch / epochs. Under
    `--minutes` the schedule of --epochs epochs is spread over the time: both quotients are the `position` of `budget`.
    """
    scheduler = None

    def factor(count):
        step = count if steps_per_epoch else getattr(scheduler, "optimizer_steps", 0)
        warmup = min(1.0, (step + 1) / args.warmup_steps) if args.warmup_steps else 1.0
        by_time = args.minutes and budget
        if args.scheduler == "cosine":
            position = budget.position(count) if by_time else min(1.0, count / steps_of(args, steps_per_epoch or 1))
            return warmup * (1 + math.cos(math.pi * position)) / 2
        epoch = int(budget.position(count) * args.epochs) if by_time else count // (steps_per_epoch or 1)
        return warmup * args.scheduler_gamma ** (epoch // args.scheduler_step_size)

    def warm_up(*_):
        scheduler.optimizer_steps += 1
        if scheduler.optimizer_steps < args.warmup_steps:
            for group, rate in zip(optimizer.param_groups, scheduler.base_lrs):
                group["lr"] = rate * factor(scheduler.last_epoch)

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    if not steps_per_epoch:
        scheduler.optimizer_steps = 0  # a part of its `state_dict`
        optimizer.register_step_post_hook(warm_up)
    return scheduler


def prepare_run(
    args: argparse.Namespace, pipeline: PipelineWithVAEs, objective: Objective, accelerator, train_loader, start=None
) -> Run:
    """The run that the loop goes on with: measurements before the first step, optimizer, schedule, or a checkpoint's state."""
    resumed = start[1] if start and args.resume else None
    pipeline.progress["config"] = config_dict(args)
    recorded = resumed["training"]["files"] if resumed else ""
    images = getattr(train_loader.dataset, "dataset", train_loader.dataset)  # a latent cache's own, or the images themselves
    paths = getattr(getattr(images, "source", None), "paths", None)
    data = {
        "order": checkpoint.data_order(train_loader, accelerator.num_processes),
        "files": checkpoint.names_digest(paths, recorded),
        "vaes": checkpoint.vaes_of(objective),
    }
    if resumed:
        checkpoint.require_same(resumed, data["order"] | {"files": data["files"]} | data["vaes"], args)
        places = resumed["training"]["places"]
        with naming("--train_data_dir"):
            train_loader.batch_sampler.go_on(resumed["step"], places and places[accelerator.process_index], places)
    else:
        with memory_advice("looking at the first images", **memory_flags(args)):
            start_module(pipeline, args, train_loader, accelerator, start)
            objective.before_first_step(train_loader, accelerator)

    optimizer = setup_optimizer(pipeline, args)
    trained = pipeline.training_module
    if args.ema_decay:
        pipeline.module = copy.deepcopy(trained).requires_grad_(False)  # the average is judged and saved
    budget = budget_of(args, len(train_loader))
    scheduler = setup_scheduler(optimizer, args, len(train_loader), budget)  # first: both it and Accelerate wrap optimizer.step
    module, prepared_optimizer = accelerator.prepare(trained, optimizer)
    run = Run(
        pipeline=pipeline,
        module=torch.compile(module) if args.compile else module,
        optimizer=prepared_optimizer,
        scheduler=scheduler,
        objective=objective,
        budget=budget,
        bad_steps=BadSteps(args.max_bad_steps, accelerator),
        accelerator=accelerator,
        data=data,
        config=pipeline.progress["config"],
        folder=Path(args.save_dir),
        keep_last=args.keep_last,
        best_metric=args.best_metric,
        trained_on={"device": accelerator.device.type, "precision": args.precision},
    )
    if resumed:
        run.load_state_dict(resumed, start[0])
        if resumed["config"].get("eval_data_dir") != args.eval_data_dir:
            run.metrics = {}
    return run


def start_module(pipeline: PipelineWithVAEs, args: argparse.Namespace, train_loader, accelerator, start=None) -> None:
    """Give the module of a new run the weights of --init, unless it has those of the checkpoint `start`. Warn of a VAE whose
    latents are not those of its named space: a recipe names the spaces of its own VAEs."""
    for inputs, target, _ in encoded_batches(pipeline, train_loader, accelerator, 1):
        for vae, latents, space in (("vae1", inputs.get("latents"), pipeline.space1), ("vae2", target, pipeline.space2)):
            found = None if latents is None else detect_wrong_space(latents, space)
            if found:
                found = found if vae == "vae1" else found.replace("takes", "gives", 1)
                log.warning("--%s_path %s: %s", vae, getattr(args, f"{vae}_path"), found)
    shipped = start_from_shipped(pipeline) if args.init == "shipped" and not start else None
    if pipeline.uses_latents and not pipeline.module.has_ridge:
        fit_ridge(pipeline, train_loader, accelerator)
    if shipped:
        return log.info("%s; --init and --load_checkpoint name another start", shipped)
    if start:
        return
    init = args.init
    if init == "shipped":
        init = "ridge" if args.architecture == "plain" else "vaes"
        log.info("no shipped module has these latent spaces and this architecture: training starts as with --init %s", init)
    if init == "ridge":
        pipeline.module.start_from_ridge()
    elif init == "vaes":
        log.info(start_from_vaes(pipeline, args.init_module))


# ----------------------------------------------------------------------------------------------------------------------
# Training


def train_align_pipeline(
    args: argparse.Namespace,
    vae1,
    vae2,
    train_loader,
    eval_loader,
    generator: torch.Generator,
    *,
    pipeline: PipelineWithVAEs | None = None,
    objective: Objective | None = None,
    accelerator=None,
    start: tuple[Path, dict] | None = None,
) -> Path | None:
    """Train an align module between two frozen VAEs; returns the final checkpoint's path (None on a helper process).

    Args:
        args: the settings, from `resolve` or `parse_args`.
        train_loader: batches with `pixel_values` and `path`, forever or epoch by epoch; its length is the steps in an epoch,
            its `batch_sampler` knows its `batch_size`.
        eval_loader: one pass over this process's share of the evaluation images.
        generator: draws posterior samples under --sample_posterior; seeded anew for each step.
        pipeline, objective, accelerator: made from `args` where they are None. start: the checkpoint to start from.

    On SIGINT or SIGTERM it finishes the step, saves, and leaves by SystemExit with 128 + the signal's number.
    """
    accelerator = accelerator or create_accelerator(args.device, args.precision)
    if pipeline is None:
        torch.manual_seed(args.seed)
        pipeline = create_align_pipeline(vae1, vae2, args, start).to(accelerator.device)
    objective = objective or create_objective(pipeline, args)
    run = prepare_run(args, pipeline, objective, accelerator, train_loader, start)
    writer = claim = None
    if accelerator.is_main_process:
        resumed = start[1]["run"] if start and args.resume else None
        run.name, claim = checkpoint.claim_name(Path(args.log_dir), Path(args.save_dir), resumed)
        writer = RunLog(Path(args.log_dir) / run.name, run.step)
        log.info("%s", description_of(args, run, train_loader))
    profile = StepProfile(args.profile, accelerator.device, writer and writer.folder)
    stopped = None
    try:
        with StopRequest() as stop:
            try:
                training_loop(args, run, train_loader, eval_loader, writer, generator, profile, stop)
            except (StopWaiting, dataloader.WorkersLost) as error:  # all processes come here at the same step
                stopped = error
                save_now(args, run, train_loader, writer)
            accelerator.wait_for_everyone()  # a launcher ends the others when the first one leaves
        if writer and not stopped and run.metrics:
            log_hparams(writer, run.config | run.trained_on, run.metrics)
    finally:
        if writer:
            for part, share in profile.shares.items():
                writer.add_scalar(f"profile/{part}", share)
            writer.close()
            checkpoint.release_name(claim)
    if isinstance(stopped, dataloader.WorkersLost):
        if not writer:
            raise SystemExit(1)
        raise UserError(f"--{stopped}; saved in {run.last}; go on with the same command and --resume")
    if stopped:
        if writer:
            of_all = f" of {run.budget.end}" if run.budget.known else ""
            print(f"stopped at step {run.step}{of_all}, saved in {run.last}")
            print("to go on: the same command with --resume")
        raise stopped
    if writer:
        images = train_loader.batch_sampler.batch_size * accelerator.num_processes
        rate = f"trained at {images / run.budget.pace:.1f} images/s" if run.budget.pace else ""
        print_results(run, args.log_dir, rate, profile.text())
    return run.last


def training_loop(
    args: argparse.Namespace,
    run: Run,
    train_loader,
    eval_loader,
    writer: RunLog | None,
    generator: torch.Generator,
    profile: StepProfile,
    stop: StopRequest,
) -> None:
    """Step after step until the run's end. StopWaiting where it is to stop before, WorkersLost where no batches come any more:
    in all processes, after the same step."""
    pipeline, objective, budget, accelerator = run.pipeline, run.objective, run.budget, run.accelerator
    dtype = get_dtype(args.precision)
    batches = endless(train_loader)
    unreadable = set()
    # a checkpoint is written after everything else that is due at its step
    done_at = run.step if run.last else None

    def next_batch():
        stop.raise_if_asked()
        return next(batches)

    for loader in (train_loader, eval_loader):
        if loader is not None:
            loader.check = stop.raise_if_asked
    bar = tqdm(initial=run.step, desc="train", unit="step", disable=not accelerator.is_main_process)
    with memory_advice("training", **memory_flags(args)), profile, bar:
        budget.start(run.step)
        logged, logged_at = run.step, budget.seconds - budget.paused
        while True:
            # ---- where we are: the clock is the step, epochs are counted from it
            budget.look(run.step, accelerator, objective.decodes_at(budget.position(run.step)))
            bar.total = budget.end if budget.known else None
            epoch, last = run.epoch, run.step == budget.end
            if writer:
                writer.step = run.step

            # ---- evaluate, visualise, save
            if run.step != done_at:
                due = partial(is_due, epoch, last)
                evaluates, draws = due(args.eval_frequency), due(args.visualize_frequency)
                if (evaluates or draws) and not (last or budget.affords_evaluation(accelerator)):
                    evaluates = draws = False
                if evaluates:
                    with budget.timed("evaluation", first=not run.fixed.figures):
                        judged = pipeline, eval_loader, writer, epoch, args, dtype
                        run.metrics = evaluate_and_log(*judged, accelerator, run.fixed)
                    is_best = run.note_if_best()
                    if args.patience and run.without_gain >= args.patience and not last:
                        log.info("no gain in %s: the run ends", count_of(run.without_gain, "evaluation"))
                        budget.end = run.step
                        last, draws = True, args.visualize_frequency > 0
                    if writer:
                        with budget.timed("statistics"):
                            if is_best:
                                run.save_best()
                            log_model_stats(pipeline, eval_loader, writer, epoch, args, dtype)
                if writer and draws:
                    with budget.timed("pictures"):
                        if sample := visualize_results(pipeline, eval_loader, writer, epoch, args, dtype):
                            save_sheet(sample, run.folder / f"{run.name}.png")
                by_steps = budget.save_is_due or (args.save_steps and run.step % args.save_steps == 0)
                if last or (run.step and (by_steps or due(args.save_frequency))):
                    with budget.timed("saving"):
                        save_now(args, run, train_loader, writer)
            if last:
                break

            # ---- one step
            with record_function("waiting for data"):
                batch = together(next_batch, accelerator)
            position = budget.position(run.step)
            with record_function("encoding"):
                if args.sample_posterior:
                    of_this_step = np.random.SeedSequence((args.seed, run.step, accelerator.process_index))
                    generator.manual_seed(int(of_this_step.generate_state(1)[0]))
                encoded = objective.encode(batch, args.sample_posterior, generator)
            learning_rate = run.optimizer.param_groups[0]["lr"]
            loss, grad_norm, ok = train_step(args, run, encoded, position)

            # ---- log
            with record_function("logging"):
                run.loss.add(loss, ok)
                run.bad_steps.note(ok, run.step, batch["path"])
                for message in set(batch.get("unreadable", ())) - unreadable:
                    unreadable.add(message)
                    with logging_redirect_tqdm():
                        log.warning("left out: %s", message)
                if run.step == 1 or run.step % args.log_frequency == 0 or run.step == budget.end:
                    skipped = run.bad_steps.read()
                    mean_loss = run.loss.read(accelerator)
                    images = (run.step - logged) * train_loader.batch_sampler.batch_size * accelerator.num_processes
                    rate = images / (budget.seconds - budget.paused - logged_at)
                    logged, logged_at = run.step, budget.seconds - budget.paused
                    if writer:
                        if skipped:
                            with logging_redirect_tqdm():
                                skipped = count_of(skipped, "step")
                                log.warning("step %d: %s skipped, %s", run.step, skipped, BadSteps.WHY)
                        writer.step = run.step
                        writer.log_training(
                            loss=mean_loss,
                            learning_rate=learning_rate,
                            grad_norm=float(grad_norm) if ok else math.nan,
                            images_per_second=rate,
                            skipped_steps=run.bad_steps.total,
                            gradient_scale=accelerator.scaler.get_scale() if accelerator.scaler else math.nan,
                        )
                        best = {"best": f"{run.best['psnr']:.2f} dB"} if run.best and run.best.get("psnr") else {}
                        ends = time_of_day(budget.seconds_left(run.step))
                        bar.set_postfix(loss=f"{mean_loss:.4f}", images_per_s=f"{rate:.1f}", **best, ends=ends)
            bar.update()
            profile.step()
    if writer:
        if unreadable:
            log.warning("%s left out during training", count_of(len(unreadable), "unreadable image"))
        if run.bad_steps.total:
            log.warning("%s skipped: %s", count_of(run.bad_steps.total, "step"), BadSteps.WHY)


def train_step(args: argparse.Namespace, run: Run, encoded: Encoded, position: float):
    """One optimizer step on an encoded batch: (loss, gradient norm, whether both were finite), tensors on the device.

    `position`: share of the run that is done, in [0, 1]. A step that was not finite changes no weight, moment or average. It
    counts as a step all the same: learning rate, order of the images and the average's decay depend on the step alone.
    Nothing here waits for a device that has fused kernels.
    """
    accelerator, optimizer = run.accelerator, run.optimizer
    with record_function("module"):
        aligned = run.module(**encoded.inputs).float()
    with record_function("losses and decoding"):
        loss, bias = run.objective(aligned, encoded, run.step, position)
    with record_function("backward"):
        optimizer.zero_grad(set_to_none=True)
        accelerator.backward(loss)
    with record_function("optimizer"):
        grad_norm = accelerator.clip_grad_norm_(run.module.parameters(), args.grad_clip or math.inf)
        ok = run.bad_steps.mask(optimizer.optimizer, loss, grad_norm)
        optimizer.step()
        run.scheduler.step()
        run.step += 1
        if run.average:
            update_average(run.average, run.pipeline.training_module, args.ema_decay, run.step, ok)
        run.objective.after_step(bias, ok, accelerator)
    run.last_inputs = encoded.inputs
    return loss.detach(), grad_norm, ok


def save_now(args: argparse.Namespace, run: Run, train_loader, writer: RunLog | None) -> None:
    """Write a checkpoint of this step, if there is none; all processes call this together."""
    if run.saved_at == run.step:
        return
    run.saved_at = run.step
    place = train_loader.batch_sampler.state_after(run.step)
    run.places = None if place is None else gathered(place, run.accelerator)
    if writer:
        writer.flush()  # the events first, so that a resumed run's logs lack no point
        path = run.save()
        save_config(args, args.config_save_path or path.with_suffix(".json"))


def endless(loader):
    while True:
        yield from loader


def memory_flags(args: argparse.Namespace) -> dict:
    """The flags that decide how much memory training takes, for `memory_advice`."""
    return {name: getattr(args, name) for name in ("train_batch_size", "image_size", "precision")}


def description_of(args: argparse.Namespace, run: Run, train_loader) -> str:
    """A line about a run that begins: what it trains, for how long, and where."""
    accelerator, end = run.accelerator, run.budget.end
    parameters = sum(parameter.numel() for parameter in run.pipeline.module.parameters())
    images = count_of(train_loader.batch_sampler.batch_size * accelerator.num_processes, "image")
    length = f"{end} steps of {images} in {count_of(-(-end // run.steps_per_epoch), 'epoch')}"
    if args.minutes:
        length = f"{args.minutes:g} minutes of {images} a step"
    return (
        f"{' + '.join(run.pipeline.config.input_types)} inputs, {parameters / 1e6:.2f} M parameters, {length} on "
        f"{accelerator.device} in {args.precision} channels_last, {count_of(accelerator.num_processes, 'process')}"
    )


# ----------------------------------------------------------------------------------------------------------------------
# The program


def is_finished(settings: Settings, path: Path, content: dict) -> bool:
    """Whether the run that --resume means has come to its end; says where the run stands."""
    step, training = content["step"], content["training"]
    budget = Budget(steps_of(settings, training["order"]["steps_per_epoch"]), settings.minutes)
    budget.load_state_dict(training["budget"])
    where = f"step {step} of {budget.end}" if budget.known else f"step {step}"
    if budget.is_over(step):
        more = "--minutes" if settings.minutes else "--epochs"
        print(f"already finished: {path} stands at {where}; to train on, give more {more}")
        return True
    left = f", {budget.seconds_left(step) / 60:.1f} minutes left" if settings.minutes else ""
    log.info("going on from %s, %s%s", path, where, left)
    return False


def dry_run(
    settings: Settings, vaes: list, pipeline: PipelineWithVAEs, objective: Objective, accelerator, datasets, generator
) -> None:
    """Train and evaluate for some seconds on a few images, into a temporary folder, and print what the whole run would take."""
    train_set, eval_set = datasets
    batch_size, judged = (size * accelerator.num_processes for size in (settings.train_batch_size, settings.eval_batch_size))
    images, steps_per_epoch, batches = len(train_set), -(-len(train_set) // batch_size), -(-len(eval_set) // judged)
    views = settings.cache_views if settings.cache_latents else 0
    if not settings.streaming:
        train_set = train_set.part(np.arange(min(images, 2 * batch_size)))
    for vae in vaes:
        _ = vae.model  # read now, so that the clock does not count it
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as ending:
        tried = settings.but(
            minutes=0.0, log_frequency=10**9, cache_views=1, save_frequency=0, save_steps=0, save_dir=folder,
            config_save_path="", latent_cache_dir=f"{folder}/cache", patience=0,
            init="random" if settings.resume or settings.load_checkpoint else settings.init,  # it has these weights
        )  # fmt: skip
        started = time.perf_counter()
        train_loader, _ = create_data_loaders(tried, *vaes, accelerator, (train_set, eval_set))
        encoding = (time.perf_counter() - started) / len(train_set) * images * views  # seconds in the whole run
        cached = sum(file.stat().st_size for file in Path(folder, "cache").rglob("*")) / len(train_set)  # bytes a view
        run = prepare_run(tried, pipeline, objective, accelerator, train_loader)
        run.name = f"align_{next_stamp(folder, 'align')}"
        writer = RunLog(Path(folder)) if accelerator.is_main_process else None
        ending.callback(writer.close if writer else lambda: None)

        def attempt(steps, batches):
            """The budget of a run that makes these steps, and evaluates on these batches if there are any."""
            few = train_set, eval_set.part(np.arange(min(len(eval_set), max(1, batches) * judged)))
            loaders = create_data_loaders(tried, *vaes, accelerator, few)
            run.step, run.saved_at, run.last, run.fixed.figures, run.budget = 0, -1, None, {}, Budget(steps)
            evaluates, draws = (min(1, batches, often) for often in (settings.eval_frequency, settings.visualize_frequency))
            changed = tried.but(eval_frequency=10**9 * evaluates, visualize_frequency=10**9 * draws)  # at both ends
            with StopRequest() as stop:
                training_loop(changed, run, *loaders, writer, generator, StepProfile(0, accelerator.device, None), stop)
            return run.budget

        def fitting(seconds, most):
            """How often something that takes so long fits into `LOOK_SECONDS`; the same in all processes."""
            return min(most, int(LOOK_SECONDS / max(1e-3, *gathered(seconds, accelerator))))

        shares, begin = {}, settings.decoder_loss_start if objective.decoded else 0.0
        for share, objective.decoded_start in ((begin, 1.0), (1 - begin, 0.0)):  # before these losses begin, and after
            if share:
                rough = attempt(2, 1)  # it starts and compiles things
                tried_batches = fitting(rough.paused, batches)
                found = attempt(2 + fitting(rough.pace, 50), tried_batches)
                shares[found.pace] = share
        if not tried_batches:
            tried_batches, found = 1, rough
        checkpoint_bytes = run.last.stat().st_size if writer else 0
    if not writer:
        return
    budget, scale = budget_of(settings, steps_per_epoch), batches / tried_batches
    later, saving = found.took.get("evaluation", 0.0), found.took["saving"]
    beside = found.reserve - later - saving  # pictures and statistics
    first = scale * (found.paused - found.reserve - beside) + beside
    budget.took, budget.paused = {"evaluation": scale * later + beside + saving}, first
    power = -1 if settings.minutes else 1  # the shares are of the time or of the steps
    budget.pace = sum(share * pace**power for pace, share in shares.items()) ** power
    end, evaluations = budget.end, budget.evaluations_left(0)
    if settings.minutes:
        end, evaluations = budget.plan(0, first, budget.reserve, first)
    training, evaluating = end * budget.pace, first + (evaluations + 1) * budget.reserve
    limit = f"; --minutes {settings.minutes:g} are those of training and evaluations" if settings.minutes else ""
    print(
        f"dry run: some steps and evaluation batches went well; nothing was written\n"
        f"steps:            {end} ({steps_per_epoch} in an epoch) of {count_of(batch_size, 'image')}\n"
        f"images:           {images} to train on, {len(eval_set)} to judge by\n"
        f"encoding:         {encoding / 60:.1f} minutes, before the training\n"
        f"training:         {training / 60:.1f} minutes ({budget.pace:.2f} s a step)\n"
        f"evaluations:      {evaluating / 60:.1f} minutes ({evaluations + 2 * bool(budget.between)} with pictures and saving: "
        f"the first {first:.1f} s, a later one {budget.reserve:.1f} s)\n"
        f"expected time:    {(encoding + training + evaluating) / 60:.1f} minutes{limit}\n"
        f"latent cache:     {images * views * cached / 1e6:.0f} MB for {count_of(views, 'view')} of each image\n"
        f"a checkpoint:     {checkpoint_bytes / 1e6:.1f} MB\n"
        f"peak memory:      {peak_memory(accelerator.device) / 1e9:.1f} GB"
    )
    if 2 * evaluating > training:
        log.warning("evaluations take over a third of the time: raise --eval_frequency and --visualize_frequency")


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    settings, start, vaes = resolve(args)
    device = torch.device(settings.device)
    keep_freed_memory(device)
    resumed = start is not None and bool(settings.resume)
    if resumed and is_finished(settings, *start):
        return
    check_outputs(settings)
    compute_policy(device, settings.precision)
    accelerator = create_accelerator(device, settings.precision)
    try:
        if settings.compile:
            with naming("--compile"):
                require_compiler(accelerator.device)
        datasets = open_datasets(settings)
        checkpoint.require_same_everywhere(datasets, accelerator)
        with naming("--image_size"):
            good_image_size(settings.image_size, *(vae.stride for vae in vaes))
        torch.manual_seed(settings.seed)
        pipeline = create_align_pipeline(*vaes, settings, start).to(accelerator.device)
        objective = create_objective(pipeline, settings)
        if resumed:  # before anything is encoded
            training, paths = start[1]["training"], datasets[0].source.paths
            found = {"processes": accelerator.num_processes}
            if isinstance(paths, list) and len(paths) < training["order"]["images"]:  # or more: unreadable ones
                found["images"] = len(paths)
            found["files"] = checkpoint.names_digest(paths, training["files"])
            checkpoint.require_same(start[1], found | checkpoint.vaes_of(objective), settings)
        if accelerator.is_main_process:
            warn_of_odd_flags(settings, len(datasets[0]), accelerator.num_processes)
        generator = torch.Generator(accelerator.device).manual_seed(settings.seed + accelerator.process_index)
        logging.getLogger().setLevel(min(logging.getLogger().level, logging.WARNING))  # each has images of its own from here on
        if settings.dry_run:
            return dry_run(settings, vaes, pipeline, objective, accelerator, datasets, generator)
        loaders = create_data_loaders(settings, *vaes, accelerator, datasets)
        if settings.cache_only:
            if accelerator.is_main_process:
                print(f"latent cache complete: {settings.latent_cache_dir}")
            return
        log.info("%s to train on, %s to judge by", *(count_of(len(loader.dataset), "image") for loader in loaders))
        parts = {"pipeline": pipeline, "objective": objective, "accelerator": accelerator, "start": start}
        train_align_pipeline(settings, *vaes, *loaders, generator, **parts)
    except OSError as error:
        raise UserError(f"{one_line(error)}: mend that, then go on with the same command and --resume") from error
    finally:
        accelerator.end_training()


if __name__ == "__main__":
    as_program(main)
