"""Train a small network that turns one frozen VAE's latents into another's.

    # a smoke run on the embedded default: under five minutes on two CPU cores, no network
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

import argparse
import copy
import functools
import logging
import math
import re
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent))  # which some Pythons leave out, such as an embedded one

from runtime.startup import before_imports

if __name__ == "__main__":
    before_imports()

import numpy as np
import torch
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

import dataloader
from cache.build import CacheOptions, cache_latents
from cache.read import cached_loader
from dataloader import StopWaiting, StreamDataset, WorkersLost, open_stream, stream_loader
from losses import (
    KINDS,
    LOSSES,
    PERCEPTUAL_LOSSES,
    Encoded,
    Objective,
    get_loss_function,
    needs_decoded,
    needs_pixels,
    seen_through,
)
from runtime.cli import Parser, integer, load_config, naming, real, run, use_proxy
from runtime.interrupts import StopRequest
from runtime.processes import create_accelerator, gathered, machine_of, machines_of
from training.bad_steps import BadSteps
from training.budget import Budget, time_of_day
from training.checkpoints import BEST_METRICS, RunCheckpoints
from training.claims import RunClaim
from training.dry_run import FewBatches, Plan, first_batches
from training.linear_start import fit_ridge
from training.log import RunLog, evaluate_and_log, log_hparams, log_model_stats, print_results, visualize_results
from training.meter import Meter
from training.muon import Muon
from training.preflight import claim_outputs, require_same_everywhere, warn_of_odd_flags
from training.profile import StepProfile
from training.resume import (
    Start,
    adopt_flags,
    data_order,
    find_checkpoint,
    names_digest,
    require_same_files,
    require_same_order,
    require_same_vaes,
)
from training.schedule import is_due, save_is_due, setup_scheduler, total_steps
from training.state import TrainingState
from training.vae_start import grids_of, start_from_vaes
from utils import (
    PRECISIONS,
    UserError,
    count_of,
    get_dtype,
    keep_freed_memory,
    memory_advice,
    one_line,
    peak_memory,
    require_compiler,
    resolve_device,
    resolve_precision,
    write_json,
)
from vae_align import ARCHITECTURES, AlignConfig, AlignModule, read_checkpoint, spaces_of
from vaes.codec import Codec, decode_picture, good_image_size
from vaes.loading import load_vae_model
from vaes.pipeline import PipelineWithVAEs, require_memory_for

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["get_dtype", "get_loss_function", "load_config", "load_vae_model"]  # part of this script's interface

log = logging.getLogger("train_align")


# ----------------------------------------------------------------------------------------------------------------------
# Command line and config


def build_parser() -> Parser:
    parser = Parser(description=__doc__)

    group = parser.add_argument_group("general")
    group.add_argument("--load_config", help="JSON file of flags; what is typed on the command line wins over it")
    group.add_argument(
        "--config_save_path", default="", help="where to write the resolved config (default: beside each checkpoint)"
    )
    group.add_argument("--seed", type=integer(0, 2**32 - 1), default=42, help="of weights, order and crops")
    group.add_argument("--resume", nargs="?", const="latest", metavar="PATH",
                       help="go on with an interrupted run: the newest in --save_dir, or this checkpoint")  # fmt: skip
    group.add_argument(
        "--dry_run", action="store_true", help="try one step and one evaluation batch, print the plan, write nothing"
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
    group.add_argument("--init", choices=("ridge", "vaes", "random"), default="ridge",
                       help="ridge: start at the closed-form linear map (latent inputs only); vaes: at VAE1's decoder and "
                       "VAE2's encoder (tiny autoencoders, --architecture tiny or whole); random: anywhere")  # fmt: skip
    group.add_argument("--init_module", help="with --init vaes: then take the trained layers of the module in this file, which "
                       "has the same width and the image among its inputs")  # fmt: skip
    group.add_argument("--load_checkpoint", help="start from this checkpoint's weights; the architecture comes with them")

    group = parser.add_argument_group("data")
    group.add_argument("--train_data_dir", default="train_images", help="folder of training images, searched recursively")
    group.add_argument("--eval_data_dir", default="eval_images", help="folder of evaluation images, searched recursively")
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
                       help="images of a stream that count as an epoch; 0: as many as it says it has, or 10000")  # fmt: skip
    parser.add_switch(group, "random_flip", True, "mirror half of the training images")
    parser.add_switch(group, "cache_latents", True, "encode each training image once and keep its latents on disk")
    group.add_argument("--cache_views", type=integer(1, 1000), default=4, help="random crops and flips per training image")
    group.add_argument("--latent_cache_dir", default="latent_cache", help="folder of latent caches; safe to delete when unused")
    parser.add_switch(group, "cache_per_machine", False, "each machine encodes, keeps and reads its own share of the images, "
                      "in its own --latent_cache_dir: for machines without a disk in common")  # fmt: skip
    group.add_argument("--cache_only", action="store_true", help="build the latent cache and stop")

    group = parser.add_argument_group("training")
    group.add_argument("--epochs", type=integer(1), default=200, help="passes over the training images")
    group.add_argument(
        "--max_train_steps", type=integer(0), default=0, help="stop after this many optimizer steps; 0: no limit"
    )
    group.add_argument("--minutes", type=real(0), default=0.0,
                       help="of training, with evaluations and saving, in place of --epochs, whose schedule is then "
                       "laid out over them; 0: by --epochs")  # fmt: skip
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
                       help="stop after so many in a row whose loss or gradient is not finite; fewer are skipped")  # fmt: skip
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
    group.add_argument("--adversarial_weight", type=real(0, 1e6), default=0.0,
                       help="factor of what a discriminator says to the decoded image; 0: none")  # fmt: skip
    group.add_argument("--latent_adversarial_weight", type=real(0, 1e6), default=0.0,
                       help="factor of what a discriminator says to the latents, beside VAE1's; 0: none")  # fmt: skip
    group.add_argument("--adversarial_lr", type=real(0, 1e3), default=3e-4, help="learning rate of the discriminators")
    group.add_argument("--adversarial_start_step", type=integer(0), default=500, help="step at which discriminators begin")
    group.add_argument("--adversarial_warmup_steps", type=integer(0), default=500,
                       help="steps from there in which their factor grows to its value; 0: at once")  # fmt: skip
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
    group.add_argument("--save_steps", type=integer(0), default=0, help="also a checkpoint every so many steps; 0: none")
    group.add_argument("--keep_last", type=integer(0), default=0, help="checkpoints of this run to keep; 0: all")
    group.add_argument("--best_metric", choices=BEST_METRICS, default="psnr", help="by which the best checkpoint is kept")
    group.add_argument("--visualize_frequency", type=integer(0), default=1, help="epochs between pictures; 0: never")
    group.add_argument("--num_visualize_samples", type=integer(0, 256), default=4, help="evaluation images to show; 0: none")
    return parser


PARSER = build_parser()
SETTINGS = PARSER.settings().keys() - {"load_config", "resume", "dry_run"}  # what a config holds


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags as given: parser default < --load_config < typed. `typed_flags` names those that were typed."""
    return PARSER.parse(argv)


