"""The quality that M minutes of training reach, judged on other photos.

    python benchmarks/bench_quality.py --vae1 PATH --vae2 PATH --train_data_dir FOLDER --eval_data_dir FOLDER \\
        --input_types latent --minutes 20

Trains the recipe that config/ ships for those inputs from the VAEs' layers (`--init vaes`), on a latent cache that is built
first, and judges the checkpoint with `eval_align.py`. Prints its ladder, and one JSON line last. `--set flag=value` changes the
recipe.

With `--until better_than_reencode` every tenth of the training photos is held out and no other photos are looked at. After the
training its checkpoints, one every --check_steps steps, are judged on them. The result has the minutes of training up to the
first one whose PSNR and ST-LPIPS (VGG) both pass those of decode + re-encode; null if none does.
"""

import argparse
import json
import tempfile
from pathlib import Path

import common

from vaes.pipeline import read_checkpoint

HELD_OUT = 10  # every such training photo
RACED = {"psnr": 1, "st_lpips_vgg": -1}  # figures that have to pass those of re-encoding; -1: less is better


def measure(options) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        if options.until:
            photos = common.photos_in(options.train_data_dir)
            judged = photos[::HELD_OUT]
            options.train_data_dir = common.folder_of(sorted(set(photos) - set(judged)), f"{folder}/train")
            options.eval_data_dir = common.folder_of(judged, f"{folder}/eval")
        save_dir = f"{folder}/ckpt" if options.until or not options.save_dir else options.save_dir
        same = {"eval_data_dir": options.eval_data_dir, "eval_batch_size": 10, "num_workers": 2}
        training = common.recipe_flags(options.input_types) | same | {
            "vae1_path": options.vae1, "vae2_path": options.vae2, "train_data_dir": options.train_data_dir,
            "latent_cache_dir": options.latent_cache_dir, "log_dir": f"{folder}/runs", "save_dir": save_dir, "init": "vaes",
            "minutes": options.minutes, "eval_frequency": 0, "visualize_frequency": 0, "save_frequency": 0,
            "save_steps": options.check_steps if options.until else 0,
        } | dict(options.set)  # fmt: skip
        common.run_program("train_align_with_args.py", training | {"cache_only": []})
        print(common.run_program("train_align_with_args.py", training))
        checkpoints = sorted(Path(save_dir).glob("align_pipeline_*.pth"))[0 if options.until else -1 :]
        metrics = ["st_lpips"] if options.until else ["ssim", "st_lpips", "texture"]
        judging = same | {"checkpoint": checkpoints, "metrics": metrics, "output_dir": f"{save_dir}/judged"}
        print(common.run_program("eval_align.py", judging))
        results = json.loads(Path(save_dir, "judged", "metrics.json").read_text())
        contents = [read_checkpoint(path) for path in checkpoints]
    minutes = [content["training"]["budget"]["seconds"] / 60 for content in contents]
    steps = [content["step"] for content in contents]
    if options.until:
        return race(steps, minutes, results)
    return {"minutes": minutes[-1], "steps": steps[-1], "images": results["images"], "ladder": results["ladder"]}


def race(steps: list[int], minutes: list[float], results: dict) -> dict:
    """The result of --until: the first checkpoint that passes re-encoding, or else the last."""
    raced = {rung: {name: figures[name] for name in RACED} for rung, figures in results["ladder"].items()}
    checks = [raced[checkpoint["row"]] for checkpoint in results["checkpoints"]]
    passed = [all(sign * check[name] > sign * raced["reencode"][name] for name, sign in RACED.items()) for check in checks]
    number = passed.index(True) if any(passed) else -1
    return {
        "minutes": minutes[number] if any(passed) else None,
        "steps": steps[number],
        "held_out": results["images"],
        "ladder": {"reencode": raced["reencode"], "aligned": checks[number]},
        "checks": [(*each, *check.values()) for *each, check in zip(steps, minutes, checks)],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common.add_recipe_flags(parser)
    parser.add_argument("--train_data_dir", required=True)
    judged = parser.add_mutually_exclusive_group(required=True)
    judged.add_argument("--eval_data_dir")
    judged.add_argument("--until", choices=["better_than_reencode"], help="say how long it took until then")
    parser.add_argument("--minutes", type=float, required=True, help="of training, the cache already built")
    parser.add_argument("--check_steps", type=int, default=200, help="steps between the checks of --until")
    parser.add_argument("--latent_cache_dir", default="latent_cache", help="where the cache is kept")
    parser.add_argument("--save_dir", help="keep the checkpoint there, with its report; not with --until")
    parser.set_defaults(measure=measure)
    common.run_measurement(parser)


if __name__ == "__main__":
    main()
