"""The quality that a recipe reaches with N photos and M minutes, judged on other photos.

    python benchmarks/bench_quality.py --vae1 TAESD --vae2 TAEF1 --train_data_dir PHOTOS --eval_data_dir OTHER_PHOTOS \\
        --photos 20 60 200 800 --minutes 3 10 30
    python benchmarks/bench_quality.py --vae1 TAESD --vae2 TAEF1 --train_data_dir PHOTOS --recipe taesd_to_taef1_latent \\
        --set init=vaes --minutes 20 --until better_than_reencode

The first one trains as a user would, with `--load_config config/RECIPE.json --minutes M`. It judges each run's best module
beside the shipped module that training starts from, decode + re-encode and the linear map. It prints a table in Markdown.

With `--until better_than_reencode` every tenth of the training photos is held out and no other photos are looked at. After the
training its checkpoints, one every --check_steps steps, are judged on them. The result has the minutes of training up to the
first one whose PSNR and ST-LPIPS (VGG) both pass those of decode + re-encode; null if none does.

Both build the latent cache first, in --output_dir, where finished runs stay: a stopped benchmark goes on there. `--set` changes
the recipe. The last line is the result as JSON.
"""

import argparse
import json
import os
import random
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from images.files import list_images  # noqa: E402 - the project is not installed: it is beside this folder
from vaes.pipeline import read_checkpoint  # noqa: E402

HELD_OUT = 10  # with --until, every such training photo
AXES = {"psnr": 1, "st_lpips_vgg": -1}  # figures that count; -1: less is better
BASELINES = {"shipped": "the shipped module", "reencode": "decode + re-encode", "linear": "the linear map"}


def run_program(script: str, flags: dict) -> None:
    words = []
    for name, value in flags.items():
        words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    subprocess.run([sys.executable, str(ROOT / script), *words], check=True, stdout=sys.stderr)


def linked(photos: list[str], place: Path) -> Path:
    """A folder with links to the photos, in their order; it may be there already."""
    place.mkdir(exist_ok=True)
    for number, photo in enumerate(photos):
        link = place / f"{number:06d}{Path(photo).suffix}"
        if not link.exists():
            os.symlink(os.path.realpath(photo), link)
    return place


def train(options, photos: Path, minutes: float, folder: Path, **more) -> Path:
    """Train the recipe on the photos unless `folder` has a finished run; returns the folder of its checkpoints."""
    flags = {
        "load_config": ROOT / "config" / f"{options.recipe}.json", "vae1_path": options.vae1, "vae2_path": options.vae2,
        "train_data_dir": photos, "latent_cache_dir": options.output_dir / "latent_cache", "log_dir": folder / "runs",
        "save_dir": folder / "ckpt", "minutes": minutes,
    } | more | dict(options.set)  # fmt: skip
    if not (folder / "finished").exists():
        run_program("train_align_with_args.py", flags | {"cache_only": []})
        run_program("train_align_with_args.py", flags | {"resume": []})
        (folder / "finished").touch()
    return folder / "ckpt"


def judge(options, checkpoints: list[Path], eval_data_dir) -> tuple[list[dict], dict]:
    """([the figures of each checkpoint], {rung: figures}), by `eval_align.py`; the figures are those of `AXES`."""
    folder = options.output_dir / "judged"
    judging = {
        "checkpoint": checkpoints, "eval_data_dir": eval_data_dir, "vae1_path": options.vae1, "vae2_path": options.vae2,
        "metrics": ["st_lpips"], "num_samples": 0, "output_dir": folder,
    }  # fmt: skip
    run_program("eval_align.py", judging)
    results = json.loads((folder / "metrics.json").read_text())
    ladder = {rung: {metric: figures[metric] for metric in AXES} for rung, figures in results["ladder"].items()}
    return [ladder[checkpoint["row"]] for checkpoint in results["checkpoints"]], ladder


def minutes_of(checkpoint: Path) -> float:
    return read_checkpoint(checkpoint)["training"]["budget"]["seconds"] / 60