def save_config(args: argparse.Namespace, save_path) -> None:
    """Write the flags as JSON that --load_config reads back; a proxy's password and the like stay out."""
    write_json(save_path, config_dict(args))


def config_dict(args: argparse.Namespace) -> dict:
    """The flags as plain values, without what is not a setting or must not be stored."""
    config = {name: value for name, value in vars(args).items() if name in SETTINGS}
    if config.get("proxy"):
        config["proxy"] = re.sub(r"^([\w+.-]+://)?.*@", r"\1", config["proxy"])
    return config


# ----------------------------------------------------------------------------------------------------------------------
# Parts


def adopt_architecture(args: argparse.Namespace, start: Start) -> None:
    """Set the module's flags to those of the checkpoint whose weights a new run takes; UserError if a typed one contradicts."""
    config = AlignConfig.from_dict(start.content["align_config"])
    for name in ("input_types", "architecture", "hidden_channels", "num_blocks", "downsample_times"):
        value, given = getattr(config, name), getattr(args, name)
        if isinstance(value, tuple):
            value, given = list(value), sorted(set(given))
        if name in args.typed_flags and given != value:
            raise UserError(
                f"--{name} {given}: --load_checkpoint brings its own architecture, with {value}; leave the flag out"
            )
        setattr(args, name, value)


def create_align_pipeline(vae1, vae2, args: argparse.Namespace, start: Start | None = None) -> PipelineWithVAEs:
    """The pipeline between two frozen VAEs, with the architecture of `args`, or of `start` and its weights; `start` is by
    default what --load_checkpoint names.

    Channels and strides are the VAEs'; `args.out_channels` is set to what VAE2 has, unless it was typed and contradicts.
    """
    if start is None and args.load_checkpoint:
        start = Start(Path(args.load_checkpoint), read_checkpoint(args.load_checkpoint))
    codec1 = Codec(vae1, args.vae1_path, args.vae1_subfolder, args.vae1_space)
    codec2 = Codec(vae2, args.vae2_path, args.vae2_subfolder, args.vae2_space)
    if start:  # a space that the checkpoint names need not be typed again
        for codec, recorded in zip((codec1, codec2), spaces_of(start.content)):
            codec.adopt_name_of(recorded)
    if args.out_channels != codec2.channels:
        if "out_channels" in args.typed_flags:
            raise UserError(
                f"--out_channels {args.out_channels}: VAE2 ({args.vae2_path}) has {codec2.channels} latent channels; "
                "leave the flag out"
            )
        log.info("out_channels: %d, as VAE2 has", codec2.channels)
        args.out_channels = codec2.channels
    if start and start.resumed:
        require_same_vaes(start.content, codec1, codec2)
    elif start:
        adopt_architecture(args, start)
    trained_for = AlignConfig.from_dict(start.content["align_config"]) if start else None
    config = AlignConfig(
        input_types=tuple(args.input_types),
        architecture=args.architecture,
        hidden_channels=args.hidden_channels,
        num_blocks=args.num_blocks,
        downsample_times=args.downsample_times,
        latent_channels=codec1.channels,
        latent_stride=codec1.stride,
        out_channels=codec2.channels,
        out_stride=codec2.stride,
        **grids_of(codec1, codec2, args.architecture, trained_for),
    )
    with naming("--hidden_channels"):
        require_memory_for(config)
    module = AlignModule(config)
    if start:
        for name in ("latent_channels", "latent_stride", "out_channels", "out_stride"):
            if getattr(config, name) != getattr(trained_for, name):
                raise UserError(
                    f"--load_checkpoint {start.path}: trained for VAEs with {name} {getattr(trained_for, name)}, "
                    f"these have {getattr(config, name)}"
                )
        module.load_state_dict(start.content["state_dict"])
    return PipelineWithVAEs(module, codec1, codec2)


