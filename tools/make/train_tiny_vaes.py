"""Train a tiny AutoencoderKL such as those that ship under assets/vaes, from photos alone.

The embedded default mirrors SD1.5 -> FLUX.1 in miniature: one VAE with 4 latent channels and no shift, one with 16 and a
shift_factor, both of stride 8.

    python tools/make/train_tiny_vaes.py --photos PHOTOS --latent_channels 4 --output_dir assets/vaes/tiny4
    python tools/make/train_tiny_vaes.py --photos PHOTOS --latent_channels 16 --output_dir assets/vaes/tiny16

The same photos, seed, thread count and library versions give the same weights again. Those that ship were trained on other
crops.
"""

import argparse
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from diffusers import AutoencoderKL
from tqdm import tqdm

from dataloader import ImageDataset, eval_loader, find_images, train_loader
from runtime.cli import run

BLOCK_CHANNELS = (16, 32, 64, 96)  # 1.7 M parameters: 3.4 MB in float16


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
    photos = find_images(args.photos, "default", True, "--photos").paths
    views = ImageDataset(photos, 128, random_crop=True, random_flip=True, seed=args.seed)

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
    batches = zip(range(args.steps), train_loader(views, 16, 0, args.seed))
    for _, batch in tqdm(batches, total=args.steps, desc=f"{args.latent_channels}-channel VAE", mininterval=5):
        images = batch["pixel_values"]
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

    vae.eval()
    with torch.inference_mode():
        squares = eval_loader(ImageDataset(photos, 256), 1, 0)
        latents = torch.cat([vae.encode(batch["pixel_values"]).latent_dist.mode().flatten() for batch in squares])
    vae.register_to_config(
        scaling_factor=round(1 / latents.std().item(), 5),
        shift_factor=round(latents.mean().item(), 4) if args.latent_channels == 16 else None,
    )
    vae.half().save_pretrained(args.output_dir)
    print(f"{args.output_dir}: scaling_factor {vae.config.scaling_factor}  shift_factor {vae.config.shift_factor}")


if __name__ == "__main__":
    run(main)
