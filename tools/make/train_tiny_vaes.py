"""Train the tiny AutoencoderKL that ships under assets/vaes, from photos alone.

The embedded default mirrors SD1.5 -> FLUX.1 in miniature: one VAE with 4 latent channels and no shift, one with 16 and a
shift_factor, both of stride 8. The two shipped ones were made with:

    python tools/make/train_tiny_vaes.py --photos PHOTOS --latent_channels 4 --output_dir assets/vaes/tiny4
    python tools/make/train_tiny_vaes.py --photos PHOTOS --latent_channels 16 --output_dir assets/vaes/tiny16

The same photos, seed, thread count and library versions give the same weights again.
"""

import argparse
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from PIL import Image, ImageOps
from torchvision.transforms.functional import resized_crop
from tqdm import tqdm

from images.files import list_images

BLOCK_CHANNELS = (16, 32, 64, 96)  # 1.7 M parameters: 3.4 MB in float16
STORED_SIZE = 320  # short side kept in memory, px


def load_photos(folder):
    """Every photo below `folder` as a uint8 CHW tensor, short side at most STORED_SIZE px."""
    photos = []
    for path in list_images(folder):
        image = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
        scale = STORED_SIZE / min(image.size)
        if scale < 1:
            image = image.resize([max(STORED_SIZE, round(side * scale)) for side in image.size], Image.Resampling.LANCZOS)
        photos.append(torch.from_numpy(np.array(image)).permute(2, 0, 1))
    if not photos:
        raise SystemExit(f"{folder}: no photo found there; name a folder of photos")
    return photos


def random_crops(photos, batch_size, crop, generator):
    """Random squares of `crop` to 2 x `crop` px, resized to `crop`, flipped half of the time: (B, 3, crop, crop) in [-1, 1]."""

    def draw(high):
        return int(torch.randint(high, (), generator=generator))

    batch = []
    for _ in range(batch_size):
        photo = photos[draw(len(photos))]
        size = min(crop + draw(crop + 1), *photo.shape[1:])
        top, left = draw(photo.shape[1] - size + 1), draw(photo.shape[2] - size + 1)
        square = resized_crop(photo.float(), top, left, size, size, [crop, crop])
        batch.append(square.flip(-1) if draw(2) else square)
    return torch.stack(batch) / 127.5 - 1


@torch.inference_mode()
def moments(vae, photos, size=256):
    """(mean, standard deviation) of the raw posterior mean over the photos' centre squares, resized to `size` px."""
    latents = []
    for photo in photos:
        side = min(photo.shape[1:])
        top, left = (photo.shape[1] - side) // 2, (photo.shape[2] - side) // 2
        square = photo[:, top : top + side, left : left + side].float()[None]
        image = F.interpolate(square, size=(size, size), mode="bilinear", antialias=True).clamp(0, 255) / 127.5 - 1
        latents.append(vae.encode(image).latent_dist.mode().flatten())
    return torch.cat(latents).mean().item(), torch.cat(latents).std().item()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", required=True, help="folder of training photos")
    parser.add_argument("--latent_channels", type=int, choices=(4, 16), required=True, help="16 also gets a shift_factor")
    parser.add_argument("--output_dir", required=True, help="where the diffusers folder is written")
    parser.add_argument("--steps", type=int, default=4000, help="optimizer steps")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; part of what makes a run reproducible")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    photos = load_photos(args.photos)

    vae = AutoencoderKL(
        block_out_channels=BLOCK_CHANNELS,
        down_block_types=["DownEncoderBlock2D"] * len(BLOCK_CHANNELS),
        up_block_types=["UpDecoderBlock2D"] * len(BLOCK_CHANNELS),
        latent_channels=args.latent_channels,
        layers_per_block=1,
        norm_num_groups=8,
        mid_block_add_attention=False,  # convolutions only: every size costs, and looks, alike
        sample_size=256,
    )
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1.5e-3, betas=(0.9, 0.99), weight_decay=1e-4)
    warmup = min(200, args.steps)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / args.steps)))
    )
    for _ in tqdm(range(args.steps), desc=f"{args.latent_channels}-channel VAE", mininterval=5):
        images = random_crops(photos, 16, 128, generator)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(images).latent_dist
            decoded = vae.decode(posterior.sample(generator=generator)).sample.float()
        error = decoded - images
        kl = posterior.kl().float().mean() / posterior.mean[0].numel()
        loss = error.abs().mean() + error.square().mean() + 1e-4 * kl
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        scheduler.step()

    mean, std = moments(vae.eval(), photos)
    shift_factor = round(mean, 4) if args.latent_channels == 16 else None
    vae.register_to_config(scaling_factor=round(1 / std, 5), shift_factor=shift_factor)
    vae.half().save_pretrained(args.output_dir)
    print(f"{args.output_dir}: scaling_factor {vae.config.scaling_factor}  shift_factor {vae.config.shift_factor}")


if __name__ == "__main__":
    main()