def load_vaes(args: argparse.Namespace, device: torch.device) -> list:
    """[VAE1, VAE2], whose weights are read when something first needs them."""
    sides = (
        (args.vae1_path, args.vae1_subfolder, "--vae1_path"),
        (args.vae2_path, args.vae2_subfolder, "--vae2_path"),
    )
    dtype = get_dtype(args.precision)
    return [load_vae_model(path, subfolder, args.cache_dir, device, dtype, label) for path, subfolder, label in sides]


def open_datasets(args: argparse.Namespace) -> tuple[dataloader.ImageDataset, dataloader.ImageDataset]:
    """(training set, evaluation set). UserError when a folder is missing, empty, or holds no readable image."""
    dataloader.require_memory(args.eval_batch_size, args.image_size, "--eval_batch_size")
    if needs_pixels(args) or not args.cache_latents:
        dataloader.require_memory(args.train_batch_size, args.image_size, "--train_batch_size")
    datasets = []
    wanted = (("train", args.train_data_dir, True), ("eval", args.eval_data_dir, False))
    if args.streaming:
        datasets.append(open_streaming_set(args))
    for flag, folder, train in wanted[len(datasets) :]:
        source = dataloader.find_images(folder, args.dataset_type, train, f"--{flag}_data_dir", args.cache_dir)
        options = {"random_crop": True, "random_flip": args.random_flip, "seed": args.seed} if train else {}
        dataset = dataloader.ImageDataset(source, args.image_size, **options)
        dataset.require_readable(f"--{flag}_data_dir {folder}")
        dataset.warn_of_small(f"--{flag}_data_dir {folder}")
        datasets.append(dataset)
    return tuple(datasets)


def open_streaming_set(args: argparse.Namespace) -> StreamDataset:
    """The training set as a stream."""
    stream = open_stream(args.train_data_dir, "--train_data_dir", args.cache_dir)
    dataset = StreamDataset(stream, args.image_size, args.random_flip, args.seed, args.epoch_images)
    dataset.look_at_first(f"--train_data_dir {args.train_data_dir}")
    return dataset


def create_data_loaders(args: argparse.Namespace, vae1=None, vae2=None, accelerator=None, datasets=None):
    """(training loader, evaluation loader) of this process, over `datasets` as from `open_datasets`, which is called if None.

    With --streaming the training images are read as they come. With --cache_latents and both VAEs, training batches come from
    the latent cache, which is built first where it is not complete; otherwise they are decoded as they are drawn. The training
    loader is endless and its length is the number of steps in an epoch; both give dicts with `pixel_values` (B, 3, S, S) in
    [-1, 1] or the latents in its place.
    """
    train_set, eval_set = datasets or open_datasets(args)
    place = {"rank": accelerator.process_index, "world": accelerator.num_processes} if accelerator else {}
    judged_images = dataloader.eval_loader(eval_set, args.eval_batch_size, args.num_workers, **place)
    if args.streaming:
        options = (args.train_batch_size, args.num_workers, args.seed, args.shuffle_buffer)
        return stream_loader(train_set, *options, **place), judged_images
    options = (args.train_batch_size, args.num_workers, args.seed, args.cache_views)
    if args.cache_latents and vae1 is not None and vae2 is not None:
        kept = CacheOptions(
            args.latent_cache_dir,
            args.cache_views,
            with_images=needs_pixels(args),
            reencoded=bool(args.reencode_target),
            decoded=needs_decoded(args),
            seen_through=seen_through(args, vae2.device, vae2.dtype),
            sample=args.sample_posterior,
        )
        machine = machine_of(accelerator, args.cache_per_machine)
        with naming("--latent_cache_dir", "--num_workers"):
            train_set = cache_latents(train_set, Codec(vae1), Codec(vae2), kept, args.num_workers, machine)
        return cached_loader(train_set, *options, machine), judged_images
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


@torch.no_grad()
def update_average(average: AlignModule, module: AlignModule, decay: float, step: int) -> None:
    """Exponential moving average of the weights after `step` steps. Its decay grows from 0, a copy, over 1/6 to `decay`, so
    that short runs are averaged too. (torch's `AveragedModel` keeps its count on the device and waits for it in every step.)"""
    decay = min(decay, step / (10 + step)) if step > 1 else 0.0
    torch._foreach_lerp_(list(average.parameters()), list(module.parameters()), 1 - decay)


