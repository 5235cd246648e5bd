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
import functools
import logging
import math
import re
import time
from pathlib import Path

import numpy as np
import torch
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

import dataloader
import report
from cli import Parser, integer, load_config, real, run
from decoded_loss import DecodedImageLoss
from device import ACCELERATE_NAMES, PRECISIONS, get_dtype, keep_freed_memory, resolve_device, resolve_precision
from eval_align import applicable_rows, comparison_panels, evaluate, reconstruct, translators
from losses import LOSSES, checked_loss_term, get_loss_function, loss_term
from ridge import RidgeRegression
from utils import UserError, claim_writable_file, claim_writable_folder, count_of, next_stamp, use_proxy, write_json
from vae_align import (
    AlignConfig,
    AlignModule,
    AlignPipeline,
    LatentSpace,
    build_module,
    good_image_size,
    load_vae_model,
    read_checkpoint,
)

__all__ = ["get_dtype", "get_loss_function", "load_config", "load_vae_model"]  # part of this script's interface

log = logging.getLogger("train_align")

RIDGE_IMAGES = 512  # training images behind the closed-form linear map: half a million equations at 256 px


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

    group = parser.add_argument_group("optimizer (AdamW)")
    group.add_argument("--learning_rate", type=real(0, 1e3), default=1e-3, help="after warm-up")
    group.add_argument("--weight_decay", type=real(0, 1e3), default=1e-4, help="decoupled weight decay; 0: none")
    group.add_argument("--grad_clip", type=real(0), default=0.0, help="largest gradient norm; 0: no clipping")
    group.add_argument("--ema_decay", type=real(0, 0.99999), default=0.0,
                       help="per step, of the averaged weights that are judged and saved; 0: no averaging")  # fmt: skip
    parser.add_switch(group, "compile", False, "torch.compile the module: slower to start, faster to run")

    group = parser.add_argument_group("schedule")
    group.add_argument("--scheduler", choices=("step", "cosine"), default="step",
                       help="step: decays by epochs as below; cosine: to zero over the whole run")  # fmt: skip
    group.add_argument("--scheduler_step_size", type=integer(1), default=50, help="epochs between decays of the learning rate")
    group.add_argument("--scheduler_gamma", type=real(0, 1, above=True), default=0.5, help="factor of each decay; 1: none")

    group = parser.add_argument_group("loss")
    group.add_argument("--loss_type", choices=LOSSES, default="mse", help="between aligned and VAE2's scaled latents")
    group.add_argument("--loss_weight", type=real(0, 1e6, above=True), default=1.0, help="factor of the loss")
    group.add_argument(
        "--extra_losses", nargs="+", type=checked_loss_term, default=[], metavar="NAME=WEIGHT", help="more latent losses"
    )
    group.add_argument("--decoder_loss_weight", type=real(0, 1e6), default=0.0,
                       help="factor of an L1 loss on the image that VAE2 decodes; 0: none")  # fmt: skip
    group.add_argument("--decoder_loss_batch", type=integer(1, 65536), default=4, help="images of each batch that are decoded")
    group.add_argument("--decoder_loss_window", type=integer(0, 4096), default=16,
                       help="side of the random window that is decoded, latents; 0: the whole image")  # fmt: skip
    group.add_argument("--decoder_loss_reference", choices=("original", "vae2"), default="original",
                       help="what the decoded image should look like: the image, or VAE2's own reconstruction")  # fmt: skip
    group.add_argument("--decoder_loss_path", help="a cheaper VAE with VAE2's latent space to decode with: folder or hub id")
    group.add_argument("--decoder_loss_subfolder", default="vae", help="where that VAE is in its folder")

    group = parser.add_argument_group("logging, evaluation, checkpoints")
    group.add_argument("--log_dir", default="runs", help="TensorBoard logs; each run gets a folder of its own in it")
    group.add_argument("--save_dir", default="ckpt_align", help="checkpoints, each beside its config")
    group.add_argument("--log_frequency", type=integer(1), default=10, help="steps between log entries")
    group.add_argument("--eval_frequency", type=integer(0), default=1, help="epochs between evaluations; 0: never")
    group.add_argument("--save_frequency", type=integer(0), default=1, help="epochs between checkpoints; 0: only at the end")
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
    names = {action.dest for action in build_parser()._actions} - {"help", "load_config"}
    config = {name: value for name, value in vars(args).items() if name in names}
    if config.get("proxy"):
        config["proxy"] = re.sub(r"^([\w+.-]+://)?.*@", r"\1", config["proxy"])
    return config


