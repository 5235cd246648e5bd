"""Runs that are interrupted and go on: the end must be bit for bit that of an uninterrupted run."""

import hashlib
import json
import os
import shutil
import signal
import time
import unicodedata
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from conftest import as_argv, make_kl_vae, tiny_flags
from hostile import refusal
from runs import QUIET, assert_same_tensors, end_after, results_of, same_weights, start, tensors_of, tiny_of, train

import train_align_with_args as train_script
from dataloader import WorkersLost
from evaluation.judge import JudgedCheckpoint
from training import checkpoint
from utils import StopWaiting
from vae_align import AlignPipeline
from vaes.pipeline import PipelineWithVAEs, module_in

KINDS = {
    "cached": {"ema_decay": 0.9, "scheduler": "cosine", "eval_frequency": 1, "reencode_target": 0.5, "decoder_loss_start": 0.5,
               "perceptual_loss_weight": 1.0, "decoder_loss_window": 2},
    "online": {"cache_latents": None, "no_cache_latents": True, "num_workers": 1, "decoder_loss_weight": 1.0},
    "sampled": {"no_cache_latents": True, "sample_posterior": True},
    "image": {"input_types": ["image"], "grad_clip": 0.5, "optimizer": "muon"},
}  # fmt: skip


class Killed(BaseException):
    """Ends a run in this interpreter at once, as a kill would: nothing of the project catches it."""


def train_until(flags, folder, step, monkeypatch, **changes):
    """Start a run that dies when it asks for the batch of `step`."""
    endless = train_script.endless

    def mortal(loader):
        for number, batch in enumerate(endless(loader), start=loader.batch_sampler.first_step):
            if number == step:
                raise Killed
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(train_script, "endless", mortal)
        with pytest.raises(Killed):
            train(flags, folder, **changes)


@pytest.mark.parametrize("kind", KINDS)
def test_killed_and_resumed_twice_ends_bit_identical(flags, tmp_path, monkeypatch, kind):
    """A moment, average, counter or draw that a resume forgets; a ridge or rung made anew; points that appear twice."""
    changes = {**QUIET, **KINDS[kind], "epochs": 4, "save_steps": 2, "log_frequency": 3}
    whole = train(flags, tmp_path / "whole", **changes)
    train_until(flags, tmp_path / "broken", 5, monkeypatch, **changes)
    train_until(flags, tmp_path / "broken", 9, monkeypatch, **changes, resume=True)
    again = train(flags, tmp_path / "broken", **changes, resume=True)
    assert again.last["step"] == whole.last["step"] == 12
    assert_same_tensors(again.last, whole.last)
    timeless = {tag: points for tag, points in whole.scalars.items() if tag != "train/images_per_second"}
    for tag, points in timeless.items():
        assert again.scalars[tag] == points, tag
    assert len({file.parent for file in again.event_files}) == 1  # one run, one folder
    if kind == "cached":
        lines = [(run.parent / "metrics.jsonl").read_text() for run in (whole.event_files[0], again.event_files[0])]
        assert lines[0] == lines[1]
        assert [json.loads(line)["step"] for line in lines[0].splitlines()] == [0, 3, 6, 9, 12]


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_it_used(flags, tmp_path, monkeypatch, caplog):
    """A resume from a torn file or from nothing; "trying the one before it" of the only one."""
    caplog.set_level("INFO")
    changes = {**QUIET, "epochs": 4, "save_steps": 2}
    whole = train(flags, tmp_path / "whole", **changes)
    train_until(flags, tmp_path / "broken", 7, monkeypatch, **changes)
    newest = results_of(tmp_path / "broken").checkpoints[-1]
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    again = train(flags, tmp_path / "broken", **changes, resume=True)
    assert newest.name in caplog.text
    assert "step 4 of 12" in caplog.text
    assert_same_tensors(again.last, whole.last)
    caplog.clear()
    for name in ("align_pipeline_20260101_000000.pth", "align_pipeline_20260102_000000.pth"):
        (tmp_path / name).write_bytes(b"PK")
    assert checkpoint.find_checkpoint("latest", str(tmp_path)) is None
    said = [record.message.rpartition("; ")[2] for record in caplog.records]
    assert said == ["trying the one before it", "there is none before it"]