def seed_of_step(seed: int, step: int, process: int) -> int:
    """A seed of its own for every step and process."""
    return int(np.random.SeedSequence((seed, step, process)).generate_state(1)[0])


def endless(loader):
    while True:
        yield from loader


# ----------------------------------------------------------------------------------------------------------------------
# Training


@dataclass
class Parts:
    """What a run is made of before its data is touched: built once, so that whatever does not fit is said at once."""

    accelerator: Accelerator
    pipeline: PipelineWithVAEs
    objective: Objective
    start: Start | None


def build_parts(args: argparse.Namespace, vae1, vae2, accelerator=None, start: Start | None = None) -> Parts:
    """The parts of a run from its flags and two frozen VAEs. UserError names what does not fit together."""
    accelerator = accelerator or create_accelerator(args)
    torch.manual_seed(args.seed)
    pipeline = create_align_pipeline(vae1, vae2, args, start).to(accelerator.device)
    pipeline.progress["config"] = config_dict(args)
    return Parts(accelerator, pipeline, Objective(pipeline, args), start)


@dataclass
class Run:
    """One run of the training loop.

    Attributes:
        state: what goes on from step to step. module, optimizer: those of `state` as Accelerate prepared them.
        steps_per_epoch: of the clock. batch_size: images of a step over all processes.
        checkpoints: where the run saves; writer: where it logs; claim: of its name (the last two None on a helper process).
        last_inputs: of the module in the last step.
        profile: of a few of its steps.
        images_per_second: since the last log entry, over all processes; evaluations and saving do not count.
        images, seconds: trained on in this session, and what that took, without its first log entry, when things start.
    """

    state: TrainingState
    module: torch.nn.Module
    optimizer: torch.optim.Optimizer
    steps_per_epoch: int
    batch_size: int
    checkpoints: RunCheckpoints
    writer: RunLog | None
    claim: RunClaim | None
    profile: StepProfile
    images_per_second: float = 0.0
    images: int = 0
    seconds: float = 0.0
    last_inputs: dict | None = None

    @property
    def end(self) -> int:
        """The step after which the run ends, as far as is known."""
        return self.state.budget.end

    def speed(self) -> str:
        """How fast this session trained and, where that was profiled, where the time went: a line each."""
        lines = [f"trained at {self.images / self.seconds:.1f} images/s"] if self.seconds else []
        return "\n".join([*lines, *filter(None, [self.profile.text()])])

    def note_pace(self, steps: int, seconds: float) -> None:
        """So many steps took so many seconds."""
        if self.images_per_second:
            self.images += steps * self.batch_size
            self.seconds += seconds
        self.images_per_second = steps * self.batch_size / seconds

    def require_sound(self) -> None:
        """UserError if what the module puts out is not finite: a checkpoint of it would pass for the last good one."""
        # a batch that is not finite itself says nothing about the module
        if self.last_inputs is not None and all(values.isfinite().all() for values in self.last_inputs.values()):
            with torch.no_grad():  # not through DDP, which would wait for the other processes: only the first one saves
                sound = bool(self.state.module(**self.last_inputs).float().square().sum().isfinite())  # as errors are measured
            if not sound:
                kept = self.checkpoints.last or (self.checkpoints.best and self.checkpoints.best_path)
                raise UserError(
                    f"the module's output is not finite at step {self.state.step}: lower --learning_rate or set --grad_clip 1; "
                    + (f"the last checkpoint is {kept}" if kept else "no checkpoint was written")
                )

    def close(self) -> None:
        """Write out what is logged, and let another process go on with this run."""
        if self.writer:
            self.writer.close()
            self.claim.release()


