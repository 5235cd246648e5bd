"""Hours and money for many images on many GPUs, and what the next bottleneck is: measured here, carried over by assumptions.

    python benchmarks/simulate_scale.py --images FOLDER

Measures on this machine, with both VAEs at full size and random weights and the recipe's module: the encoders and a training
step (latent loss), in time and in FLOPs; the all-reduce of the module's gradients between two processes; how fast a core
decodes photos; how fast the file system reads and writes. Where this machine has a GPU its times count as they are. Otherwise
the FLOPs are carried over by the speeds that the flags assume. Prints what was measured, a table for README.md and one
JSON line; `--help` lists what is assumed.

The model: building the cache takes as long as the slowest of GPUs, decoding cores and file system, which work at the same time.
A step takes the module's time, a fixed overhead, and what of the all-reduce the backward pass (two thirds) does not hide; its
rows are read meanwhile, at what all GPUs share of the file system. Evaluations and a failing machine are not in it.
"""

import argparse
import os
import statistics
import tempfile
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist
from common import open_vae, print_result, recipe_args, train
from torch.utils.flop_counter import FlopCounterMode

from dataloader import ImageDataset
from images.files import list_images
from utils import autocast, get_dtype
from vaes.codec import Codec

GPUS = (1, 8, 64)
IMAGES = (1e6, 1e7, 1e8)


def seconds_of(work, rounds=3):
    """Of `work()`, the median, after one that does not count."""
    times = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def flops_of(work) -> int:
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def reduce_gradients(rank, numbers, port, results):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    gradients = torch.ones(numbers)
    seconds = seconds_of(lambda: dist.all_reduce(gradients), 5)
    if rank == 0:
        results.put(seconds)
    dist.destroy_process_group()


def all_reduce_seconds(numbers: int) -> float:
    """Of a float32 vector, between two processes of this machine (gloo)."""
    context = torch.multiprocessing.get_context("spawn")
    results, port = context.SimpleQueue(), 20000 + os.getpid() % 20000
    processes = [context.Process(target=reduce_gradients, args=(rank, numbers, port, results)) for rank in range(2)]
    for process in processes:
        process.start()
    seconds = results.get()
    for process in processes:
        process.join()
    return seconds


def file_system_rates(folder: str, size: int = 1 << 28) -> tuple[float, float]:
    """(bytes/s written, bytes/s read back past the page cache) in `folder`."""
    content = os.urandom(size)
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        start = time.perf_counter()
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
        written = size / (time.perf_counter() - start)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        start = time.perf_counter()
        file.seek(0)
        while file.read(1 << 22):
            pass
        return written, size / (time.perf_counter() - start)


@dataclass
class Costs:
    """What was measured: seconds and FLOPs of an image through both encoders and of an image in a training step, bytes of the
    gradients and of a row of the cache, photos that a core decodes in a second."""

    encode_seconds: float
    encode_flops: float
    step_seconds: float
    step_flops: float
    gradient_bytes: int
    row_bytes: int
    decoded_per_core: float


def measure(options) -> Costs:
    args = recipe_args(options.input_types, image_size=options.image_size, decoder_loss_weight=0)
    dtype = get_dtype(args.precision)
    vaes = [open_vae(name, args.device, dtype) for name in ("random:sd15", "random:flux")]
    pipeline = train.build_parts(args, *vaes).pipeline
    pixels = torch.rand(options.batch, 3, options.image_size, options.image_size, device=args.device) * 2 - 1
    codecs = [Codec(vae) for vae in vaes]

    def encode():
        return [codec.encode(pixels) for codec in codecs]

    latents, target = encode()
    given = {"latents": latents.float() if pipeline.uses_latents else None, "image": pixels if pipeline.uses_image else None}

    def step():
        with autocast(pipeline.device, dtype):
            aligned = pipeline.module(**{name: each for name, each in given.items() if each is not None})
        (aligned.float() - target).square().mean().backward()

    paths = list_images(options.images)[:64]
    photos = ImageDataset(paths, options.image_size, random_crop=True)
    start = time.perf_counter()
    for place in range(len(paths)):
        photos[place, 0]
    decoded = len(paths) / (time.perf_counter() - start)
    row = 2 * sum(each[0].numel() for each in (latents, target)) + (pixels[0].numel() if pipeline.uses_image else 0)
    numbers = sum(parameter.numel() for parameter in pipeline.module.parameters())
    each = options.batch
    return Costs(
        seconds_of(encode) / each, flops_of(encode) / each, seconds_of(step) / each, flops_of(step) / each, 4 * numbers, row,
        decoded,
    )  # fmt: skip


def bottleneck(parts: dict[str, float]) -> str:
    """The part that takes longest, and the next one, as a share of it."""
    first, second = sorted(parts, key=parts.get)[:-3:-1]
    return f"{first} (next: {second}, {100 * parts[second] / parts[first]:.0f} %)"


