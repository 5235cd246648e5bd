"""Measure on photos the second moments by which `vae_align.py` recognises a latent space, or count what it notices.

    python tools/make/measure_spaces.py sd15=FOLDER_OF_TAESD sdxl=FOLDER_OF_TAESDXL sd3=… flux1=… --photos PHOTOS

Prints the entries of `MOMENTS` in `vae_align.py`. A space's tiny autoencoder serves as well as its full VAE. A fixed-point
iteration finds the maximum-likelihood matrix of Student's t distribution (Kent, Tyler & Vardi 1994).

With --count, prints in how many latents of each space something is noticed instead. Give it other photos than those of the
moments.
"""

import argparse
import itertools
import sys
import textwrap
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.nn.functional as F

import vae_align
from dataloader import ImageDataset, eval_loader
from images.files import list_images
from runtime.cli import run
from utils import UserError
from vaes.codec import SPACES, Codec
from vaes.loading import load_vae_model

ITERATIONS = 15
DEGREES = 3  # of freedom: latents of edges lie far from those of plain areas
RAW = {False: "scaled", True: "raw"}
LATENTS = {  # what becomes of scaled latents
    "unchanged": lambda latents: latents,
    "x 0.8": lambda latents: latents * 0.8,
    "x 1.25": lambda latents: latents * 1.25,
    "with noise of 0.3": lambda latents: latents + 0.3 * torch.randn_like(latents),
    "half noise": lambda latents: (latents + torch.randn_like(latents)) * 0.5**0.5,
}


def moments(bands: torch.Tensor) -> torch.Tensor:
    """(bands, C, C) of numbers (bands, places, C)."""
    matrices = []
    for band in bands.double():
        matrix = band.T @ band / len(band)
        for _ in range(ITERATIONS):
            distance = ((band @ torch.linalg.inv(matrix)) * band).sum(1)
            weight = (DEGREES + band.shape[1]) / (DEGREES + distance)
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


def pictures_of(photos: torch.Tensor) -> dict[str, list[torch.Tensor]]:
    """Photos (B, 3, H, W) in six ways, and five kinds of pictures in their colours that are no photos."""
    size, blurred = photos.shape[2:], F.avg_pool2d(photos, 7, 1, 3, count_include_pad=False)
    grey, plain = (photos.mean(axes, keepdim=True).expand_as(photos) for axes in (1, (2, 3)))
    gradients = F.interpolate(F.adaptive_avg_pool2d(photos, 2), size, mode="bilinear")
    mosaics = F.interpolate(F.adaptive_max_pool2d(photos, 7), size)
    posters = blurred.mul(1.5).round().div(1.5).clamp(-1, 1)
    noise = (plain + 0.3 * torch.randn(photos.shape)).clamp(-1, 1)
    ways = [photos, F.avg_pool2d(photos, 2), blurred, photos * 0.3 - 0.7, grey, photos / 2]
    return {"photos": ways, "drawings": [plain, gradients, mosaics, posters, noise]}


def count(name: str, codec: Codec, loader) -> str:
    """A table: in how many of a space's latents something is noticed, given as what they are and as what they are not."""
    space, noticed, seen = SPACES[name], Counter(), Counter()
    cases = list(itertools.product(vae_align.MOMENTS[space.channels], RAW, RAW, LATENTS))
    for kind, pictures in (item for batch in loader for item in pictures_of(batch["pixel_values"]).items()):
        for scaled in (latents for picture in pictures for latents in codec.encode(picture).split(1)):
            for wanted, raw, given, how in cases:
                is_right = (wanted, given) == (name, raw)
                if is_right or kind == "photos":
                    latents = space.to_raw(LATENTS[how](scaled)) if raw else LATENTS[how](scaled)
                    found = vae_align.detect_wrong_space(latents, SPACES[wanted], given)
                    row = f"{name}, {kind}, {how}, {RAW[raw]}, given as {RAW[given]} ones of {wanted}"
                    noticed[row] += found is not None and (is_right or found.split(",")[0].endswith(name))
                    seen[row] += 1
    return "\n".join(f"{row}: {noticed[row]} of {seen[row]}" for row in sorted(seen))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("spaces", nargs="+", metavar="NAME=VAE", help="a latent space by name, and the folder of its VAE")
    parser.add_argument("--photos", required=True, help="folder of photos")
    parser.add_argument("--count", action="store_true", help="count what is noticed, and false alarms")
    parser.add_argument("--image_size", type=int, default=192, help="pixels (default: 192)")
    args = parser.parse_args()
    loader = eval_loader(ImageDataset(list_images(args.photos), args.image_size), 8, 0)
    for given in args.spaces:
        name, _, place = given.partition("=")
        if not place:
            raise UserError(f"{given}: write it as NAME=VAE")
        codec = Codec(load_vae_model(place, "vae", None, "cpu", torch.float32), place)
        if args.count:
            print(count(name, codec, loader), flush=True)
            continue
        found = [vae_align.space_features(codec.encode(batch["pixel_values"])) for batch in loader]
        print(lines_of(name, moments(torch.cat([features[:, counts] for features, counts, _ in found], dim=1))), flush=True)


if __name__ == "__main__":
    run(main)
