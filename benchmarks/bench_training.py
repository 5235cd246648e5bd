"""Images per second of training, against the two limits: the bare module and the bare encoders.

    python benchmarks/bench_training.py --vae1 PATH --vae2 PATH --images FOLDER --input_types latent

Prints one JSON line last. `online` and `cached` are the real training loop with the shipped recipe (latent loss alone),
`module` its step alone on a batch that is already on the device, `cache_build` the encoding pass,
`encoders_best` both VAEs' encoders in the layout and precision that the project chooses, `encoders_naive` the same as plain
diffusers runs them: float32, NCHW, the whole batch at once, malloc as it comes. An encoded image counts once it went through
both. With `--cores 0 1` there are rows for one process and for two, each on a core of its own, with local VAEs: `cached` with
as many images a step in each process, and `evaluation` with the default metrics. Nothing else may run on those cores.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from common import RANDOM_VAES, RECIPES, ROOT, open_vae, prepared_step, print_result, recipe_args, train
from processes import process_rates
from tqdm import tqdm

import dataloader
from cache.build import CacheOptions, cache_latents
from cache.read import cached_loader
from utils import get_dtype
from vaes.codec import Codec


def rate_of(work, images, rounds):
    """Images per second of `work()`, which handles `images` of them: the median of `rounds`, after one warm-up."""
    work()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return images / statistics.median(times)


def loop_rate(args, vaes, loader, steps, log_dir):
    """Images per second of the real training loop, as it logs them: the median over log entries, the first left out."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with tempfile.TemporaryDirectory(dir=log_dir) as folder:
        args.log_dir = args.save_dir = folder
        args.max_train_steps, args.epochs = steps, 10**6
        args.eval_frequency = args.visualize_frequency = args.save_frequency = 0
        args.log_frequency = max(1, steps // 10)
        generator = torch.Generator(args.device).manual_seed(args.seed)
        train.train_align_pipeline(args, *vaes, loader, None, generator)
        (file,) = Path(folder).rglob("events.*")
        events = EventAccumulator(str(file))
        events.Reload()
        return statistics.median([event.value for event in events.Scalars("train/images_per_second")][1:])


def module_rate(args, vaes, loader, steps, log_dir):
    """Images per second of the training step alone, on one batch that is already on the device: nothing is read or encoded."""
    with tempfile.TemporaryDirectory(dir=log_dir) as folder:
        args.log_dir = args.save_dir = folder
        step, run = prepared_step(args, vaes, loader)
        rate = rate_of(lambda: [step() for _ in range(steps)], run.batch_size * steps, 1)
        run.close()
        return rate


def encoder_rate(spaces, images, rounds):
    return rate_of(lambda: [space.encode(images) for space in spaces], len(images), rounds)


@torch.no_grad()
def naive_encoder_rate(names, images, device):
    """Images per second through both encoders as plain diffusers runs them: float32, NCHW, the whole batch at once."""
    vaes = [open_vae(name, device, torch.float32) for name in names]
    vaes = [getattr(vae, "model", vae).to(memory_format=torch.contiguous_format) for vae in vaes]
    images = images.to(device)
    return rate_of(lambda: [vae.encode(images) for vae in vaes], len(images), 1)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vae1", required=True, help="folder, hub id, random:sd15 or random:flux")
    parser.add_argument("--vae2", required=True, help="folder, hub id, random:sd15 or random:flux")
    parser.add_argument("--images", required=True, help="folder of training images")
    parser.add_argument("--input_types", nargs="+", default=["image", "latent"], choices=["image", "latent"])
    parser.add_argument("--image_size", type=int, default=256, help="px")
    parser.add_argument("--max_images", type=int, default=160, help="use this many of the images")
    parser.add_argument("--views", type=int, default=4, help="views per image in the cache")
    parser.add_argument("--steps", type=int, default=40, help="cached steps per round")
    parser.add_argument("--online_steps", type=int, default=10, help="online steps")
    parser.add_argument("--encode_batch", type=int, default=16, help="images per call of the bare encoders")
    parser.add_argument("--rounds", type=int, default=3, help="rounds in which the bare module and the cached loop take turns")
    parser.add_argument("--cores", type=int, nargs=2, default=[], help="two CPU cores for one process and two")
    options = parser.parse_args()
    if options.cores and {options.vae1, options.vae2} & RANDOM_VAES.keys():
        parser.error("--cores: needs VAEs in folders")

    images = torch.rand(options.encode_batch, 3, options.image_size, options.image_size) * 2 - 1
    names = (options.vae1, options.vae2)
    naive = naive_encoder_rate(names, images, train.resolve_device("cuda", False))  # before anything is tuned
    args = recipe_args(
        options.input_types, image_size=options.image_size, train_data_dir=options.images, decoder_loss_weight=0,
        num_workers=2,
    )  # fmt: skip
    vaes = [open_vae(name, args.device, get_dtype(args.precision)) for name in names]
    spaces = [Codec(vae) for vae in vaes]
    source = dataloader.find_images(options.images, "default", True, "--images").paths[: options.max_images]
    dataset = dataloader.ImageDataset(source, options.image_size, random_crop=True, random_flip=True, seed=args.seed)

    with tempfile.TemporaryDirectory() as folder:
        best, build = [], []
        with_images = train.needs_pixels(args)
        rounds = 2
        for number in range(rounds):
            best.append(encoder_rate(spaces, images, 2))
            start = time.perf_counter()
            cached = cache_latents(
                dataset, *spaces, CacheOptions(f"{folder}/cache{number}", options.views, with_images), args.num_workers
            )
            build.append(len(dataset) * options.views / (time.perf_counter() - start))
        loader = cached_loader(cached, args.train_batch_size, 0, args.seed, options.views)
        online_loader = dataloader.train_loader(dataset, args.train_batch_size, args.num_workers, args.seed, options.views)
        module, cached_rate = [], []
        for _ in range(options.rounds):
            module.append(module_rate(args, vaes, loader, options.steps, folder))
            cached_rate.append(loop_rate(args, vaes, loader, options.steps, folder))
        online = loop_rate(args, vaes, online_loader, options.online_steps, folder)

    rates = {
        "online": online,
        "cached": statistics.median(cached_rate),
        "module": statistics.median(module),
        "cache_build": statistics.median(build),
        "encoders_best": statistics.median(best),
        "encoders_naive": naive,
    }
    ratios = {}
    if options.cores:
        recipe = {
            "load_config": ROOT / "config" / RECIPES[tuple(sorted(options.input_types))], "vae1_path": options.vae1,
            "vae2_path": options.vae2, "image_size": options.image_size, "cache_views": options.views,
            "decoder_loss_weight": 0,
        }  # fmt: skip
        together = process_rates(recipe, source, options.steps, options.cores, options.rounds)
        rates |= {name: statistics.median(of_rounds) for name, of_rounds in together.items()}
        for what in ("cached", "evaluation"):
            pairs = zip(together[f"{what}, 2 processes"], together[f"{what}, 1 process"])
            ratios[f"{what}, 2 processes/1 process"] = statistics.median(two / one for two, one in pairs)
        ratios["cached, 2 processes/1 process, per core"] = ratios["cached, 2 processes/1 process"] / 2
    for name, rate in rates.items():
        tqdm.write(f"{name:24} {rate:10.2f} images/s")
    print_result(
        {
            "images_per_second": {name: round(rate, 3) for name, rate in rates.items()},
            "ratios": ratios
            | {
                "cached/module": statistics.median(a / b for a, b in zip(cached_rate, module)),
                "cached/online": rates["cached"] / rates["online"],
                "cache_build/encoders_best": statistics.median(a / b for a, b in zip(build, best)),
                "encoders_best/encoders_naive": rates["encoders_best"] / rates["encoders_naive"],
            },
        }
    )


if __name__ == "__main__":
    main()
