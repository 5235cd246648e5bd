"""Flags and configs: defaults, precedence default < JSON < typed, and one-line errors."""

import json
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT, run_script

from runtime.cli import load_config, run
from train_align_with_args import parse_args, save_config
from utils import UserError

DEFAULTS = {  # the specification's section 2 and the task's additions, name by name
    "config_save_path": "",
    "vae1_path": "black-forest-labs/FLUX.1-dev",
    "vae2_path": "sd-legacy/stable-diffusion-v1-5",
    "vae1_subfolder": "vae",
    "vae2_subfolder": "vae",
    "hidden_channels": 64,
    "out_channels": 16,
    "num_blocks": 2,
    "downsample_times": 3,
    "input_types": ["image", "latent"],
    "train_data_dir": "train_images",
    "eval_data_dir": "eval_images",
    "train_batch_size": 4,
    "eval_batch_size": 4,
    "num_workers": 4,
    "dataset_type": "default",
    "epochs": 200,
    "warmup_steps": 100,
    "device": "cuda",
    "precision": "bfloat16",
    "learning_rate": 1e-3,
    "weight_decay": 1e-4,
    "scheduler_step_size": 50,
    "scheduler_gamma": 0.5,
    "loss_type": "mse",
    "loss_weight": 1.0,
    "log_dir": "runs",
    "save_dir": "ckpt_align",
    "eval_frequency": 1,
    "save_frequency": 1,
    "visualize_frequency": 1,
    "num_visualize_samples": 4,
    "image_size": 256,
    "seed": 42,
    "grad_clip": 0.0,
    "max_train_steps": 0,
}


def parse_line(line):
    """`parse_args` on what one types into a shell."""
    return parse_args(shlex.split(line))


@pytest.fixture
def config(tmp_path):
    """A function: write its keywords (or one text) as config.json, and give the path."""

    def write(text=None, **values):
        path = tmp_path / "config.json"
        path.write_text(json.dumps(values) if text is None else text, encoding="utf-8")
        return str(path)

    return write


@pytest.fixture
def refusal(capsys):
    """A function: parse flags that must be refused; the one line on stderr."""

    def parse(*argv):
        with pytest.raises(SystemExit) as stop:
            parse_args(list(argv))
        printed = capsys.readouterr()
        assert stop.value.code == 2
        assert printed.out == ""
        assert printed.err.endswith("\n") and len(printed.err.splitlines()) == 1, printed.err
        return printed.err

    return parse


# ----------------------------------------------------------------------------------------------------------------------
# Flags


def test_every_flag_of_the_specification_has_its_default():
    """A flag renamed, left out, or with another default than promised."""
    args = vars(parse_args([]))
    assert {name: args[name] for name in DEFAULTS} == DEFAULTS
    assert {type(args[name]) for name in ("epochs", "seed", "image_size", "max_train_steps")} == {int}
    for name in ("load_config", "load_checkpoint", "cache_dir", "proxy"):
        assert args[name] is None
    assert args["log_frequency"] >= 1
    assert args["typed_flags"] == ()


def test_defaults_are_not_shared_between_calls():
    """One run's change to a list that becomes the next run's default."""
    parse_args([]).input_types.remove("image")
    assert parse_args([]).input_types == ["image", "latent"]


def test_the_specifications_examples_parse_as_typed():
    args = parse_line(
        "--vae1_path sd-legacy/stable-diffusion-v1-5 --vae2_path black-forest-labs/FLUX.1-dev --train_data_dir train_images "
        "--eval_data_dir eval_images --epochs 200 --learning_rate 1e-3"
    )
    assert (args.vae1_path, args.vae2_path) == ("sd-legacy/stable-diffusion-v1-5", "black-forest-labs/FLUX.1-dev")
    assert (args.epochs, args.learning_rate) == (200, 1e-3)
    args = parse_line("--hidden_channels 128 --num_blocks 3 --downsample_times 4 --input_types image latent")
    assert (args.hidden_channels, args.num_blocks, args.downsample_times) == (128, 3, 4)
    assert args.input_types == ["image", "latent"]
    assert parse_args(["--input_types", "latent"]).input_types == ["latent"]