def test_what_a_run_is_resumed_with(flags, tmp_path, photo_folders, caplog, capsys):
    """A first start that --resume refuses, a finished run that trains on, another rate, seed or image set unnoticed."""
    run = train(flags, tmp_path, **QUIET, max_train_steps=2, resume=True)
    assert "starting fresh" in caplog.text
    assert run.last["step"] == 2
    again = train(flags, tmp_path, **QUIET, max_train_steps=2, resume=True)
    assert "already finished" in capsys.readouterr().out
    assert again.checkpoints == run.checkpoints
    changes = {**QUIET, "max_train_steps": 4, "resume": True}
    for flag, value in {"learning_rate": 0.5, "seed": 7, "hidden_channels": 16, "init": "random"}.items():
        with pytest.raises(train_script.UserError, match=rf"^--{flag} {value}: the run to resume has"):
            train(flags, tmp_path, **changes | {flag: value})
    with pytest.raises(train_script.UserError, match="the run to resume had 10 images, now 5"):
        train(flags, tmp_path, **changes, train_data_dir=photo_folders[1])
    longer = train(flags, tmp_path, **changes)
    assert longer.last["step"] == 4


def test_other_files_of_the_same_number_are_refused_before_they_are_encoded(flags, tmp_path, photo_folders, monkeypatch):
    """A run that goes on with other pictures, or hours of encoding before it says so; a moved folder that is refused."""
    folder = tmp_path / "moved"
    shutil.copytree(photo_folders[0], folder / "deeper")
    train(flags, tmp_path, **QUIET, max_train_steps=2)
    changes = {**QUIET, "resume": True, "train_data_dir": folder / "deeper"}
    assert train(flags, tmp_path, **changes, max_train_steps=3).last["step"] == 3
    monkeypatch.setattr("train_align_with_args.cache_latents", lambda *_, **__: pytest.fail("the cache is built"))
    first = next((folder / "deeper").rglob("*.png"))
    first.rename(first.with_name("other.png"))
    with pytest.raises(train_script.UserError, match=r"^--train_data_dir .*not the files that the run to resume had"):
        train(flags, tmp_path, **changes, max_train_steps=4)


def test_keep_last_deletes_this_runs_oldest_only(flags, tmp_path, monkeypatch):
    """Another run's checkpoint in the same folder deleted; a resumed run that forgets which ones are its own."""
    other = train(flags, tmp_path, **QUIET, max_train_steps=1).checkpoints
    changes = {**QUIET, "epochs": 4, "save_steps": 2, "keep_last": 2}
    train_until(flags, tmp_path, 7, monkeypatch, **changes)
    run = train(flags, tmp_path, **changes, resume=True)
    steps = [torch.load(path, weights_only=True)["step"] for path in run.checkpoints]
    assert run.checkpoints[0] == other[0]
    assert steps == [1, 10, 12]
    assert sorted(path.stem for path in other[0].parent.glob("*.json")) == sorted(path.stem for path in run.checkpoints)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_stopped_before_the_first_step_is_resumed_too(flags, tmp_path, monkeypatch, optimizer):
    """An optimizer without moments yet, called damaged: a signal during the first evaluation would cost the run."""
    changes = {**QUIET, "max_train_steps": 3, "optimizer": optimizer, "ema_decay": 0.9}
    whole = train(flags, tmp_path / "whole", **changes)
    with monkeypatch.context() as patch:
        end_after(patch, 0, StopWaiting(143))
        with pytest.raises(SystemExit):
            train(flags, tmp_path / "broken", **changes)
    assert results_of(tmp_path / "broken").last["step"] == 0
    assert_same_tensors(train(flags, tmp_path / "broken", **changes, resume=True).last, whole.last)


def test_resumed_from_a_renamed_copy(flags, tmp_path):
    """Checkpoints that cannot be resumed in their turn, or the user's copy deleted by --keep_last."""
    run = train(flags, tmp_path, **QUIET, max_train_steps=2)
    copy = run.checkpoints[-1].rename(run.checkpoints[-1].with_name("good.pth"))
    train(flags, tmp_path, **QUIET, max_train_steps=4, resume=copy, keep_last=1, save_steps=1)
    assert copy.exists()
    assert train(flags, tmp_path, **QUIET, max_train_steps=5, resume=True).last["step"] == 5