def plan(costs: Costs, options, images: float, gpus: int) -> dict:
    """Hours and money for `images` images on `gpus` GPUs, and what bounds each part."""
    has_gpu = torch.cuda.is_available()
    encode = costs.encode_seconds if has_gpu else costs.encode_flops / (options.encode_tflops * 1e12)
    step = costs.step_seconds if has_gpu else costs.step_flops / (options.step_tflops * 1e12)
    shared = options.storage_gb * 1e9
    rows = images * options.views
    building = {
        "encoders": rows * encode / gpus,
        "decoding": images / (gpus * options.cores_per_gpu * costs.decoded_per_core),
        "storage": (images * options.photo_kb * 1e3 + rows * costs.row_bytes) / shared,
    }
    batch = options.batch_per_gpu
    link = (options.node_gb if gpus <= 8 else options.network_gb) * 1e9
    ring = 2 * (gpus - 1) / gpus * costs.gradient_bytes / link + options.latency_ms / 1e3 * (gpus > 1)
    of_step = {
        "module": batch * step,
        "overhead": options.overhead_ms / 1e3,
        "all-reduce": max(0.0, ring - 2 / 3 * batch * step),
    }
    steps = rows * options.passes / (batch * gpus)
    reading = rows * options.passes * costs.row_bytes / shared
    training = max(steps * sum(of_step.values()), reading)
    bound = bottleneck({part: steps * seconds for part, seconds in of_step.items()} | {"storage": reading})
    hours = (max(building.values()) + training) / 3600
    return {
        "images": images, "gpus": gpus, "build_hours": max(building.values()) / 3600,
        "build_bound": bottleneck(building),
        "train_hours": training / 3600, "train_bound": bound, "hours": hours, "money": hours * gpus * options.gpu_price,
        "cache_tb": rows * costs.row_bytes / 1e12,
    }  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True, help="folder of photos, to measure how fast they are decoded")
    parser.add_argument("--input_types", nargs="+", default=["latent"], choices=["image", "latent"])
    parser.add_argument("--image_size", type=int, default=256, help="px")
    parser.add_argument("--batch", type=int, default=2, help="images at once while measuring")
    parser.add_argument("--folder", default=".", help="where the file system is measured")
    assumed = parser.add_argument_group("assumed")
    for name, default, text in (
        ("encode_tflops", 150.0, "that a GPU sustains in the encoders, bfloat16, 10^12 FLOP/s"),
        ("step_tflops", 40.0, "that it sustains in the module, whose layers are thin"),
        ("overhead_ms", 5.0, "of a step beside the module: launches, optimizer, logging"),
        ("batch_per_gpu", 64, "images of a step and GPU"),
        ("node_gb", 200.0, "GB/s between the GPUs of a machine of eight"),
        ("network_gb", 25.0, "GB/s between machines, for each GPU"),
        ("latency_ms", 0.2, "of an all-reduce beside its bytes"),
        ("cores_per_gpu", 12, "CPU cores that decode"),
        ("storage_gb", 5.0, "GB/s of the shared file system"),
        ("photo_kb", 150.0, "kB of a photo's file"),
        ("views", 1, "crops of each image in the cache"),
        ("passes", 2, "over the rows of the cache"),
        ("gpu_price", 2.5, "dollars for a GPU and hour"),
    ):
        assumed.add_argument(f"--{name}", type=type(default), default=default, help=f"{text} (default: {default})")
    options = parser.parse_args()

    costs = measure(options)
    together = all_reduce_seconds(costs.gradient_bytes // 4)
    written, read = file_system_rates(options.folder)
    print(
        f"measured: encoders {1 / costs.encode_seconds:.2f} images/s ({costs.encode_flops / costs.encode_seconds / 1e12:.2f} "
        f"TFLOP/s, {costs.encode_flops / 1e9:.0f} GFLOP an image), module's step {1 / costs.step_seconds:.1f} images/s "
        f"({costs.step_flops / 1e9:.1f} GFLOP), gradients {costs.gradient_bytes / 1e6:.1f} MB all-reduced in "
        f"{1e3 * together:.1f} ms (two processes, gloo), a core decodes {costs.decoded_per_core:.0f} photos/s, the file system "
        f"writes {written / 1e9:.2f} and reads {read / 1e9:.2f} GB/s; a row has {costs.row_bytes / 1e3:.1f} kB"
    )
    print("\n| images | GPUs | cache | build it | bound by | train | bound by | hours | dollars |")
    print("|---|---|---|---|---|---|---|---|---|")
    plans = [plan(costs, options, images, gpus) for images in IMAGES for gpus in GPUS]
    for each in plans:
        print(
            f"| {each['images'] / 1e6:.0f} M | {each['gpus']} | {each['cache_tb']:.2g} TB | {each['build_hours']:.3g} h | "
            f"{each['build_bound']} | {each['train_hours']:.3g} h | {each['train_bound']} | **{each['hours']:.3g}** | "
            f"{each['money']:,.0f} |"
        )
    measured = vars(costs) | {"all_reduce_seconds": together, "write_bytes": written, "read_bytes": read}
    print_result({"measured": measured, "plans": plans})


if __name__ == "__main__":
    main()
