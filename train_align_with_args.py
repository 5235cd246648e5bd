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
import datetime
import functools
import logging
import math
import re
import signal
import time
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback of the imports, which take seconds

import numpy as np
import torch
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

import dataloader
from latents.encode_once import cache_latents, cached_loader
from latents.pipeline import PipelineWithVAEs, build_module
from latents.spaces import Codec, good_image_size
from latents.vaes import load_vae_model
from losses import LOSSES, get_loss_function
from runtime.cli import Parser, integer, load_config, naming, real, run, use_proxy
from runtime.device import (
    ACCELERATE_NAMES,
    PRECISIONS,
    get_dtype,
    keep_freed_memory,
    memory_advice,
    require_compiler,
    resolve_device,
    resolve_precision,
)
from runtime.interrupts import StopRequest
from training.bad_steps import BadSteps
from training.checkpoints import BEST_METRICS, RunCheckpoints, find_checkpoint
from training.decoded_image import KINDS, fit_colours
from training.dry_run import print_plan
from training.linear_start import fit_ridge
from training.log import evaluate_and_log, log_hparams, log_model_stats, open_writer, print_results, visualize_results
from training.muon import Muon
from training.objective import Objective, needs_pixels
from training.preflight import claim_outputs, say_what_is_odd
from training.resume import (
    adopt_flags,
    data_order,
    names_digest,
    require_same_files,
    require_same_order,
    require_same_vaes,
    restore_training,
    training_state,
)
from training.schedule import is_due, save_is_due, setup_scheduler, total_steps
from utils import UserError, count_of, next_stamp, one_line, write_json
from vae_align import AlignConfig, AlignModule, read_checkpoint

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
    group.add_argument("--init", choices=("ridge", "random"), default="ridge",
                       help="ridge: start at the closed-form linear map (latent inputs only); random: anywhere")  # fmt: skip
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
    parser.add_switch(group, "random_flip", True, "mirror half of the training images")
    parser.add_switch(group, "cache_latents", True, "encode each training image once and keep its latents on disk")
    group.add_argument("--cache_views", type=integer(1, 1000), default=4, help="random crops and flips per training image")
    group.add_argument("--latent_cache_dir", default="latent_cache", help="folder of latent caches; safe to delete when unused")
    group.add_argument("--cache_only", action="store_true", help="build the latent cache and stop")

    group = parser.add_argument_group("training")
    group.add_argument("--epochs", type=integer(1), default=200, help="passes over the training images")
    group.add_argument(
        "--max_train_steps", type=integer(0), default=0, help="stop after this many optimizer steps; 0: no limit"
    )
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
    group.add_argument("--decoder_loss_weight", type=real(0, 1e6), default=0.0,
                       help="factor of a loss on the image that VAE2 decodes; 0: none")  # fmt: skip
    group.add_argument("--decoder_loss_type", choices=KINDS, default="l1", help="between that image and the reference")
    group.add_argument("--decoder_loss_batch", type=integer(1, 65536), default=4, help="images of each batch that are decoded")
    group.add_argument("--decoder_loss_window", type=integer(0, 4096), default=16,
                       help="side of the random window that is decoded, latents; 0: the whole image")  # fmt: skip
    group.add_argument("--decoder_loss_reference", choices=("original", "vae2"), default="original",
                       help="what it should look like: the image in VAE2's colours, or VAE2's reconstruction")  # fmt: skip
    group.add_argument("--perceptual_loss", choices=("decoder", "lpips"), default="decoder",
                       help="on the decoded image too: the decoder's features, or LPIPS if its weights are here")  # fmt: skip
    group.add_argument("--perceptual_loss_weight", type=real(0, 1e6), default=0.0, help="factor of that loss; 0: none")
    group.add_argument("--decoder_loss_path", help="a cheaper VAE of VAE2's latent space to decode with: folder or hub id")
    group.add_argument("--decoder_loss_subfolder", default="vae", help="where that VAE is in its folder")

    group = parser.add_argument_group("logging, evaluation, checkpoints")
    group.add_argument("--log_dir", default="runs", help="TensorBoard logs; each run gets a folder of its own in it")
    group.add_argument("--save_dir", default="ckpt_align", help="checkpoints, each beside its config")
    group.add_argument("--log_frequency", type=integer(1), default=10, help="steps between log entries")
    group.add_argument("--eval_frequency", type=integer(0), default=1, help="epochs between evaluations; 0: never")
    group.add_argument("--save_frequency", type=integer(0), default=1, help="epochs between checkpoints; 0: only at the end")
    group.add_argument("--save_steps", type=integer(0), default=0, help="also a checkpoint every so many steps; 0: none")
    group.add_argument("--keep_last", type=integer(0), default=0, help="checkpoints of this run to keep; 0: all")
    group.add_argument("--best_metric", choices=BEST_METRICS, default="psnr", help="by which the best checkpoint is kept")
    group.add_argument("--visualize_frequency", type=integer(0), default=1, help="epochs between pictures; 0: never")
    group.add_argument("--num_visualize_samples", type=integer(0, 256), default=4, help="evaluation images to show; 0: none")
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags as given: parser default < --load_config < typed. `typed_flags` names those that were typed."""
    return build_parser().parse(argv)


def save_config(args: argparse.Namespace, save_path) -> None:
    """Write the flags as JSON that --load_config reads back; a proxy's password and the like stay out."""
    write_json(save_path, config_dict(args))