def prepare_run(args: argparse.Namespace, parts: Parts, train_loader) -> Run:
    """What the loop needs: what is measured before the first step, optimizer, schedule, and the state to go on from."""
    accelerator, pipeline, objective, start = parts.accelerator, parts.pipeline, parts.objective, parts.start
    resumed = start.content if start and start.resumed else None
    data = {"order": data_order(train_loader, accelerator.num_processes), "files": names_digest(image_files(train_loader))}
    if resumed:
        require_same_order(resumed["training"]["order"], data["order"])
        places = resumed["training"]["places"]
        with naming("--train_data_dir"):
            train_loader.batch_sampler.go_on(resumed["step"], places and places[accelerator.process_index])
    else:
        with memory_advice("looking at the first images", **memory_flags(args)):
            if pipeline.uses_latents and not start:
                fit_ridge(pipeline, train_loader, accelerator)
                if args.init == "ridge":
                    pipeline.module.start_from_ridge()
            if args.init == "vaes" and not start:
                log.info(start_from_vaes(pipeline, args.init_module))
            objective.before_first_step(pipeline, train_loader, accelerator)

    optimizer = setup_optimizer(pipeline, args)
    trained = pipeline.training_module
    average = copy.deepcopy(trained).requires_grad_(False) if args.ema_decay else None
    if average:
        pipeline.module = average  # what is judged and saved
    module, prepared_optimizer = accelerator.prepare(trained, optimizer)
    budget = Budget(total_steps(args, len(train_loader)), args.minutes)
    state = TrainingState(
        module=trained,
        average=average,
        optimizer=optimizer,
        scheduler=setup_scheduler(optimizer, args, len(train_loader), budget),
        scaler=accelerator.scaler,
        bad_steps=BadSteps(args.max_bad_steps, accelerator),
        objective=objective,
        meter=Meter(accelerator.device),
        budget=budget,
        data=data,
    )
    claim = RunClaim(args.log_dir, args.save_dir, resumed["run"] if resumed else None) if accelerator.is_main_process else None
    name = claim.name if claim else ""
    checkpoints = RunCheckpoints(pipeline, config_dict(args), Path(args.save_dir), name, args.keep_last, args.best_metric)
    if resumed:
        try:
            state.load_state_dict(resumed)
        except UserError as error:
            raise UserError(f"--resume {start.path}: {error}") from None
        checkpoints.load_state_dict(resumed["training"], start.path)
        if resumed["config"].get("eval_data_dir") != args.eval_data_dir:
            state.metrics = {}
    return Run(
        state=state,
        module=torch.compile(module) if args.compile else module,
        optimizer=prepared_optimizer,
        steps_per_epoch=len(train_loader),
        batch_size=train_loader.batch_sampler.batch_size * accelerator.num_processes,
        checkpoints=checkpoints,
        writer=RunLog(Path(args.log_dir) / name, state.step, state.fixed) if claim else None,
        profile=StepProfile(args.profile, state.step, accelerator.device, Path(args.log_dir) / name if claim else None),
        claim=claim,
    )


def train_align_pipeline(
    args: argparse.Namespace, vae1, vae2, train_loader, eval_loader, generator: torch.Generator, parts: Parts | None = None
) -> Path | None:
    """Train an align module between two frozen VAEs; returns the final checkpoint's path (None on a helper process).

    Args:
        args: as from `parse_args`, with device and precision resolved.
        train_loader: batches with `pixel_values` and `path`, forever or epoch by epoch; its length is the steps in an epoch,
            its `batch_sampler` knows its `batch_size`.
        eval_loader: one pass over this process's share of the evaluation images.
        generator: draws posterior samples under --sample_posterior; seeded anew for each step.
        parts: as from `build_parts`, which is called if None.

    On SIGINT or SIGTERM it finishes the step, saves, and leaves by SystemExit with 128 + the signal's number.
    """
    parts = parts or build_parts(args, vae1, vae2)
    run = prepare_run(args, parts, train_loader)
    accelerator, state, writer = parts.accelerator, run.state, run.writer
    if writer:
        log.info("%s", description_of(args, parts, run))
    try:
        try:
            stopped = training_loop(args, parts, run, train_loader, eval_loader, generator)
        except WorkersLost as error:
            sampler = train_loader.batch_sampler
            if not writer or (accelerator.num_processes > 1 and sampler.state_after(state.step)):
                raise  # the places of the other processes in their streams are not known here
            note_places(state, sampler, None)
            save_checkpoint(args, run)
            raise UserError(f"--{error}; saved in {run.checkpoints.last}; go on with the same command and --resume") from None
        if writer and state.step == run.end and state.metrics:
            log_hparams(writer, run.checkpoints.config, state.metrics)
    finally:
        run.close()
    if stopped and state.step < run.end:
        if writer:
            of_all = f" of {run.end}" if state.budget.known else ""
            print(f"stopped at step {state.step}{of_all}, saved in {run.checkpoints.last}")
            print("to go on: the same command with --resume")
        raise SystemExit(128 + stopped)
    if not writer:
        return None
    print_results(run.checkpoints, state.metrics, state.step, args, run.speed())
    return run.checkpoints.last


