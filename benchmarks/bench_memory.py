"""Whether training memory grows with the data set: peak anonymous memory at N and at 10 N images.

    python benchmarks/bench_memory.py

Trains on made-up images with a complete latent cache, pixels included, in a process of its own, and follows that process's
RssAnon (memory that is not a mapped file). Prints one JSON line last: `peak_mb` with `n` and `10n`. Linux only.
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
    parser.add_argument("--image_size", type=int, default=256, help="px")
    parser.add_argument("--steps", type=int, default=20, help="training steps")
    options = parser.parse_args()
    peaks = {}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for name, count in (("n", options.n), ("10n", 10 * options.n)):
            make_images(folder / name, count, options.image_size)
            command = [
                sys.executable, "train_align_with_args.py", "--load_config", "config/demo.json",
                "--train_data_dir", folder / name, "--image_size", options.image_size, "--cache_views", 1,
                "--latent_cache_dir", folder / "cache", "--log_dir", folder / "runs", "--save_dir", folder / "ckpt",
                "--eval_frequency", 0, "--visualize_frequency", 0, "--max_train_steps", options.steps, "--num_workers", 1,
            ]  # fmt: skip
            command = [str(part) for part in command]
            subprocess.run([*command, "--cache_only"], check=True, cwd=ROOT)
            peaks[name] = peak_anonymous_mb(command)
            print(f"{count} images: {peaks[name]:.1f} MB")
    print_result({"peak_mb": {name: round(peak, 1) for name, peak in peaks.items()}, "ratio": peaks["10n"] / peaks["n"]})


if __name__ == "__main__":
    main()
