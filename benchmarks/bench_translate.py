"""What a translation costs: align against decode + re-encode and against VAE2's encoder, at full size and tiny.

    python benchmarks/bench_translate.py --tiny1 PATH --tiny2 PATH

Full size means the architectures of SD1.5's and FLUX.1's VAEs with random weights. Prints one JSON line last: for `full`
and `tiny`, `seconds_per_image`, `macs` and `parameters` of `align_latent`, `align_image_latent`, `reencode` and
`vae2_encoder`. All run in the precision and layout that the project chooses; the module is the shipped recipe's.
"""

import argparse
import statistics
import time

import torch
from common import ROOT, open_vae, print_result, recipe_args, train

from evaluation.ladder import Ladder
from utils import autocast, get_dtype


def seconds_per_image(translate, latents, images, rounds):
    """Median seconds per image over `rounds` calls, after one warm-up."""
    times = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        translate(latents, images)[0, 0, 0, 0].item()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:]) / len(images)


@torch.inference_mode()
def measure(vae1, vae2, size, batch_size, rounds):
    figures = {name: {} for name in ("seconds_per_image", "macs", "parameters")}
    for input_types in (["latent"], ["image", "latent"]):
        args = recipe_args(input_types, image_size=size)
        dtype = get_dtype(args.precision)
        pipeline = train.create_align_pipeline(open_vae(vae1, args.device, dtype), open_vae(vae2, args.device, dtype), args).to(
            args.device
        )
        names = {"aligned": f"align_{'_'.join(input_types)}", "vae2": "vae2_encoder", "reencode": "reencode"}
        ladder = Ladder(pipeline, dtype, only=names)
        costs = ladder.costs(size, repeats=1)
        images = torch.rand(batch_size, 3, size, size, device=pipeline.device) * 2 - 1
        latents = pipeline.codec1.encode(images)
        for rung, name in names.items():
            if name in figures["macs"]:
                continue
            figures["macs"][name], figures["parameters"][name] = costs[rung]["macs"], costs[rung]["parameters"]
            with autocast(pipeline.device, dtype):
                repeats = rounds * 10 if rung == "aligned" else rounds
                figures["seconds_per_image"][name] = seconds_per_image(ladder.rungs[rung], latents, images, repeats)
    return figures


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny1", default=str(ROOT / "assets/vaes/tiny4"), help="the tiny pair's VAE1")
    parser.add_argument("--tiny2", default=str(ROOT / "assets/vaes/tiny16"), help="the tiny pair's VAE2")
    parser.add_argument("--image_size", type=int, default=256, help="px")
    parser.add_argument("--batch_size", type=int, default=4, help="images per call")
    parser.add_argument("--rounds", type=int, default=2, help="counted calls; ten times as many of align")
    options = parser.parse_args()
    pairs = {"full": ("random:sd15", "random:flux"), "tiny": (options.tiny1, options.tiny2)}
    result = {name: measure(*pair, options.image_size, options.batch_size, options.rounds) for name, pair in pairs.items()}
    for name, figures in result.items():
        seconds = figures["seconds_per_image"]
        print(f"{name}: decode + re-encode / align latent       {seconds['reencode'] / seconds['align_latent']:8.1f}")
        print(f"{name}: VAE2 encoder / align image latent       {seconds['vae2_encoder'] / seconds['align_image_latent']:8.1f}")
    print_result(result)


if __name__ == "__main__":
    main()
