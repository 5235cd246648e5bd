"""Make a checkpoint fit to be given away: weights, recipe and the hub's names of its VAEs; no folder of this machine.

    python tools/share_checkpoint.py ckpt_align/align_pipeline_20251231_034701.pth assets/pretrained/sd15_to_flux1.pth \\
        --vae1_path madebyollin/taesd --vae2_path madebyollin/taef1

The state of the training goes, so the file shrinks to a third or less and a run cannot be resumed from it; starting one from
its weights (--load_checkpoint), translating and judging work as before. Prints the file's size.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from runtime.cli import run
from utils import UserError, atomic_file
from vae_align import read_checkpoint

OF_THE_MACHINE = {
    "train_data_dir", "eval_data_dir", "latent_cache_dir", "log_dir", "save_dir", "config_save_path", "cache_dir", "proxy",
    "load_checkpoint", "decoder_loss_path", "decoder_loss_subfolder",
}  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="file, or a folder: its newest")
    parser.add_argument("output", help="the file to write; replaces none")
    parser.add_argument("--vae1_path", required=True, help="hub id of the VAE to come from")
    parser.add_argument("--vae2_path", required=True, help="hub id of the VAE to go to")
    args = parser.parse_args()

    content = read_checkpoint(args.checkpoint)
    content.pop("training", None)
    content["config"] = {name: value for name, value in content["config"].items() if name not in OF_THE_MACHINE}
    for name in ("vae1", "vae2"):
        path = getattr(args, f"{name}_path")
        content[name] = content[name] | {"path": path}
        content["config"] |= {f"{name}_path": path, f"{name}_subfolder": content[name]["subfolder"]}
    try:
        with atomic_file(args.output, exclusive=True) as file:
            torch.save(content, file)
    except FileExistsError:
        raise UserError(f"{args.output}: exists already; name another file or delete it") from None
    read_checkpoint(args.output)
    print(f"{args.output}: {Path(args.output).stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    run(main)
