"""What a training step takes: its time beside the first recipe's, the share of each term of the loss, and the peak of memory.

    python benchmarks/bench_step.py --vae1 PATH --vae2 PATH --images FOLDER --input_types latent

A step is that of the recipe which config/ ships for those inputs, on batches of 8 photos at 256 px out of a latent cache, with
discriminators and losses on decoded images in play from the first step; `--set flag=value` changes the recipe. The first recipe
is a plain latent error with a squared decoded one. The steps of all variants take turns. On a CPU a step's seconds are those of
all its threads, which other programs do not lengthen. Memory is that of a process which does nothing else: the device's where
torch counts it (CUDA), else the most that was resident. Prints one JSON line last: `seconds` and `peak_gb` of `first` and
`recipe`, `ratio` of their times, and of the recipe's time the share that each term adds when it is switched on after those
before it.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time

import torch
from common import open_vae, prepared_step, print_result, recipe_args, train
from tqdm import tqdm

import dataloader
from cache.build import CacheOptions, cache_latents
from cache.read import cached_loader
from utils import get_dtype, peak_memory
from vaes.codec import Codec

FIRST = {
    "architecture": "plain", "init": "ridge", "hidden_channels": 128, "num_blocks": 4, "optimizer": "muon", "loss_type": "mse",
    "decoder_loss_weight": 12, "decoder_loss_type": "mse", "decoder_loss_batch": 2, "decoder_loss_window": 24,
    "decoder_loss_reference": "original", "perceptual_loss_weight": 0, "adversarial_weight": 0,
    "latent_adversarial_weight": 0, "reencode_target": 0, "moments_loss_weight": 0,
}  # fmt: skip
FIRST_BLOCKS = {1: 5, 2: 4}  # by the number of inputs
TERMS = (
    "moments_loss_weight",
    "decoder_loss_weight",
    "perceptual_loss_weight",
    "adversarial_weight",
    "latent_adversarial_weight",
    "reencode_target",
)
FIXED = {"image_size": 256, "train_batch_size": 8, "adversarial_start_step": 0, "decoder_loss_start": 0}
PHOTOS = 16


def variants_of(options):
    """{name: flags}: the first recipe, the recipe without terms, with one term more each, and so at last as it is."""
    changes = dict(change.split("=", 1) for change in options.set) | FIXED
    wanted = recipe_args(options.input_types, **changes)
    terms = [name for name in TERMS if getattr(wanted, name)]
    flags = {"first": {**FIXED, **FIRST, "num_blocks": FIRST_BLOCKS[len(options.input_types)]}}
    for count in range(len(terms) + 1):
        name = terms[count - 1] if count else "latents"
        flags[name] = changes | dict.fromkeys(terms[count:], 0)
    return flags


def open_loader(args, vaes, images, cache_dir):
    source = dataloader.find_images(images, "default", True, "--images").paths[:PHOTOS]
    dataset = dataloader.ImageDataset(source, args.image_size, random_crop=True, random_flip=True, seed=args.seed)
    cached = cache_latents(dataset, *map(Codec, vaes), CacheOptions(cache_dir, 1, with_images=True, reencoded=True), 0)
    return cached_loader(cached, args.train_batch_size, 0, args.seed, 1)


def steps_of(options, flags, cache_dir, folder):
    """A function that does one step, for each of those sets of flags."""
    steps, vaes = [], None
    for each in flags:
        args = recipe_args(options.input_types, train_data_dir=options.images, **each)
        vaes = vaes or [open_vae(name, args.device, get_dtype(args.precision)) for name in (options.vae1, options.vae2)]
        args.log_dir = args.save_dir = folder
        steps.append(prepared_step(args, vaes, open_loader(args, vaes, options.images, cache_dir))[0])
    return steps


def peak_gb(flags, cache_dir):
    """GB at the peak of a process that does a few steps with those flags. Linux counts to it what this process has when it
    starts the other, so it is to have little."""
    command = [sys.executable, __file__, *sys.argv[1:], "--memory_with", json.dumps(flags), "--cache_dir", cache_dir]
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vae1", required=True, help="folder or hub id")
    parser.add_argument("--vae2", required=True, help="folder or hub id")
    parser.add_argument("--images", required=True, help="folder of training images")
    parser.add_argument("--input_types", nargs="+", default=["image", "latent"], choices=["image", "latent"])
    parser.add_argument("--set", nargs="+", default=[], metavar="FLAG=VALUE", help="changes to the recipe")
    parser.add_argument("--rounds", type=int, default=10, help="steps of each variant, of which the median counts")
    for name in ("memory_with", "cache_dir"):  # what this program says to itself
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        if options.memory_with:
            (step,) = steps_of(options, [json.loads(options.memory_with)], options.cache_dir, folder)
            for _ in range(3):
                step()
            print(peak_memory(train.resolve_device("cuda", False)) / 1e9)
            return
        flags, cache_dir = variants_of(options), f"{folder}/cache"
        recipe = list(flags)[-1]
        peak_gb(flags["first"], cache_dir)  # builds the cache, which takes memory of its own
        peaks = {name: peak_gb(flags[name], cache_dir) for name in ("first", recipe)}
        steps = dict(zip(flags, steps_of(options, flags.values(), cache_dir, folder)))
        times = {name: [] for name in steps}
        clock = time.perf_counter if torch.cuda.is_available() else time.process_time
        for _ in tqdm(range(options.rounds + 1)):
            for name, step in steps.items():
                start = clock()
                step()
                times[name].append(clock() - start)
    seconds = {name: statistics.median(each[1:]) for name, each in times.items()}  # the first ones warm up
    shares, before = {}, 0.0
    for name, total in list(seconds.items())[1:]:
        shares[name] = round((total - before) / seconds[recipe], 3)
        before = total
    print_result(
        {
            "first": {"seconds": seconds["first"], "peak_gb": peaks["first"]},
            "recipe": {"seconds": seconds[recipe], "peak_gb": peaks[recipe]},
            "ratio": seconds[recipe] / seconds["first"],
            "shares": shares,
            "threads": torch.get_num_threads(),
        }
    )


if __name__ == "__main__":
    main()
