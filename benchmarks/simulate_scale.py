"""Hours and money for many images on many GPUs, and the next bottleneck: measured here, carried over by assumptions.

    python benchmarks/simulate_scale.py --images FOLDER

Measures on this machine, with both VAEs at full size and random weights and the recipe's module: the encoders and a training
step (latent loss), in time and in FLOPs, and how fast a core decodes photos. On a machine with a GPU these times count as they
are. Otherwise the FLOPs are carried over by the speeds that the flags assume. Prints the measurements, a table for README.md
and one JSON line; `--help` lists the assumptions.

The model: building the cache takes as long as the slowest of GPUs, decoding cores and file system, which work at the same time.
A step takes the module's time, a fixed overhead, and the part of the all-reduce that the backward pass (two thirds) does not
hide; its rows are read meanwhile, at what all GPUs share of the file system. Evaluations and failing machines are left out.
"""

import argparse

import torch
from common import open_vaes, recipe_flags, run_measurement, seconds_of, settings_of, train
from torch.utils.flop_counter import FlopCounterMode

GPUS = (1, 8, 64)
IMAGES = (1e6, 1e7, 1e8)
ROW = (
    "| {millions:.0f} M | {gpus} | {cache_tb:.2g} TB | {build_hours:.3g} h | {build_bound} | {train_hours:.3g} h | "
    "{train_bound} | **{hours:.3g}** | {money:,.0f} |"
)
ASSUMED = {
    "encode_tflops": (150.0, "that a GPU sustains in the encoders, bfloat16, 10^12 FLOP/s"),
    "step_tflops": (40.0, "that it sustains in the module, whose layers are thin"),
    "overhead_ms": (5.0, "of a step beside the module: launches, optimizer, logging"),
    "batch_per_gpu": (64, "images of a step and GPU"),
    "node_gb": (200.0, "GB/s between the GPUs of a machine of eight"),
    "network_gb": (25.0, "GB/s between machines, for each GPU"),
    "latency_ms": (0.2, "of an all-reduce beside its bytes"),
    "cores_per_gpu": (12, "CPU cores that decode"),
    "storage_gb": (5.0, "GB/s of the shared file system"),
    "photo_kb": (150.0, "kB of a photo's file"),
    "views": (1, "crops of each image in the cache"),
    "passes": (2, "over the rows of the cache"),
    "gpu_price": (2.5, "dollars for a GPU and hour"),
}


def measure_machine(options) -> dict:
    """Seconds and FLOPs of an image through both encoders and in a training step, bytes of the gradients and of a row of the
    cache, photos that a core decodes in a second."""
    flags = {"image_size": options.image_size, "train_data_dir": options.images, "eval_data_dir": options.images}
    args = settings_of(recipe_flags(options.input_types, decoder_loss_weight=0, num_workers=0, **flags))
    dtype = train.get_dtype(args.precision)
    pipeline = train.create_align_pipeline(*open_vaes(("random:sd15", "random:flux"), args.device, dtype), args).to(args.device)
    pixels = torch.rand(options.batch, 3, options.image_size, options.image_size, device=args.device) * 2 - 1
    latents, target = pipeline.codec1.encode(pixels), pipeline.codec2.encode(pixels)
    inputs = ({"latents": latents} if pipeline.uses_latents else {}) | ({"image": pixels} if pipeline.uses_image else {})
    dataset = train.create_data_loaders(args)[0].dataset  # without VAEs there is no cache
    photos = min(64, len(dataset))

    def step():
        with torch.autocast(pipeline.device.type, dtype, enabled=dtype != torch.float32):
            aligned = pipeline.module(**inputs)
        (aligned.float() - target).square().mean().backward()

    work = {
        "encode": lambda: (pipeline.codec1.encode(pixels), pipeline.codec2.encode(pixels)),
        "step": step,
        "decode": lambda: [dataset[index, 0] for index in range(photos)],
    }
    seconds, flops = seconds_of(work, 3), {}
    for name in ("encode", "step"):
        with FlopCounterMode(display=False) as counter:
            work[name]()
        flops[name] = counter.get_total_flops() / options.batch
    numbers = sum(parameter.numel() for parameter in pipeline.module.parameters())
    return {
        "encode_seconds": seconds["encode"] / options.batch, "encode_flops": flops["encode"],
        "step_seconds": seconds["step"] / options.batch, "step_flops": flops["step"], "gradient_bytes": 4 * numbers,
        "row_bytes": 2 * (latents[0].numel() + target[0].numel()) + (pixels[0].numel() if pipeline.uses_image else 0),
        "decoded_per_core": photos / seconds["decode"],
    }  # fmt: skip


