"""Real parts, tiny in size: diffusers VAEs with random weights, image folders, and the two programs as subprocesses."""

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

# Networks this small gain nothing from threads, and on busy cores they wait for each other. Set before numpy and torch are
# imported: `torch.set_num_threads` leaves other sums than those of a child, which gets this variable.
os.environ["OMP_NUM_THREADS"] = "1"

import hypothesis
import numpy as np
import pytest
import torch
from PIL import Image

# A suite under nohup, or in the background of a script, is started with these ignored, and its programs would ignore them too.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
hypothesis.settings.register_profile(  # the same examples every time, on a slow machine too
    "suite", derandomize=True, database=None, deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("suite")


def pytest_configure(config):
    """With `-m gpu` the programs that the tests start see the GPUs too; VAE_ALIGN_GPU=1 does the same for the whole suite."""
    if config.option.markexpr == "gpu":
        os.environ["VAE_ALIGN_GPU"] = "1"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """The processes of a suite on several cores exchange UTF-8 alone; what a test prints may be a name that is not."""
    report = yield
    report.sections = [(title, text.encode("utf-8", "backslashreplace").decode()) for title, text in report.sections]
    return report


def child_environment(**more):
    """The environment of a program that a test starts: one thread, no GPU unless GPU tests are asked for, and `more`."""
    hidden = {} if os.environ.get("VAE_ALIGN_GPU") else {"CUDA_VISIBLE_DEVICES": ""}
    return {**os.environ, "OMP_NUM_THREADS": "1", **hidden, **more}


def make_kl_vae(latent_channels, levels=4, **options):
    """An AutoencoderKL of stride 2 ** (levels - 1) with random weights, 0.1 M parameters."""
    from diffusers import AutoencoderKL

    widths = (8, 8, 16, 16)[-levels:]
    torch.manual_seed(latent_channels)
    return AutoencoderKL(
        block_out_channels=widths,
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        latent_channels=latent_channels,
        layers_per_block=1,
        norm_num_groups=4,
        **options,
    )


def make_tiny_vae(latent_channels):
    from diffusers import AutoencoderTiny

    torch.manual_seed(latent_channels)
    return AutoencoderTiny(
        encoder_block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 4,
        num_encoder_blocks=(1,) * 4,
        num_decoder_blocks=(1,) * 4,
        latent_channels=latent_channels,
    )


@pytest.fixture(scope="session")
def vae_folders(tmp_path_factory):
    """{name: folder} of saved VAEs: kl4 and kl16 (stride 8; scaled, kl16 also shifted), kl4_stride4, tiny4, and a model
    folder `nested` that holds kl16 in its `vae` subfolder."""
    root = tmp_path_factory.mktemp("vaes")
    made = {
        "kl4": make_kl_vae(4, scaling_factor=0.18215),
        "kl16": make_kl_vae(16, scaling_factor=0.3611, shift_factor=0.1159),
        "kl4_stride4": make_kl_vae(4, levels=3, scaling_factor=0.5),
        "tiny4": make_tiny_vae(4),
    }
    for name, vae in made.items():
        vae.save_pretrained(root / name)
    made["kl16"].save_pretrained(root / "nested" / "vae")
    return {name: root / name for name in (*made, "nested")}


def make_photo(rng, size):
    """A smooth colour picture with an edge: (H, W, 3) uint8 noise at a tenth of the size, blown up."""
    small = Image.fromarray(rng.integers(0, 256, (max(2, size[1] // 10), max(2, size[0] // 10), 3), dtype=np.uint8))
    return small.resize(size, Image.Resampling.BICUBIC)


@pytest.fixture(scope="session")
def photo_folders(tmp_path_factory):
    """(training folder with 10 photos of mixed shape in two subfolders, evaluation folder with 5)."""
    root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for number in range(10):
        folder = root / "train" / ("a" if number % 2 else "b")
        folder.mkdir(parents=True, exist_ok=True)
        make_photo(rng, (96, 80) if number % 3 else (64, 120)).save(folder / f"{number}.png")
    (root / "eval").mkdir()
    for number in range(5):
        make_photo(rng, (80, 64)).save(root / "eval" / f"{number}.jpg", quality=95)
    return root / "train", root / "eval"


def tiny_flags(vae_folders, photo_folders, folder):
    """Flags of the smallest real training run: kl4 -> kl16 at 32 px on the CPU, 3 steps an epoch, into `folder`."""
    return {
        "vae1_path": vae_folders["kl4"],
        "vae2_path": vae_folders["kl16"],
        "train_data_dir": photo_folders[0],
        "eval_data_dir": photo_folders[1],
        "image_size": 32,
        "hidden_channels": 8,
        "num_blocks": 1,
        "train_batch_size": 4,
        "num_workers": 0,
        "warmup_steps": 2,
        "log_frequency": 1,
        "num_visualize_samples": 1,
        "device": "cpu",
        "precision": "float32",
        "latent_cache_dir": Path(folder) / "cache",
        "log_dir": Path(folder) / "runs",
        "save_dir": Path(folder) / "ckpt",
    }


@pytest.fixture
def flags(vae_folders, photo_folders, tmp_path):
    return tiny_flags(vae_folders, photo_folders, tmp_path)


@contextlib.contextmanager
def own_environment():
    """What is done to the environment within this context ends with it."""
    before = dict(os.environ)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture(autouse=True)
def environment_of_each_test():
    """The program sets variables, such as a proxy's, and they are not to reach the next test."""
    with own_environment():
        yield


def as_argv(flags):
    """{"name": value} -> ["--name", "value"]; a list gives several values, True a bare flag, None nothing."""
    argv = []
    for name, value in flags.items():
        if value is None:
            continue
        argv.append(f"--{name}")
        if value is not True:
            argv += [str(item) for item in value] if isinstance(value, (list, tuple)) else [str(value)]
    return argv


def run_script(script, *argv, launcher=(), check=True, env=None, cwd=None, timeout=600):
    """Run one of the programs as a user would; the CompletedProcess with its text. `env` adds to the environment."""
    result = subprocess.run(
        [*(launcher or [sys.executable]), str(ROOT / script), *argv],
        capture_output=True,
        text=True,
        env=child_environment(**(env or {})),
        cwd=cwd,
        timeout=timeout,
    )
    if check and result.returncode:
        raise AssertionError(f"{script} ended with {result.returncode}:\n{result.stdout}\n{result.stderr}")
    return result


def read_scalars(log_dir):
    """{tag: [(step, value), …]} of the runs below `log_dir`, as TensorBoard shows them: a folder's event files are one log.
    Checksums are not compared: they are computed in Python, a second for the pictures of one run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.compat.tensorflow_stub import pywrap_tensorflow

    scalars = {}
    with mock.patch.object(pywrap_tensorflow, "masked_crc32c", lambda data: mock.ANY):
        for folder in sorted({file.parent for file in Path(log_dir).rglob("events.out.tfevents.*")}):
            events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
            events.Reload()
            for tag in events.Tags()["scalars"]:
                scalars.setdefault(tag, []).extend((event.step, event.value) for event in events.Scalars(tag))
    return scalars


@pytest.fixture(params=[os.environ["VAE_ALIGN_START"]] if "VAE_ALIGN_START" in os.environ else ["fork", "spawn", "forkserver"])
def start_method(request):
    """How Python starts worker processes during the test: as on Linux, on macOS and Windows, and on Linux since Python 3.14."""
    with starting_by(request.param):
        yield request.param


@pytest.fixture
def spawned():
    """Worker processes inherit nothing but what is sent to them, as on macOS and Windows."""
    with starting_by("spawn"):
        yield


@contextlib.contextmanager
def starting_by(method):
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method(method, force=True)
    yield
    multiprocessing.set_start_method(before, force=True)


@pytest.fixture(scope="session")
def shared():
    """The folder of real VAEs and photos, where there is one."""
    folder = os.environ.get("VAE_ALIGN_SHARED")
    if not folder or not Path(folder).is_dir():
        pytest.skip("VAE_ALIGN_SHARED names no folder with real VAEs and photos")
    return Path(folder)


@pytest.fixture(scope="session")
def judged(vae_folders, tmp_path_factory):
    """What `reports.judge_hostile_images` leaves: an evaluation of two checkpoints on images with hostile names."""
    from reports import judge_hostile_images

    return judge_hostile_images(tmp_path_factory.mktemp("report"), vae_folders)
