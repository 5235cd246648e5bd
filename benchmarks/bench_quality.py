"""The quality that M minutes of training reach, judged on other photos.

    python benchmarks/bench_quality.py --vae1 PATH --vae2 PATH --train_data_dir FOLDER --eval_data_dir FOLDER \\
        --input_types latent --minutes 20

Uses the recipe that config/ ships for those inputs, with --minutes of training; the latent cache is built first. Prints the
ladder and one JSON line last. `--set flag=value` changes the recipe.

With `--until better_than_reencode` every tenth of the training photos is held out, and what is trained for those minutes is
judged on them again and again, until PSNR and ST-LPIPS (VGG) both pass those of decode + re-encode. Printed are the minutes
that training took until then, judging left out; null if it never came so far. No other photos are looked at.
"""

import argparse
import signal
import statistics
import tempfile
import time

import torch
from common import prepared_step, print_result, recipe_args, train
from tqdm import tqdm

import dataloader
from evaluation import tables
from evaluation.ladder import Ladder, evaluate
from evaluation.metrics import Measures
from utils import get_dtype, write_json
from vaes.loading import load_vae_model
from vaes.pipeline import PipelineWithVAEs

KEPT = (
    "latent_mse", "psnr", "ssim", "psnr_vs_vae2", "st_lpips_vgg", "st_lpips_alex", "texture", "detail", "latent_variance",
    "latent_variance_by_channel", "colour_bias", "macs",
)  # fmt: skip
METRICS = ("ssim", "st_lpips", "texture")
HELD_OUT = 10  # every such training photo
PACE_STEPS = 10
RACED = {"psnr": 1, "st_lpips_vgg": -1}  # what has to pass re-encoding's; -1: less is better


class Race:
    """Training batches that judge the module on the way, and end the training when it has passed re-encoding.

    Attributes:
        checks: [(step, seconds of training, {metric: value})] of the module. reencode: {metric: value} of what it has to pass.
        won: whether it has passed in both. dataset, batch_sampler: of the loader.
    """

    def __init__(self, loader, judged, pipeline, args, every):
        self.dataset, self.batch_sampler = loader.dataset, loader.batch_sampler
        self._loader, self._judged, self._pipeline, self._every = loader, judged, pipeline, every
        self._dtype = get_dtype(args.precision)
        self._measures = lambda: Measures(("st_lpips",), args.image_size, pipeline.device, self._dtype)
        self.checks, self.won = [], False
        self.reencode = self._judge("reencode")

    def __len__(self):
        return len(self._loader)

    def __iter__(self):
        start = time.perf_counter()
        for step, batch in enumerate(self._loader):
            if step and step % self._every == 0 and not self.won:
                paused = time.perf_counter()
                figures = self._judge("aligned")
                self.checks.append((step, paused - start, figures))
                tqdm.write(f"step {step}: {figures}, re-encoding {self.reencode}")
                self.won = all(sign * figures[name] > sign * self.reencode[name] for name, sign in RACED.items())
                if self.won:
                    signal.raise_signal(signal.SIGINT)  # which ends a training after the step that it is in
                start += time.perf_counter() - paused
            yield batch

    def _judge(self, rung):
        ladder = Ladder(self._pipeline, self._dtype, only=(rung,))
        figures = evaluate(ladder, self._judged, self._measures(), show_progress=False)["ladder"][rung]
        return {name: figures[name] for name in RACED}


def race(args, vaes, loaders, every):
    """Train until re-encoding is passed or the minutes are over; the result to print. The pace of a few steps says how many
    there are in those minutes, since judging is not to count."""
    step, _ = prepared_step(args, vaes, loaders[0])
    times = []
    for _ in range(PACE_STEPS):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    args.max_train_steps, args.epochs = max(1, int(60 * args.minutes / statistics.median(times))), 10**6
    args.minutes = 0.0
    parts = train.build_parts(args, *vaes)
    run = train.prepare_run(args, parts, loaders[0])
    batches = Race(*loaders, parts.pipeline, args, every)
    train.training_loop(args, parts, run, batches, loaders[1], torch.Generator(args.device).manual_seed(args.seed))
    run.close()
    step, seconds, figures = batches.checks[-1] if batches.checks else (0, 0.0, {})
    return {
        "minutes": seconds / 60 if batches.won else None,
        "steps": step,
        "held_out": len(loaders[1].dataset),
        "ladder": {"reencode": batches.reencode, "aligned": figures},
        "checks": [(step, seconds / 60, *figures.values()) for step, seconds, figures in batches.checks],
    }


def held_out_datasets(args):
    """(nine tenths of the training photos, the tenth between them), to train and to judge."""
    paths = dataloader.find_images(args.train_data_dir, "default", True, "--train_data_dir").paths
    judged = paths[::HELD_OUT]
    trained = sorted(set(paths) - set(judged))
    options = {"random_crop": True, "random_flip": args.random_flip, "seed": args.seed}
    return dataloader.ImageDataset(trained, args.image_size, **options), dataloader.ImageDataset(judged, args.image_size)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vae1", required=True, help="folder or hub id")
    parser.add_argument("--vae2", required=True, help="folder or hub id")
    parser.add_argument("--train_data_dir", required=True)
    parser.add_argument("--eval_data_dir", help="required but for --until")
    parser.add_argument("--input_types", nargs="+", default=["image", "latent"], choices=["image", "latent"])
    parser.add_argument("--minutes", type=float, required=True, help="of training, the cache already built")
    parser.add_argument("--until", choices=["better_than_reencode"], help="stop there, and say how long it took")
    parser.add_argument("--check_steps", type=int, default=200, help="steps between the checks of --until")
    parser.add_argument("--latent_cache_dir", default="latent_cache", help="where the cache is kept")
    parser.add_argument("--save_dir", help="keep the checkpoint there")
    parser.add_argument("--set", nargs="+", default=[], metavar="FLAG=VALUE", help="changes to the recipe")
    options = parser.parse_args()
    if not (options.until or options.eval_data_dir):
        parser.error("--eval_data_dir is required without --until")

    with tempfile.TemporaryDirectory() as folder:
        changes = dict(change.split("=", 1) for change in options.set)
        args = recipe_args(
            options.input_types,
            **{
                "vae1_path": options.vae1, "vae2_path": options.vae2, "latent_cache_dir": options.latent_cache_dir,
                "train_data_dir": options.train_data_dir, "eval_data_dir": options.eval_data_dir or "", "num_workers": 2,
                "eval_batch_size": 10, "log_dir": folder, "save_dir": options.save_dir or folder, "minutes": options.minutes,
            } | changes,
        )  # fmt: skip
        args.eval_frequency = args.visualize_frequency = args.save_frequency = 0
        dtype = get_dtype(args.precision)
        vaes = [
            load_vae_model(args.vae1_path, args.vae1_subfolder, None, args.device, dtype, "--vae1"),
            load_vae_model(args.vae2_path, args.vae2_subfolder, None, args.device, dtype, "--vae2"),
        ]
        loaders = train.create_data_loaders(args, *vaes, datasets=held_out_datasets(args) if options.until else None)
        if options.until:
            print_result(race(args, vaes, loaders, options.check_steps))
            return
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