# ----------------------------------------------------------------------------------------------------------------------
# Parts


def adopt_architecture(args: argparse.Namespace) -> None:
    """With --load_checkpoint, set the module's flags to the checkpoint's; UserError if a typed one contradicts."""
    if not args.load_checkpoint:
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


def create_align_pipeline(vae1, vae2, args: argparse.Namespace) -> AlignPipeline:
    """The pipeline between two frozen VAEs, with the architecture of `args`, or of `args.load_checkpoint` and its weights.

    Channels and strides are the VAEs'; `args.out_channels` is set to what VAE2 has, unless it was typed and contradicts.
    """
    space1 = LatentSpace(vae1, getattr(args, "vae1_path", None), getattr(args, "vae1_subfolder", None))
    space2 = LatentSpace(vae2, getattr(args, "vae2_path", None), getattr(args, "vae2_subfolder", None))
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
    if args.load_checkpoint:
        content = read_checkpoint(args.load_checkpoint)
        trained_for = AlignConfig(**content["align_config"])
        for name in ("latent_channels", "latent_stride", "out_channels", "out_stride"):
            if getattr(config, name) != getattr(trained_for, name):
                raise UserError(
                    f"--load_checkpoint {args.load_checkpoint}: trained for VAEs with {name} {getattr(trained_for, name)}, "
                    f"these have {getattr(config, name)}"
                )
        module.load_state_dict(content["state_dict"])
    return AlignPipeline(module, space1, space2)


def create_data_loaders(args: argparse.Namespace, vae1=None, vae2=None, accelerator=None):
    """(training loader, evaluation loader) of this process.

    With --cache_latents and both VAEs, training batches come from the latent cache, which is built first where it is not
    complete; otherwise they are decoded as they are drawn. The training loader is endless and its length is the number of
    steps in an epoch; both give dicts with `pixel_values` (B, 3, S, S) in [-1, 1] or the latents in its place. UserError
    when a folder is missing, empty, or holds no readable image.
    """
    dataloader.require_memory(args.eval_batch_size, args.image_size, "--eval_batch_size")
    if needs_pixels(args) or not args.cache_latents:
        dataloader.require_memory(args.train_batch_size, args.image_size, "--train_batch_size")
    datasets = []
    for flag, folder, train in (("train", args.train_data_dir, True), ("eval", args.eval_data_dir, False)):
        source = dataloader.open_dataset(folder, args.dataset_type, train, f"--{flag}_data_dir", args.cache_dir)
        options = {"random_crop": True, "random_flip": args.random_flip, "seed": args.seed} if train else {}
        dataset = dataloader.ImageDataset(source, args.image_size, **options)
        dataset.require_readable(f"--{flag}_data_dir {folder}")
        datasets.append(dataset)
    train_set, eval_set = datasets
    place = {"rank": accelerator.process_index, "world": accelerator.num_processes} if accelerator else {}
    if args.cache_latents and vae1 is not None and vae2 is not None:
        train_set = dataloader.cache_latents(
            train_set,
            LatentSpace(vae1),
            LatentSpace(vae2),
            with_images=needs_pixels(args),
            root=args.latent_cache_dir,
            views=args.cache_views,
            num_workers=args.num_workers,
            sample=args.sample_posterior,
            barrier=accelerator.wait_for_everyone if accelerator else None,
            **place,
        )
    return (
        dataloader.train_loader(train_set, args.train_batch_size, args.num_workers, args.seed, views=args.cache_views, **place),
        dataloader.eval_loader(eval_set, args.eval_batch_size, args.num_workers),
    )


def setup_optimizer(pipeline: AlignPipeline, args: argparse.Namespace) -> torch.optim.Optimizer:
    """AdamW over the align module's parameters, and no others; one fused kernel where the device has it."""
    fused = pipeline.device.type in ("cuda", "cpu")
    return torch.optim.AdamW(
        pipeline.training_module.parameters(), lr=args.learning_rate, weight_decay=args.weight_decay, fused=fused
    )