def config_dict(args: argparse.Namespace) -> dict:
    """The flags as plain values, without what is not a setting or must not be stored."""
    names = set(build_parser().settings()) - {"load_config", "resume", "dry_run"}
    config = {name: value for name, value in vars(args).items() if name in names}
    if config.get("proxy"):
        config["proxy"] = re.sub(r"^([\w+.-]+://)?.*@", r"\1", config["proxy"])
    return config


# ----------------------------------------------------------------------------------------------------------------------
# Parts


def adopt_architecture(args: argparse.Namespace) -> None:
    """With --load_checkpoint, set the module's flags to the checkpoint's; UserError if a typed one contradicts. A resumed run
    has them already."""
    if not args.load_checkpoint or getattr(args, "resumed", None):
        return
    config = AlignConfig(**read_checkpoint(args.load_checkpoint)["align_config"])
    for name in ("input_types", "hidden_channels", "num_blocks", "downsample_times"):
        value, given = getattr(config, name), getattr(args, name)
        value, given = (list(value), sorted(set(given))) if isinstance(value, tuple) else (value, given)
        if name in getattr(args, "typed_flags", ()) and given != value:
            raise UserError(
                f"--{name} {given}: --load_checkpoint brings its own architecture, with {value}; leave the flag out"
            )
        setattr(args, name, value)


def create_align_pipeline(vae1, vae2, args: argparse.Namespace) -> PipelineWithVAEs:
    """The pipeline between two frozen VAEs, with the architecture of `args`, or of `args.load_checkpoint` and its weights.

    Channels and strides are the VAEs'; `args.out_channels` is set to what VAE2 has, unless it was typed and contradicts.
    """
    space1 = Codec(vae1, getattr(args, "vae1_path", None), getattr(args, "vae1_subfolder", None))
    space2 = Codec(vae2, getattr(args, "vae2_path", None), getattr(args, "vae2_subfolder", None))
    if args.out_channels != space2.channels:
        if "out_channels" in getattr(args, "typed_flags", ()):
            raise UserError(
                f"--out_channels {args.out_channels}: VAE2 ({args.vae2_path}) has {space2.channels} latent channels; "
                "leave the flag out"
            )
        log.info("out_channels: %d, as VAE2 has", space2.channels)
        args.out_channels = space2.channels
    adopt_architecture(args)
    config = AlignConfig(
        input_types=tuple(args.input_types),
        hidden_channels=args.hidden_channels,
        num_blocks=args.num_blocks,
        downsample_times=args.downsample_times,
        latent_channels=space1.channels,
        latent_stride=space1.stride,
        out_channels=space2.channels,
        out_stride=space2.stride,
    )
    module = build_module(config)
    resumed = getattr(args, "resumed", None)
    if resumed:
        require_same_vaes(resumed, space1, space2)
        module.load_state_dict(resumed["state_dict"])
    elif args.load_checkpoint:
        content = read_checkpoint(args.load_checkpoint)
        trained_for = AlignConfig(**content["align_config"])
        for name in ("latent_channels", "latent_stride", "out_channels", "out_stride"):
            if getattr(config, name) != getattr(trained_for, name):
                raise UserError(
                    f"--load_checkpoint {args.load_checkpoint}: trained for VAEs with {name} {getattr(trained_for, name)}, "
                    f"these have {getattr(config, name)}"
                )
        module.load_state_dict(content["state_dict"])
    return PipelineWithVAEs(module, space1, space2)


