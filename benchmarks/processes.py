"""Images per second of one process and of two, each on a core of its own: training from the latent cache, and evaluation.

Part of bench_training.py. As a program it is what a launcher starts: it takes its core and runs the script that follows.
"""

import os
import re
import runpy
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LAUNCHER = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
CORES = "BENCHMARK_CORES"


def run(script: str, processes: int, cores: list[int], flags: dict) -> tuple[str, float]:
    """Run a program of the project on `processes` of the cores: (what it printed, seconds)."""
    argv = [word for name, value in flags.items() for word in (f"--{name}", *(value if isinstance(value, list) else [value]))]
    launcher = [*LAUNCHER, str(processes)] if processes > 1 else []
    command = [sys.executable, *launcher, __file__, str(ROOT / script), *map(str, argv)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", CORES: ",".join(map(str, cores))}
    start = time.perf_counter()
    ended = subprocess.run(command, capture_output=True, text=True, env=environment)
    if ended.returncode:
        sys.exit(ended.stderr)
    return ended.stdout, time.perf_counter() - start


def folder_of(images: list[str], place: Path) -> Path:
    """A new folder with links to the images."""
    place.mkdir()
    for number, image in enumerate(images):
        (place / f"{number:06d}{Path(image).suffix}").symlink_to(Path(image).resolve())
    return place


def process_rates(recipe: dict, images: list[str], steps: int, cores: list[int], rounds: int) -> dict[str, list[float]]:
    """{"cached, 1 process": [images/s of each round], …}; one process and two take turns.

    Args:
        recipe: flags of the training script that name the config, the VAEs and the size.
        images: files to train on and to judge. steps: of each training.
        cores: two numbers of CPU cores.

    An evaluation's rate follows from those of all images and of half of them, so that what it does once drops out.
    """
    rates = {}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        halves = folder_of(images[: len(images) // 2], folder / "half"), folder_of(images, folder / "all")
        quiet = dict.fromkeys(("eval_frequency", "save_frequency", "visualize_frequency", "num_workers"), 0)
        training = recipe | quiet | {
            "train_data_dir": halves[1], "eval_data_dir": halves[0], "latent_cache_dir": folder / "cache",
            "log_dir": folder / "runs", "save_dir": folder / "ckpt", "max_train_steps": steps, "log_frequency": steps,
            "device": "cpu",
        }  # fmt: skip
        run("train_align_with_args.py", 1, cores, training | {"max_train_steps": 1})  # builds the cache
        judging = {
            "checkpoint": folder / "ckpt",
            "output_dir": folder / "out",
            "num_workers": 0,
            "num_samples": 0,
            "device": "cpu",
        }
        for _ in range(rounds):
            for processes in (1, 2):
                name = f"{processes} process{'es' if processes > 1 else ''}"
                said, _ = run("train_align_with_args.py", processes, cores, training)
                rates.setdefault(f"cached, {name}", []).append(float(re.search(r"trained at ([\d.]+) images/s", said)[1]))
                times = [run("eval_align.py", processes, cores, judging | {"eval_data_dir": half})[1] for half in halves]
                rates.setdefault(f"evaluation, {name}", []).append((len(images) - len(images) // 2) / (times[1] - times[0]))
    return rates


def main():
    cores = os.environ[CORES].split(",")
    os.sched_setaffinity(0, {int(cores[int(os.environ.get("LOCAL_RANK", 0))])})
    sys.argv = sys.argv[1:]
    sys.path.insert(0, str(ROOT))
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
