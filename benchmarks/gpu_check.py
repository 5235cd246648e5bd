"""What the project does on a GPU, unattended, in eight minutes: its tests, training's speed, translation's cost.

    python benchmarks/gpu_check.py
    python benchmarks/gpu_check.py --small     # on a CPU too: tiny VAEs, small pictures
    python benchmarks/gpu_check.py --only "translate tiny" --tiny1 TAESD --tiny2 TAEF1 --sizes 256

Writes gpu_check.json anew after each row, so a run that is killed keeps what it has measured. At the end it writes and prints
gpu_check.md, the tables for README.md. A row that the time, the memory or the machine does not allow is named with its reason.
`tiny` are the embedded VAEs or the given ones. `full` has SD1.5's and FLUX.1's architectures and random weights.

A row of `train` has images per second of the first recipe at 256 px. `bare` is the step alone on a batch that is on the device,
`cached` and `online` are the real loop, with the latent cache and without. `encoders` are both VAEs' alone, `building` is the
pass that fills the cache. `sent` counts the bytes an image that cross to the device. A row of `translate` has an image's
milliseconds, multiply-adds and the most memory that CUDA held: of `translate` by the shipped recipe for latents, of decode +
re-encode, and of VAE2's encoder.
"""

import argparse
import contextlib
import itertools
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from diffusers import AutoencoderKL
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import train_align_with_args as train
from utils import PRECISIONS, UserError, compute_policy, is_out_of_memory, one_line, peak_memory, require_compiler, write_json
from vaes.codec import reencode

ROOT = Path(__file__).resolve().parent.parent
MIB = 1 << 20
RECIPE = ROOT / "config" / "taesd_to_taef1_latent.json"
FIRST_RECIPE = {
    "architecture": "plain", "init": "ridge", "hidden_channels": 128, "num_blocks": 4, "optimizer": "muon", "loss_type": "mse",
    "decoder_loss_weight": 12, "decoder_loss_type": "mse", "decoder_loss_batch": 2, "decoder_loss_window": 24,
    "decoder_loss_reference": "original", "perceptual_loss_weight": 0, "reencode_target": 0,
    "moments_loss_weight": 0,
}  # fmt: skip
FULL_SIZE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
}
RANDOM_VAES = {
    "random:sd15": {"latent_channels": 4, "scaling_factor": 0.18215},
    "random:flux": {
        "latent_channels": 16, "scaling_factor": 0.3611, "shift_factor": 0.1159,
        "use_quant_conv": False, "use_post_quant_conv": False,
    },
}  # fmt: skip


def rows_of(options) -> dict:
    """{name: function that fills a row}, those first that matter most."""
    rows = {"tests": run_tests}
    for pair, size in itertools.product(("tiny", "full"), options.sizes):
        rows[f"translate {pair} {size} px"] = partial(measure_translation, pair=pair, size=size)
    for compiled, precision, pair in itertools.product((False, True), PRECISIONS, ("tiny", "full")):
        changes = {"precision": precision} | ({"compile": None} if compiled else {})
        name = f"train {pair} {precision}{', compiled' if compiled else ''}"
        rows[name] = partial(measure_training, pair=pair, changes=changes)
    seen = {"precision": "float32", "perceptual_loss": "stlpips", "perceptual_loss_weight": 1}
    rows["train tiny float32, ST-LPIPS"] = partial(measure_training, pair="tiny", changes=seen)
    return {name: row for name, row in rows.items() if any(words in name for words in options.only or [""])}


class LeftOut(Exception):
    """Why a row has no values, or no more of them."""


def run_tests(options, row: dict) -> None:
    """Run `pytest -m gpu`; keep its last line."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", *(["tests/test_gpu.py"] if options.small else [])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=options.seconds_left())
    row |= {"exit code": done.returncode, "result": (done.stdout.strip() or done.stderr.strip()).rpartition("\n")[2]}


def settings_of(flags: dict) -> train.Settings:
    """The training script's settings for the recipe with these flags, device and precision resolved for this machine."""
    words = ["--load_config", str(RECIPE)]
    for name, value in flags.items():
        words += [f"--{name}", *([] if value is None else [str(value)])]
    values = vars(train.parse_args(words))
    device = train.resolve_device(values["device"], False)
    train.keep_freed_memory(device)
    changes = {"device": str(device), "precision": train.resolve_precision(values["precision"], device, False)}
    compute_policy(device, changes["precision"])
    return train.Settings(values | changes | {"vae1_space": None, "vae2_space": None})  # the recipe names its own pair's