def open_datasets(args: argparse.Namespace) -> tuple[dataloader.ImageDataset, dataloader.ImageDataset]:
    """(training set, evaluation set). UserError when a folder is missing, empty, or holds no readable image."""
    dataloader.require_memory(args.eval_batch_size, args.image_size, "--eval_batch_size")
    if needs_pixels(args) or not args.cache_latents:
        dataloader.require_memory(args.train_batch_size, args.image_size, "--train_batch_size")
    datasets = []
    for flag, folder, train in (("train", args.train_data_dir, True), ("eval", args.eval_data_dir, False)):
        source = dataloader.find_images(folder, args.dataset_type, train, f"--{flag}_data_dir", args.cache_dir)
        options = {"random_crop": True, "random_flip": args.random_flip, "seed": args.seed} if train else {}
        dataset = dataloader.ImageDataset(source, args.image_size, **options)
        dataset.require_readable(f"--{flag}_data_dir {folder}")
        datasets.append(dataset)
    return tuple(datasets)


def create_data_loaders(args: argparse.Namespace, vae1=None, vae2=None, accelerator=None, datasets=None):
    """(training loader, evaluation loader) of this process, over `datasets` as from `open_datasets`, which is called if None.

    With --cache_latents and both VAEs, training batches come from the latent cache, which is built first where it is not
    complete; otherwise they are decoded as they are drawn. The training loader is endless and its length is the number of
    steps in an epoch; both give dicts with `pixel_values` (B, 3, S, S) in [-1, 1] or the latents in its place.
    """
    train_set, eval_set = datasets or open_datasets(args)
    place = {"rank": accelerator.process_index, "world": accelerator.num_processes} if accelerator else {}
    train_loader = dataloader.train_loader
    if args.cache_latents and vae1 is not None and vae2 is not None:
        train_set = cache_latents(
            train_set,
            Codec(vae1),
            Codec(vae2),
            with_images=needs_pixels(args),
            root=args.latent_cache_dir,
            views=args.cache_views,
            num_workers=args.num_workers,
            sample=args.sample_posterior,
            barrier=accelerator.wait_for_everyone if accelerator else None,
            **place,
        )
        train_loader = cached_loader
    return (
        train_loader(train_set, args.train_batch_size, args.num_workers, args.seed, views=args.cache_views, **place),
        dataloader.eval_loader(eval_set, args.eval_batch_size, args.num_workers),
    )


def setup_optimizer(pipeline: PipelineWithVAEs, args: argparse.Namespace) -> torch.optim.Optimizer:
    """The optimizer that --optimizer names, over the align module's parameters and no others; AdamW in one fused kernel
    where the device has it."""
    module = pipeline.training_module
    options = {"lr": args.learning_rate, "weight_decay": args.weight_decay, "fused": pipeline.device.type in ("cuda", "cpu")}
    if args.optimizer == "adamw":
        return torch.optim.AdamW(module.parameters(), **options)
    matrices = module.hidden_weights()
    known = {id(weight) for weight in matrices}
    return Muon(matrices, [parameter for parameter in module.parameters() if id(parameter) not in known], **options)


