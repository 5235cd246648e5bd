"""Whether a module is as good on large, oblong pictures as at its training size.

    python benchmarks/bench_sizes.py --checkpoint assets/pretrained/taesd_to_taef1_latent.safetensors --images FOLDER

Takes photos of at least 768x512 px at their own resolution and judges each twice: the centre of 768x512, and the centre of
256x256 alone. So content and scale are alike and only the size differs. Prints, for both, how far aligned stands above
decode + re-encode and below VAE2's own reconstruction, in dB of PSNR, and one JSON line last.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from common import print_result
from PIL import Image

from evaluation.ladder import Ladder, evaluate
from vaes.pipeline import PipelineWithVAEs

SIZES = {"256x256": (256, 256), "768x512": (768, 512)}  # width, height
RUNGS = ("vae2", "reencode", "aligned")


def centre(photo: Image.Image, width: int, height: int) -> torch.Tensor:
    """(1, 3, height, width) in [-1, 1]."""
    left, top = (photo.width - width) // 2, (photo.height - height) // 2
    pixels = np.array(photo.crop((left, top, left + width, top + height)).convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1)[None] / 127.5 - 1


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--images", required=True, help="folder of photos; those below 768x512 px are left out")
    parser.add_argument("--vae1_path", help="in place of the checkpoint's")
    parser.add_argument("--vae2_path", help="in place of the checkpoint's")
    parser.add_argument("--max_images", type=int, default=20)
    args = parser.parse_args()

    photos = []
    for path in sorted(Path(args.images).iterdir()):
        if path.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp") and len(photos) < args.max_images:
            photo = Image.open(path)
            if photo.width >= 768 and photo.height >= 512:
                photos.append(photo)
    pipeline = PipelineWithVAEs.from_checkpoint(args.checkpoint, args.vae1_path, args.vae2_path)
    result = {"images": len(photos)}
    for name, (width, height) in SIZES.items():
        batches = [
            {"pixel_values": centre(photo, width, height), "index": torch.tensor([index]), "path": ["photo"], "unreadable": []}
            for index, photo in enumerate(photos)
        ]
        ladder = evaluate(Ladder(pipeline, torch.float32, only=RUNGS), batches)["ladder"]
        psnr = {rung: ladder[rung]["psnr"] for rung in RUNGS}
        above = psnr["aligned"] - psnr["reencode"]
        below = psnr["aligned"] - psnr["vae2"]
        print(f"{name}: aligned {psnr['aligned']:.2f} dB, {above:+.2f} against decode + re-encode, {below:+.2f} against VAE2")
        result[name] = psnr | {"colour_bias": ladder["aligned"]["colour_bias"], "latent_mse": ladder["aligned"]["latent_mse"]}
    print_result(result)


if __name__ == "__main__":
    main()
