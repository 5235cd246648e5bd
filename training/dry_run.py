"""--dry_run: one real step and one real evaluation batch, and what the whole run would take by them. Writes nothing."""

from __future__ import annotations

import itertools
import time

from evaluation.ladder import evaluate
from runtime.device import get_dtype, peak_memory
from utils import count_of


def print_plan(args, pipeline, loaders, objective, optimizer, steps: int, views: int, cached_pixels: bool, accelerator) -> None:
    """Try everything once and print what the run would take.

    Args:
        loaders: (training, evaluation), without a latent cache.
        objective: `objective.Objective`; steps: in the whole run.
        views: of each image in the latent cache, 0 without one; cached_pixels: whether it holds the images too.
    """
    train_loader, eval_loader = loaders
    batch = next(iter(train_loader))
    encoded = {}

    def encode():
        encoded["inputs"], encoded["target"] = pipeline.encode_batch(batch)
        encoded["target"].sum().item()  # waits for the device

    def step():
        with accelerator.autocast():
            aligned = pipeline.training_module(**encoded["inputs"]).float()
        loss = objective(aligned, encoded["target"], batch["pixel_values"], 0)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        loss.item()

    def judge():
        evaluate(pipeline, itertools.islice(eval_loader, 1), get_dtype(args.precision), show_progress=False)

    encoding, stepping, judging = _seconds(encode), _seconds(step), _seconds(judge)
    if not accelerator.is_main_process:
        return

    images, batch_size = len(train_loader.dataset), args.train_batch_size * accelerator.num_processes
    view_bytes = 2 * sum(  # float16 latents, 8-bit pixels
        tensor[0].numel() for tensor in (encoded["target"], encoded["inputs"].get("latents")) if tensor is not None
    )
    view_bytes += batch["pixel_values"][0].numel() if cached_pixels else 0
    weight_bytes = 4 * sum(parameter.numel() for parameter in pipeline.module.parameters())
    moment_bytes = 4 * sum(moment.numel() for moments in optimizer.state.values() for moment in moments.values())
    checkpoint_bytes = (2 if args.ema_decay else 1) * weight_bytes + moment_bytes
    encoded_images = images * views if views else steps * batch_size
    evaluations = 1 + -(-steps // (args.eval_frequency * len(train_loader))) if args.eval_frequency else 0
    seconds = steps * stepping + encoded_images / batch_size * encoding + evaluations * len(eval_loader) * judging
    print(
        f"dry run: one step and one evaluation batch went well; nothing was written\n"
        f"steps:            {steps} ({len(train_loader)} in an epoch) of {count_of(batch_size, 'image')}\n"
        f"images:           {images} to train on, {len(eval_loader.dataset)} to judge by\n"
        f"expected time:    {seconds / 60:.1f} minutes ({stepping:.2f} s a step, {encoding:.2f} s to encode a batch, "
        f"{count_of(evaluations, 'evaluation')})\n"
        f"latent cache:     {images * views * view_bytes / 1e6:.0f} MB for {count_of(views, 'view')} of each image\n"
        f"a checkpoint:     {checkpoint_bytes / 1e6:.1f} MB\n"
        f"peak memory:      {peak_memory(accelerator.device) / 1e9:.1f} GB"
    )


def _seconds(work) -> float:
    work()  # the first time also compiles and allocates
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