def open_vaes(names, device, dtype) -> list:
    """VAEs from folders or hub ids; 'random:sd15' and 'random:flux' are full-size architectures with random weights."""
    torch.manual_seed(0)
    return [
        AutoencoderKL(**FULL_SIZE, **RANDOM_VAES[name]).to(device, dtype)
        if name in RANDOM_VAES
        else train.load_vae_model(name, "vae", None, device, dtype)
        for name in names
    ]


def measure_training(options, row: dict, pair: str, changes: dict) -> None:
    """Images per second of a step, of the real loop on the latent cache and without it, of the encoders and the cache."""
    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder, "photos")
        images.mkdir()
        for photo in sorted((ROOT / "assets/photos/train").iterdir())[: options.photos]:
            (images / photo.name).symlink_to(photo)
        flags = FIRST_RECIPE | {"train_data_dir": images, "eval_data_dir": images, "decoder_loss_start": 0, "cache_views": 1}
        flags |= dict.fromkeys(("eval_frequency", "visualize_frequency", "save_frequency"), 0)
        flags |= {name: f"{folder}/{name}" for name in ("latent_cache_dir", "log_dir", "save_dir")}
        flags |= {"image_size": options.image_size, "num_workers": 2, "device": options.device}
        args = settings_of(flags | changes)
        if args.precision != changes["precision"]:
            raise LeftOut(f"this device computes in {args.precision} in its place")
        device, batch = torch.device(args.device), args.train_batch_size
        if args.compile:
            require_compiler(device)
        vaes = open_vaes(options.vaes[pair], device, train.get_dtype(args.precision))
        accelerator = train.create_accelerator(device, args.precision)
        online, _ = train.create_data_loaders(args, accelerator=accelerator)  # without VAEs there is no cache
        row["sent online"] = online.dataset.__getitems__([(0, 0)])[0]["pixel_values"].nbytes  # as the loader asks for it
        began = time.perf_counter()
        cached, _ = train.create_data_loaders(args, *vaes, accelerator)
        row["building"] = len(cached.dataset) / (time.perf_counter() - began)
        row["sent cached"] = cached.dataset.cache.row.itemsize
        torch.manual_seed(args.seed)
        pipeline = train.create_align_pipeline(*vaes, args).to(device)
        objective = train.create_objective(pipeline, args)
        run = train.prepare_run(args, pipeline, objective, accelerator, cached)
        encoded = objective.encode(next(iter(cached)))
        row["bare"] = batch / seconds_of(lambda: train.train_step(args, run, encoded, position=1.0)[0].item(), options.steps)
        row["cached"] = loop_rate(args, vaes, cached, options.steps)
        row["online"] = loop_rate(args, vaes, online, max(2, options.steps // 4))
        pixels = torch.rand(batch, 3, options.image_size, options.image_size, device=device) * 2 - 1
        row["encoders"] = batch / seconds_of(lambda: [pipeline.codec1.encode(pixels), pipeline.codec2.encode(pixels)], 2)


def loop_rate(args, vaes, loader, steps: int) -> float:
    """Images per second of the real training loop: the median of what it logs, but the first, when things start."""
    args = args.but(max_train_steps=steps, epochs=10**6, log_frequency=max(1, steps // 10))
    train.train_align_pipeline(args, *vaes, loader, None, torch.Generator(args.device).manual_seed(args.seed))
    newest = max(Path(args.log_dir).rglob("events.*"), key=os.path.getmtime)
    logged = EventAccumulator(str(newest)).Reload().Scalars("train/images_per_second")
    return statistics.median([event.value for event in logged][1:])


def seconds_of(call: Callable, rounds: int) -> float:
    """The median seconds of a call; one more warms up."""
    times = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        call()
        if torch.cuda.is_initialized():  # else what is measured runs on the CPU beside a GPU
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


@torch.inference_mode()
def measure_translation(options, row: dict, pair: str, size: int) -> None:
    """Milliseconds, memory and multiply-adds of an image through the module, and through the VAEs in its place."""
    args = settings_of({"image_size": size, "device": options.device})
    device = torch.device(args.device)
    compute_policy(device)  # a translation's, in place of training's
    vaes = open_vaes(options.vaes[pair], device, train.get_dtype(args.precision))
    pipeline = train.create_align_pipeline(*vaes, args).to(device)
    image = torch.rand(1, 3, size, size, device=device) * 2 - 1
    latents = torch.randn(1, pipeline.codec1.channels, *(side // pipeline.codec1.stride for side in image.shape[2:])).to(device)
    calls = {
        "translate": lambda: pipeline.translate(latents),
        "re-encode": lambda: reencode(latents, pipeline.codec1, pipeline.codec2),
        "VAE2's encoder": lambda: pipeline.codec2.encode(image),
    }
    for name, call in calls.items():
        try:
            with FlopCounterMode(display=False) as counter:
                call()
            row[f"{name}, GMACs"] = counter.get_total_flops() / 2e9
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            row[f"{name}, ms"] = 1e3 * seconds_of(call, options.calls)
            row[f"{name}, MiB"] = peak_memory(device) / MIB if device.type == "cuda" else None
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            row[f"{name}, ms"] = "out of memory"


@contextlib.contextmanager
def at_most(seconds: float):
    """Within this context, `LeftOut` after so much time. Without effect on Windows."""

    def end(*_):
        raise LeftOut(f"took more than {seconds:.0f} s")

    if not hasattr(signal, "SIGALRM"):
        yield
        return
    signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def measured(options, name: str, measure) -> dict:
    """A row's values; its `note` says why it has none, or no more of them."""
    began, row, seconds = time.monotonic(), {}, options.seconds_left()
    try:
        if options.small and ("full" in name or "compiled" in name or "float16" in name):
            raise LeftOut("not among the small rows")
        if seconds < 1:
            raise LeftOut("no time was left")
        with at_most(seconds), contextlib.redirect_stdout(sys.stderr):  # a training prints what it has done
            measure(options, row)
    except (LeftOut, subprocess.TimeoutExpired, UserError) as error:
        row["note"] = one_line(error)
    except Exception as error:  # whatever a row meets, the next ones are measured
        row["note"] = "out of memory" if is_out_of_memory(error) else f"{type(error).__name__}: {one_line(error)}"
    return row | {"seconds": round(time.monotonic() - began, 1)}


def machine() -> dict:
    found = {"torch": torch.__version__, "cuda": torch.version.cuda, "device": "cpu", "threads": torch.get_num_threads()}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {"device": properties.name, "capability": f"{properties.major}.{properties.minor}"}
        found["memory MiB"] = properties.total_memory // MIB
    return found


def tables_of(result: dict) -> str:
    """The result as Markdown: a table for each kind of row, and the rows that were left out."""
    lines, rows = [", ".join(f"{name} {value}" for name, value in result["machine"].items()), ""], result["rows"]
    left_out = [name for name, row in rows.items() if row.keys() == {"note", "seconds"}]
    for kind in ("tests", "train", "translate"):
        found = {name: row for name, row in rows.items() if name.startswith(kind) and name not in left_out}
        columns = list(dict.fromkeys(column for row in found.values() for column in row))
        if found:
            lines += [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
        for name, row in found.items():
            lines.append(f"| {name} | {' | '.join(shown(row.get(column)) for column in columns)} |")
        lines += [""] * bool(found)
    return "\n".join(lines + [f"- {name}: left out, {rows[name]['note']}" for name in left_out])


def shown(value) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("gpu_check.json"), help="the tables are written beside it")
    parser.add_argument("--minutes", type=float, default=8.0, help="for all rows")
    parser.add_argument("--row_seconds", type=float, default=120.0, help="for one row")
    parser.add_argument("--only", nargs="+", metavar="WORDS", help="the rows whose names hold one of these")
    parser.add_argument("--device", default="cuda", help="falls back to what there is")
    parser.add_argument("--small", action="store_true", help="without the full size, lower precisions and large pictures")
    parser.add_argument("--sizes", type=int, nargs="+", help="px of the pictures to translate")
    parser.add_argument("--tiny1", default=str(ROOT / "assets/vaes/tiny4"), help="the tiny pair's VAE1")
    parser.add_argument("--tiny2", default=str(ROOT / "assets/vaes/tiny16"), help="the tiny pair's VAE2")
    options = parser.parse_args()
    options.sizes = options.sizes or ([64] if options.small else [512, 1024, 2048, 4096])
    options.image_size, options.photos, options.steps, options.calls = (64, 4, 2, 1) if options.small else (256, 32, 20, 3)
    options.vaes = {"tiny": (options.tiny1, options.tiny2), "full": tuple(RANDOM_VAES)}
    ends = time.monotonic() + 60 * options.minutes
    options.seconds_left = lambda: min(options.row_seconds, ends - time.monotonic())
    result = {"machine": machine(), "rows": {}}
    bar = tqdm(rows_of(options).items(), unit="row")
    for name, measure in bar:
        bar.set_description(name)
        result["rows"][name] = measured(options, name, measure)
        write_json(options.output, result)
        torch.cuda.empty_cache()
    text = tables_of(result)
    options.output.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