def test_best_checkpoint_is_that_of_the_best_evaluation(flags, tmp_path):
    """A best file that is the last, or the worst: with --best_metric latent_mse, less is better."""
    for metric, best in (("psnr", max), ("latent_mse", min)):
        run = train(flags, tmp_path / metric, epochs=4, save_frequency=0, visualize_frequency=0, best_metric=metric)
        values = dict(run.scalars[f"eval_{metric}/aligned"])
        (kept,) = (tmp_path / metric / "ckpt").glob("align_best_*.pth")
        content = torch.load(kept, weights_only=True)
        assert values[content["step"]] == best(values.values())
        assert content["metrics"]["aligned"][metric] == pytest.approx(values[content["step"]])


def test_best_by_both_axes_gives_neither_up():
    """Catches a blurred module that is kept for its PSNR, and gains that are not counted from the start."""
    run = SimpleNamespace(best=None, best_metric="both", fixed=SimpleNamespace(images=""), step=0, without_gain=0)
    kept = []
    for psnr, distance in ((24.0, 0.1), (26.0, 0.103), (24.3, 0.099), (24.1, 0.1), (24.0, 0.094), (23.94, 0.01)):
        run.metrics, run.step = {"aligned": {"psnr": psnr, "st_lpips_vgg": distance}}, run.step + 1
        kept.append(checkpoint.Run.note_if_best(run))
    assert kept == [True, False, True, False, False, False] and run.without_gain == 3
    assert run.best["step"] == 3 and run.best["value"] == pytest.approx(6.5)


def test_a_run_that_gains_nothing_ends(flags, tmp_path, capsys):
    """Catches a run that goes on for nothing, one that counts anew at each resume, and one that cannot be trained on."""
    flags |= {"best_metric": "both", "patience": 3, "learning_rate": 0, "visualize_frequency": 0, "epochs": 9}
    run = train(flags, tmp_path)
    assert run.last["epoch"] == 3 and run.last["training"]["without_gain"] == 3
    capsys.readouterr()
    train(flags, tmp_path, resume=True)
    assert "already finished" in capsys.readouterr().out
    assert train(flags, tmp_path, epochs=12, resume=True).last["epoch"] == 6


def test_a_folder_stands_for_one_module_whoever_reads_it(flags, tmp_path, capsys):
    """A run's last module in place of its best, or its steps for the run's; an older run's best in place of a newer run's
    only module, or of the run resumed last; another module for `from_pretrained` than for the programs; lines at the
    end that cannot be run."""
    folder, judged = tmp_path / "ckpt", {**QUIET, "eval_frequency": 1, "learning_rate": 0.1, "max_train_steps": 6}

    def file_of_all():
        path, content = module_in(folder)
        used = AlignPipeline.from_pretrained(folder)
        assert same_weights(content, {"state_dict": used.module.state_dict()}) and used.figures == content["metrics"]
        assert str(tmp_path).encode() not in (folder / "model.safetensors").read_bytes()
        return path, content["step"]

    first = train(flags, tmp_path, **judged)  # it gets worse from its first evaluation on
    best, step = file_of_all()
    assert step < first.last["step"] and best.name.startswith("align_best")
    found = JudgedCheckpoint("aligned", "aligned", *module_in(folder), PipelineWithVAEs.from_checkpoint(best)).description()
    trained = found["trained"]
    assert (found["step"], trained["steps"], trained["epochs"]) == (step, 6, first.last["epoch"]) and trained["seconds"] > 0
    said = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines() if ": " in line)
    assert eval(said["to use"].partition(", by ")[2], {"AlignPipeline": AlignPipeline}).config.hidden_channels == 8
    assert said["to judge"] == f"python eval_align.py --checkpoint {folder} --eval_data_dir {flags['eval_data_dir']}"
    second = train(flags, tmp_path, **QUIET, max_train_steps=1)
    assert file_of_all() == (second.checkpoints[-1], 1)
    train(flags, tmp_path, **judged | {"max_train_steps": 7, "resume": first.checkpoints[-1]})
    assert file_of_all() == (best, step)
    best.write_bytes(best.read_bytes()[:1000])
    assert module_in(folder)[0] == results_of(tmp_path).checkpoints[-1]


