"""What training costs: images per second against two limits, and a step's time and memory beside the first recipe's.

    python benchmarks/bench_training.py rates --vae1 PATH --vae2 PATH --images FOLDER --input_types latent
    python benchmarks/bench_training.py step --vae1 PATH --vae2 PATH --images FOLDER --input_types latent

`--help` after a measurement's name describes it. Each prints its result as one JSON line, last.
"""

import argparse
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import common
import torch
from common import train

RATIOS = (
    ("cached", "module"),
    ("cached", "online"),
    ("cache_build", "encoders_best"),
    ("encoders_best", "encoders_naive"),
    ("cached, 2 processes", "cached, 1 process"),
    ("evaluation, 2 processes", "evaluation, 1 process"),
)
PINNED = 'cores=($CORES); exec taskset -c ${cores[${LOCAL_RANK:-0}]} "$0" "$@"'  # in bash: a core for each process
FIRST_RECIPE = {
    "architecture": "plain", "init": "ridge", "hidden_channels": 128, "num_blocks": 4, "optimizer": "muon", "loss_type": "mse",
    "decoder_loss_weight": 12, "decoder_loss_type": "mse", "decoder_loss_batch": 2, "decoder_loss_window": 24,
    "decoder_loss_reference": "original", "perceptual_loss_weight": 0, "reencode_target": 0,
    "moments_loss_weight": 0,
}  # fmt: skip
TERMS = ("moments_loss_weight", "decoder_loss_weight", "perceptual_loss_weight", "reencode_target")
FIXED = {"image_size": 256, "train_batch_size": 8, "decoder_loss_start": 0}
STEP_PHOTOS = 16


def flags_of(options, folder: str, photos: int) -> dict:
    """Flags of a run of the recipe on the first photos, which writes to `folder` alone; it neither evaluates nor saves on its
    way."""
    images = f"{folder}/photos"
    if not Path(images).exists():
        common.folder_of(common.photos_in(options.images)[:photos], images)
    quiet = dict.fromkeys(("eval_frequency", "visualize_frequency", "save_frequency", "num_workers"), 0)
    places = {name: f"{folder}/{name}" for name in ("latent_cache_dir", "log_dir", "save_dir")}
    return common.recipe_flags(options.input_types, train_data_dir=images, eval_data_dir=images, **quiet, **places)


def measure_rates(options):
    """Images per second of training, against the bare module and the bare encoders.

    `online` and `cached` are the real training loop with the shipped recipe, its squared decoded loss switched off. `module` is
    the step alone, on a batch that is already on the device. `cache_build` is the encoding pass. `encoders_best` is both VAEs'
    encoders in the layout and precision that the project chooses. `encoders_naive` is the same as plain diffusers runs them:
    float32, NCHW, the whole batch at once, malloc as it comes. An encoded image counts once it went through both.

    With --cores there are rows for one process and for two, each on a core of its own. `cached` has the same number of images a
    step in each process, `evaluation` the default metrics. Nothing else may run on those cores. Linux only.
    """
    rates = defaultdict(list)
    names, device = (options.vae1, options.vae2), train.resolve_device("cuda", False)
    images = torch.rand(options.encode_batch, 3, options.image_size, options.image_size, device=device) * 2 - 1

    def time_encoders(name, encoders, rounds):
        with torch.no_grad():
            seconds = common.seconds_of({name: lambda: [encode(images) for encode in encoders]}, rounds)[name]
        rates[name].append(len(images) / seconds)

    naive = common.open_vaes(names, device, torch.float32)
    naive = [getattr(vae, "model", vae).to(memory_format=torch.contiguous_format) for vae in naive]
    time_encoders("encoders_naive", [vae.encode for vae in naive], 1)  # before malloc is tuned
    del naive
    with tempfile.TemporaryDirectory() as folder:
        flags = flags_of(options, folder, options.max_images) | {"image_size": options.image_size, "decoder_loss_weight": 0}
        flags |= {"cache_views": options.views} | dict(options.set)
        args = common.settings_of(flags | {"num_workers": 2})
        vaes = common.open_vaes(names, args.device, train.get_dtype(args.precision))
        pipeline = train.create_align_pipeline(*vaes, args).to(args.device)
        accelerator = train.create_accelerator(args.device, args.precision)
        for number in range(2):
            time_encoders("encoders_best", [pipeline.codec1.encode, pipeline.codec2.encode], 2)
            args = args.but(latent_cache_dir=f"{folder}/cache{number}")
            start = time.perf_counter()
            loader, _ = train.create_data_loaders(args, *vaes, accelerator)
            rates["cache_build"].append(len(loader.dataset) * options.views / (time.perf_counter() - start))
        step = common.prepared_step(args, vaes, loader)
        for _ in range(options.rounds):
            seconds = common.seconds_of({"step": step}, options.steps)["step"]
            rates["module"].append(args.train_batch_size / seconds)
            rates["cached"].append(loop_rate(args, vaes, loader, options.steps))
        online_loader, _ = train.create_data_loaders(args, accelerator=accelerator)  # without VAEs there is no cache
        rates["online"].append(loop_rate(args, vaes, online_loader, options.online_steps))
        if options.cores:
            add_process_rates(rates, flags | {"vae1_path": names[0], "vae2_path": names[1]}, folder, options)
    rates = {name: statistics.median(rounds) for name, rounds in rates.items()}
    for name, rate in rates.items():
        print(f"{name:24} {rate:10.2f} images/s")
    ratios = {f"{name}/{other}": rates[name] / rates[other] for name, other in RATIOS if name in rates}
    return {"images_per_second": {name: round(rate, 3) for name, rate in rates.items()}, "ratios": ratios}


