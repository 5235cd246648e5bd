"""Parts of the benchmarks: the shipped recipes, VAEs at full size with random weights, programs to run, and a clock."""

import argparse
import inspect
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")

import train_align_with_args as train  # noqa: E402 - the project is not installed: it is beside this folder

RECIPES = {("image", "latent"): "taesd_to_taef1.json", ("latent",): "taesd_to_taef1_latent.json"}
FULL_SIZE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
}
RANDOM_VAES = {
    "random:sd15": {"latent_channels": 4, "scaling_factor": 0.18215},
    "random:flux": {
        "latent_channels": 16, "scaling_factor": 0.3611, "shift_factor": 0.1159,
        "use_quant_conv": False, "use_post_quant_conv": False,
    },
}  # fmt: skip


def words_of(flags: dict) -> list[str]:
    """A command line's words: {"image_size": 64, "cache_only": []} -> ["--image_size", "64", "--cache_only"]."""
    words = []
    for name, value in flags.items():
        words += [f"--{name}", *map(str, value if isinstance(value, (list, tuple)) else [value])]
    return words


def run_program(script: str, flags: dict, launcher=(sys.executable,), **environment) -> str:
    """Run a program of the project; returns what it printed. Its warnings and errors go to the terminal."""
    command = [*launcher, str(ROOT / script), *words_of(flags)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | environment).stdout


def recipe_flags(input_types, **changes) -> dict:
    """Flags of the training script: the recipe that config/ ships for `input_types`, with changes."""
    return {"load_config": ROOT / "config" / RECIPES[tuple(sorted(input_types))], **changes}


def settings_of(flags: dict) -> argparse.Namespace:
    """The training script's settings for these flags, with device and precision resolved for this machine."""
    values = vars(train.parse_args(words_of(flags)))
    device = train.resolve_device(values["device"], False)
    train.keep_freed_memory(device)
    changes = {"device": str(device), "precision": train.resolve_precision(values["precision"], device, False)}
    train.compute_policy(device, changes["precision"])
    changes |= {"vae1_space": None, "vae2_space": None}  # the recipe names those of its own pair
    return train.Settings(values | changes)


def open_vaes(names, device, dtype) -> list:
    """VAEs from folders or hub ids; 'random:sd15' and 'random:flux' are full-size architectures with random weights."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    return [
        AutoencoderKL(**FULL_SIZE, **RANDOM_VAES[name]).to(device, dtype)
        if name in RANDOM_VAES
        else train.load_vae_model(name, "vae", None, device, dtype)
        for name in names
    ]


def prepared_step(args, vaes, loader) -> Callable[[], float]:
    """A function that trains one step on a batch that is already on the device, waits for it, and returns the loss."""
    accelerator = train.create_accelerator(args.device, args.precision)
    torch.manual_seed(args.seed)
    pipeline = train.create_align_pipeline(*vaes, args).to(accelerator.device)
    objective = train.create_objective(pipeline, args)
    run = train.prepare_run(args, pipeline, objective, accelerator, loader)
    encoded = objective.encode(next(iter(loader)))
    return lambda: train.train_step(args, run, encoded, position=1.0)[0].item()


def photos_in(folder) -> list[Path]:
    """The JPEG, PNG and WebP files below a folder, sorted."""
    return sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp"))


def folder_of(photos: list[Path], place: str) -> str:
    """A new folder with links to the photos, in their order."""
    os.mkdir(place)
    for number, photo in enumerate(photos):
        os.symlink(photo.resolve(), f"{place}/{number:06d}{photo.suffix}")
    return place


def seconds_of(calls: dict[str, Callable], rounds: int, clock=time.perf_counter) -> dict[str, float]:
    """{name: median seconds of a call}. The calls take turns, so that a busy machine slows all alike; one round warms up."""
    times = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            start = clock()
            call()
            if torch.cuda.is_initialized():  # else what is measured runs on the CPU beside a GPU
                torch.cuda.synchronize()
            times[name].append(clock() - start)
    return {name: statistics.median(seconds[1:]) for name, seconds in times.items()}


def add_recipe_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that say which recipe is trained between which VAEs."""
    parser.add_argument("--vae1", required=True, help="folder or hub id; `rates` also takes random:sd15")
    parser.add_argument("--vae2", required=True, help="folder or hub id; `rates` also takes random:flux")
    parser.add_argument("--input_types", nargs="+", default=["image", "latent"], choices=["image", "latent"])
    parser.add_argument("--set", nargs="+", default=[], metavar="FLAG=VALUE", type=lambda word: word.split("=", 1),
                        help="changes to the recipe")  # fmt: skip


def add_measurement(kinds, measure: Callable[[argparse.Namespace], dict]) -> argparse.ArgumentParser:
    """A subcommand, named after the function `measure_NAME` and described by its docstring."""
    name, text = measure.__name__.removeprefix("measure_"), inspect.getdoc(measure)
    parser = kinds.add_parser(name, description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.set_defaults(measure=measure)
    return parser


def run_measurement(parser: argparse.ArgumentParser) -> None:
    """Run the measurement that the command line names, and print its result as JSON on the last line."""
    options = parser.parse_args()
    print(json.dumps(options.measure(options)))
