"""Kills and full disks: a real training process is ended at any moment, started again with --resume, and must end bit for bit
as if nothing had happened. A data worker is ended at any moment, and the run must end soon, and saved.

The suite runs a short form. `make test-faults` sets VAE_ALIGN_FAULTS, the number of kills at random moments, and runs all;
its figures are in tests/README.md.
"""

import contextlib
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import as_argv, make_photo, read_scalars, run_script, tiny_flags
from drawn import encoded
from mortal import WHERE
from runs import QUIET, assert_same_tensors, is_alive, start, train, write_shard

KILLS = int(os.environ.get("VAE_ALIGN_FAULTS", "0"))
FIRST_LINES = b"from __future__ import annotations\n", b"from runtime.before_imports import before_imports\n"
STEPS_BETWEEN = {"save_steps": 1, "keep_last": 3, "eval_frequency": 8, "visualize_frequency": 0, "ema_decay": 0.9}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def job(vae_folders, photo_folders, tmp_path_factory):
    """(flags of a run of 48 steps that saves at every step, what it leaves when nothing happens to it)."""
    folder = tmp_path_factory.mktemp("whole")
    flags = tiny_flags(vae_folders, photo_folders, folder) | STEPS_BETWEEN | {"epochs": 16}
    return flags, train(flags, folder)


def placed(flags, folder):
    """`flags` with their outputs in `folder`."""
    outputs = {"log_dir": "runs", "save_dir": "ckpt", "latent_cache_dir": "cache", "output_dir": "judged"}
    return flags | {name: folder / place for name, place in outputs.items() if name in flags}


def assert_as_if_nothing_had_happened(broken, whole):
    assert_same_tensors(broken.last, whole.last)
    run = broken.event_files[-1].parent  # a run that died before its first checkpoint left a folder of its own
    scalars = read_scalars(run)
    for tag, points in whole.scalars.items():
        if tag != "train/images_per_second":
            assert scalars[tag] == points, tag
    assert len(broken.checkpoints) <= 3 + 1  # --keep_last; one may be new and its predecessor not yet deleted


def kill_at_random(flags, folder, draw, number=signal.SIGKILL):
    """Start or resume the run and send it signal `number` at a moment that `draw` chooses: by what the run has done, for a
    clock would meet a slow machine at start-up only. Says in what it was hit, or None if it was done before."""
    log = folder / "log"
    before = log.stat().st_size if log.exists() else 0
    leftovers, saved = set(folder.glob("ckpt/*.tmp")), set(folder.glob("ckpt/align_pipeline_*.pth"))
    moment, saves = draw.choice(["start", "cache", "training", "training", "training"]), len(saved) + draw.randint(0, 12)
    process = start(flags, folder)

    def said():
        return log.read_bytes()[before:]

    def reached():
        saved.update(folder.glob("ckpt/align_pipeline_*.pth"))
        return (
            process.poll() is not None
            or {
                "start": True,
                "cache": b"encode: " in said() or b"train: " in said(),
                "training": b"train: " in said() and len(saved) >= saves,
            }[moment]
        )

    deadline = time.monotonic() + 600
    while not reached():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.005)
    time.sleep(draw.random() * {"start": 8, "cache": 0.2, "training": 0.1}[moment])
    if process.poll() is not None:
        assert process.returncode == 0, log.read_text()
        return None
    started = b"encode: " in said() or b"train: " in said()
    os.killpg(process.pid, number)
    code = process.wait()
    if code == 0:  # it was done in that very moment
        return None
    if number != signal.SIGKILL:
        assert code in (128 + number, -number), said().decode()
        # the interpreter has its own word until the program's first lines have run
        early = b"train_align_with_args.py" not in said() or any(line in said() for line in FIRST_LINES)
        assert b"Traceback" not in said() or early, said().decode()
        return "in training, saved" if b"saved in" in said() else "before or after"
    if not started:
        return "at start-up"
    if set(folder.glob("ckpt/*.tmp")) - leftovers:
        return "while a checkpoint was written"
    if b"train: " not in said():
        return "while the latent cache was built"
    return "in training" if list(folder.glob("ckpt/*.pth")) else "before the first checkpoint"


