"""What N photos of one's own and M minutes are worth: a recipe's best module, judged on other photos.

    python benchmarks/bench_first_hour.py --vae1 TAESD --vae2 TAEF1 --train_data_dir PHOTOS --eval_data_dir OTHER_PHOTOS \\
        --photos 20 60 200 800 --minutes 3 10 30 --output_dir first_hour

Trains as a user would, with `--load_config config/taesd_to_taef1.json --minutes M` and nothing else that shapes the weights.
Judges each run's best module beside the shipped one, decode + re-encode and the linear map. Prints the table in Markdown and,
last, one JSON line. Finished runs stay in --output_dir: a stopped benchmark goes on there.
"""

import argparse
import json
import random
from pathlib import Path

import common

from vaes.pipeline import read_checkpoint

SHIPPED = common.ROOT / "assets" / "pretrained" / "taesd_to_taef1.safetensors"
SHOWN = {"psnr": "{:.2f}".format, "st_lpips_vgg": "{:.4f}".format}


def train(options, photos: list[Path], count: int, minutes: float, folder: Path) -> Path:
    """The best module's file of a run on the first `count` photos; trained unless its folder has a finished run."""
    place = f"{options.output_dir}/{count}_photos"
    if not Path(place).is_dir():
        common.folder_of(photos[:count], place)
    if not (folder / "finished").exists():
        flags = common.recipe_flags(("image", "latent")) | {
            "vae1_path": options.vae1, "vae2_path": options.vae2, "train_data_dir": place, "minutes": minutes,
            "latent_cache_dir": f"{options.output_dir}/latent_cache", "log_dir": folder / "runs", "save_dir": folder,
        }  # fmt: skip
        print(common.run_program("train_align_with_args.py", flags | {"resume": []}), flush=True)
        (folder / "finished").touch()
    return next(folder.glob("align_best_*.pth"))


def measure(options) -> dict:
    photos = common.photos_in(options.train_data_dir)
    random.Random(0).shuffle(photos)
    Path(options.output_dir).mkdir(parents=True, exist_ok=True)
    cells = {}
    for count in options.photos:
        for minutes in options.minutes:
            folder = Path(options.output_dir, f"{count}_photos_{minutes:g}_minutes")
            folder.mkdir(exist_ok=True)
            file = train(options, photos, count, minutes, folder)
            last = read_checkpoint(max(folder.glob("align_pipeline_*.pth")))
            cells[count, minutes] = {
                "file": file,
                "best_step": read_checkpoint(file)["step"],
                "steps": last["step"],
                "minutes_taken": last["training"]["budget"]["seconds"] / 60,
            }
    moved = [cell["file"] for cell in cells.values() if cell["best_step"]]  # the others kept the shipped weights
    judging = {
        "checkpoint": [SHIPPED, *moved], "eval_data_dir": options.eval_data_dir, "vae1_path": options.vae1,
        "vae2_path": options.vae2, "metrics": ["st_lpips"], "num_samples": 0, "output_dir": f"{options.output_dir}/judged",
    }  # fmt: skip
    common.run_program("eval_align.py", judging)
    results = json.loads(Path(options.output_dir, "judged", "metrics.json").read_text())
    rows = {str(checkpoint["path"]): checkpoint["row"] for checkpoint in results["checkpoints"]}
    ladder = {rung: {metric: figures[metric] for metric in SHOWN} for rung, figures in results["ladder"].items()}
    for cell in cells.values():
        cell["file"] = str(cell["file"])
        cell |= ladder[rows[cell["file"]] if cell["best_step"] else "aligned"]
    print(table(options, cells, ladder))
    return {
        "images": results["images"],
        "ladder": {rung: ladder[rung] for rung in ("reencode", "linear", "aligned")},
        "cells": [{"photos": count, "minutes": minutes} | cell for (count, minutes), cell in cells.items()],
    }


def table(options, cells: dict, ladder: dict) -> str:
    """PSNR in dB / ST-LPIPS (VGG) of each cell in Markdown, with the steps of the best module and of its run."""

    def shown(figures):
        return " / ".join(as_text(figures[metric]) for metric, as_text in SHOWN.items())

    lines = ["| photos | " + " | ".join(f"{minutes:g} minutes" for minutes in options.minutes) + " |"]
    lines.append("|---" * (1 + len(options.minutes)) + "|")
    for count in options.photos:
        row = [cells[count, minutes] for minutes in options.minutes]
        texts = [f"{shown(cell)} (step {cell['best_step']} of {cell['steps']})" for cell in row]
        lines.append(f"| {count} | {' | '.join(texts)} |")
    names = {"aligned": "the shipped module", "reencode": "decode + re-encode", "linear": "the linear map"}
    lines += [f"| {name} | {shown(ladder[rung])} |{' |' * (len(options.minutes) - 1)}" for rung, name in names.items()]
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vae1", required=True, help="folder or hub id of a tiny autoencoder of SD1.5's latents")
    parser.add_argument("--vae2", required=True, help="the same of FLUX.1's")
    parser.add_argument("--train_data_dir", required=True)
    parser.add_argument("--eval_data_dir", required=True)
    parser.add_argument("--photos", type=int, nargs="+", default=[20, 60, 200, 800], help="numbers of training photos")
    parser.add_argument("--minutes", type=float, nargs="+", default=[3, 10, 30], help="of training, the cache built before")
    parser.add_argument("--output_dir", default="first_hour", help="where the runs and the latent cache stay")
    parser.set_defaults(measure=measure)
    common.run_measurement(parser)


if __name__ == "__main__":
    main()
