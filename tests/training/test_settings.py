"""What the flags mean on this machine: settings that are resolved once."""

import json

import pytest
import torch
from conftest import ROOT, as_argv
from runs import QUIET, train

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
    content["config"]["precision"] = "float16"
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
    assert {name: value for name, value in config.items() if name in SETTINGS} == config_dict(args)
    changed = tmp_path / "config.json"
    changed.write_text(json.dumps(config | {"adversarial_weight": 0.02}))
    with pytest.raises((SystemExit, UserError)):
        parse_args(["--load_config", str(changed)])