@pytest.mark.parametrize("name", ["random_flip", "cache_latents", "sample_posterior"])
def test_a_switch_can_be_set_either_way_on_the_command_line(name, config):
    """A `--no_x` that a config cannot be overridden with, or that sets something else."""
    for value in (True, False):
        path = config(**{name: not value})
        args = parse_args(["--load_config", path, f"--{name}" if value else f"--no_{name}"])
        assert getattr(args, name) is value
        assert getattr(parse_args(["--load_config", path]), name) is not value
        assert set(args.typed_flags) == {"load_config", name}


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--learning_rat", "1"], ("--learning_rat;", "did you mean --learning_rate?")),
        (["--learning-rate", "1"], ("--learning-rate;", "did you mean --learning_rate?")),
        (["--learning_rates=1"], ("--learning_rates;", "did you mean --learning_rate?")),
        (["--epoch", "5"], ("--epoch;", "did you mean --epochs?")),  # not taken as an abbreviation
        (["--zzz"], ("--zzz",)),
        (["stray"], ("stray",)),
        (["two\nlines"], ("two",)),
        (["--epochs", "many"], ("--epochs", "many")),
        (["--epochs", "1.5"], ("--epochs", "1.5")),
        (["--epochs", "0"], ("--epochs", "1")),
        (["--epochs"], ("--epochs",)),
        (["--epochs", "9" * 5000], ("--epochs",)),
        (["--train_batch_size", "-4"], ("--train_batch_size", "-4")),
        (["--learning_rate", "-1"], ("--learning_rate", "-1")),
        (["--learning_rate", "nan"], ("--learning_rate", "nan")),
        (["--learning_rate", "inf"], ("--learning_rate", "inf")),
        (["--loss_weight", "0"], ("--loss_weight", "above 0")),
        (["--loss_type", "l2"], ("--loss_type", "l2", "weighted_l1")),
        (["--loss_type", "two\nlines"], ("--loss_type",)),
        (["--precision", "fp16"], ("--precision", "float16")),
        (["--input_types", "pixels"], ("--input_types", "pixels", "image")),
        (["--input_types"], ("--input_types",)),
        (["--dataset_type", "folder"], ("--dataset_type", "imagenet")),
    ],
)
def test_a_flag_that_does_not_parse_is_one_line_that_names_it(refusal, argv, said):
    """argparse's page of usage; a typo that is silently taken for something else; a value that fails hours later."""
    line = refusal(*argv)
    assert all(part in line for part in said), line


# ----------------------------------------------------------------------------------------------------------------------
# Configs


def test_typed_wins_over_json_wins_over_default(config):
    """--load_config that throws the command line away, or the reverse."""
    args = parse_args(["--epochs", "7", "--load_config", config(epochs=5, num_blocks=9), "--seed", "1"])
    assert (args.epochs, args.num_blocks, args.seed, args.hidden_channels) == (7, 9, 1, 64)


def test_typed_value_that_equals_the_default_still_wins_over_json(config):
    """Taking whatever equals the default for not typed."""
    path = config(epochs=5, input_types=["latent"], learning_rate=0.5, vae1_subfolder="", cache_latents=False)
    typed = "--epochs 200 --input_types image latent --learning_rate 1e-3 --vae1_subfolder vae --cache_latents"
    args = parse_line(f"{typed} --load_config {shlex.quote(path)}")
    assert (args.epochs, args.input_types, args.learning_rate) == (200, ["image", "latent"], 1e-3)
    assert (args.vae1_subfolder, args.cache_latents) == ("vae", True)


def test_typed_flags_names_what_was_typed_and_nothing_else(config):
    """A default --device or --out_channels, or one from a config, that is treated as the user's explicit wish."""
    args = parse_args(["--load_config", config(device="cuda", out_channels=4), "--no_random_flip", "--epochs=200"])
    assert sorted(args.typed_flags) == ["epochs", "load_config", "random_flip"]


