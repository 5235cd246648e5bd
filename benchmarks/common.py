"""What the benchmarks share: the shipped recipe for given inputs, VAEs by path or at full size with random weights."""

import json
import os
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")

import train_align_with_args as train  # noqa: E402 - the project is not installed, it is beside this folder
from vaes.loading import freeze, load_vae_model  # noqa: E402

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


def recipe_args(input_types, **overrides):
    """The parsed flags of the recipe that config/ ships for `input_types`, with `overrides` as if typed."""
    name = RECIPES[tuple(sorted(input_types))]
    argv = ["--load_config", str(ROOT / "config" / name)]
    for flag, value in overrides.items():
        argv += [f"--{flag}", *(map(str, value) if isinstance(value, (list, tuple)) else [str(value)])]
    args = train.parse_args(argv)
    args.device = str(train.resolve_device(args.device, False))
    train.keep_freed_memory(torch.device(args.device))
    args.precision = train.resolve_precision(args.precision, torch.device(args.device), False)
    return args


def open_vae(name: str, device, dtype):
    """A frozen VAE from a folder or hub id, or 'random:sd15' / 'random:flux': the full-size architecture, random weights."""
    if name not in RANDOM_VAES:
        return load_vae_model(name, "vae", None, device, dtype)
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    return freeze(AutoencoderKL(**FULL_SIZE, **RANDOM_VAES[name]).to(device, dtype))


def prepared_step(args, vaes, loader):
    """(a function that does one training step on a batch that is already on the device, and waits for it; the `Run`)."""
    parts = train.build_parts(args, *vaes)
    run = train.prepare_run(args, parts, loader)
    encoded = parts.objective.encode(next(iter(loader)))

    def step():
        train.train_step(args, parts, run, encoded)[0].item()

    return step, run


def print_result(result: dict) -> None:
    """The last line that every benchmark prints: its result as JSON."""
    print(json.dumps(result))
