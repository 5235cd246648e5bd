"""The functions of the specification, called as it writes them: with the plain result of `parse_args` and a `SummaryWriter`."""
# ruff: noqa: F403, F405  `__all__` names the fifteen functions

import json

import torch
from conftest import as_argv, read_scalars
from runs import QUIET, assert_same_tensors, event_tags, train
from torch.utils.tensorboard import SummaryWriter

import eval_align
import train_align_with_args as train_script
from train_align_with_args import *


def test_the_fifteen_functions_run_from_flags_to_pictures_as_the_specification_calls_them(flags, tmp_path, monkeypatch, caplog):
    """A function that takes this project's own writer alone, or is missing; points under another x-axis than `epoch`; a
    scheduler that does not go with the optimizer; differences and latents that have no pictures of their own."""
    assert all(callable(globals()[name]) for name in train_script.__all__) and len(set(train_script.__all__)) == 15
    monkeypatch.chdir(tmp_path)
    caplog.set_level("INFO")
    args = parse_args(as_argv(flags | {"epochs": 1, "device": None}))  # the default, cuda, which a machine may lack
    dtype, writer = get_dtype(args.precision), SummaryWriter(tmp_path / "own")
    vae1 = load_vae_model(args.vae1_path, args.vae1_subfolder, args.cache_dir, args.device, dtype)
    vae2 = load_vae_model(args.vae2_path, args.vae2_subfolder, args.cache_dir, args.device, dtype)
    pipeline, (train_loader, eval_loader) = create_align_pipeline(vae1, vae2, args), create_data_loaders(args)
    optimizer = setup_optimizer(pipeline, args)
    scheduler, loss_function = setup_scheduler(optimizer, args), get_loss_function(args.loss_type)
    for epoch in (3, 4):
        batch = next(iter(train_loader))["pixel_values"].to(pipeline.device)
        aligned = pipeline.module(image=batch, latents=pipeline.codec1.encode(batch))
        loss_function(aligned, pipeline.codec2.encode(batch)).backward()
        optimizer.step()
        scheduler.step()
        evaluate_and_log(pipeline, eval_loader, writer, epoch, args, dtype)
        log_model_stats(pipeline, eval_loader, writer, epoch, args, dtype)
        visualize_results(pipeline, eval_loader, writer, epoch, args, dtype)
    writer.close()
    scalars, (events,) = read_scalars(tmp_path / "own"), (tmp_path / "own").glob("events*")
    for tag in ("eval_psnr/aligned", "eval_psnr/vae2", "latents_mean/aligned"):
        assert [epoch for epoch, _ in scalars[tag]] == [3, 4], tag
    tags = event_tags(events)
    assert set(tags["images"]) == {"samples/0", "differences/0", "latents/0"}
    assert {"gradients/out.weight", "weights/out.weight", "latents/target"} <= set(tags["histograms"])
    save_config(args, tmp_path / "config.json")
    assert load_config(tmp_path / "config.json").items() <= vars(args).items()

    assert train_align_pipeline(args, vae1, vae2, train_loader, eval_loader, torch.Generator()).is_file()
    said = [record.message.partition(":")[0] for record in caplog.records if ": aligned PSNR" in record.message]
    assert said == ["epoch 3", "epoch 4", "at the start", "epoch 1"]
    main(["--load_config", str(tmp_path / "config.json"), "--max_train_steps", "1"])


def test_a_saved_config_holds_what_was_asked_for_and_a_resumed_run_goes_on_as_before(flags, tmp_path, vae_folders, monkeypatch):
    """A config of a machine without a GPU by which others do not use theirs; a run that goes on in another precision than it
    began in, or is judged in another; a run refused for a flag that says how it was trained."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
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
    judging = {"checkpoint": first.checkpoints[-1], "eval_data_dir": flags["eval_data_dir"], "output_dir": tmp_path / "judged"}
    assert eval_align.main(as_argv(judging | {"metrics": "ssim", "num_samples": 0}))["settings"]["precision"] == "float32"
