"""Two real processes on the CPU against one process with the same global batch, and two of which one gets no more data."""

import contextlib
import http.server
import json
import os
import re
import shutil
import signal
import threading
import time
from functools import partial

import numpy as np
import pytest
import torch
from conftest import as_argv, make_photo, run_script, tiny_flags
from drawn import encoded
from hostile import no_hang, refusal
from runs import LAUNCHER, QUIET, TORCHRUN, assert_same_tensors, results_of, specified, start, tiny_of, train, write_shard

from runtime import processes

SETTINGS = {
    "decoder_loss_weight": 1.0,
    "epochs": 4,
    "warmup_steps": 4,
    "scheduler_step_size": 2,
    "scheduler_gamma": 0.5,
    "eval_frequency": 2,
    "save_frequency": 2,
    "save_steps": 7,
    "visualize_frequency": 0,
    "ema_decay": 0.9,
}
ON_CPU = {"ACCELERATE_USE_CPU": "true"}

STEPS = 12  # 10 images in global batches of 4: 3 steps an epoch


@pytest.fixture(scope="module")
def pair(vae_folders, photo_folders, tmp_path_factory):
    """(run with 1 process and batch 4, run with 2 processes and batch 2 each, stderr of the latter)."""
    alone, together = tmp_path_factory.mktemp("alone"), tmp_path_factory.mktemp("together")
    one = train(tiny_flags(vae_folders, photo_folders, alone), alone, **SETTINGS)
    flags = {**tiny_flags(vae_folders, photo_folders, together), **SETTINGS, "train_batch_size": 2}
    ended = run_script("train_align_with_args.py", *as_argv(flags), launcher=TORCHRUN, env=ON_CPU, cwd=together)
    return one, results_of(together), ended.stderr


def test_losses_rates_and_weights_follow_the_single_process_run_of_the_same_global_batch(pair):
    """Both processes on the same slice, gradients summed instead of averaged or not shared, or the main process's own loss
    logged; Accelerate's prepared schedulers step once per process, which halves warm-up and epochs."""
    one, two, _ = pair
    losses = [dict(run.scalars["train/loss"]) for run in (one, two)]
    assert list(losses[0]) == list(losses[1]) == list(range(1, STEPS + 1))
    assert list(losses[1].values()) == pytest.approx(list(losses[0].values()), rel=1e-3)
    norms = [dict(run.scalars["train/grad_norm"]) for run in (one, two)]
    assert list(norms[1].values()) == pytest.approx(list(norms[0].values()), rel=1e-2)
    torch.testing.assert_close(two.last["state_dict"], one.last["state_dict"], rtol=1e-2, atol=1e-4)
    for run in (one, two):
        logged = run.scalars["train/learning_rate"]
        assert [step for step, _ in logged] == list(range(1, STEPS + 1))
        assert [value for _, value in logged] == pytest.approx(
            [specified(step, 3, 1e-3, 4, 2, 0.5) for step in range(STEPS)], rel=1e-5
        )


def test_both_processes_judge_and_find_what_one_finds_to_the_last_digit(pair):
    """Images that are judged twice or by nobody, sums in another order: what the module's weights do not enter is the same."""
    one, two, _ = pair
    lines = [(run.event_files[0].parent / "metrics.jsonl").read_text().splitlines() for run in (one, two)]
    for alone, together in zip(*([json.loads(line)["ladder"] for line in each] for each in lines)):
        for rung in ("vae1", "vae2", "reencode", "untrained"):
            assert alone[rung] == together[rung]
        assert together["aligned"]["psnr"] == pytest.approx(alone["aligned"]["psnr"], rel=1e-3)


def test_only_the_main_process_writes(pair):
    """A launcher that starts two independent runs; every process saving its own checkpoint or opening its own event file; a
    temporary file left behind."""
    one, two, stderr = pair
    summaries = [line for line in stderr.splitlines() if " parameters, " in line]
    assert len(summaries) == 1, stderr
    assert summaries[0].endswith("2 processes"), summaries[0]
    assert f"{STEPS} steps of 4 images" in summaries[0]
    assert len(one.checkpoints) == len(two.checkpoints) == 3  # epochs 2 and 4 and step 7, no more at the end
    assert len(two.event_files) == 1
    written = sorted(entry.stem.split("_2")[0] + entry.suffix for entry in two.checkpoints[0].parent.iterdir())
    assert written == ["align_best.pth", *["align_pipeline.json"] * 3, *["align_pipeline.pth"] * 3, "model.safetensors"]
    steps = [step for step, _ in two.scalars["eval_latent_mse/aligned"]]
    assert steps == [0, 6, 12]


