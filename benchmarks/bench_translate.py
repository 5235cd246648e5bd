"""A translation's memory over a data set, its quality at other sizes, and its speed as ONNX. Its time: gpu_check.py.

    python benchmarks/bench_translate.py memory
    python benchmarks/bench_translate.py sizes --checkpoint assets/pretrained/taesd_to_taef1_latent.safetensors --images FOLDER
    python benchmarks/bench_translate.py onnx [--checkpoint FILE …] [--threads N]

`--help` after a measurement's name describes it. Each prints its result as one JSON line, last.
"""

import argparse
import contextlib
import itertools
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import common
import numpy as np
import psutil
import torch
from common import ROOT
from PIL import Image
from torchvision.datasets import FakeData

from evaluation.ladder import Ladder, evaluate
from vae_align import AlignPipeline
from vaes.pipeline import PipelineWithVAEs

SIZES = {"256x256": (256, 256), "768x512": (768, 512)}  # width, height
RUNGS = ("vae2", "reencode", "aligned")


def measure_memory(options):
    """Peak anonymous memory at N and at 10 N images, in training and in evaluation: does memory grow with the data set?

    Trains on random images with a complete latent cache, pixels included, and evaluates the checkpoint on the same images, each
    in a process of its own. Memory that maps a file does not count. The result has `peak_mb` of `n` and `10n`, and their
    ratio. Linux only.
    """
    os.chdir(ROOT)  # where the demo's config looks for its VAEs
    peaks = {"training": {}, "evaluation": {}}
    with tempfile.TemporaryDirectory() as folder:
        for name, count in (("n", options.n), ("10n", 10 * options.n)):
            images = Path(folder) / name
            images.mkdir()
            for number, (image, _) in enumerate(FakeData(count, (3, options.image_size, options.image_size))):
                image.save(images / f"{number:06d}.jpg")
            training = {
                "load_config": "config/demo.json", "train_data_dir": images,
                "image_size": options.image_size, "cache_views": 1, "latent_cache_dir": f"{folder}/cache",
                "log_dir": f"{folder}/runs", "save_dir": f"{folder}/ckpt", "max_train_steps": options.steps,
                "eval_frequency": 0, "visualize_frequency": 0, "num_workers": 1,
            }  # fmt: skip
            judging = {
                "checkpoint": f"{folder}/ckpt", "eval_data_dir": images, "output_dir": f"{folder}/results",
                "image_size": options.eval_image_size, "num_workers": 1, "save_visualizations": [],
            }  # fmt: skip
            common.run_program("train_align_with_args.py", training | {"cache_only": []})
            peaks["training"][name] = peak_anonymous_mb("train_align_with_args.py", training)
            peaks["evaluation"][name] = peak_anonymous_mb("eval_align.py", judging)
    return {what: {"peak_mb": peak, "ratio": peak["10n"] / peak["n"]} for what, peak in peaks.items()}


def peak_anonymous_mb(script: str, flags: dict) -> float:
    """The most memory, in MB, that a program held beside mapped files."""
    command = [sys.executable, str(ROOT / script), *common.words_of(flags)]
    process, peak = psutil.Popen(command, stdout=subprocess.DEVNULL), 0
    while process.poll() is None:
        with contextlib.suppress(psutil.Error):  # it has just ended
            memory = process.memory_info()
            peak = max(peak, memory.rss - memory.shared)
        time.sleep(0.02)
    if process.returncode:
        sys.exit(f"{script}: ended with {process.returncode}")
    return round(peak / 2**20, 1)