@torch.no_grad()
def update_average(average: AlignModule, module: AlignModule, decay: float, step: int) -> None:
    """Exponential moving average of the weights after `step` steps. Its decay grows from 0, a copy, over 1/6 to `decay`, so
    that short runs are averaged too. (torch's `AveragedModel` keeps its count on the device and waits for it in every step.)"""
    decay = min(decay, step / (10 + step)) if step > 1 else 0.0
    torch._foreach_lerp_(list(average.parameters()), list(module.parameters()), 1 - decay)


def create_accelerator(args: argparse.Namespace):
    """Accelerate's view of this process: its device, precision and place among the others."""
    from accelerate import Accelerator, InitProcessGroupKwargs
    from accelerate.state import AcceleratorState

    device = torch.device(args.device)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # Accelerate takes the current one
    precision = ACCELERATE_NAMES[get_dtype(args.precision)]
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != precision:
        AcceleratorState._reset_state()  # a second run in one interpreter may want another precision
    # the others wait while the main process evaluates, or while another run builds the cache: longer than the usual ten minutes
    patience = InitProcessGroupKwargs(timeout=datetime.timedelta(hours=12))
    return Accelerator(cpu=device.type == "cpu", mixed_precision=precision, kwargs_handlers=[patience])


def seed_of_step(seed: int, step: int, process: int) -> int:
    """A seed of its own for every step and process."""
    return int(np.random.SeedSequence((seed, step, process)).generate_state(1)[0])


def endless(loader):
    while True:
        yield from loader


# ----------------------------------------------------------------------------------------------------------------------
# Training