STOPPED = {**QUIET, "epochs": 40, "num_workers": 1, "no_cache_latents": True}


@pytest.fixture(scope="module")
def unstopped(vae_folders, photo_folders, tmp_path_factory):
    """What a run of the flags `STOPPED` leaves when nobody stops it."""
    folder = tmp_path_factory.mktemp("unstopped")
    return train(tiny_flags(vae_folders, photo_folders, folder), folder, **STOPPED)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_saves_and_exits_with_the_customary_code(flags, tmp_path, unstopped, number):
    """A signal that loses steps or ends the data workers, a save that cannot be resumed, exit status 0."""
    folder = tmp_path / "stopped"
    stopped_flags = {**tiny_of(flags, folder), **STOPPED}
    process = start(stopped_flags, folder)
    deadline = time.monotonic() + 300
    while "train: " not in (folder / "log").read_text():
        assert process.poll() is None and time.monotonic() < deadline, "the run never got there"
        time.sleep(0.02)
    os.killpg(process.pid, number)
    code = process.wait(240)
    said = (folder / "log").read_text()
    assert code == 128 + number, said
    assert "--resume" in said and "Traceback" not in said
    run = results_of(folder)
    assert 0 <= run.last["step"] < 120
    again = train(flags, folder, **STOPPED, resume=True)
    assert_same_tensors(again.last, unstopped.last)


def poison(monkeypatch, bad_steps):
    """Batches whose latents are NaN at these steps (counted from 1)."""
    endless = train_script.endless

    def poisoned(loader):
        for number, batch in enumerate(endless(loader), start=1):
            if number in bad_steps:
                batch = batch | {"latents1": torch.full_like(batch["latents1"], float("nan"))}
            yield batch

    monkeypatch.setattr(train_script, "endless", poisoned)


def test_steps_that_are_not_finite_are_skipped_and_counted(flags, tmp_path, monkeypatch, caplog):
    """NaN weights after one bad batch; moments that a bad step spoils; a skip that nobody hears of."""
    changes = {**QUIET, "epochs": 3, "log_frequency": 2, "weight_decay": 0.1, "ema_decay": 0.9, "decoder_loss_weight": 1.0}
    poison(monkeypatch, {2, 5, 6})
    run = train(flags, tmp_path, **changes)
    assert all(tensor.isfinite().all() for tensor in tensors_of(run.last).values())
    assert dict(run.scalars["train/skipped_steps"])[9] == 3
    assert all(step["step"] == 6 for step in run.last["training"]["state"]["optimizer"]["state"].values())
    assert "3 steps skipped" in caplog.text
    assert 6 not in dict(run.scalars["train/grad_norm"])


def test_a_skipped_step_leaves_the_weights_as_they_were(flags, tmp_path, monkeypatch):
    """Weight decay, momentum or the running average that moves the weights in a step that is called skipped."""
    flags = flags | {"optimizer": "muon", "weight_decay": 0.1, "ema_decay": 0.9}
    before = train(flags, tmp_path / "before", **QUIET, max_train_steps=2)
    poison(monkeypatch, {3})
    after = train(flags, tmp_path / "after", **QUIET, max_train_steps=3)
    assert_same_tensors(after.last["state_dict"], before.last["state_dict"])
    moments = [run.last["training"]["state"]["optimizer"]["state"] for run in (after, before)]
    assert_same_tensors(*moments)


def test_too_many_bad_steps_in_a_row_end_the_run_with_the_files_named(flags, tmp_path, monkeypatch):
    """A run that goes on for days without learning; a checkpoint spoilt by it."""
    poison(monkeypatch, set(range(6, 100)))
    with pytest.raises(train_script.UserError, match=r"not finite in 4 steps in a row.* step 9 with '.*\.png'"):
        train(flags, tmp_path, **QUIET, epochs=10, max_bad_steps=4, save_steps=5)
    run = results_of(tmp_path)
    assert run.last["step"] == 5
    assert all(tensor.isfinite().all() for tensor in tensors_of(run.last).values())