def training_loop(args, parts: Parts, run: Run, train_loader, eval_loader, generator) -> int | None:
    """Step after step until the run's end; returns the signal that stopped it before, or None."""
    accelerator, pipeline, state, writer = parts.accelerator, parts.pipeline, run.state, run.writer
    main_process = accelerator.is_main_process
    dtype = get_dtype(args.precision)
    batches = endless(train_loader)
    unreadable = set()
    first_step = state.step
    decoding = False
    resumed = parts.start is not None and parts.start.resumed

    with StopRequest() as stop, memory_advice("training", **memory_flags(args)):
        if accelerator.num_processes == 1:  # several agree at a step, and the others are waiting in theirs
            train_loader.batch_sampler.stop_requested = lambda: stop.signal is not None
        bar = tqdm(initial=state.step, desc="train", unit="step", disable=not main_process)
        state.budget.start(state.step)
        clock, clocked_step = time.perf_counter(), state.step
        while True:
            # ---- where we are: the clock is the step, epochs are counted from it
            state.budget.look(state.step, accelerator)
            bar.total = run.end if state.budget.known else None
            epoch = state.step / run.steps_per_epoch
            last = state.step == run.end
            due = functools.partial(is_due, epoch, last)
            # the checkpoint that a resumed run starts from was written after everything that was due at its step
            news = not (resumed and state.step == first_step)
            saved = not news
            paused = time.perf_counter()
            if writer:
                writer.step = state.step

            # ---- evaluate, visualise, save
            if news and due(args.eval_frequency):
                state.metrics = evaluate_and_log(pipeline, eval_loader, writer, epoch, args, dtype, accelerator, state.fixed)
                if main_process:
                    run.checkpoints.save_if_best(state, epoch)
                    log_model_stats(pipeline, eval_loader, writer, epoch, args, dtype)
            if news and main_process and due(args.visualize_frequency):
                visualize_results(pipeline, eval_loader, writer, epoch, args, dtype)
            if news and save_is_due(state.step, epoch, last, args):
                note_places(state, train_loader.batch_sampler, accelerator)
                if main_process:
                    save_checkpoint(args, run)
                saved = True
            if last:
                accelerator.wait_for_everyone()
            stopped = stop.agreed(accelerator, state.step)
            if stopped and not saved:
                note_places(state, train_loader.batch_sampler, accelerator)
                if main_process:
                    save_checkpoint(args, run)
            if stopped:
                accelerator.wait_for_everyone()  # a launcher ends the others when the first one leaves
            if last or stopped:
                break
            pause = time.perf_counter() - paused
            clock += pause  # images/s is the training's own
            if news and (due(args.eval_frequency) or due(args.visualize_frequency)):
                state.budget.note_evaluation(pause)

            # ---- one step
            if not decoding and parts.objective.decodes_at(state.budget.position(state.step)):
                decoding = True
                state.budget.forget_pace(state.step)
            run.profile.begin(state.step)
            run.profile.enter("data")
            try:
                batch = next(batches)
            except StopWaiting:
                stopped = stop.signal
                if not saved:
                    note_places(state, train_loader.batch_sampler, accelerator)
                    save_checkpoint(args, run)
                break
            run.profile.enter("encoding")
            if args.sample_posterior:
                generator.manual_seed(seed_of_step(args.seed, state.step, accelerator.process_index))
            encoded = parts.objective.encode(batch, args.sample_posterior, generator)
            learning_rate = state.optimizer.param_groups[0]["lr"]
            loss, grad_norm, ok = train_step(args, parts, run, encoded)
            run.last_inputs = encoded.inputs

            # ---- log
            run.profile.enter("logging")
            state.meter.add(loss, ok)
            state.bad_steps.note(ok, state.step, batch["path"])
            for message in set(batch.get("unreadable", ())) - unreadable:
                unreadable.add(message)
                with logging_redirect_tqdm():
                    log.warning("left out: %s", message)
            if state.step == 1 or state.step % args.log_frequency == 0 or state.step == run.end:
                skipped = state.bad_steps.read()
                mean_loss = state.meter.read(accelerator)
                terms = parts.objective.read(accelerator)
                now = time.perf_counter()
                run.note_pace(state.step - clocked_step, now - clock)
                clock, clocked_step = now, state.step
                if main_process:
                    if skipped:
                        with logging_redirect_tqdm():
                            log.warning(
                                "step %d: %s skipped, loss or gradient not finite", state.step, count_of(skipped, "step")
                            )
                    writer.step = state.step
                    writer.log_training(
                        loss=mean_loss,
                        learning_rate=learning_rate,
                        terms=terms,
                        grad_norm=float(grad_norm) if ok else math.nan,
                        images_per_second=run.images_per_second,
                        skipped_steps=state.bad_steps.total,
                    )
                    left = state.budget.seconds_left(state.step, run.batch_size / run.images_per_second)
                    bar.set_postfix(
                        loss=f"{mean_loss:.4f}", images_per_s=f"{run.images_per_second:.1f}", ends=time_of_day(left)
                    )
            bar.update()
            run.profile.enter(None)
    bar.close()
    run.profile.close()
    for part, share in run.profile.shares.items():
        writer.add_scalar(f"profile/{part}", share)
    if main_process and last:
        if unreadable:
            log.warning("%s left out during training", count_of(len(unreadable), "unreadable image"))
        if state.bad_steps.total:
            log.warning("%s skipped: loss or gradient not finite", count_of(state.bad_steps.total, "step"))
    return stopped


def note_places(state: TrainingState, sampler, accelerator) -> None:
    """Remember where each process is in its stream of training images; all processes call this together."""
    place = sampler.state_after(state.step)
    state.places = None if place is None else gathered(place, accelerator)


def save_checkpoint(args, run: Run) -> None:
    """Write everything that is known; the events first, so that a resumed run's logs lack no point."""
    run.require_sound()
    run.writer.flush()
    path = run.checkpoints.save(run.state, run.state.step / run.steps_per_epoch)
    save_config(args, args.config_save_path or path.with_suffix(".json"))