@pytest.mark.parametrize(
    "number", [signal.SIGKILL, *([signal.SIGINT, signal.SIGTERM] if KILLS else [])], ids=lambda number: number.name
)
def test_killed_at_random_moments(job, tmp_path, number):
    """A checkpoint that does not match its logs, a torn cache, a signal that ends the run unsaved."""
    flags, whole = job
    kills, hit, seed = 0, Counter(), random.randrange(2**32)
    draw = random.Random(seed)
    if number != signal.SIGKILL:
        flags = flags | {"cache_latents": None, "no_cache_latents": True, "num_workers": 2}
        whole = train(flags, tmp_path / "whole")
    while kills < max(2, KILLS):
        folder = tmp_path / str(kills)
        changed = placed(flags, folder) | {"resume": True}
        for _ in range(8):
            phase = kill_at_random(changed, folder, draw, number)
            if phase is None or kills >= max(2, KILLS):
                break
            hit[phase] += 1
            kills += 1
        assert_as_if_nothing_had_happened(train(changed, folder), whole)
        shutil.rmtree(folder)
    print(f"\n{kills} x {number.name} (seed {seed}): " + ", ".join(f"{count} {phase}" for phase, count in hit.items()))


@pytest.mark.parametrize("count", (1, 5) if KILLS else (2,))
@pytest.mark.parametrize("where", WHERE if KILLS else ("checkpoint", "rename", "cache"))
def test_killed_inside_a_write(job, tmp_path, where, count):
    """A half-written file that a resume takes for a whole one, in each place where something is written."""
    flags, whole = job
    if where == "cache":
        count = 1  # the ten images are one chunk
    changed = placed(flags, tmp_path) | {"resume": True}
    died = run_script("tests/mortal.py", where, str(count), "--", *as_argv(changed), cwd=tmp_path, check=False)
    assert died.returncode == -signal.SIGKILL, died.stderr
    assert_as_if_nothing_had_happened(train(changed, tmp_path), whole)


@pytest.mark.parametrize("count", (2, 4, 9, 14, 33) if KILLS else (9,))
def test_a_disk_that_is_full_at_a_write_ends_in_one_line_and_is_resumed(job, tmp_path, count):
    """A traceback; a damaged checkpoint that replaces a good one; a cache that must be built anew."""
    flags, whole = job
    changed = placed(flags, tmp_path) | {"resume": True}
    ended = run_script("tests/mortal.py", "full", str(count), "--", *as_argv(changed), cwd=tmp_path, check=False)
    assert ended.returncode == 1, ended.stderr
    assert "Traceback" not in ended.stderr
    assert "No space left" in ended.stderr or "disk is full" in ended.stderr
    assert_as_if_nothing_had_happened(train(changed, tmp_path), whole)


@pytest.mark.skipif(not KILLS, reason="part of make test-faults")
@pytest.mark.parametrize("kilobytes", [300, 600, 900])
def test_a_small_file_system_fills_up(job, tmp_path, kilobytes):
    """What a real full file system does that an injected error does not: short writes, failing mmaps, event files."""
    flags, whole = job
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a tmpfs is not allowed here")
    try:
        changed = placed(flags, disk) | {"resume": True, "keep_last": 0}
        ended = run_script("train_align_with_args.py", *as_argv(changed), cwd=tmp_path, check=False)
        assert ended.returncode in (1, 2), ended.stderr
        assert "Traceback" not in ended.stderr, ended.stderr
        subprocess.run(["mount", "-o", "remount,size=100m", disk], check=True)
        again = train(changed, disk)
        assert_same_tensors(again.last, whole.last)
    finally:
        subprocess.run(["umount", disk], check=True)


# ----------------------------------------------------------------------------------------------------------------------
# Data workers

PROGRAMS = {"training": "train_align_with_args", "cache": "train_align_with_args", "streaming": "train_align_with_args",
            "evaluation": "eval_align"}  # fmt: skip


def as_child(program, argv, log, method):
    """In a process of its own: the program, whose data workers start by `method`."""
    from runtime.cli import run

    os.setsid()
    for stream in (1, 2):
        os.dup2(os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND), stream)
    multiprocessing.set_start_method(method, force=True)
    run(lambda: __import__(program).main(argv))