def loop_rate(args, vaes, loader, steps: int) -> float:
    """Images per second of the real training loop."""
    args = args.but(max_train_steps=steps, epochs=10**6, log_frequency=max(1, steps // 10))
    train.train_align_pipeline(args, *vaes, loader, None, torch.Generator(args.device).manual_seed(args.seed))
    return logged_rate(args.log_dir)


def logged_rate(log_dir: str) -> float:
    """Images per second, as the newest run logged them: the median of its entries but the first, when things start."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    newest = max(Path(log_dir).rglob("events.*"), key=os.path.getmtime)
    events = EventAccumulator(str(newest)).Reload()
    return statistics.median([event.value for event in events.Scalars("train/images_per_second")][1:])


def add_process_rates(rates: dict, training: dict, folder: str, options) -> None:
    """Add the rates of each round to `rates`; one process and two take turns.

    An evaluation's rate follows from its times on all photos and on half of them, so that the start of a program drops out.
    """

    def run(script, processes, **flags):
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes, "--no-python"]
        pinned = [*([sys.executable, *map(str, launcher)] if processes > 1 else []), "bash", "-c", PINNED, sys.executable]
        environment = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "CORES": " ".join(map(str, options.cores))}
        start = time.perf_counter()
        common.run_program(script, flags | {"device": "cpu"}, pinned, **environment)
        return time.perf_counter() - start

    photos = common.photos_in(training["train_data_dir"])
    half = common.folder_of(photos[: len(photos) // 2], f"{folder}/half")
    training |= {"log_frequency": options.steps}
    judging = {"checkpoint": training["save_dir"], "output_dir": f"{folder}/out", "num_workers": 0, "num_samples": 0}
    run("train_align_with_args.py", 1, **training, max_train_steps=1)  # builds the cache
    for _ in range(options.rounds):
        for processes, name in ((1, "1 process"), (2, "2 processes")):
            run("train_align_with_args.py", processes, **training, max_train_steps=options.steps)
            rates[f"cached, {name}"].append(logged_rate(training["log_dir"]))
            short = run("eval_align.py", processes, **judging, eval_data_dir=half)
            long = run("eval_align.py", processes, **judging, eval_data_dir=training["eval_data_dir"])
            rates[f"evaluation, {name}"].append((len(photos) - len(photos) // 2) / (long - short))


def measure_step(options):
    """A training step's time and memory beside the first recipe's, and the share of each term of the loss.

    The step is that of the shipped recipe on batches of 8 photos at 256 px out of a latent cache. Losses on decoded images
    are in play from the first step. The first recipe is a plain latent error with a squared decoded one. The
    steps of all variants take turns. On a CPU a step's seconds are those of all its threads, which other programs do not
    lengthen. Memory is that of a process that does nothing else: the device's on CUDA, else the most that was resident.

    The result has `seconds` and `peak_gb` of `first` and `recipe`, the `ratio` of their times, and as `shares` the part of the
    recipe's time that each term adds when it is switched on after those before it. Not on Windows.
    """
    changes = dict(options.set) | FIXED
    wanted = common.settings_of(common.recipe_flags(options.input_types, **changes))
    terms = [name for name in TERMS if getattr(wanted, name)]
    variants = {"first": FIXED | FIRST_RECIPE | {"num_blocks": 5 if len(options.input_types) == 1 else 4}}
    variants |= {name: changes | dict.fromkeys(terms[on:], 0) for on, name in enumerate(["latents", *terms])}
    recipe = list(variants)[-1]
    with tempfile.TemporaryDirectory() as folder:
        # Linux counts to a process the memory of the one that starts it: this one has little so far
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            for count in (0, 3):  # the first pass builds the caches, which takes memory of its own
                peaks = {name: pool.apply(peak_gb, (options, variants[name], folder, count)) for name in ("first", recipe)}
        steps = dict(zip(variants, steps_of(options, variants.values(), folder)))
        clock = time.perf_counter if torch.cuda.is_available() else time.process_time
        seconds = common.seconds_of(steps, options.rounds, clock)
    shares, before = {}, 0.0
    for name in list(seconds)[1:]:
        shares[name] = round((seconds[name] - before) / seconds[recipe], 3)
        before = seconds[name]
    return {
        "first": {"seconds": seconds["first"], "peak_gb": peaks["first"]},
        "recipe": {"seconds": seconds[recipe], "peak_gb": peaks[recipe]},
        "ratio": seconds[recipe] / seconds["first"],
        "shares": shares,
        "threads": torch.get_num_threads(),
    }


def steps_of(options, variants, folder: str) -> list:
    """A function for each variant that trains one step."""
    steps, vaes = [], None
    for changes in variants:
        args = common.settings_of(flags_of(options, folder, STEP_PHOTOS) | {"cache_views": 1} | changes)
        vaes = vaes or common.open_vaes((options.vae1, options.vae2), args.device, train.get_dtype(args.precision))
        loader, _ = train.create_data_loaders(args, *vaes)
        steps.append(common.prepared_step(args, vaes, loader))
    return steps


def peak_gb(options, changes: dict, folder: str, count: int) -> float:
    """GB at the peak of this process, after `count` steps of a variant."""
    import resource  # which Windows does not have

    (step,) = steps_of(options, [changes], folder)
    for _ in range(count):
        step()
    return (torch.cuda.max_memory_allocated() or 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) / 1e9


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(metavar="MEASUREMENT", required=True)
    rates, step = common.add_measurement(kinds, measure_rates), common.add_measurement(kinds, measure_step)
    for kind in (rates, step):
        common.add_recipe_flags(kind)
        kind.add_argument("--images", required=True, help="folder of training images")
    rates.add_argument("--image_size", type=int, default=256, help="px")
    rates.add_argument("--max_images", type=int, default=160, help="use this many of the images")
    rates.add_argument("--views", type=int, default=4, help="views per image in the cache")
    rates.add_argument("--steps", type=int, default=40, help="cached steps per round")
    rates.add_argument("--online_steps", type=int, default=10, help="online steps")
    rates.add_argument("--encode_batch", type=int, default=16, help="images per call of the bare encoders")
    rates.add_argument("--rounds", type=int, default=3, help="rounds in which the bare module and the cached loop take turns")
    rates.add_argument("--cores", type=int, nargs=2, help="two CPU cores for one process and two; needs VAEs in folders")
    step.add_argument("--rounds", type=int, default=10, help="steps of each variant, of which the median counts")
    common.run_measurement(parser)


if __name__ == "__main__":
    main()
