"""Whether memory grows with the data set: peak anonymous memory at N and at 10 N images, training and evaluating.

    python benchmarks/bench_memory.py

Trains on made-up images with a complete latent cache, pixels included, and evaluates the checkpoint on the same images, each in
a process of its own, and follows that process's RssAnon (memory that is not a mapped file). Prints one JSON line last:
`training` and `evaluation` with `peak_mb` of `n` and `10n`, and their ratio. Linux only.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from common import ROOT, print_result
from PIL import Image


def make_images(folder, count, size):
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(count):
        small = Image.fromarray(rng.integers(0, 256, (size // 16, size // 16, 3), dtype=np.uint8))
        small.resize((size, size), Image.Resampling.BICUBIC).save(folder / f"{number:06d}.jpg")


def peak_anonymous_mb(command):
    """Run `command`; the highest RssAnon seen, in MB."""
    process, peak = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=ROOT), 0
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
            peak = max(peak, *(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon")), 0)
        except (OSError, TypeError):
            pass
        time.sleep(0.02)
    if process.returncode:
        sys.exit(process.stderr.read().decode())
    return peak / 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=100, help="images of the smaller set")
    parser.add_argument("--image_size", type=int, default=256, help="px, in training")
    parser.add_argument("--eval_image_size", type=int, default=64, help="px, in evaluation")
    parser.add_argument("--steps", type=int, default=20, help="training steps")
    options = parser.parse_args()
    peaks = {"training": {}, "evaluation": {}}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for name, count in (("n", options.n), ("10n", 10 * options.n)):
            make_images(folder / name, count, options.image_size)
            train = [
                sys.executable, "train_align_with_args.py", "--load_config", "config/demo.json",
                "--train_data_dir", folder / name, "--image_size", options.image_size, "--cache_views", 1,
                "--latent_cache_dir", folder / "cache", "--log_dir", folder / "runs", "--save_dir", folder / "ckpt",
                "--eval_frequency", 0, "--visualize_frequency", 0, "--max_train_steps", options.steps, "--num_workers", 1,
            ]  # fmt: skip
            evaluate = [
                sys.executable, "eval_align.py", "--checkpoint", folder / "ckpt", "--eval_data_dir", folder / name,
                "--output_dir", folder / "results", "--image_size", options.eval_image_size, "--num_workers", 1,
                "--save_visualizations",
            ]  # fmt: skip
            train, evaluate = ([str(part) for part in command] for command in (train, evaluate))
            subprocess.run([*train, "--cache_only"], check=True, cwd=ROOT)
            for what, command in (("training", train), ("evaluation", evaluate)):
                peaks[what][name] = round(peak_anonymous_mb(command), 1)
                print(f"{what}, {count} images: {peaks[what][name]} MB")
    print_result({what: {"peak_mb": peak, "ratio": peak["10n"] / peak["n"]} for what, peak in peaks.items()})


if __name__ == "__main__":
    main()