def train_step(args, parts: Parts, run: Run, encoded: Encoded):
    """One optimizer step on an encoded batch: (loss and gradient norm, on the device; whether both were finite, as a tensor).

    A step that was not finite changes no weight, moment or average. Nothing here waits for a device that has fused kernels.
    """
    accelerator, state = parts.accelerator, run.state

    # align
    run.profile.enter("module")
    aligned = run.module(**encoded.inputs).float()
    run.profile.watch(aligned)

    # loss
    run.profile.enter("decoding")
    loss, seen = parts.objective(aligned, encoded, state.step, state.budget.position(state.step))

    # backward
    run.optimizer.zero_grad(set_to_none=True)
    accelerator.backward(loss)

    # clip
    run.profile.enter("optimizer")
    grad_norm = accelerator.clip_grad_norm_(run.module.parameters(), args.grad_clip or math.inf)

    # step
    ok = state.bad_steps.mask(state.optimizer, loss, grad_norm)
    run.optimizer.step()
    state.scheduler.step()
    state.step += 1
    if state.average:
        update_average(state.average, state.module, args.ema_decay, state.step)
    parts.objective.after_step(seen, ok, accelerator)
    return loss.detach(), grad_norm, ok


def memory_flags(args: argparse.Namespace) -> dict:
    """The flags that decide how much memory training takes, for `memory_advice`."""
    return {name: getattr(args, name) for name in ("train_batch_size", "image_size", "precision")}


def image_files(train_loader) -> list[str] | None:
    """The files behind a training loader; None for a data set that has none of its own."""
    dataset = getattr(train_loader.dataset, "dataset", train_loader.dataset)  # a latent cache's own, or the images themselves
    source = getattr(dataset, "source", None)
    return source.paths if source else None


def description_of(args, parts: Parts, run: Run) -> str:
    """A line about a run that begins: what it trains, for how long, and where."""
    accelerator = parts.accelerator
    parameters = sum(parameter.numel() for parameter in run.state.judged.parameters())
    length = (
        f"{run.end} steps of {count_of(run.batch_size, 'image')} in {count_of(-(-run.end // run.steps_per_epoch), 'epoch')}"
    )
    if args.minutes:
        length = f"{args.minutes:g} minutes of {count_of(run.batch_size, 'image')} a step"
    return (
        f"{' + '.join(parts.pipeline.config.input_types)} inputs, {parameters / 1e6:.2f} M parameters, {length} on "
        f"{accelerator.device} in {args.precision} channels_last, {count_of(accelerator.num_processes, 'process')}"
    )


# ----------------------------------------------------------------------------------------------------------------------


