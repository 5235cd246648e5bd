"""onnxruntime's time beside torch's for a module, in float32 on the CPU, one picture at a time.

    python benchmarks/bench_onnx.py [--checkpoint FILE …] [--threads N]

Prints one JSON line last: for each file and image size `torch` and `onnxruntime` in seconds per image. The two take turns,
and each figure is the median. Needs the packages onnx, onnxscript and onnxruntime.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from common import ROOT, print_result

sys.path.insert(0, str(ROOT / "tools"))

import onnxruntime
from export_onnx import example_inputs, export_pipeline

from vae_align import AlignPipeline


def seconds(call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


@torch.inference_mode()
def measure(path: Path, sizes: list[int], threads: int, rounds: int) -> dict:
    """{image size in px: {"torch": s, "onnxruntime": s}}."""
    exported, pipeline = AlignPipeline.from_checkpoint(path), AlignPipeline.from_checkpoint(path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    with tempfile.TemporaryDirectory() as folder:
        export_pipeline(exported, Path(folder) / "module.onnx")
        session = onnxruntime.InferenceSession(str(Path(folder) / "module.onnx"), options, providers=["CPUExecutionProvider"])
    result = {}
    for size in sizes:
        stride = max(pipeline.config.latent_stride, pipeline.config.out_stride)
        inputs = example_inputs(pipeline.module, size // stride, size // stride, batch=1)
        arrays = {name: tensor.numpy() for name, tensor in inputs.items()}
        calls = {"torch": lambda: pipeline.translate(**inputs), "onnxruntime": lambda: session.run(None, arrays)}  # noqa: B023
        times = {name: [] for name in calls}
        for _ in range(rounds + 1):
            for name, call in calls.items():
                times[name].append(seconds(call))
        result[size] = {name: round(statistics.median(values[1:]), 5) for name, values in times.items()}
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shipped = sorted((ROOT / "assets" / "pretrained").glob("*.safetensors"))
    parser.add_argument("--checkpoint", type=Path, nargs="+", default=shipped, help="default: the shipped modules")
    parser.add_argument("--image_size", type=int, nargs="+", default=[256, 512, 1024], help="px")
    parser.add_argument("--threads", type=int, default=1, help="of each of the two")
    parser.add_argument("--rounds", type=int, default=15, help="counted calls")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    result = {path.stem: measure(path, args.image_size, args.threads, args.rounds) for path in args.checkpoint}
    for name, sizes in result.items():
        for size, times in sizes.items():
            print(f"{name} {size} px: torch {times['torch'] * 1000:7.1f} ms, onnxruntime {times['onnxruntime'] * 1000:7.1f} ms")
    print_result(result)


if __name__ == "__main__":
    main()