def bottleneck(parts: dict[str, float]) -> str:
    """The part that takes longest, and the next one, as a share of it."""
    first, second = sorted(parts, key=parts.get)[:-3:-1]
    return f"{first} (next: {second}, {100 * parts[second] / parts[first]:.0f} %)"


def plan(measured: dict, options, images: float, gpus: int) -> dict:
    """Hours and money for `images` images on `gpus` GPUs, and the bounds of each part."""
    if torch.cuda.is_available():
        encode, step = measured["encode_seconds"], measured["step_seconds"]
    else:
        encode = measured["encode_flops"] / (options.encode_tflops * 1e12)
        step = measured["step_flops"] / (options.step_tflops * 1e12)
    shared, rows, batch = options.storage_gb * 1e9, images * options.views, options.batch_per_gpu
    building = {
        "encoders": rows * encode / gpus,
        "decoding": images / (gpus * options.cores_per_gpu * measured["decoded_per_core"]),
        "storage": (images * options.photo_kb * 1e3 + rows * measured["row_bytes"]) / shared,
    }
    link = (options.node_gb if gpus <= 8 else options.network_gb) * 1e9
    ring = 2 * (gpus - 1) / gpus * measured["gradient_bytes"] / link + options.latency_ms / 1e3 * (gpus > 1)
    steps = rows * options.passes / (batch * gpus)
    training = {
        "module": steps * batch * step,
        "overhead": steps * options.overhead_ms / 1e3,
        "all-reduce": steps * max(0.0, ring - 2 / 3 * batch * step),
    }
    reading = rows * options.passes * measured["row_bytes"] / shared
    build_hours, train_hours = max(building.values()) / 3600, max(sum(training.values()), reading) / 3600
    return {
        "images": images, "gpus": gpus, "build_hours": build_hours, "build_bound": bottleneck(building),
        "train_hours": train_hours, "train_bound": bottleneck(training | {"storage": reading}),
        "hours": build_hours + train_hours, "money": (build_hours + train_hours) * gpus * options.gpu_price,
        "cache_tb": rows * measured["row_bytes"] / 1e12,
    }  # fmt: skip


def simulate(options) -> dict:
    measured = measure_machine(options)
    print("measured:", ", ".join(f"{name} {value:.4g}" for name, value in measured.items()))
    print("\n| images | GPUs | cache | build it | bound by | train | bound by | hours | dollars |")
    print("|---|---|---|---|---|---|---|---|---|")
    plans = [plan(measured, options, images, gpus) for images in IMAGES for gpus in GPUS]
    for each in plans:
        print(ROW.format(millions=each["images"] / 1e6, **each))
    return {"measured": measured, "plans": plans}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.set_defaults(measure=simulate)
    parser.add_argument("--images", required=True, help="folder of photos, to measure how fast they are decoded")
    parser.add_argument("--input_types", nargs="+", default=["latent"], choices=["image", "latent"])
    parser.add_argument("--image_size", type=int, default=256, help="px")
    parser.add_argument("--batch", type=int, default=2, help="images at once while measuring")
    assumed = parser.add_argument_group("assumed")
    for name, (default, text) in ASSUMED.items():
        assumed.add_argument(f"--{name}", type=type(default), default=default, help=f"{text} (default: {default})")
    run_measurement(parser)


if __name__ == "__main__":
    main()