@pytest.mark.parametrize(
    ("key", "nearest"),
    [("learning_rat", "learning_rate"), ("vae_1_path", "vae1_path"), ("no_random_flip", "random_flip"), ("--epochs", "epochs")],
)
def test_unknown_key_names_the_nearest(refusal, config, key, nearest):
    """A misspelt key that is silently ignored."""
    line = refusal("--load_config", config(**{"epochs": 3, key: 1}))
    assert f"unknown key '{key}'; did you mean {nearest}?" in line


@pytest.mark.parametrize("key", ["load_config", "typed_flags", "help", "zzz", "two\nlines"])
def test_what_is_no_setting_is_refused_without_nonsense(refusal, config, key):
    """A config that loads another; "unknown key 'load_config'; did you mean load_config?"."""
    line = refusal("--load_config", config(**{key: "x"}))
    assert repr(key) in line
    assert f"did you mean {key}" not in line


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("epochs", True),
        ("epochs", "200"),
        ("epochs", 1.5),
        ("epochs", 0),
        ("epochs", -3),
        ("epochs", 10**30),
        ("epochs", None),
        ("epochs", [200]),
        ("epochs", {"value": 200}),
        ("seed", -1),
        ("learning_rate", True),
        ("learning_rate", "1e-3"),
        ("learning_rate", -0.1),
        ("learning_rate", float("nan")),
        ("learning_rate", float("inf")),
        ("learning_rate", 10**400),
        ("scheduler_gamma", 0),
        ("vae1_path", 5),
        ("vae1_path", ["a", "b"]),
        ("vae1_path", None),
        ("loss_type", "l2"),
        ("precision", 16),
        ("input_types", "image"),
        ("input_types", []),
        ("input_types", ["pixels"]),
        ("input_types", [["image"]]),
        ("random_flip", 1),
        ("random_flip", "false"),
        ("random_flip", None),
    ],
    ids=lambda value: str(value)[:20],
)
def test_value_of_the_wrong_kind_in_a_config_is_one_line_that_names_the_key(refusal, config, key, value):
    """A bool taken for 1, "false" taken for true, a string taken for a list of letters, a NaN learning rate."""
    path = config(**{key: value})
    line = refusal("--load_config", path)
    assert f"{path}: {key}: " in line
    assert len(line) < 1000


def test_whole_numbers_serve_as_numbers_and_null_as_not_set(config):
    """`"learning_rate": 1` refused for not being a float; a saved `"proxy": null` refused on reading back."""
    args = parse_args(["--load_config", config(learning_rate=1, grad_clip=2, proxy=None, cache_dir=None)])
    assert (args.learning_rate, args.grad_clip, args.proxy, args.cache_dir) == (1.0, 2.0, None, None)
    assert isinstance(args.learning_rate, float)


@pytest.mark.parametrize("text", ["", "{", "[1]", "3", '"epochs"', "null", "{'epochs': 1}", "[" * 100_000])
def test_config_that_is_no_json_object_is_one_line(refusal, config, text):
    """A traceback for a comma too many."""
    path = config(text)
    assert path in refusal("--load_config", path)
    with pytest.raises(UserError) as error:
        load_config(path)
    assert path in str(error.value) and "\n" not in str(error.value)


def test_config_that_cannot_be_read_is_one_line(refusal, tmp_path):
    """A traceback for a mistyped path, a folder, or a checkpoint in place of its config."""
    (tmp_path / "binary.pth").write_bytes(bytes(range(256)))
    for path in (tmp_path / "missing.json", tmp_path, tmp_path / "binary.pth"):
        assert str(path) in refusal("--load_config", str(path))


# ----------------------------------------------------------------------------------------------------------------------
# Saving


TYPED = (
    "--epochs 3 --input_types latent --learning_rate 2.5e-4 --no_random_flip --vae1_subfolder '' --loss_type l1 "
    "--train_data_dir bücher/图像 --cache_dir c --seed 0"
)


NO_SETTINGS = ("load_config", "resume", "dry_run", "typed_flags", "given_flags")  # how it was started, not what it is


