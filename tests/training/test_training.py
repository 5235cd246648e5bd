"""Training runs: what they leave behind, what their flags do, and what must never change."""

import json
import logging
import re

import pytest
import torch
from conftest import as_argv, run_script, tiny_flags
from runs import QUIET, assert_same_tensors, event_tags, results_of, same_weights, tensors_of, train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch.optim.optimizer import register_optimizer_step_pre_hook

from runtime.processes import create_accelerator
from train_align_with_args import create_data_loaders, load_vae_model, parse_args, train_align_pipeline
from utils import UserError
from vae_align import AlignConfig, align_module

SHORT = {**QUIET, "max_train_steps": 2}


def trainable(content):
    """The names of a checkpoint's trainable weights."""
    return [name for name, _ in align_module(AlignConfig(**content["align_config"])).named_parameters()]


# ----------------------------------------------------------------------------------------------------------------------
# One run of both programs, as a user starts them


@pytest.fixture(scope="module")
def user_run(vae_folders, photo_folders, tmp_path_factory):
    """(flags, results, folder, stdout of training, stdout of evaluation): 2 epochs of 3 steps, then eval_align.py."""
    folder = tmp_path_factory.mktemp("user_run")
    flags = {**tiny_flags(vae_folders, photo_folders, folder), "epochs": 2, "num_visualize_samples": 3}
    trained = run_script("train_align_with_args.py", *as_argv(flags), cwd=folder)
    results = results_of(folder)
    judging = {"checkpoint": results.checkpoints[-1], "eval_data_dir": photo_folders[1], "output_dir": folder / "results"}
    judged = run_script("eval_align.py", *as_argv(judging), cwd=folder)
    return flags, results, folder, trained.stdout, judged.stdout


def test_checkpoints_are_named_by_time_and_say_where_they_stand(user_run):
    """Two saves within one second that share a name; a last checkpoint that is not the last step's; a config that its own
    parser refuses, or that forgets what was typed; a start that is told as the random module's figure; no sample picture
    beside them, or no word of it."""
    flags, results, folder, stdout, _ = user_run
    (sample,) = (folder / "ckpt").glob("*.png")
    assert str(sample) in stdout and "CUSTOM SCALARS" in stdout and sample.read_bytes()[1:4] == b"PNG"
    assert len(results.checkpoints) == 2  # one an epoch; the end does not save twice
    for checkpoint in results.checkpoints:
        assert re.fullmatch(r"align_pipeline_\d{8}_\d{6}\.pth", checkpoint.name)
    assert [torch.load(path, weights_only=True)["step"] for path in results.checkpoints] == [3, 6]
    assert results.last["epoch"] == 2
    assert str(results.checkpoints[-1]) in stdout
    start, *_, end = (value for _, value in results.scalars["eval_psnr/aligned"])
    assert f"at the start {start:.2f} dB -> aligned {end:.2f} dB (random weights " in stdout
    saved = results.checkpoints[-1].with_suffix(".json")
    again = parse_args(["--load_config", str(saved)])
    for name, value in flags.items():
        kept = getattr(again, name)
        assert str(kept) == str(value), name
    assert again.out_channels == 16
    assert json.loads(saved.read_text()) == results.last["config"]