def measure_sizes(options):
    """Quality of a module on large, oblong pictures beside its training size.

    Photos of at least 768x512 px are judged twice at their own resolution: their centre of 768x512, and their centre of
    256x256. So content and scale are alike and only the size differs. Printed is, for both, PSNR against decode + re-encode and
    against VAE2's own reconstruction.
    """
    opened = map(Image.open, common.photos_in(options.images))
    large = (photo for photo in opened if photo.width >= 768 and photo.height >= 512)
    photos = list(itertools.islice(large, options.max_images))
    pipeline = PipelineWithVAEs.from_checkpoint(options.checkpoint, options.vae1_path, options.vae2_path)
    result = {"images": len(photos)}
    for name, size in SIZES.items():
        batches = [
            {"pixel_values": centre(photo, *size), "index": torch.tensor([index]), "path": ["photo"], "unreadable": []}
            for index, photo in enumerate(photos)
        ]
        ladder = evaluate(Ladder(pipeline, torch.float32, only=RUNGS), batches)["ladder"]
        psnr = {rung: ladder[rung]["psnr"] for rung in RUNGS}
        above, below = psnr["aligned"] - psnr["reencode"], psnr["aligned"] - psnr["vae2"]
        print(f"{name}: aligned {psnr['aligned']:.2f} dB, {above:+.2f} against decode + re-encode, {below:+.2f} against VAE2")
        result[name] = psnr | {figure: ladder["aligned"][figure] for figure in ("colour_bias", "latent_mse")}
    return result


def centre(photo: Image.Image, width: int, height: int) -> torch.Tensor:
    """(1, 3, height, width) in [-1, 1]."""
    left, top = (photo.width - width) // 2, (photo.height - height) // 2
    pixels = np.array(photo.crop((left, top, left + width, top + height)).convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1)[None] / 127.5 - 1


@torch.inference_mode()
def measure_onnx(options):
    """onnxruntime's time beside torch's, in float32 on the CPU, one picture at a time.

    The result has, for each file and image size in px, `torch` and `onnxruntime` in seconds per image. Needs the packages onnx,
    onnxscript and onnxruntime.
    """
    import onnxruntime

    torch.set_num_threads(options.threads)
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = options.threads
    result = {path.stem: {} for path in options.checkpoint}
    for path in options.checkpoint:
        pipeline = AlignPipeline.from_checkpoint(path)
        config = pipeline.config
        with tempfile.TemporaryDirectory() as folder:
            exported = f"{folder}/module.onnx"
            subprocess.run([sys.executable, ROOT / "tools/export_onnx.py", path, exported], check=True)
            session = onnxruntime.InferenceSession(exported, settings, providers=["CPUExecutionProvider"])
        for size in options.image_size:
            rows = size // config.latent_stride
            inputs = {
                "latents": torch.randn(1, config.latent_channels, rows, rows),
                "image": torch.rand(1, 3, size, size) * 2 - 1,
            }
            inputs = {name: inputs[name] for name in inputs if name.removesuffix("s") in config.input_types}
            arrays = {name: tensor.numpy() for name, tensor in inputs.items()}
            calls = {
                "torch": lambda: pipeline.translate(**inputs),  # noqa: B023
                "onnxruntime": lambda: session.run(None, arrays),  # noqa: B023
            }
            seconds = common.seconds_of(calls, options.rounds)
            print(f"{path.stem} {size} px:", ", ".join(f"{name} {1000 * each:7.1f} ms" for name, each in seconds.items()))
            result[path.stem][size] = {name: round(each, 5) for name, each in seconds.items()}
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(metavar="MEASUREMENT", required=True)

    kind = common.add_measurement(kinds, measure_memory)
    kind.add_argument("--n", type=int, default=100, help="images of the smaller set")
    kind.add_argument("--image_size", type=int, default=256, help="px, in training")
    kind.add_argument("--eval_image_size", type=int, default=64, help="px, in evaluation")
    kind.add_argument("--steps", type=int, default=20, help="training steps")

    kind = common.add_measurement(kinds, measure_sizes)
    kind.add_argument("--checkpoint", required=True)
    kind.add_argument("--images", required=True, help="folder of photos; those below 768x512 px are left out")
    kind.add_argument("--vae1_path", help="in place of the checkpoint's")
    kind.add_argument("--vae2_path", help="in place of the checkpoint's")
    kind.add_argument("--max_images", type=int, default=20)

    kind = common.add_measurement(kinds, measure_onnx)
    shipped = sorted((ROOT / "assets" / "pretrained").glob("*.safetensors"))
    kind.add_argument("--checkpoint", type=Path, nargs="+", default=shipped, help="default: the shipped modules")
    kind.add_argument("--image_size", type=int, nargs="+", default=[256, 512, 1024], help="px")
    kind.add_argument("--threads", type=int, default=1, help="of torch and of onnxruntime")
    kind.add_argument("--rounds", type=int, default=15, help="counted calls")

    common.run_measurement(parser)


if __name__ == "__main__":
    main()
