"""The second moments by which `vae_align.py` tells whose latents it is given, measured on photos.

    python tools/measure_spaces.py sd15=FOLDER_OF_TAESD sdxl=FOLDER_OF_TAESDXL sd3=… flux1=… --photos PHOTOS

Prints the entries of `MOMENTS` in `vae_align.py`. A tiny autoencoder of a space serves as well as its own VAE. The matrix of
Student's t distribution is found by the fixed-point iteration of its maximum likelihood (Kent, Tyler & Vardi 1994).
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import vae_align
from dataloader import ImageDataset, eval_loader
from images.files import ImageFiles, list_images
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


def lines_of(name: str, matrices: torch.Tensor) -> list[str]:
    """The lines of `MOMENTS` for one space."""
    lines = [f'        "{name}": (']
    for matrix in matrices:
        numbers = " ".join(f"{value:.3g}" for value in matrix[tuple(torch.triu_indices(*matrix.shape))].tolist())
        while len(numbers) > 110:
            cut = numbers.rindex(" ", 0, 110) + 1
            lines.append(f'            "{numbers[:cut]}"')
            numbers = numbers[cut:]
        lines.append(f'            "{numbers}",')
    return [*lines, "        ),"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("spaces", nargs="+", metavar="NAME=VAE", help="a named latent space and the folder of a VAE of it")
    parser.add_argument("--photos", required=True, help="folder of photos")
    parser.add_argument("--image_size", type=int, default=192, help="pixels (default: 192)")
    args = parser.parse_args()
    files = list_images(args.photos)
    loader = eval_loader(ImageDataset(ImageFiles(files), args.image_size), 8, 0)
    for given in args.spaces:
        name, _, place = given.partition("=")
        if not place:
            raise UserError(f"{given}: write it as NAME=VAE")
        codec = Codec(load_vae_model(place, "vae", None, "cpu", torch.float32), place)
        bands = [vae_align.space_features(codec.encode(batch["pixel_values"])) for batch in loader]
        bands = torch.cat([each for each in bands if each is not None], dim=1)
        print("\n".join(lines_of(name, moments(bands))), flush=True)


if __name__ == "__main__":
    run(main)
