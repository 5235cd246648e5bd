"""The functions of the specification, called as it writes them: with the plain result of `parse_args` and a `SummaryWriter`."""

import json

import pytest
import torch
from conftest import as_argv, read_scalars
from runs import QUIET, assert_same_tensors, event_tags, specified, train
from torch.utils.tensorboard import SummaryWriter

import train_align_with_args as train_script
from train_align_with_args import (
    create_align_pipeline,
    create_data_loaders,
    evaluate_and_log,
    get_dtype,
    get_loss_function,
    load_config,
    load_vae_model,
    log_model_stats,
    main,
    parse_args,
    save_config,
    setup_optimizer,
    setup_scheduler,
    train_align_pipeline,
    visualize_results,
)
from training.optimizer import ADAMW_SHARE


@pytest.fixture
def parts(flags, tmp_path, monkeypatch):
    """(args, VAE1, VAE2, pipeline, both loaders) as a reader of the specification makes them."""
    monkeypatch.chdir(tmp_path)
    args = parse_args(as_argv(flags | {"epochs": 1, "device": None}))  # the default, cuda, which a machine may lack
    dtype = get_dtype(args.precision)
    vae1 = load_vae_model(args.vae1_path, args.vae1_subfolder, args.cache_dir, args.device, dtype)
    vae2 = load_vae_model(args.vae2_path, args.vae2_subfolder, args.cache_dir, args.device, dtype)
    return args, vae1, vae2, create_align_pipeline(vae1, vae2, args), *create_data_loaders(args)


def test_the_fifteen_functions_run_from_flags_to_pictures_as_the_specification_calls_them(parts, tmp_path):
    """A function that takes this project's own writer alone, or is missing; points under another x-axis than `epoch`; a
    scheduler that does not go with the optimizer; differences and latents that have no pictures of their own."""
    assert all(callable(globals()[name]) for name in train_script.__all__) and len(set(train_script.__all__)) == 15
    args, vae1, vae2, pipeline, train_loader, eval_loader = parts
    dtype, writer = get_dtype(args.precision), SummaryWriter(tmp_path / "own")
    optimizer = setup_optimizer(pipeline, args)
    scheduler, loss_function = setup_scheduler(optimizer, args), get_loss_function(args.loss_type)
    for epoch in (3, 4):
        batch = next(iter(train_loader))["pixel_values"].to(pipeline.device)
        aligned = pipeline.module(image=batch, latents=pipeline.codec1.encode(batch))
        loss_function(aligned, pipeline.codec2.encode(batch)).backward()
        optimizer.step()
        scheduler.step()
        ladder = evaluate_and_log(pipeline, eval_loader, writer, epoch, args, dtype)
        log_model_stats(pipeline, eval_loader, writer, epoch, args, dtype)
        visualize_results(pipeline, eval_loader, writer, epoch, args, dtype)
    writer.close()
    scalars, (events,) = read_scalars(tmp_path / "own"), (tmp_path / "own").glob("events*")
    for tag in ("eval_psnr/aligned", "eval_psnr/vae2", "latents_mean/aligned"):
        assert [epoch for epoch, _ in scalars[tag]] == [3, 4], tag
    assert scalars["eval_psnr/aligned"][1][1] == pytest.approx(ladder["aligned"]["psnr"])
    tags = event_tags(events)
    assert set(tags["images"]) == {"samples/0", "differences/0", "latents/0"}
    assert {"gradients/out.weight", "weights/out.weight", "latents/target"} <= set(tags["histograms"])
    save_config(args, tmp_path / "config.json")
    assert load_config(tmp_path / "config.json").items() <= vars(args).items()

    path = train_align_pipeline(args, vae1, vae2, train_loader, eval_loader, torch.Generator())
    assert torch.load(path, weights_only=True)["step"] == len(train_loader)
    main(["--load_config", str(tmp_path / "config.json"), "--max_train_steps", "1"])


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("warmup_steps", [0, 4, 20])
def test_a_scheduler_that_is_stepped_by_epochs_warms_up_by_steps(parts, name, warmup_steps):
    """A warm-up of a hundred epochs in place of a hundred steps; one that only AdamW follows, or that a resumed run begins
    anew; a decay by steps."""
    args, _, _, pipeline, *_ = parts
    args.optimizer, args.warmup_steps, args.scheduler_step_size = name, warmup_steps, 2
    optimizer = setup_optimizer(pipeline, args)
    scheduler, rates = setup_scheduler(optimizer, args), [args.learning_rate, args.learning_rate * ADAMW_SHARE]
    for parameter in pipeline.module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for step in range(15):
        for group, rate in zip(optimizer.param_groups, rates):
            assert group["lr"] == pytest.approx(specified(step, 3, rate, warmup_steps, 2, 0.5), rel=1e-9), step
        optimizer.step()
        if step % 3 == 2:  # an epoch's end
            scheduler.step()
        if step == 7:
            state = optimizer.state_dict(), scheduler.state_dict()
            optimizer = setup_optimizer(pipeline, args)
            scheduler = setup_scheduler(optimizer, args)
            optimizer.load_state_dict(state[0]), scheduler.load_state_dict(state[1])


def test_a_saved_config_holds_what_was_asked_for_and_a_resumed_run_goes_on_as_before(flags, tmp_path, vae_folders, monkeypatch):
    """A config from a machine without a GPU that keeps every other machine off its own; a run that goes on in another precision
    than it began in; a checkpoint judged in another; a run refused for a flag that says how it was trained."""
    monkeypatch.setattr("utils.cpu_has_bfloat16", lambda: False)
    flags |= {"device": None, "precision": None, "vae2_path": vae_folders["kl4"], "max_train_steps": 2, **QUIET}
    whole = train(flags, tmp_path / "whole")
    first = train(flags | {"max_train_steps": 1}, tmp_path / "run")
    saved = json.loads(first.checkpoints[-1].with_suffix(".json").read_text())
    asked = {"device": "cuda", "precision": "bfloat16", "out_channels": 16, "cache_latents": True}
    assert saved == first.last["config"] and {name: saved[name] for name in asked} == asked
    assert first.last["trained_on"] == {"device": "cpu", "precision": "float32"}
    monkeypatch.setattr("utils.cpu_has_bfloat16", lambda: True)  # another CPU
    resumed = train(flags | {"precision": "float32", "out_channels": 4}, tmp_path / "run", resume=True)
    assert_same_tensors(resumed.last, whole.last)