def measure_table(options, photos: list[str]) -> dict:
    """Every cell of --photos and --minutes."""
    random.Random(0).shuffle(photos)
    cells = []
    for count in options.photos or [len(photos)]:
        for minutes in options.minutes:
            some = linked(photos[:count], options.output_dir / f"{count}_photos")
            folder = train(options, some, minutes, options.output_dir / f"{count}_photos_{minutes:g}_minutes")
            best, last = (max(folder.glob(f"align_{kind}_*.pth")) for kind in ("best", "pipeline"))
            steps = {"best_step": read_checkpoint(best)["step"], "steps": read_checkpoint(last)["step"]}
            cells.append({"photos": count, "minutes": minutes, "took": minutes_of(last), "file": str(best)} | steps)
    moved = [cell for cell in cells if cell["best_step"]]  # the others kept the weights that they started with
    figures, ladder = judge(options, [options.shipped, *(cell["file"] for cell in moved)], options.eval_data_dir)
    ladder["shipped"] = figures[0]
    for cell in cells:
        cell |= figures[0]
    for cell, found in zip(moved, figures[1:]):
        cell |= found
    print_table(options.minutes, cells, ladder)
    return {"ladder": {rung: ladder[rung] for rung in BASELINES}, "cells": cells}


def print_table(minutes: list[float], cells: list[dict], ladder: dict) -> None:
    """PSNR in dB / ST-LPIPS (VGG), and the step of the best module among those of its run."""

    def shown(figures):
        return f"{figures['psnr']:.2f} / {figures['st_lpips_vgg']:.4f}"

    print("| photos |" + "".join(f" {each:g} minutes |" for each in minutes))
    print("|---|" + "---|" * len(minutes))
    for start in range(0, len(cells), len(minutes)):
        row = cells[start : start + len(minutes)]
        texts = (f" {shown(cell)} (step {cell['best_step']} of {cell['steps']}) |" for cell in row)
        print(f"| {row[0]['photos']} |" + "".join(texts))
    for rung, name in BASELINES.items():
        print(f"| {name} | {shown(ladder[rung])} |" + " |" * (len(minutes) - 1))


def measure_until(options, photos: list[str]) -> dict:
    """The first checkpoint that passes decode + re-encode on both axes, or else the last."""
    judged = photos[::HELD_OUT]
    eval_data_dir = linked(judged, options.output_dir / "held_out")
    others = linked(sorted(set(photos) - set(judged)), options.output_dir / "trained_on")
    quiet = {"eval_data_dir": eval_data_dir, "eval_frequency": 0, "visualize_frequency": 0, "save_frequency": 0}
    (minutes,) = options.minutes
    folder = train(options, others, minutes, options.output_dir / "until", save_steps=options.check_steps, **quiet)
    checkpoints = sorted(folder.glob("align_pipeline_*.pth"))
    figures, ladder = judge(options, checkpoints, eval_data_dir)
    passed = [all(sign * found[axis] > sign * ladder["reencode"][axis] for axis, sign in AXES.items()) for found in figures]
    number = passed.index(True) if any(passed) else -1
    steps = [read_checkpoint(path)["step"] for path in checkpoints]
    return {
        "minutes": minutes_of(checkpoints[number]) if any(passed) else None,
        "steps": steps[number],
        "held_out": len(judged),
        "ladder": {"reencode": ladder["reencode"], "aligned": figures[number]},
        "checks": [(step, minutes_of(path), *found.values()) for step, path, found in zip(steps, checkpoints, figures)],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vae1", required=True, help="folder or hub id of the recipe's VAE1")
    parser.add_argument("--vae2", required=True, help="folder or hub id of the recipe's VAE2")
    parser.add_argument("--train_data_dir", required=True)
    judged = parser.add_mutually_exclusive_group(required=True)
    judged.add_argument("--eval_data_dir")
    judged.add_argument("--until", choices=["better_than_reencode"], help="say how long it took until then")
    parser.add_argument("--recipe", default="taesd_to_taef1", help="a config's name")
    parser.add_argument("--shipped", default="taesd_to_taef1",
                        help="the module that the recipe starts from, or a pair such as sd15:flux1")  # fmt: skip
    parser.add_argument("--photos", type=int, nargs="+", help="numbers of training photos (default: all)")
    parser.add_argument("--minutes", type=float, nargs="+", required=True, help="of training, the cache already built")
    parser.add_argument("--check_steps", type=int, default=200, help="steps between the checks of --until")
    parser.add_argument("--output_dir", type=Path, default="bench_quality", help="where runs and the latent cache stay")
    parser.add_argument("--set", nargs="+", default=[], metavar="FLAG=VALUE", type=lambda word: word.split("=", 1),
                        help="changes to the recipe")  # fmt: skip
    options = parser.parse_args()
    options.output_dir.mkdir(parents=True, exist_ok=True)
    measure = measure_until if options.until else measure_table
    print(json.dumps(measure(options, [str(path) for path in list_images(options.train_data_dir)])))


if __name__ == "__main__":
    main()
