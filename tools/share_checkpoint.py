"""Make a file to give away: weights, both latent spaces and figures as .safetensors; no flag and no folder of this machine.

    python tools/share_checkpoint.py ckpt_align/align_pipeline_20251231_034701.pth sd15_to_flux1.safetensors \\
        --vae1_path madebyollin/taesd --vae2_path madebyollin/taef1 --vae1_space sd15 --vae2_space flux1

The state of the training stays behind, so a run cannot be resumed from the file; starting one from its weights
(--load_checkpoint), translating and judging work as before. Prints the file's size.
"""

import argparse
import logging
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from runtime.cli import run
from utils import UserError, one_line, read_json, shown
from vae_align import AlignPipeline, module_of
from vaes.codec import named_space
from vaes.pipeline import read_checkpoint, spaces_of

log = logging.getLogger(__name__)

RUNGS = ("vae2", "reencode", "linear", "aligned")
FIGURES = ("psnr", "st_lpips_vgg", "texture", "detail", "ssim", "psnr_vs_vae2", "latent_mse", "colour_bias")
DTYPES = {"float16": torch.float16, "float32": torch.float32}


def require_hub_id(flag: str, value: str) -> None:
    """UserError for a folder: it is of this machine only, and tells others how its disks are laid out."""
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", value, re.ASCII) or Path(value).is_dir():
        raise UserError(f"{flag} {shown(value)}: a folder of this machine goes into no shared file; name a hub id, owner/name")


def space_to_record(number: int, recorded, name: str | None):
    """The latent space of VAE1 or VAE2: the one that was named, else the one that the checkpoint records."""
    space = named_space(name) if name else recorded
    if not space.map_is_known:
        log.warning(
            "VAE%d's latent space has no name: the file serves scaled latents only; --vae%d_space names it", number, number
        )
    return space


def figures_in(results: dict, names: tuple[str, ...] = FIGURES) -> dict:
    """{rung: {metric: mean}} of what `ladder.evaluate` returns, with its `image_size`; KeyError where one is missing."""
    rungs = {rung: results["ladder"][rung] for rung in RUNGS if rung in results["ladder"]}
    judged_on = {"images": results["images"], "image_size": results["image_size"]}
    return {rung: {name: figures.get(name) for name in names} | judged_on for rung, figures in rungs.items()}


def figures_of(path: str) -> dict:
    """{rung: {metric: mean}} of the rungs that a reader compares, from a metrics.json of `eval_align.py`."""
    try:
        return figures_in(read_json(path))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a metrics.json of eval_align.py ({one_line(error)})") from None


def add_arguments(parser: argparse.ArgumentParser, vaes_required: bool) -> None:
    """The flags of what a file to give away says of a module; `pipeline_to_share` reads them."""
    for number in (1, 2):
        recorded = "" if vaes_required else " (default: what the checkpoint records)"
        path_help = f"hub id of VAE{number}, for those who judge the module{recorded}"
        parser.add_argument(f"--vae{number}_path", required=vaes_required, help=path_help)
        space_help = "name or alias of its latent space (default: what the checkpoint records)"
        parser.add_argument(f"--vae{number}_space", help=space_help)
    parser.add_argument("--metrics", help="a metrics.json of eval_align.py about this checkpoint: its figures go along")
    parser.add_argument("--dtype", choices=DTYPES, default="float16", help="of the weights; half the size in float16")


def pipeline_to_share(args: argparse.Namespace) -> tuple[AlignPipeline, list[str]]:
    """(the pipeline of `args.checkpoint` without its training, hub ids of its VAEs). UserError for folders of this machine."""
    content = read_checkpoint(args.checkpoint)
    vaes = [getattr(args, f"vae{number}_path") or content[f"vae{number}"]["path"] or "" for number in (1, 2)]
    for number, vae in enumerate(vaes, 1):
        require_hub_id(f"--vae{number}_path", vae)
    names = (args.vae1_space, args.vae2_space)
    spaces = [space_to_record(number, *pair) for number, pair in enumerate(zip(spaces_of(content), names), 1)]
    figures = figures_of(args.metrics) if args.metrics else content["metrics"]
    return AlignPipeline(module_of(content), *spaces, figures=figures).to(DTYPES[args.dtype]), vaes


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="file, or a folder: its newest")
    parser.add_argument("output", help="the .safetensors file to write; replaces none")
    add_arguments(parser, vaes_required=True)
    args = parser.parse_args()

    output = Path(args.output)
    if output.suffix != ".safetensors":
        raise UserError(f"{output}: name a file that ends in .safetensors")
    if output.exists():
        raise UserError(f"{output}: exists already; name another file or delete it")
    pipeline, vaes = pipeline_to_share(args)
    pipeline.save_pretrained(output, vaes=vaes)
    AlignPipeline.from_pretrained(output)
    print(f"{output}: {output.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    run(main)
