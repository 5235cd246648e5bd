"""Measure on photos the second moments by which `vae_align.py` recognises a latent space.

    python tools/make/measure_spaces.py sd15=FOLDER_OF_TAESD sdxl=FOLDER_OF_TAESDXL sd3=… flux1=… --photos PHOTOS

Prints the entries of `MOMENTS` in `vae_align.py`. A space's tiny autoencoder serves as well as its full VAE. A fixed-point
iteration finds the maximum-likelihood matrix of Student's t distribution (Kent, Tyler & Vardi 1994).
"""

import argparse
import sys
import textwrap
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

import vae_align
from dataloader import ImageDataset, eval_loader
from images.files import list_images
from runtime.cli import run
from utils import UserError
from vaes.codec import Codec
from vaes.loading import load_vae_model

ITERATIONS = 15


def moments(bands: torch.Tensor) -> torch.Tensor:
    """(bands, C, C) of numbers (bands, places, C)."""
    matrices = []
    for band in bands.double():
        matrix = band.T @ band / len(band)
        for _ in range(ITERATIONS):
            distance = ((band @ torch.linalg.inv(matrix)) * band).sum(1)
            weight = (vae_align.DEGREES + band.shape[1]) / (vae_align.DEGREES + distance)
            matrix = (band.T * weight) @ band / len(band)
        matrices.append(matrix)
    return torch.stack(matrices)


def lines_of(name: str, matrices: torch.Tensor) -> str:
    """The lines of `MOMENTS` for one space."""
    lines = [f'        "{name}": (']
    for matrix in matrices:
        numbers = " ".join(f"{value:.3g}" for value in matrix[tuple(torch.triu_indices(*matrix.shape))].tolist())
        lines += [f'            "{line} "' for line in textwrap.wrap(numbers, 110)]
        lines[-1] = lines[-1][:-2] + '",'
    return "\n".join([*lines, "        ),"])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("spaces", nargs="+", metavar="NAME=VAE", help="a latent space by name, and the folder of its VAE")
    parser.add_argument("--photos", required=True, help="folder of photos")
    parser.add_argument("--image_size", type=int, default=192, help="pixels (default: 192)")
    args = parser.parse_args()
    loader = eval_loader(ImageDataset(list_images(args.photos), args.image_size), 8, 0)
    for given in args.spaces:
        name, _, place = given.partition("=")
        if not place:
            raise UserError(f"{given}: write it as NAME=VAE")
        codec = Codec(load_vae_model(place, "vae", None, "cpu", torch.float32), place)
        bands = [vae_align.space_features(codec.encode(batch["pixel_values"])) for batch in loader]
        bands = torch.cat([each for each in bands if each is not None], dim=1)
        print(lines_of(name, moments(bands)), flush=True)


if __name__ == "__main__":
    run(main)