def test_bad_steps_in_a_row_are_counted_across_a_resume(flags, tmp_path, monkeypatch):
    """A run that is restarted every few minutes and never comes to the limit."""
    with monkeypatch.context() as patch:
        poison(patch, {4, 5})
        first = train(flags, tmp_path, **QUIET, max_bad_steps=4, max_train_steps=5).last["training"]
    assert (first["bad_steps"], first["bad_steps_in_a_row"]) == (2, 2)
    poison(monkeypatch, set(range(100)))
    with pytest.raises(train_script.UserError, match=r"not finite in 4 steps in a row.* step 7 with"):
        train(flags, tmp_path, **QUIET, max_bad_steps=4, max_train_steps=20, resume=True)


def test_a_run_from_another_runs_weights_resumes_without_them(flags, tmp_path):
    """A resume that reads --load_checkpoint again: the file may be gone, or the folder's newest be of another shape."""
    first = train(flags, tmp_path / "first", **QUIET, max_train_steps=1).checkpoints[-1]
    changes = {**QUIET, "load_checkpoint": first, "hidden_channels": None, "num_blocks": None}
    train(flags, tmp_path / "second", **changes, max_train_steps=2)
    first.unlink()
    changes = {**QUIET, "hidden_channels": None, "num_blocks": None, "resume": True}
    assert train(flags, tmp_path / "second", **changes, max_train_steps=3).last["step"] == 3


def test_names_do_not_depend_on_how_the_folder_is_written():
    """A run that is refused its own images since its folder is now typed with ./ or two slashes; one of a single image."""
    names = checkpoint.names_digest(["photos/a/1.png", "photos/b/2.png"])
    for folder in ("./", "/elsewhere//"):
        assert names == checkpoint.names_digest([f"{folder}photos/a/1.png", f"{folder}photos/b/2.png"])
    for other in ("3", "é"):
        assert names != checkpoint.names_digest(["photos/a/1.png", f"photos/b/{other}.png"])
    composed, decomposed = (unicodedata.normalize(form, "café_が.jpg") for form in ("NFC", "NFD"))
    written = hashlib.sha256("café_が.jpg".encode()).hexdigest()[:16]
    assert checkpoint.names_digest([composed]) == checkpoint.names_digest([decomposed]) == written
    written = hashlib.sha256(decomposed.encode()).hexdigest()[:16]  # by an earlier version
    assert checkpoint.names_digest([decomposed], written) == written != checkpoint.names_digest([composed], written)
    assert checkpoint.names_digest(["x/1.png"]) == checkpoint.names_digest(["y/1.png"]) != checkpoint.names_digest(["x/2.png"])


def test_dry_run_prints_the_plan_and_writes_nothing(flags, vae_folders, tmp_path, capsys, monkeypatch):
    """A plan that leaves files behind, miscounts the steps, or wants VAE1's latents; that evaluates at each epoch of its few
    images and counts all of that as the first evaluation; that ends for want of gain before it has a pace."""
    evaluated = Mock(side_effect=train_script.evaluate_and_log)
    monkeypatch.setattr(train_script, "evaluate_and_log", evaluated)
    monkeypatch.setattr(train_script, "LOOK_SECONDS", 1000.0)  # as on a fast machine
    before = sorted(tmp_path.rglob("*"))
    work = tmp_path.parent / "elsewhere"
    flags |= {"dry_run": True, "save_dir": work / "ckpt", "log_dir": work / "runs", "epochs": 7, "patience": 1}
    image = {"input_types": ["image"], "decoder_loss_weight": 1.0, "reencode_target": 0.5}
    image["seen_through"] = [vae_folders["kl4"]]
    for changes in ({}, image):
        train_script.main(as_argv(flags | changes))
        said, bar = capsys.readouterr()
        assert "best=" in bar and "dB" in bar
        assert sorted(tmp_path.rglob("*")) == before and not work.exists()
        assert "21 (3 in an epoch) of 4 images" in said
        for fact in ("encoding:", "training:", "evaluations:", "expected time", "latent cache", "checkpoint", "peak memory"):
            assert fact in said
    assert evaluated.call_count == 8  # for each plan twice, at its first step and its last one


