"""What the flags mean on this machine: settings that are resolved once."""

import json
import os

import pytest
import torch
from conftest import ROOT, as_argv
from hostile import refusal
from runs import QUIET, train

import train_align_with_args as train_script
from train_align_with_args import SETTINGS, config_dict, parse_args, resolve
from utils import UserError


def test_settings_never_change(flags):
    """Code that writes to the settings on their way: nobody could say what a setting is at a given line."""
    settings, start, vaes = resolve(parse_args(as_argv(flags)))
    with pytest.raises(AttributeError, match="precision: settings never change"):
        settings.precision = "float16"
    assert settings.but(seed=7).seed == 7 and settings.seed == 42
    assert start is None and settings.out_channels == 16 and len(vaes) == 2


def test_a_resumed_runs_precision_is_one_that_the_device_has(flags, tmp_path, caplog):
    """A float16 run that is resumed on the CPU and trains in float16 there, without a scaler and without a word."""
    path = train(flags, tmp_path, **QUIET, max_train_steps=1).checkpoints[-1]
    content = torch.load(path, weights_only=True)
    content["config"]["precision"], content["trained_on"] = "float16", {"device": "cuda", "precision": "float16"}
    torch.save(content, path)
    asked = flags | {"save_dir": tmp_path / "ckpt", "resume": True, "precision": None}
    settings, start, _ = resolve(parse_args(as_argv(asked)))
    assert start[0] == path and settings.precision in ("float32", "bfloat16")
    assert "does not suit this CPU" in caplog.text


def test_an_older_config_is_read(tmp_path):
    """A config of an earlier version that ends in an unknown key; one whose lost setting mattered, passed over in silence."""
    older = ROOT / "tests" / "files" / "config.json"
    args = parse_args(["--load_config", str(older)])
    config = json.loads(older.read_text())
    assert config_dict(args) == config_dict(parse_args([])) | {
        name: value for name, value in config.items() if name in SETTINGS
    }
    changed = tmp_path / "config.json"
    for lost in ({"adversarial_weight": 0.02}, {"cache_per_machine": True}):
        changed.write_text(json.dumps(config | lost))
        with pytest.raises((SystemExit, UserError)):
            parse_args(["--load_config", str(changed)])


# ----------------------------------------------------------------------------------------------------------------------
# What must be said before hours go into a run


REFUSED = {  # changes to a run's flags, and the parts of the line
    "cache only without a cache": ({"cache_only": True, "no_cache_latents": True}, "--cache_only"),
    "module larger than the memory": ({"hidden_channels": 8192, "num_blocks": 1000}, "--hidden_channels"),
    "evaluation batch larger than the memory": ({"eval_batch_size": 65536, "image_size": 16384}, "--eval_batch_size"),
    "config onto a folder": ({"config_save_path": "{}"}, "--config_save_path"),
    "checkpoints onto a file": ({"save_dir": "{}/file"}, "--save_dir"),
    "logs onto a file": ({"log_dir": "{}/file"}, "--log_dir"),
    "logs that are not utf-8": ({"log_dir": os.fsdecode(b"\xff\xfe")}, "--log_dir \\udcff\\udcfe"),
    "cache onto a file": ({"latent_cache_dir": "{}/file"}, "--latent_cache_dir"),
    "decoder that is not there": ({"decoder_loss_weight": 1, "decoder_loss_path": "{}/none"}, "--decoder_loss_path"),
    "decoder of another space": ({"decoder_loss_weight": 1, "decoder_loss_path": "kl4"}, "--decoder_loss_path"),
    "images in a pipe": ({"eval_data_dir": "{}/pipe"}, "--eval_data_dir"),
    "images that are nowhere": ({"train_data_dir": "{}/none", "vae1_path": "{}/none"}, "--train_data_dir"),
    "a stamp after which no other sorts": ({"save_dir": "{}/9999"}, "align_pipeline_99991231_235959.pth", "rename it"),
    "a checkpoint without a name": ({"resume": ""}, "--resume ''"),
    "weights without a name": ({"load_checkpoint": ""}, "--load_checkpoint ''"),
    "latents alone, and no decoder to look with": ({"architecture": "tiny", "input_types": ["latent"]}, "--architecture tiny"),
    "a module's layers, and no start": ({"init_module": "module.safetensors"}, "--init_module module.safetensors"),
    "compiling without a compiler": ({"compile": True}, "--compile"),
    "device that nobody has": ({"device": "cuda:99"}, "--device cuda:99"),
    "re-encoded targets for images alone": (
        {"input_types": ["image"], "reencode_target": 0.5},
        "--reencode_target 0.5: ",
        "latent among the input types",
    ),
    "pictures through VAEs for latents": (
        {"input_types": ["latent"], "seen_through": ["{}"]},
        "--seen_through",
        "--input_types image",
    ),
    "size whose nearest good one is named": ({"image_size": 36}, "--image_size", "32"),
    "VAE that is not there": ({"vae2_path": "{}/no_vae"}, "--vae2_path", "no_vae"),
    "folder without images": ({"eval_data_dir": "{}/empty"}, "--eval_data_dir", "empty"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_flags_that_cannot_work_together_are_refused_before_anything_is_encoded(
    flags, vae_folders, tmp_path, monkeypatch, kind
):
    """An hour of encoding, or a whole training run, that is lost to a flag which could not work from the start."""
    monkeypatch.setattr("train_align_with_args.cache_latents", lambda *_, **__: pytest.fail("the cache is built"))
    monkeypatch.setattr("vaes.loading.FrozenVAE.model", property(lambda vae: pytest.fail("a VAE's weights are read")))
    monkeypatch.setattr("utils.torch.compile", lambda _: lambda _: (_ for _ in ()).throw(RuntimeError("no compiler")))
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "9999" / "align_pipeline_99991231_235959.pth").mkdir(parents=True)
    os.mkfifo(tmp_path / "pipe")
    changes, *said = REFUSED[kind]
    changes = {name: value.replace("{}", str(tmp_path)) if isinstance(value, str) else value for name, value in changes.items()}
    if changes.get("decoder_loss_path") == "kl4":
        changes["decoder_loss_path"] = vae_folders["kl4"]
    monkeypatch.chdir(tmp_path)
    refusal(lambda: train_script.main(as_argv(flags | changes)), *said)