@pytest.mark.parametrize("line", ["", TYPED], ids=["defaults", "typed"])
def test_saved_config_reads_back_as_the_same_flags(tmp_path, line):
    """A saved config that --load_config refuses, such as for an empty list, or that has lost or changed a value."""
    args = parse_line(line)
    save_config(args, tmp_path / "sub" / "saved.json")
    loaded = load_config(tmp_path / "sub" / "saved.json")
    flags = {name: value for name, value in vars(args).items() if name not in NO_SETTINGS}
    assert loaded == flags
    again = vars(parse_args(["--load_config", str(tmp_path / "sub" / "saved.json")]))
    assert {name: again[name] for name in flags} == flags


@pytest.mark.parametrize(
    ("proxy", "saved"),
    [
        ("http://127.0.0.1:7890", "http://127.0.0.1:7890"),
        ("http://user:secret@127.0.0.1:7890", "http://127.0.0.1:7890"),
        ("socks5://user:s@secret@[::1]:7890", "socks5://[::1]:7890"),
        ("user:secret@127.0.0.1:7890", "127.0.0.1:7890"),
        ("http://user:se/secret@127.0.0.1:7890", "http://127.0.0.1:7890"),
    ],
)
def test_proxy_is_saved_without_name_and_password(tmp_path, proxy, saved):
    """A password in every checkpoint and config, however the URL was typed."""
    args = parse_args(["--proxy", proxy])
    save_config(args, tmp_path / "saved.json")
    assert load_config(tmp_path / "saved.json")["proxy"] == saved
    assert args.proxy == proxy  # the run itself still needs it


@pytest.mark.parametrize("path", sorted((ROOT / "config").glob("*.json")), ids=lambda path: path.name)
def test_every_shipped_config_parses_to_its_values(path):
    """A config left behind when a flag was renamed."""
    args = vars(parse_args(["--load_config", str(path)]))
    values = json.loads(path.read_text(encoding="utf-8"))
    assert values and {name: args[name] for name in values} == values


# ----------------------------------------------------------------------------------------------------------------------
# The program


def test_a_wrong_flag_ends_the_program_with_status_2_and_one_line(tmp_path):
    """Warnings of imported libraries around the error; minutes of imports or a written folder before it."""
    result = run_script("train_align_with_args.py", "--epochs", "many", check=False, cwd=tmp_path)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.splitlines() == [
        "train_align_with_args.py: error: argument --epochs: invalid whole number value: 'many'"
    ]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "status"),
    [(UserError("--a b: two\nlines; mend it"), "error: --a b: two lines; mend it"), (KeyboardInterrupt(), 130)],
)
def test_a_users_mistake_and_ctrl_c_end_a_program_without_a_traceback(monkeypatch, error, status):
    """A page of Python for a missing folder; exit status 0 after a failure."""
    monkeypatch.setenv("DIFFUSERS_VERBOSITY", "error")  # `run` sets it for its process

    def main():
        raise error

    with pytest.raises(SystemExit) as stop:
        run(main)
    assert stop.value.code == status  # a text is printed to stderr and means status 1


def test_importing_the_script_has_no_side_effects(tmp_path):
    """Files, a CUDA context, changed settings or seconds of heavy imports for who only wants one function."""
    program = f"""
import logging, os, random, sys, warnings
sys.path.insert(0, {str(ROOT)!r})
import torch
before = dict(os.environ), list(warnings.filters), torch.initial_seed(), random.getstate(), torch.is_grad_enabled()
import train_align_with_args
assert before == (dict(os.environ), list(warnings.filters), torch.initial_seed(), random.getstate(), torch.is_grad_enabled())
assert not torch.cuda.is_initialized() and not logging.getLogger().handlers
heavy = {{"diffusers", "accelerate", "datasets", "transformers", "tensorboard", "torchmetrics", "torchvision"}}
print(sorted(heavy & set(sys.modules)))
"""
    result = subprocess.run(
        [sys.executable, "-B", "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "[]\n", "")
    assert not list(tmp_path.iterdir())