def test_folders_whose_names_are_not_utf8(flags, tmp_path, photo_folders):
    """A run that is lost at its last line, where its flags are written down; one that is refused for such a name."""
    photos, place = (tmp_path / os.fsdecode(name) for name in (b"\xff\xfe", b"\xfe\n"))
    shutil.copytree(photo_folders[1], photos)
    changes = {"train_data_dir": photos, "eval_data_dir": photos, "latent_cache_dir": place, "visualize_frequency": 0}
    for steps in (2, 3):
        train(flags, tmp_path, **changes, max_train_steps=steps, save_dir=place, resume=True)
    (kept,) = set(place.glob("align_pipeline_*.pth")) - {sorted(place.glob("align_pipeline_*.pth"))[0]}
    assert torch.load(kept, weights_only=True)["step"] == 3


def test_a_lost_worker_ends_the_run_saved(flags, tmp_path, monkeypatch):
    """Hours of training lost since the kernel has killed a process that decodes images."""
    with monkeypatch.context() as patch:
        end_after(patch, 2, WorkersLost("num_workers 2: a data worker has ended unexpectedly"))
        with pytest.raises(train_script.UserError, match=r"^--num_workers 2: .*saved in .*align_pipeline_.*--resume$"):
            train(flags, tmp_path, **QUIET, max_train_steps=4)
    assert results_of(tmp_path).last["step"] == 2
    assert train(flags, tmp_path, **QUIET, max_train_steps=4, resume=True).last["step"] == 4


def test_vaes_are_the_same_by_content_wherever_they_are(flags, vae_folders, tmp_path, monkeypatch):
    """A run that goes on towards another VAE, or is lost since a folder was moved or written by another diffusers."""
    old, new = tmp_path / "old", tmp_path / "new"
    changes = {**QUIET, "input_types": ["image"], "decoder_loss_weight": 1.0, "seen_through": [old / "kl4_stride4"]}
    places = {"vae1_path": "kl4", "vae2_path": "kl16", "decoder_loss_path": "kl16", "seen_through": "kl4_stride4"}
    for name in {*places.values()}:
        shutil.copytree(vae_folders[name], old / name)
    changes |= {flag: old / name for flag, name in places.items()}
    train(flags, tmp_path, **changes, max_train_steps=1)
    for flag, name in places.items():
        shutil.copytree(old / name, new / flag)
        config = json.loads((new / flag / "config.json").read_text()) | {"_diffusers_version": "99"}
        (new / flag / "config.json").write_text(json.dumps(config))
    shutil.rmtree(old)
    changes |= {flag: new / flag for flag in places} | {"resume": True, "max_train_steps": 2}
    assert train(flags, tmp_path, **changes).last["step"] == 2
    monkeypatch.setattr("train_align_with_args.cache_latents", lambda *_, **__: pytest.fail("the cache is built"))
    for flag in places:
        weights = new / flag / "diffusion_pytorch_model.safetensors"
        sound = weights.read_bytes()
        weights.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
        refusal(lambda: train(flags, tmp_path, **changes | {"max_train_steps": 3}), f"--{flag} ", "not the VAE")
        weights.write_bytes(sound)


def test_best_is_counted_anew_where_it_was_measured_on_something_else(flags, tmp_path, photo_folders, caplog):
    """The best of other pictures held against these ones for ever, or beaten at once; a moved folder that counts as another."""
    caplog.set_level("INFO")
    folder, moved = tmp_path / "eval", tmp_path / "moved"
    shutil.copytree(photo_folders[1], folder)
    changes = {"visualize_frequency": 0, "eval_frequency": 1, "save_frequency": 0, "eval_data_dir": folder}
    train(flags, tmp_path, **changes, epochs=1)
    shutil.copytree(folder, moved)
    changes |= {"resume": True, "eval_data_dir": moved}
    train(flags, tmp_path, **changes, epochs=2)
    assert "counted anew" not in caplog.text
    for number, photo in enumerate(sorted(photo_folders[0].rglob("*.png"))[:5]):
        shutil.copy(photo, moved / f"{number}.jpg")
    best = train(flags, tmp_path, **changes, epochs=3).last["training"]["best"]
    assert caplog.text.count("counted anew") == 1 and best["step"] == 9
    best = train(flags, tmp_path, **changes, epochs=4, best_metric="latent_mse").last["training"]["best"]
    assert caplog.text.count("counted anew") == 2 and best["step"] == 12 and best["by"] == "latent_mse"