def test_two_processes_resume_bit_identically(pair, vae_folders, photo_folders, tmp_path):
    """A process that resumes from another place in the data, or whose optimizer starts anew; one that has lost the other."""
    whole = pair[1].checkpoints[-1].parent.parent
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    (tmp_path / "ckpt" / pair[1].checkpoints[-1].name).unlink()
    assert results_of(tmp_path).last["step"] == 7  # in the middle of an epoch
    flags = {**tiny_flags(vae_folders, photo_folders, tmp_path), **SETTINGS, "train_batch_size": 2, "resume": True}
    run_script("train_align_with_args.py", *as_argv(flags), launcher=LAUNCHER, env=ON_CPU, cwd=tmp_path)
    assert_same_tensors(results_of(tmp_path).last, pair[1].last)
    refusal(lambda: train(flags | {"epochs": 5}, tmp_path), "the run to resume had 2 processes, now 1")


@pytest.fixture
def streaming(vae_folders, photo_folders, tmp_path):
    """Flags of a run of two processes with a shard each, 0.tar and 1.tar."""
    rng = np.random.default_rng(2)
    for number in range(2):
        photos = {f"{image}.jpg": encoded("JPEG", make_photo(rng, (48, 40))) for image in range(40)}
        write_shard(tmp_path / f"{number}.tar", photos)
    flags = tiny_of(tiny_flags(vae_folders, photo_folders, tmp_path), tmp_path) | QUIET
    flags |= {"streaming": True, "train_data_dir": tmp_path / "{0..1}.tar", "shuffle_buffer": 2, "input_types": ["image"]}
    return flags | {"train_batch_size": 2, "epoch_images": 400, "max_train_steps": 200}


def test_a_stream_that_breaks_off_in_one_process_ends_both_saved(streaming, tmp_path):
    """Hours of training lost, since one process alone cannot save the places of all; a line from each of them."""
    with no_hang(300):
        process = start(streaming, tmp_path, LAUNCHER, **ON_CPU)
        while not re.search(r"train: .* [1-9]\d*/", (tmp_path / "log").read_text()):
            assert process.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.02)
        (tmp_path / "1.tar").unlink()  # the next pass finds no image in the share of the second process
        process.wait()
    said = (tmp_path / "log").read_text()
    assert process.returncode == 1 and "Traceback" not in said, said
    (error,) = [line for line in re.split(r"[\r\n]", said) if "error: " in line]
    assert error.startswith("error: --train_data_dir ") and "saved in" in error
    last = results_of(tmp_path).last
    assert last["step"] and all(place["count"] + place["offset"] == 2 * last["step"] for place in last["training"]["places"])


class Stalling(http.server.SimpleHTTPRequestHandler):
    """A server that sends half of 1.tar and then nothing."""

    def log_message(self, *_):
        pass

    def copyfile(self, source, file):
        content = source.read()
        stalls = self.path.endswith("1.tar")
        file.write(content[: len(content) // (1 + stalls)])
        if stalls:
            threading.Event().wait()


def test_a_stream_that_stalls_in_one_process_stops_both_saved(streaming, tmp_path):
    """SIGTERM that nobody serves: one process waits for data, and the other for that one."""
    pytest.importorskip("aiohttp")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Stalling, directory=str(tmp_path))) as server, no_hang(300):
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        streaming["train_data_dir"] = f"http://127.0.0.1:{server.server_port}/{{0..1}}.tar"
        process = start(streaming, tmp_path, LAUNCHER, **ON_CPU)
        said, before = "", None
        while not re.search(r"train: .* [1-9]\d*/", said) or said != before:  # until the bar stands still
            assert process.poll() is None, said
            time.sleep(2)
            before, said = said, (tmp_path / "log").read_text()
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()
        with contextlib.suppress(ProcessLookupError):
            while True:
                os.killpg(process.pid, 0)
                time.sleep(0.05)
        server.shutdown()
    said = (tmp_path / "log").read_text()
    assert said.count("saved in") == 1 and "Traceback" not in said, said
    assert results_of(tmp_path).checkpoints


def test_processes_agree_without_their_devices(monkeypatch):
    """A wait for the device at every step, in which it has nothing to do."""
    asked = []
    monkeypatch.setattr(processes.distributed, "new_group", lambda **options: options["backend"])
    monkeypatch.setattr(
        processes.distributed, "all_reduce", lambda tensor, *_, group: asked.append((tensor.device.type, group))
    )
    two = type("Two", (), {"num_processes": 2})()
    assert processes.together(lambda: 7, two) == 7 and asked == [("cpu", "gloo")]