def setup_scheduler(optimizer: torch.optim.Optimizer, args: argparse.Namespace) -> torch.optim.lr_scheduler.LambdaLR:
    """Warm-up by steps times StepLR by epochs; to be stepped once per optimizer step, on one process or many.

        lr(step) = learning_rate · min(1, (step + 1) / warmup_steps) · gamma^(epoch // step_size)

    with epoch = step // `args.steps_per_epoch`, which `train_align_pipeline` sets (1 where it is not set). Under
    `--scheduler cosine` the last factor is (1 + cos(pi · step / total_steps)) / 2 instead.
    """
    steps_per_epoch = getattr(args, "steps_per_epoch", 1)

    def factor(step):
        warmup = min(1.0, (step + 1) / args.warmup_steps) if args.warmup_steps else 1.0
        if args.scheduler == "cosine":
            return warmup * (1 + math.cos(math.pi * min(1.0, step / total_steps(args)))) / 2
        return warmup * args.scheduler_gamma ** (step // steps_per_epoch // args.scheduler_step_size)

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def total_steps(args: argparse.Namespace) -> int:
    """Optimizer steps in the whole run."""
    steps = args.epochs * getattr(args, "steps_per_epoch", 1)
    return min(steps, args.max_train_steps) if args.max_train_steps else steps


def setup_losses(pipeline: AlignPipeline, args: argparse.Namespace):
    """(the latent terms as [(weight, function)], the `DecodedImageLoss` or None)."""
    terms = [(args.loss_weight, get_loss_function(args.loss_type))]
    terms += [(weight, get_loss_function(name)) for name, weight in map(loss_term, args.extra_losses)]
    if not args.decoder_loss_weight:
        return terms, None
    space = pipeline.space2
    if args.decoder_loss_path:
        flag = "--decoder_loss_path"
        vae = load_vae_model(
            args.decoder_loss_path, args.decoder_loss_subfolder, args.cache_dir, space.vae.device, space.vae.dtype, flag
        )
        space = LatentSpace(vae, args.decoder_loss_path, args.decoder_loss_subfolder)
        if (space.channels, space.stride) != (pipeline.space2.channels, pipeline.space2.stride):
            raise UserError(f"{flag} {args.decoder_loss_path}: its latent space is not VAE2's (other channels or stride)")
    reference = args.decoder_loss_reference
    return terms, DecodedImageLoss(space, args.decoder_loss_batch, args.decoder_loss_window, reference, args.seed)


def needs_pixels(args: argparse.Namespace) -> bool:
    """Whether training batches must carry the image beside its latents."""
    return "image" in args.input_types or bool(args.decoder_loss_weight and args.decoder_loss_reference == "original")


def fit_ridge(pipeline: AlignPipeline, loader, args: argparse.Namespace, accelerator) -> None:
    """Fit the closed-form linear map on about `RIDGE_IMAGES` training images; with --init ridge, start from it."""
    regression = RidgeRegression(pipeline.module.linear.in_channels, pipeline.config.out_channels)
    wanted = min(RIDGE_IMAGES, len(loader.dataset))
    for batch in loader:
        inputs, target = pipeline.encode_batch(batch)
        regression.add(pipeline.module.on_output_grid(inputs["latents"]), target)
        wanted -= len(target) * accelerator.num_processes
        if wanted <= 0:
            break
    if accelerator.num_processes > 1:  # every process adds what it saw, and all start from the same map
        for name in ("xx", "xy"):
            setattr(regression, name, accelerator.reduce(getattr(regression, name).to(accelerator.device), "sum").cpu())
    pipeline.module.remember_ridge(*regression.solve())
    if args.init == "ridge":
        pipeline.module.start_from_ridge()


def average_weights(module: AlignModule, decay: float) -> AveragedModel:
    """Exponential moving average of the weights; its decay grows from 1/11 to `decay`, so short runs are averaged too."""

    @torch.no_grad()
    def update(averages, currents, count):
        torch._foreach_lerp_(averages, currents, 1 - min(decay, (1 + float(count)) / (11 + float(count))))

    return AveragedModel(module, multi_avg_fn=update)


def create_accelerator(args: argparse.Namespace):
    """Accelerate's view of this process: its device, precision and place among the others."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    device = torch.device(args.device)
    precision = ACCELERATE_NAMES[get_dtype(args.precision)]
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != precision:
        AcceleratorState._reset_state()  # a second run in one interpreter may want another precision
    return Accelerator(cpu=device.type == "cpu", mixed_precision=precision)


def is_due(epoch: float, last: bool, frequency: int) -> bool:
    """Whether something that happens every `frequency` epochs (0: never) happens now; the last step always counts."""
    return frequency > 0 and (last or epoch % frequency == 0)


def endless(loader):
    while True:
        yield from loader


# ----------------------------------------------------------------------------------------------------------------------
# Training


def train_align_pipeline(args, vae1, vae2, train_loader, eval_loader, generator) -> Path | None:
    """Train an align module between two frozen VAEs; returns the final checkpoint's path (None on a helper process).

    Args:
        args: as from `parse_args`, with device and precision resolved.
        train_loader: batches with `pixel_values`, forever or epoch by epoch; its length is the steps in an epoch.
        eval_loader: one pass over the evaluation images.
        generator: draws posterior samples under --sample_posterior.
    """
    from torch.utils.tensorboard import SummaryWriter

    accelerator = create_accelerator(args)
    main_process = accelerator.is_main_process
    torch.manual_seed(args.seed)
    dtype = get_dtype(args.precision)
    pipeline = create_align_pipeline(vae1, vae2, args).to(accelerator.device)
    terms, decoded_loss = setup_losses(pipeline, args)
    if pipeline.uses_latents and not args.load_checkpoint:
        fit_ridge(pipeline, train_loader, args, accelerator)

    steps_per_epoch = args.steps_per_epoch = len(train_loader)
    end = total_steps(args)
    optimizer = setup_optimizer(pipeline, args)
    scheduler = setup_scheduler(optimizer, args)
    trained = pipeline.training_module
    average = average_weights(trained, args.ema_decay) if args.ema_decay else None
    if average:
        pipeline.module = average.module  # what is judged and saved
    module, optimizer = accelerator.prepare(trained, optimizer)
    module = torch.compile(module) if args.compile else module

    run_name = next_stamp(args.log_dir, "align")
    writer = SummaryWriter(Path(args.log_dir) / f"align_{run_name}") if main_process else None
    parameters = sum(parameter.numel() for parameter in pipeline.module.parameters())
    batch_size = train_loader.batch_sampler.batch_size * accelerator.num_processes
    if main_process:
        log.info(
            "%s inputs, %.2f M parameters, %d steps of %s in %s on %s in %s channels_last, %s",
            " + ".join(pipeline.config.input_types), parameters / 1e6, end, count_of(batch_size, "image"),
            count_of(-(-end // steps_per_epoch), "epoch"), accelerator.device, args.precision,
            count_of(accelerator.num_processes, "process"),
        )  # fmt: skip

    batches = endless(train_loader)
    loss_sum = torch.zeros((), device=accelerator.device)
    summed_steps, step, metrics, checkpoint, unreadable = 0, 0, {}, None, set()
    bar = tqdm(total=end, desc="train", unit="step", disable=not main_process)
    clock = time.perf_counter()

    while True:
        # ---- where we are: the clock is the step, epochs are counted from it
        epoch, last = step / steps_per_epoch, step == end
        due = functools.partial(is_due, epoch, last)

        # ---- evaluate, visualise, save
        paused = time.perf_counter()
        if main_process and due(args.eval_frequency):
            metrics = evaluate_and_log(pipeline, eval_loader, writer, epoch, args, dtype)
            log_model_stats(pipeline, eval_loader, writer, epoch, args, dtype)
        if main_process and due(args.visualize_frequency):
            visualize_results(pipeline, eval_loader, writer, epoch, args, dtype)
        if main_process and (last or (step and due(args.save_frequency))):
            checkpoint = pipeline.save_checkpoint(args.save_dir, config_dict(args), step, epoch, metrics)
            save_config(args, args.config_save_path or checkpoint.with_suffix(".json"))
        if step % steps_per_epoch == 0 or last:
            accelerator.wait_for_everyone()
        if last:
            break
        clock += time.perf_counter() - paused  # images/s is the training's own

        # ================================================== one step ==================================================
        batch = next(batches)

        # encode
        inputs, target = pipeline.encode_batch(batch, args.sample_posterior, generator)

        # align
        aligned = module(**inputs).float()

        # loss
        loss = sum(weight * term(aligned, target) for weight, term in terms)
        if decoded_loss:
            loss = loss + args.decoder_loss_weight * decoded_loss(aligned, target, batch.get("pixel_values"), step)

        # backward
        optimizer.zero_grad(set_to_none=True)
        accelerator.backward(loss)

        # clip
        log_due = step % args.log_frequency == 0 or step + 1 == end
        if args.grad_clip or log_due:
            grad_norm = accelerator.clip_grad_norm_(module.parameters(), args.grad_clip or math.inf)

        # step
        learning_rate = optimizer.param_groups[0]["lr"]
        optimizer.step()
        scheduler.step()
        if average:
            average.update_parameters(trained)
        # ==============================================================================================================

        # ---- log: the only place that waits for the device
        loss_sum += loss.detach()
        summed_steps += 1
        for message in set(batch.get("unreadable", ())) - unreadable:
            unreadable.add(message)
            with logging_redirect_tqdm():
                log.warning("left out: %s", message)
        if log_due:
            mean_loss = accelerator.reduce(loss_sum / summed_steps, "mean").item()
            if not math.isfinite(mean_loss):
                raise UserError(f"the loss is {mean_loss} at step {step}: lower --learning_rate or set --grad_clip 1")
            now = time.perf_counter()
            rate = summed_steps * batch_size / (now - clock)
            if main_process:
                writer.add_scalar("train/loss", mean_loss, step)
                writer.add_scalar("train/learning_rate", learning_rate, step)
                writer.add_scalar("train/grad_norm", float(grad_norm), step)
                writer.add_scalar("train/images_per_second", rate, step)
                bar.set_postfix(loss=f"{mean_loss:.4f}", images_per_s=f"{rate:.1f}")
            loss_sum.zero_()
            summed_steps, clock = 0, now
        step += 1
        bar.update()

    bar.close()
    if not main_process:
        return None
    writer.close()
    if unreadable:
        log.warning("%s left out during training", count_of(len(unreadable), "unreadable image"))
    if metrics:
        psnr = {row: figures["psnr"] for row, figures in metrics.items()}
        print(
            f"PSNR of the decoded image: untrained module {psnr['untrained']:.2f} dB -> aligned {psnr['aligned']:.2f} dB "
            f"(decode + re-encode {psnr['reencode']:.2f} dB, VAE2's own reconstruction {psnr['ceiling']:.2f} dB)"
        )
    print(f"checkpoint: {checkpoint}\nTensorBoard: tensorboard --logdir {args.log_dir}")
    return checkpoint


def evaluate_and_log(pipeline, eval_loader, writer, epoch, args, dtype) -> dict:
    """Evaluate the whole set; scalars to TensorBoard at the epoch's step; returns {row: metrics} of the ladder.

    The rungs that training cannot move are measured the first time and drawn again as level lines from then on.
    """
    step = round(epoch * getattr(args, "steps_per_epoch", 1))
    fixed = {row: figures for row, figures in pipeline.progress["metrics"].items() if row != "aligned"}
    rows = ("aligned",) if fixed else applicable_rows(pipeline)
    ladder = pipeline.progress["metrics"] = fixed | evaluate(pipeline, eval_loader, dtype, rows)["ladder"]
    for row, figures in ladder.items():
        for name in ("latent_mse", "psnr", "ssim", "psnr_vs_vae2"):
            if figures[name] is not None:
                writer.add_scalar(f"eval_{name}/{row}", figures[name], step)
    aligned = ladder["aligned"]
    if aligned["latent_mse"] is None:
        raise UserError(f"the module's output is not finite at step {step}: lower --learning_rate or set --grad_clip 1")
    with logging_redirect_tqdm():
        log.info(
            "epoch %g: aligned PSNR %.2f dB (VAE2 itself %.2f, re-encoding %.2f), SSIM %.4f, latent MSE %.4f",
            round(epoch, 2), aligned["psnr"], ladder["ceiling"]["psnr"], ladder["reencode"]["psnr"], aligned["ssim"],
            aligned["latent_mse"],
        )  # fmt: skip
    return ladder


def log_model_stats(pipeline, eval_loader, writer, epoch, args, dtype) -> None:
    """Histograms of weights and of the last step's gradients per layer, and level and spread of the latents."""
    step = round(epoch * getattr(args, "steps_per_epoch", 1))
    for name, parameter in pipeline.training_module.named_parameters():
        writer.add_histogram(f"weights/{name}", parameter.detach().float().cpu(), step)
        if parameter.grad is not None:
            writer.add_histogram(f"gradients/{name}", parameter.grad.float().cpu(), step)
    images = next(iter(eval_loader))["pixel_values"].to(pipeline.device)
    if len(images):
        made = reconstruct(pipeline, images, translators(pipeline, ("ceiling", "aligned"), dtype))
        for name, latents in (("aligned", made["aligned"][0]), ("target", made["ceiling"][0])):
            writer.add_scalar(f"latents_mean/{name}", latents.mean().item(), step)
            writer.add_scalar(f"latents_std/{name}", latents.std().item(), step)
            writer.add_histogram(f"latents/{name}", latents.cpu(), step)


def visualize_results(pipeline, eval_loader, writer, epoch, args, dtype) -> None:
    """The first --num_visualize_samples evaluation images as captioned sheets: reconstructions, differences, latents."""
    step = round(epoch * getattr(args, "steps_per_epoch", 1))
    shown = 0
    for batch in eval_loader:
        images = batch["pixel_values"][: args.num_visualize_samples - shown].to(pipeline.device)
        if not len(images):
            continue
        rows = comparison_panels(images, reconstruct(pipeline, images, translators(pipeline, ("ceiling", "aligned"), dtype)))
        for number in range(len(images)):
            sheet = report.comparison_picture(rows[2 * number : 2 * number + 2], args.image_size)
            writer.add_image(f"samples/{shown + number}", np.asarray(sheet), step, dataformats="HWC")
        shown += len(images)
        if shown >= args.num_visualize_samples:
            break


# ----------------------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    adopt_architecture(args)
    use_proxy(args.proxy)
    args.device = str(resolve_device(args.device, "device" in args.typed_flags))
    keep_freed_memory(torch.device(args.device))
    args.precision = resolve_precision(args.precision, torch.device(args.device), "precision" in args.typed_flags)
    claim_writable_folder(args.save_dir, "--save_dir")
    claim_writable_folder(args.log_dir, "--log_dir")
    if args.config_save_path:
        claim_writable_file(args.config_save_path, "--config_save_path")
    if args.cache_latents:
        claim_writable_folder(args.latent_cache_dir, "--latent_cache_dir")
    elif args.cache_only:
        raise UserError("--cache_only: with --no_cache_latents there is no cache to build; leave one of them out")

    accelerator = create_accelerator(args)
    vaes = [
        load_vae_model(path, subfolder, args.cache_dir, accelerator.device, get_dtype(args.precision), flag)
        for path, subfolder, flag in (
            (args.vae1_path, args.vae1_subfolder, "--vae1_path"),
            (args.vae2_path, args.vae2_subfolder, "--vae2_path"),
        )
    ]
    good_image_size(args.image_size, *(LatentSpace(vae).stride for vae in vaes))
    setup_losses(create_align_pipeline(*vaes, args), args)  # what does not fit together is said before anything is encoded
    loaders = create_data_loaders(args, *vaes, accelerator)
    if args.cache_only:
        print(f"latent cache complete: {args.latent_cache_dir}")
        return
    log.info("%s to train on, %s to judge by", *(count_of(len(loader.dataset), "image") for loader in loaders))
    generator = torch.Generator(accelerator.device).manual_seed(args.seed + accelerator.process_index)
    train_align_pipeline(args, *vaes, *loaders, generator)
    accelerator.end_training()


if __name__ == "__main__":
    run(main)