def test_event_file_holds_every_promised_tag_the_ladder_in_one_chart_and_the_flags(user_run):
    """A log that nothing writes; a profile that nobody asked for; a curve without its baselines; a run without its flags."""
    _, results, *_ = user_run
    assert len(results.event_files) == 1
    tags = event_tags(results.event_files[0])
    assert not [tag for tag in tags["scalars"] if tag.startswith("profile/")]
    of_a_step = ("loss", "learning_rate", "grad_norm", "images_per_second", "skipped_steps")
    assert {f"train/{name}" for name in of_a_step} <= set(tags["scalars"])
    for row in ("vae1", "vae2", "reencode", "aligned"):
        assert {f"eval_psnr/{row}", f"eval_ssim/{row}"} <= set(tags["scalars"])
    for row in ("vae2", "reencode", "aligned"):
        assert f"eval_latent_mse/{row}" in tags["scalars"]
    assert {f"latents_{what}/{which}" for what in ("mean", "std") for which in ("aligned", "target")} <= set(tags["scalars"])
    layers = {f"gradients/{name}" for name in trainable(results.last)}
    assert layers <= set(tags["histograms"])
    assert set(tags["images"]) == {f"{kind}/{number}" for kind in ("samples", "differences", "latents") for number in range(3)}
    assert [step for step, _ in results.scalars["train/loss"]] == list(range(1, 7))
    assert [step for step, _ in results.scalars["eval_psnr/aligned"]] == [0, 3, 6]
    events = EventAccumulator(str(results.event_files[0]))
    events.Reload()
    layout = Layout.FromString(events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    drawn = [pattern for chart in layout.category[0].chart for pattern in chart.multiline.tag]
    for row in ("vae2", "reencode", "linear", "aligned"):
        assert f"eval_psnr/{row}" in results.scalars
        assert any(re.fullmatch(pattern, f"eval_psnr/{row}") for pattern in drawn), row
    assert not any(re.match(pattern, "eval_psnr/untrained") for pattern in drawn)  # 10 dB below, it would flatten the rest

    def hparams(part):
        return HParamsPluginData.FromString(events.SummaryMetadata(f"_hparams_/{part}").plugin_data.content)

    flags = hparams("session_start_info").session_start_info.hparams
    assert flags["learning_rate"].number_value == results.last["config"]["learning_rate"]
    for info in hparams("experiment").experiment.metric_infos:
        (point,) = results.scalars[info.name.tag]
        assert point[1] == pytest.approx(results.scalars[info.name.tag.replace("final/", "eval_") + "/aligned"][-1][1])


def test_eval_align_agrees_with_the_runs_own_last_evaluation(user_run):
    """Another crop, size, scale or precision than in training, or weights of another step; a table that is not printed."""
    _, results, folder, _, stdout = user_run
    for label in ("VAE1", "VAE2", "aligned", "latent MSE", "PSNR", "SSIM"):
        assert label in stdout
    ladder = json.loads((folder / "results" / "metrics.json").read_text())["ladder"]
    for row in ladder:
        for name in ("latent_mse", "psnr", "ssim"):
            if ladder[row][name] is not None:
                assert ladder[row][name] == pytest.approx(results.scalars[f"eval_{name}/{row}"][-1][1], rel=1e-3)
                assert ladder[row][name] == pytest.approx(results.last["metrics"][row][name], rel=1e-3)


# ----------------------------------------------------------------------------------------------------------------------
# Flags


@pytest.mark.parametrize("wanted", ["", "eval_frequency", "visualize_frequency"])
def test_every_frequency_switches_its_own_thing(flags, tmp_path, wanted):
    """A division by zero, a result that is never written, pictures only with an evaluation, or the reverse."""
    run = train(flags, tmp_path, epochs=2, **QUIET | ({wanted: 1} if wanted else {}))
    tags = event_tags(run.event_files[0])
    assert ("samples/0" in tags["images"]) == bool(tags["images"]) == (wanted == "visualize_frequency")
    assert ("eval_psnr/aligned" in tags["scalars"]) == (wanted == "eval_frequency")
    assert wanted or not [tag for tag in tags["scalars"] if not tag.startswith("train/")]
    assert len(run.checkpoints) == 1
    assert run.last["step"] == 6


TRAINED = {"input_types": ["image"], "downsample_times": 4}, {"input_types": ["latent"], "loss_type": "weighted_l1"}


@pytest.mark.parametrize("changes", [*TRAINED, {"precision": "bfloat16"}], ids=str)
def test_each_kind_of_module_trains(flags, tmp_path, changes):
    """A branch that gets no gradient or is never stepped: every layer's weights move. Master weights stay float32."""
    start = train(flags, tmp_path / "start", **{**SHORT, "learning_rate": 0, **changes})
    end = train(flags, tmp_path / "end", **{**SHORT, **changes})
    assert start.last["align_config"]["input_types"] == sorted(changes.get("input_types", ["image", "latent"]))
    for name in trainable(end.last):
        weights = end.last["state_dict"][name]
        assert weights.dtype == torch.float32
        assert weights.isfinite().all()
        assert not torch.equal(weights, start.last["state_dict"][name]), name


def test_loss_falls_on_a_problem_that_is_nearly_the_identity(flags, tmp_path, vae_folders):
    """A step against the gradient, a target that moves, gradients that add up: from one VAE's latents to the same ones."""
    same = {"vae2_path": vae_folders["kl4"], "input_types": ["latent"], "learning_rate": 1e-2}
    same["init"] = "random"  # the closed-form start would leave nothing to learn
    run = train(flags, tmp_path, epochs=14, **same, **QUIET)
    assert sum(run.losses[-4:]) < 0.2 * sum(run.losses[:4])


def test_load_checkpoint_starts_from_the_other_runs_weights_and_architecture(flags, tmp_path):
    """Weights of a fresh module, or this run's own architecture flags; with --resume, where there is nothing to resume yet, the
    other run itself."""
    judged = {**SHORT, "eval_frequency": 1}
    shape = {"input_types": ["latent"], "num_blocks": 3, "hidden_channels": 12}
    first = train(flags, tmp_path / "first", **judged, **shape)
    flags |= {"num_blocks": None, "hidden_channels": None}  # not typed: the parser's defaults are others
    second = train(flags, tmp_path / "second", **judged, load_checkpoint=first.checkpoints[-1], seed=7, resume=True)
    assert second.scalars["eval_psnr/aligned"][0][0] == 0  # a new run, from its own first step
    assert second.last["align_config"] == first.last["align_config"]
    for name, value in shape.items():
        assert second.last["config"][name] == value
    for name in ("latent_mse", "psnr", "ssim"):
        tag = f"eval_{name}/aligned"
        assert second.scalars[tag][0][1] == pytest.approx(first.scalars[tag][-1][1], rel=1e-5)


def test_gradients_are_clipped_before_the_step_and_only_where_told(flags, tmp_path):
    """Clipping after `optimizer.step`, or only on logged steps; a norm whose measuring changes the gradients."""
    norms, clip = [], 1e-5

    def look(optimizer, *_):
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norms.append(torch.linalg.vector_norm(torch.stack([grad.norm() for grad in gradients])).item())

    hook = register_optimizer_step_pre_hook(look)
    try:
        run = train(flags, tmp_path / "clipped", grad_clip=clip, weight_decay=0, log_frequency=2, epochs=2, **QUIET)
        assert norms == [pytest.approx(clip, rel=1e-2)] * 6
        assert run.scalars["train/grad_norm"][0][1] > 2 * clip  # the logged norm is the one before clipping
        norms.clear()
        run = train(flags, tmp_path / "whole", epochs=2, **QUIET)
        assert [value for _, value in run.scalars["train/grad_norm"]] == pytest.approx(norms, rel=1e-4)
    finally:
        hook.remove()


def test_the_seed_alone_decides_the_final_weights(flags, tmp_path):
    """An unseeded generator, a seed that nothing reads, an evaluation that leaves its mark on training."""
    quiet = train(flags, tmp_path / "quiet", epochs=2, seed=1, **QUIET)
    chatty = train(flags, tmp_path / "chatty", epochs=2, seed=1, num_visualize_samples=1, log_frequency=2)
    other = train(flags, tmp_path / "other", epochs=2, seed=2, **QUIET)
    assert same_weights(quiet.last, chatty.last)
    assert not same_weights(quiet.last, other.last)


def test_diverged_training_says_so_without_a_traceback(flags, tmp_path):
    """Weights that are no numbers any more: histograms refuse them, and None has no format in the summary."""
    absurd = {"learning_rate": 1000, "warmup_steps": 0, "loss_weight": 1e6, "weight_decay": 1000}
    with pytest.raises(UserError, match="learning_rate"):
        train(flags, tmp_path, epochs=4, **{**QUIET, "eval_frequency": 4}, **absurd)


def test_vae_weights_are_bit_identical_after_training(flags, tmp_path, vae_folders):
    """An optimizer that holds VAE weights, batch statistics that move, gradients that reach the VAEs."""
    args = parse_args(as_argv({**flags, "epochs": 2, "num_visualize_samples": 1}))
    vaes = [load_vae_model(vae_folders[name], "", None, "cpu", torch.float32) for name in ("kl4", "kl16")]
    before = [{name: tensor.clone() for name, tensor in vae.model.state_dict().items()} for vae in vaes]
    train_loader, eval_loader = create_data_loaders(args)
    checkpoint = train_align_pipeline(args, *vaes, train_loader, eval_loader, torch.Generator().manual_seed(0))
    assert checkpoint.is_file()
    for vae, kept in zip(vaes, before):
        after = vae.model.state_dict()
        assert after.keys() == kept.keys()
        assert all(torch.equal(after[name], kept[name]) for name in kept)
        for parameter in vae.model.parameters():
            assert not parameter.requires_grad
            assert parameter.grad is None


# ----------------------------------------------------------------------------------------------------------------------
# What goes wrong


def test_unreadable_images_are_named_once_and_the_run_goes_on(flags, tmp_path, photo_folders, caplog):
    """One broken file that ends the run or goes unnamed; figures of five images under the name of six."""
    folders = [tmp_path / "photos", tmp_path / "eval"]
    for folder, photos in zip(folders, (sorted(photo_folders[0].rglob("*.png"))[:6], photo_folders[1].iterdir())):
        folder.mkdir()
        for photo in photos:
            (folder / photo.name).symlink_to(photo)
    (folders[0] / "broken_one.png").write_bytes(b"\x89PNG\r\n\x1a\n and then nothing")
    (folders[1] / "broken_two.jpg").write_bytes(b"x")
    flags |= {"train_data_dir": folders[0], "eval_data_dir": folders[1], "eval_batch_size": 1}
    with caplog.at_level(logging.WARNING):
        run = train(flags, tmp_path, epochs=2, visualize_frequency=0)
    assert run.last["step"] == 4
    naming = [record for record in caplog.records if "broken_one.png" in record.getMessage()]
    assert len(naming) == 1  # named, and once
    assert caplog.text.count("left out of the evaluation: ") == 1 and "broken_two.jpg" in caplog.text


def test_a_ruined_module_is_not_saved_as_the_last_good_one(flags, tmp_path):
    """A checkpoint whose output is not finite, said to be unharmed, from which --resume would go on."""
    absurd = {"learning_rate": 1000, "warmup_steps": 0, "loss_weight": 1e6, "weight_decay": 1000, "max_bad_steps": 10**6}
    with pytest.raises(UserError, match=r"^the module's output is not finite at step") as error:
        train(flags, tmp_path, epochs=40, **{**QUIET, "save_steps": 1}, **absurd)
    assert "unharmed" not in str(error.value)
    for content in (torch.load(path, weights_only=True) for path in (tmp_path / "ckpt").glob("*.pth")):
        module = align_module(AlignConfig.from_dict(content["align_config"]))
        module.load_state_dict(content["state_dict"])
        assert module(image=torch.zeros(1, 3, 32, 32), latents=torch.zeros(1, 4, 4, 4)).square().sum().isfinite()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_steps_that_overflow_in_float16_are_counted_and_go_by(flags, tmp_path, monkeypatch, caplog, recwarn, optimizer):
    """A skipped step that is not counted, counts as bad data, moves weights, moments or average, or costs the schedule."""

    def with_scaler(device, precision):  # Accelerate has none on a CPU; its scale overflows at 2^60 and 2^35, not at 2^10
        accelerator = create_accelerator(device, precision)
        accelerator.state._mixed_precision, accelerator.native_amp = "fp16", True
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60, backoff_factor=2.0**-25)
        return accelerator

    monkeypatch.setattr("train_align_with_args.create_accelerator", with_scaler)
    flags |= {"optimizer": optimizer, "ema_decay": 0.9, "max_bad_steps": 2, "warmup_steps": 4, "weight_decay": 0.1}
    first, skipped, run = (train(flags, tmp_path / str(steps), **QUIET, max_train_steps=steps) for steps in (1, 2, 4))
    assert_same_tensors(skipped.last["state_dict"], first.last["state_dict"])
    assert not any(moment.any() for moment in tensors_of(skipped.last["training"]["state"]["optimizer"]).values())
    assert dict(run.scalars["train/skipped_steps"]) == {1: 1, 2: 2, 3: 2, 4: 2}
    assert dict(run.scalars["train/gradient_scale"]) == {1: 2.0**35, 2: 2.0**10, 3: 2.0**10, 4: 2.0**10}
    assert "step 2: 1 step skipped" in caplog.text and "2 steps skipped" in caplog.text
    rates = [rate for _, rate in run.scalars["train/learning_rate"]]
    assert rates == pytest.approx([1e-3 * share for share in (0.25, 0.5, 0.75, 1)])
    assert not same_weights(run.last, first.last)
    assert not [warning for warning in recwarn if "lr_scheduler" in str(warning.message)]