def test_a_config_that_holds_images_out_goes_on_as_it_began(flags, tmp_path):
    """A run that is told to go on by the same command, and refused for --hold_out, which --eval_data_dir had switched off; a
    typed --eval_data_dir that a run with held-out images does not look at, without a word."""
    config, judged = tmp_path / "my.json", flags["eval_data_dir"]
    config.write_text('{"hold_out": 0.3}')
    same = {**QUIET, "load_config": config, "resume": True}
    for folder, steps in (("typed", 1), ("typed", 2), ("held out", 1), ("held out", 2)):
        given = flags | {"eval_data_dir": judged if folder == "typed" else None}
        run = train(given, tmp_path / folder, **same, max_train_steps=steps)
        assert run.last["step"] == steps and run.last["config"]["hold_out"] == (0 if folder == "typed" else 0.3)
    refusal(lambda: train(flags, tmp_path / folder, **same, max_train_steps=3), "--eval_data_dir", "training images")


def test_a_strangers_checkpoint_decides_no_place(flags, tmp_path, monkeypatch, caplog):
    """Files replaced or deleted, folders filled or a proxy asked because a stranger's file says so."""
    caplog.set_level("INFO")
    path = train(flags, tmp_path / "theirs", **QUIET, max_train_steps=1).checkpoints[-1]
    content, mine = torch.load(path, weights_only=True), tmp_path / "mine"
    victim = mine / "ckpt" / "align_pipeline_20250101_000000.pth"
    victim.parent.mkdir(parents=True)
    victim.write_text("precious")
    planted = dict.fromkeys(("log_dir", "save_dir", "latent_cache_dir", "cache_dir"), str(tmp_path / "planted"))
    content["config"] |= planted | {"config_save_path": str(victim), "proxy": "http://127.0.0.1:9", "keep_last": 1}
    content["training"]["own"] = [victim.name]
    torch.save(content, path)
    given = {name: value for name, value in flags.items() if name != "latent_cache_dir"}
    run = train(given, mine, **QUIET, resume=path, keep_last=1, max_train_steps=2)
    assert victim.read_text() == "precious" and not (tmp_path / "planted").exists() and "HTTP_PROXY" not in os.environ
    assert (mine / "latent_cache").is_dir() and len(run.checkpoints) == 2
    said = next(record.message for record in caplog.records if "not as in the checkpoint" in record.message)
    assert all(f"--{name} " in said for name in (*planted, "config_save_path", "proxy")) and str(victim) in said


@pytest.mark.parametrize("mode", ["dry_run", "cache_only"])
def test_what_ends_before_training_ends_properly(flags, tmp_path, monkeypatch, mode):
    """An event file that is never closed, or processes that a launcher waits for; also after a mistake."""
    ended, closed = [], []
    monkeypatch.setattr("accelerate.Accelerator.end_training", lambda _: ended.append(1))
    monkeypatch.setattr(train_script.RunLog, "close", lambda writer: closed.append(writer.events.close()))
    train(flags, tmp_path, **QUIET, **{mode: True})
    assert len(ended) == 1 and len(closed) == (mode == "dry_run")
    fails = {"dry_run": "training_loop", "cache_only": "cache_latents"}[mode]
    monkeypatch.setattr(train_script, fails, lambda *_: (_ for _ in ()).throw(train_script.UserError("a mistake")))
    with pytest.raises(train_script.UserError):
        train(flags, tmp_path, **QUIET, **{mode: True})
    assert len(ended) == 2 and len(closed) == 2 * (mode == "dry_run")


def test_weights_that_were_trained_for_another_vae_come_with_a_word(flags, tmp_path, vae_folders, caplog):
    """A start from weights for other latents of the same shape, of which nobody hears; a word about the very same VAEs."""
    path = train(flags, tmp_path, **QUIET, max_train_steps=1).checkpoints[-1]
    changes = {**QUIET, "max_train_steps": 1, "load_checkpoint": path, "hidden_channels": None, "num_blocks": None}
    train(flags, tmp_path, **changes)
    assert "another VAE" not in caplog.text
    torch.manual_seed(0)
    make_kl_vae(4, scaling_factor=0.18215, act_fn="relu").save_pretrained(tmp_path / "other")
    train(flags, tmp_path, **changes, vae1_path=tmp_path / "other")
    assert caplog.text.count("trained with another VAE than --vae1_path") == 1
