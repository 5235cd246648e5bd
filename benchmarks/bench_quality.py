"""The quality that M minutes of training reach, judged on other photos.

    python benchmarks/bench_quality.py --vae1 PATH --vae2 PATH --train_data_dir FOLDER --eval_data_dir FOLDER \\
        --input_types latent --minutes 20

Uses the recipe that config/ ships for those inputs, with --minutes of training; the latent cache is built first. Prints the
ladder and one JSON line last. `--set flag=value` changes the recipe.
"""

import argparse
import tempfile
import time

import torch
from common import print_result, recipe_args, train

from evaluation import tables
from evaluation.ladder import Ladder, evaluate
from evaluation.metrics import Measures
from latents.pipeline import PipelineWithVAEs
from latents.vaes import load_vae_model
from runtime.device import get_dtype
from utils import write_json

KEPT = (
    "latent_mse", "psnr", "ssim", "psnr_vs_vae2", "st_lpips_vgg", "st_lpips_alex", "texture", "detail", "latent_variance",
    "latent_variance_by_channel", "colour_bias", "macs",
)  # fmt: skip
METRICS = ("ssim", "st_lpips", "texture")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vae1", required=True, help="folder or hub id")
    parser.add_argument("--vae2", required=True, help="folder or hub id")
    parser.add_argument("--train_data_dir", required=True)
    parser.add_argument("--eval_data_dir", required=True)
    parser.add_argument("--input_types", nargs="+", default=["image", "latent"], choices=["image", "latent"])
    parser.add_argument("--minutes", type=float, required=True, help="of training, the cache already built")
    parser.add_argument("--latent_cache_dir", default="latent_cache", help="where the cache is kept")
    parser.add_argument("--save_dir", help="keep the checkpoint there")
    parser.add_argument("--set", nargs="+", default=[], metavar="FLAG=VALUE", help="changes to the recipe")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        changes = dict(change.split("=", 1) for change in options.set)
        args = recipe_args(
            options.input_types,
            **{
                "vae1_path": options.vae1, "vae2_path": options.vae2, "latent_cache_dir": options.latent_cache_dir,
                "train_data_dir": options.train_data_dir, "eval_data_dir": options.eval_data_dir, "num_workers": 2,
                "eval_batch_size": 10, "log_dir": folder, "save_dir": options.save_dir or folder, "minutes": options.minutes,
            } | changes,
        )  # fmt: skip
        args.eval_frequency = args.visualize_frequency = args.save_frequency = 0
        dtype = get_dtype(args.precision)
        vaes = [
            load_vae_model(args.vae1_path, args.vae1_subfolder, None, args.device, dtype, "--vae1"),
            load_vae_model(args.vae2_path, args.vae2_subfolder, None, args.device, dtype, "--vae2"),
        ]
        loaders = train.create_data_loaders(args, *vaes)
        start = time.perf_counter()
        checkpoint = train.train_align_pipeline(args, *vaes, *loaders, torch.Generator(args.device).manual_seed(args.seed))
        seconds = time.perf_counter() - start

        pipeline = PipelineWithVAEs.from_checkpoint(checkpoint, *vaes)
        measures = Measures(METRICS, args.image_size, pipeline.device)
        results = evaluate(Ladder(pipeline, dtype), loaders[1], measures, costs=True)
        if options.save_dir:
            write_json(checkpoint.with_suffix(".metrics.json"), results)
    print(tables.ladder_table(results))
    ladder = {rung: {name: figures.get(name) for name in KEPT} for rung, figures in results["ladder"].items() if rung != "vae1"}
    steps = pipeline.progress["step"]
    print_result({"minutes": seconds / 60, "steps": steps, "images": results["images"], "ladder": ladder})


if __name__ == "__main__":
    main()