def train_align_pipeline(args, vae1, vae2, train_loader, eval_loader, generator) -> Path | None:
    """Train an align module between two frozen VAEs; returns the final checkpoint's path (None on a helper process).

    Args:
        args: as from `parse_args`, with device and precision resolved; `args.resumed`, where there is one, is the content of
            the checkpoint to go on from and `args.resumed_from` its path.
        train_loader: batches with `pixel_values` and `path`, forever or epoch by epoch; its length is the steps in an epoch,
            its `batch_sampler` knows its `batch_size`.
        eval_loader: one pass over the evaluation images.
        generator: draws posterior samples under --sample_posterior; seeded anew for each step.

    On SIGINT or SIGTERM it finishes the step, saves, and leaves by SystemExit with 128 + the signal's number.
    """
    accelerator = create_accelerator(args)
    main_process = accelerator.is_main_process
    resumed = getattr(args, "resumed", None)
    torch.manual_seed(args.seed)
    dtype = get_dtype(args.precision)
    pipeline = create_align_pipeline(vae1, vae2, args).to(accelerator.device)
    pipeline.progress["config"] = config_dict(args)
    objective = Objective(pipeline, args)
    order = data_order(train_loader, accelerator.num_processes)
    source = getattr(getattr(train_loader.dataset, "dataset", train_loader.dataset), "source", None)
    files = names_digest(source.paths if source else None)
    facts = {"train_batch_size": args.train_batch_size, "image_size": args.image_size, "precision": args.precision}
    if resumed:
        require_same_order(resumed["training"]["order"], order)
    with memory_advice("looking at the first images", **facts):
        if not resumed and pipeline.uses_latents and not args.load_checkpoint:
            fit_ridge(pipeline, train_loader, accelerator)
            if args.init == "ridge":
                pipeline.module.start_from_ridge()
        if objective.decoded and resumed and resumed["training"]["colours"]:
            objective.decoded.load_state_dict(resumed["training"]["colours"])
        elif objective.decoded:
            fit_colours(objective.decoded, pipeline, train_loader, accelerator)

    steps_per_epoch = args.steps_per_epoch = len(train_loader)
    end = total_steps(args)
    optimizer = setup_optimizer(pipeline, args)
    scheduler = setup_scheduler(optimizer, args)
    fused_optimizer = optimizer
    trained = pipeline.training_module
    average = copy.deepcopy(trained).requires_grad_(False) if args.ema_decay else None
    if average:
        pipeline.module = average  # what is judged and saved
    module, optimizer = accelerator.prepare(trained, optimizer)
    parts = {"trained": trained, "average": average, "optimizer": fused_optimizer, "scheduler": scheduler}
    parts["scaler"] = accelerator.scaler
    module = torch.compile(module) if args.compile else module

    step, metrics, bad_steps = 0, {}, BadSteps(args.max_bad_steps, accelerator)
    loss_sum = torch.zeros((), device=accelerator.device)
    summed_steps = torch.zeros((), device=accelerator.device)
    if resumed:
        training = resumed["training"]
        restore_training(training["state"], **parts)
        step = train_loader.batch_sampler.first_step = resumed["step"]
        same_images = resumed["config"].get("eval_data_dir") == args.eval_data_dir
        metrics = pipeline.progress["metrics"] = resumed["metrics"] if same_images else {}
        bad_steps.total, bad_steps.in_a_row = training["bad_steps"], training["bad_steps_in_a_row"]
        loss_sum += training["loss_sum"].to(loss_sum.device)
        summed_steps += training["summed_steps"]

    run_name = resumed["run"] if resumed else f"align_{next_stamp(args.log_dir, 'align')}"
    kept = RunCheckpoints(
        pipeline, args.save_dir, run_name, args.keep_last, args.best_metric,
        resumed["training"] if resumed else None, args.resumed_from if resumed else None,
    )  # fmt: skip
    writer = open_writer(Path(args.log_dir) / run_name, step) if main_process else None
    parameters = sum(parameter.numel() for parameter in pipeline.module.parameters())
    batch_size = train_loader.batch_sampler.batch_size * accelerator.num_processes
    if main_process:
        log.info(
            "%s inputs, %.2f M parameters, %d steps of %s in %s on %s in %s channels_last, %s",
            " + ".join(pipeline.config.input_types), parameters / 1e6, end, count_of(batch_size, "image"),
            count_of(-(-end // steps_per_epoch), "epoch"), accelerator.device, args.precision,
            count_of(accelerator.num_processes, "process"),
        )  # fmt: skip

    def save():
        """Write all that is known after `step` steps; events first, so that no logged point is missing after a resume."""
        bad_steps.read()
        training = {
            "state": training_state(**parts),
            "colours": objective.decoded.state_dict() if objective.decoded else {},
            "order": order,
            "files": files,
            "loss_sum": loss_sum.cpu(),
            "summed_steps": summed_steps.cpu(),
            "bad_steps": bad_steps.total,
            "bad_steps_in_a_row": bad_steps.in_a_row,
        }
        writer.flush()
        path = kept.save(config_dict(args), step, step / steps_per_epoch, metrics, training)
        save_config(args, args.config_save_path or path.with_suffix(".json"))

    batches = endless(train_loader)
    unreadable, arrived = set(), step  # where a resumed run arrives, everything that was due has been done

    with StopRequest() as stop, memory_advice("training", **facts):
        bar = tqdm(total=end, initial=step, desc="train", unit="step", disable=not main_process)
        clock, clocked_step = time.perf_counter(), step
        while True:
            # ---- where we are: the clock is the step, epochs are counted from it
            epoch, last, new = step / steps_per_epoch, step == end, step > arrived or not resumed
            due = functools.partial(is_due, epoch, last)

            # ---- evaluate, visualise, save
            paused, saved = time.perf_counter(), not new
            if main_process and new and due(args.eval_frequency):
                metrics = evaluate_and_log(pipeline, eval_loader, writer, epoch, args, dtype)
                kept.save_if_best(config_dict(args), step, epoch, metrics)
                log_model_stats(pipeline, eval_loader, writer, epoch, args, dtype)
            if main_process and new and due(args.visualize_frequency):
                visualize_results(pipeline, eval_loader, writer, epoch, args, dtype)
            if main_process and new and save_is_due(step, epoch, last, args):
                save()
                saved = True
            if step % steps_per_epoch == 0 or last:
                accelerator.wait_for_everyone()
            stopped = stop.agreed(accelerator, step)
            if stopped and main_process and not saved:
                save()
            if stopped:
                accelerator.wait_for_everyone()  # a launcher ends the others when the first one leaves
            if last or stopped:
                break
            clock += time.perf_counter() - paused  # images/s is the training's own

            # ================================================ one step ================================================
            batch = next(batches)

            # encode
            if args.sample_posterior:
                generator.manual_seed(seed_of_step(args.seed, step, accelerator.process_index))
            inputs, target = pipeline.encode_batch(batch, args.sample_posterior, generator)

            # align
            aligned = module(**inputs).float()

            # loss
            loss = objective(aligned, target, batch.get("pixel_values"), step)

            # backward
            optimizer.zero_grad(set_to_none=True)
            accelerator.backward(loss)

            # clip
            grad_norm = accelerator.clip_grad_norm_(module.parameters(), args.grad_clip or math.inf)

            # step
            learning_rate = fused_optimizer.param_groups[0]["lr"]
            ok = bad_steps.mask(fused_optimizer, loss, grad_norm)
            optimizer.step()
            scheduler.step()
            step += 1
            if average:
                update_average(average, trained, args.ema_decay, step)
            if objective.decoded:
                objective.decoded.correct_colours(ok, accelerator)
            # ==========================================================================================================

            # ---- log: the only place that waits for the device
            loss_sum += torch.where(ok, loss.detach(), 0)
            summed_steps += ok
            bad_steps.note(ok, step, batch["path"])
            for message in set(batch.get("unreadable", ())) - unreadable:
                unreadable.add(message)
                with logging_redirect_tqdm():
                    log.warning("left out: %s", message)
            if step == 1 or step % args.log_frequency == 0 or step == end:
                skipped = bad_steps.read()
                mean_loss = accelerator.reduce(loss_sum / summed_steps, "mean").item()
                now = time.perf_counter()
                rate = (step - clocked_step) * batch_size / (now - clock)
                if main_process:
                    if skipped:
                        with logging_redirect_tqdm():
                            log.warning("step %d: %s skipped, loss or gradient not finite", step, count_of(skipped, "step"))
                    if math.isfinite(mean_loss):
                        writer.add_scalar("train/loss", mean_loss, step)
                    writer.add_scalar("train/learning_rate", learning_rate, step)
                    if ok:
                        writer.add_scalar("train/grad_norm", float(grad_norm), step)
                    writer.add_scalar("train/images_per_second", rate, step)
                    writer.add_scalar("train/skipped_steps", bad_steps.total, step)
                    bar.set_postfix(loss=f"{mean_loss:.4f}", images_per_s=f"{rate:.1f}")
                loss_sum.zero_()
                summed_steps.zero_()
                clock, clocked_step = now, step
            bar.update()

    bar.close()
    if main_process and last and metrics:
        log_hparams(writer, config_dict(args), metrics, step)
    if writer:
        writer.close()
    if not last:
        if main_process:
            print(f"stopped at step {step} of {end}, saved in {kept.last}\nto go on: the same command with --resume")
        raise SystemExit(128 + stopped)
    if not main_process:
        return None
    if unreadable:
        log.warning("%s left out during training", count_of(len(unreadable), "unreadable image"))
    if bad_steps.total:
        log.warning("%s skipped: loss or gradient not finite", count_of(bad_steps.total, "step"))
    print_results(kept, metrics, step, args)
    return kept.last


# ----------------------------------------------------------------------------------------------------------------------


def dry_run(args: argparse.Namespace, vae1, vae2, accelerator, datasets) -> None:
    """Build every part but the latent cache, try it once, and print what the run would take. Writes nothing."""
    views, args.cache_latents = args.cache_views if args.cache_latents else 0, False
    loaders = create_data_loaders(args, vae1, vae2, accelerator, datasets)
    args.steps_per_epoch = len(loaders[0])
    torch.manual_seed(args.seed)
    pipeline = create_align_pipeline(vae1, vae2, args).to(accelerator.device)
    objective = Objective(pipeline, args)
    optimizer = setup_optimizer(pipeline, args)
    print_plan(args, pipeline, loaders, objective, optimizer, total_steps(args), views, needs_pixels(args), accelerator)


def adopt_resumed(args: argparse.Namespace) -> bool:
    """With --resume, find the checkpoint and take its flags; returns whether that run is already finished."""
    args.resumed = None
    for name in ("resume", "load_checkpoint"):
        if getattr(args, name) == "":  # an unset variable in a job's script
            raise UserError(f"--{name} '': names nothing; leave the flag out to start anew")
    found = find_checkpoint(args.resume, args.save_dir) if args.resume else None
    if not found:
        if args.resume:
            log.warning("--resume: no checkpoint in %s, starting fresh", args.save_dir)
        return False
    args.resumed_from, args.resumed = found
    parser = build_parser()
    config = {name: value for name, value in args.resumed["config"].items() if name in parser.settings()}
    adopt_flags(args, parser.check_config(config, f"--resume {args.resumed_from}"))
    args.steps_per_epoch = args.resumed["training"]["order"]["steps in an epoch"]
    step, end = args.resumed["step"], total_steps(args)
    if step >= end:
        print(f"already finished: {args.resumed_from} stands at step {step} of {end}; to train on, give more --epochs")
        return True
    log.info("going on from %s, step %d of %d", args.resumed_from, step, end)
    return False


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    use_proxy(args.proxy)
    with naming("--device"):
        args.device = str(resolve_device(args.device, "device" in args.typed_flags))
    keep_freed_memory(torch.device(args.device))
    args.precision = resolve_precision(args.precision, torch.device(args.device), "precision" in args.typed_flags)
    if adopt_resumed(args):
        return
    adopt_architecture(args)
    claim_outputs(args)

    if args.compile:
        with naming("--compile"):
            require_compiler(torch.device(args.device))

    accelerator = create_accelerator(args)
    datasets = open_datasets(args)
    if args.resumed:
        files, processes = datasets[0].source.paths, accelerator.num_processes
        require_same_files(args.resumed["training"], files, processes, args.train_data_dir)
    vaes = [
        load_vae_model(path, subfolder, args.cache_dir, accelerator.device, get_dtype(args.precision), flag)
        for path, subfolder, flag in (
            (args.vae1_path, args.vae1_subfolder, "--vae1_path"),
            (args.vae2_path, args.vae2_subfolder, "--vae2_path"),
        )
    ]
    good_image_size(args.image_size, *(Codec(vae).stride for vae in vaes))
    Objective(create_align_pipeline(*vaes, args), args)  # what does not fit together is said before anything is encoded
    if accelerator.is_main_process:
        say_what_is_odd(args, len(datasets[0]), accelerator.num_processes)
    if args.dry_run:
        return dry_run(args, *vaes, accelerator, datasets)
    loaders = create_data_loaders(args, *vaes, accelerator, datasets)
    if args.cache_only:
        if accelerator.is_main_process:
            print(f"latent cache complete: {args.latent_cache_dir}")
        return
    log.info("%s to train on, %s to judge by", *(count_of(len(loader.dataset), "image") for loader in loaders))
    generator = torch.Generator(accelerator.device).manual_seed(args.seed + accelerator.process_index)
    try:
        train_align_pipeline(args, *vaes, *loaders, generator)
    except OSError as error:
        raise UserError(f"{one_line(error)}: mend that, then go on with the same command and --resume") from error
    finally:
        accelerator.end_training()


if __name__ == "__main__":
    run(main)