def dry_run(args: argparse.Namespace, parts: Parts, datasets, generator: torch.Generator) -> None:
    """Run the real loop for two steps and one evaluation batch, and print what the whole run would take.

    What the loop writes goes into a temporary folder. With a latent cache the steps get latents that were encoded before.
    """
    accelerator = parts.accelerator
    parts.objective.begin_at_once()
    views = args.cache_views if args.cache_latents else 0
    with tempfile.TemporaryDirectory() as folder:
        changes = {"max_train_steps": 2, "minutes": 0.0, "log_frequency": 1, "config_save_path": "", "cache_latents": False}
        changes |= {"eval_frequency": min(args.eval_frequency, 1), "log_dir": folder, "save_dir": folder}
        rehearsed = argparse.Namespace(**(vars(args) | changes))
        train_loader, eval_loader = create_data_loaders(rehearsed, accelerator=accelerator, datasets=datasets)
        batches = first_batches(train_loader, 2)
        view_bytes, seconds_to_encode = 0, 0.0
        for number, batch in enumerate(batches):
            start = time.perf_counter()
            encoded = parts.objective.encode(batch)
            encoded.target.sum().item()  # waits for the device
            seconds_to_encode = time.perf_counter() - start
            if views:
                latents = {"latents2": encoded.target}
                latents |= {"latents1": encoded.inputs["latents"]} if "latents" in encoded.inputs else {}
                latents |= {"reencoded": encoded.reencoded.latents} if encoded.reencoded else {}
                view_bytes = 2 * sum(tensor[0].numel() for tensor in latents.values())  # float16
                if needs_decoded(args):
                    latents["decoded"] = (
                        encoded.inputs["image"]
                        if args.seen_through
                        else decode_picture(encoded.inputs["latents"], parts.pipeline.codec1)
                    )
                pictures = needs_pixels(args) + needs_decoded(args)
                view_bytes += pictures * batch["pixel_values"][0].numel()  # 8 bits
                batches[number] = batch | latents
        few, judged = FewBatches(train_loader, batches), FewBatches(eval_loader, first_batches(eval_loader, 1))
        run = prepare_run(rehearsed, parts, few)
        stopped = training_loop(rehearsed, parts, run, few, judged, generator)
        run.close()
        if run.writer:
            checkpoint_bytes = run.checkpoints.last.stat().st_size
    if stopped:
        raise SystemExit(128 + stopped)
    if run.writer:
        seconds_per_step = run.batch_size / run.images_per_second
        seconds_to_evaluate = len(eval_loader) * judged.seconds[-1] if judged.seconds else 0.0
        between = args.eval_frequency * len(train_loader)  # steps from one evaluation to the next
        steps = total_steps(args, len(train_loader))
        if args.minutes:
            average = seconds_per_step + (seconds_to_evaluate / between if between else 0.0)
            steps = min(steps, max(1, int(60 * args.minutes / average)))
        evaluations = 1 + -(-steps // between) if between else 0
        plan = Plan(
            steps=steps,
            steps_per_epoch=len(train_loader),
            batch_size=run.batch_size,
            train_images=len(train_loader.dataset),
            eval_images=len(eval_loader.dataset),
            views=views,
            view_bytes=view_bytes,
            checkpoint_bytes=checkpoint_bytes,
            evaluations=evaluations,
            seconds_per_step=seconds_per_step,
            seconds_to_encode=seconds_to_encode,
            seconds_to_evaluate=seconds_to_evaluate,
            peak_memory=peak_memory(accelerator.device),
        )
        print(plan.text())


def find_start(args: argparse.Namespace) -> Start | None:
    """The checkpoint that --resume or --load_checkpoint means; with --resume `args` takes its flags. The first process reads it
    for all: another machine may have another disk."""
    for name in ("resume", "load_checkpoint"):
        if getattr(args, name) == "":  # an unset variable in a job's script
            raise UserError(f"--{name} '': names nothing; leave the flag out to start anew")
    if not (args.resume or args.load_checkpoint):
        return None
    everyone = machine_of(create_accelerator(args), separate=False)
    if args.resume:
        start = everyone.of_first(lambda: find_checkpoint(args.resume, args.save_dir))
        if start:
            config = {name: value for name, value in start.content["config"].items() if name in SETTINGS}
            adopt_flags(args, PARSER.check_config(config, f"--resume {start.path}"))
            return start
        log.warning("--resume: no checkpoint in %s that can be resumed, starting fresh", args.save_dir)
    if args.load_checkpoint:
        start = everyone.of_first(lambda: Start(Path(args.load_checkpoint), read_checkpoint(args.load_checkpoint)))
        adopt_architecture(args, start)
        return start
    return None


def is_finished(args: argparse.Namespace, start: Start) -> bool:
    """Whether the run that --resume means has come to its end; either way it says where the run stands."""
    step, training = start.content["step"], start.content["training"]
    budget = Budget(total_steps(args, training["order"]["steps_per_epoch"]), args.minutes)
    budget.load_state_dict(training["budget"])
    where = f"step {step} of {budget.end}" if budget.known else f"step {step}"
    if budget.is_over(step):
        more = "--minutes" if args.minutes else "--epochs"
        print(f"already finished: {start.path} stands at {where}; to train on, give more {more}")
        return True
    left = f", {budget.seconds_left(step, 0) / 60:.1f} minutes left" if args.minutes else ""
    log.info("going on from %s, %s%s", start.path, where, left)
    return False


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    use_proxy(args.proxy)
    with naming("--device"):
        args.device = str(resolve_device(args.device, "device" in args.typed_flags))
    keep_freed_memory(torch.device(args.device))
    args.precision = resolve_precision(args.precision, torch.device(args.device), "precision" in args.typed_flags)
    start = find_start(args)
    resumed = start is not None and start.resumed
    if resumed and is_finished(args, start):
        return
    if args.streaming and args.cache_latents:
        log.info("--streaming: images are encoded as they come, there is no latent cache")
        args.cache_latents = False
    claim_outputs(args)
    if args.compile:
        with naming("--compile"):
            require_compiler(torch.device(args.device))

    accelerator = create_accelerator(args)
    datasets = open_datasets(args)
    require_same_everywhere(datasets, accelerator)
    if resumed:
        machines = len(machines_of(accelerator, args.cache_per_machine))
        among = {"processes": accelerator.num_processes, "machines": machines}
        require_same_files(start.content["training"], datasets[0].source.paths, among, args.train_data_dir)
    vaes = load_vaes(args, accelerator.device)
    with naming("--image_size"):
        good_image_size(args.image_size, *(vae.stride for vae in vaes))
    parts = build_parts(args, *vaes, accelerator, start)
    if accelerator.is_main_process:
        warn_of_odd_flags(args, len(datasets[0]), accelerator.num_processes)
    generator = torch.Generator(accelerator.device).manual_seed(args.seed + accelerator.process_index)
    if args.dry_run:
        return dry_run(args, parts, datasets, generator)
    loaders = create_data_loaders(args, *vaes, accelerator, datasets)
    if args.cache_only:
        if accelerator.is_main_process:
            print(f"latent cache complete: {args.latent_cache_dir}")
        return
    log.info("%s to train on, %s to judge by", *(count_of(len(loader.dataset), "image") for loader in loaders))
    try:
        train_align_pipeline(args, *vaes, *loaders, generator, parts)
    except OSError as error:
        raise UserError(f"{one_line(error)}: mend that, then go on with the same command and --resume") from error
    finally:
        accelerator.end_training()


if __name__ == "__main__":
    run(main)