def begin(program, flags, log, method="fork"):
    """The program as a fork of one that has imported it, for that takes longer than what such a run does."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["train_align_with_args", "eval_align", "diffusers", "datasets", "torch.utils.tensorboard"])
    process = server.Process(target=as_child, args=(program, as_argv(flags), log, method))
    process.start()
    return process


def below(pid):
    """The processes that this one has started, and theirs, as long as they live."""
    with contextlib.suppress(FileNotFoundError):
        children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
        return children + [other for child in children for other in below(child)]
    return []


def until(reached, process, log):
    deadline = time.monotonic() + 300
    while not (found := reached()):
        assert process.is_alive() and time.monotonic() < deadline, log.read_text()
        time.sleep(0.005)
    return found


@pytest.fixture(scope="module")
def work_for_workers(vae_folders, tmp_path_factory):
    """{situation: flags of a program that decodes batches of 200 kB for minutes}."""
    folder, rng = tmp_path_factory.mktemp("workers"), np.random.default_rng(3)
    (folder / "photos").mkdir()
    photos = [make_photo(rng, (160, 144)) for _ in range(60)]
    for number, photo in enumerate(photos):
        photo.save(folder / "photos" / f"{number}.png")
    write_shard(folder / "0.tar", {f"{number}.jpg": encoded("JPEG", photo) for number, photo in enumerate(photos)})
    flags = tiny_flags(vae_folders, (folder / "photos",) * 2, folder)
    few = train(flags, folder, **QUIET, no_cache_latents=True, max_train_steps=1).checkpoints[-1]
    flags |= QUIET | {"image_size": 128, "num_workers": 2, "epochs": 10**6}
    judging = {"checkpoint": few, "image_size": 128, "num_workers": 2, "device": "cpu", "metrics": "ssim", "num_samples": 0}
    return {
        "training": flags | {"no_cache_latents": True},
        "cache": flags | {"cache_views": 50},
        "streaming": flags | {"streaming": True, "train_data_dir": folder / "0.tar", "shuffle_buffer": 8},
        "evaluation": judging | {"eval_data_dir": folder / "photos", "output_dir": folder / "judged"},
    }


def kill_a_worker(situation, flags, folder, draw):
    """Run the program in `folder` and kill one of its workers at a moment that `draw` chooses; (exit status, what it said)."""
    folder.mkdir()
    log, number = folder / "log", draw.randrange(2)
    process = begin(PROGRAMS[situation], placed(flags, folder), log)
    at_work = {"cache": b"encode: ", "evaluation": b"evaluate: "}.get(situation, b"train: ")
    try:  # two children are the workers; an import may have one for a moment
        until(lambda: not process.is_alive() or (below(process.pid)[1:] and at_work in log.read_bytes()), process, log)
        time.sleep(draw.random() * 0.5)
        for worker in below(process.pid)[number : number + 1]:  # none where the program was faster
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker, signal.SIGKILL)
        process.join(100)
        assert not process.is_alive(), log.read_text()
    finally:
        process.kill()
    return process.exitcode, log.read_text()


@pytest.mark.parametrize("situation", PROGRAMS)
def test_a_worker_that_is_killed_at_any_moment_ends_the_run(work_for_workers, tmp_path, situation):
    """A wait for ever for the rest of a batch, a lock or memory that the killed worker held; a run that ends unsaved."""
    kills, seed = 0, random.randrange(2**32)
    draw = random.Random(seed)
    for attempt in range(4 * (1 + KILLS)):
        code, said = kill_a_worker(situation, work_for_workers[situation], tmp_path / str(attempt), draw)
        if code == 0:  # it had what it needed of the workers
            continue
        error = said[said.rindex("error: ") :]
        assert code == 1 and error.count("\n") == 1 and "Traceback" not in said, said
        assert error.startswith("error: --num_workers 2: a data worker has ended"), said
        assert situation in ("cache", "evaluation") or ("saved in" in error and "--resume" in error), said
        assert ("saved in" in error) == bool(list(tmp_path.glob(f"{attempt}/ckpt/*.pth")))
        kills += 1
        if kills >= max(1, KILLS // len(PROGRAMS)):
            break
    print(f"\n{kills} x a worker killed in {situation}, {attempt + 1 - kills} x too late (seed {seed})")
    assert kills


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_no_worker_outlives_a_killed_run(work_for_workers, tmp_path, method):
    """Workers of half a gigabyte each that live on for ever, in a read, or in the sending of a batch."""
    log = tmp_path / "log"
    process = begin("train_align_with_args", placed(work_for_workers["training"], tmp_path), log, method)
    until(lambda: log.exists() and re.search(rb"train: .* [2-9]/", log.read_bytes()), process, log)
    workers = below(process.pid)
    process.kill()
    process.join()
    deadline = time.monotonic() + 60
    while alive := [worker for worker in workers if is_alive(worker)]:
        assert time.monotonic() < deadline, alive
        time.sleep(0.05)
