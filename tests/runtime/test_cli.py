"""Flags and configs: defaults, precedence default < JSON < typed, and one-line errors."""

import contextlib
import io
import json
import math
import os
import random
import shlex
import subprocess
import sys
from functools import partial

import pytest
from conftest import ROOT, run_script
from hostile import is_one_line, no_hang, refusal
from hypothesis import example, given, settings
from hypothesis import strategies as st

import eval_align
import train_align_with_args as train_script
from runtime.cli import claim_writable_file, claim_writable_folder, load_config, run, use_proxy
from train_align_with_args import config_dict, parse_args, save_config
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
    """A function: write its keywords, or one text or bytes, as config.json, and give the path."""

    def write(content=None, **values):
        path = tmp_path / "config.json"
        content = json.dumps(values) if content is None else content
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return str(path)

    return write


@pytest.fixture
def mistake(capsys):
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
    """A command of the specification that no longer parses, or that sets other values."""
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
def test_a_flag_that_does_not_parse_is_one_line_that_names_it(mistake, argv, said):
    """argparse's page of usage; a typo that is silently taken for something else; a value that fails hours later."""
    line = mistake(*argv)
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
def test_unknown_key_names_the_nearest(mistake, config, key, nearest):
    """A misspelt key that is silently ignored."""
    line = mistake("--load_config", config(**{"epochs": 3, key: 1}))
    assert f"unknown key '{key}'; did you mean {nearest}?" in line


@pytest.mark.parametrize("key", ["load_config", "typed_flags", "help", "zzz", "two\nlines"])
def test_what_is_no_setting_is_refused_without_nonsense(mistake, config, key):
    """A config that loads another; "unknown key 'load_config'; did you mean load_config?"."""
    line = mistake("--load_config", config(**{key: "x"}))
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
def test_value_of_the_wrong_kind_in_a_config_is_one_line_that_names_the_key(mistake, config, key, value):
    """A bool taken for 1, "false" taken for true, a string taken for a list of letters, a NaN learning rate."""
    path = config(**{key: value})
    line = mistake("--load_config", path)
    assert f"{path}: {key}: " in line
    assert len(line) < 1000


def test_a_number_too_long_to_print_is_one_line():
    """Python's refusal to print a number of 4,300 digits, which no JSON but a checkpoint's config can hold, as a traceback."""
    refusal(lambda: train_script.PARSER.check_config({"epochs": 10**5000}, "a checkpoint"), "a checkpoint: epochs: ")


def test_whole_numbers_serve_as_numbers_and_null_as_not_set(config):
    """`"learning_rate": 1` refused for not being a float; a saved `"proxy": null` refused on reading back."""
    args = parse_args(["--load_config", config(learning_rate=1, grad_clip=2, proxy=None, cache_dir=None)])
    assert (args.learning_rate, args.grad_clip, args.proxy, args.cache_dir) == (1.0, 2.0, None, None)
    assert isinstance(args.learning_rate, float)


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


def test_use_proxy_sets_both_spellings_and_none_leaves_the_environment_alone(monkeypatch):
    """A proxy that reaches plain http only; an empty --proxy that wipes the user's own."""
    names = ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy")
    for name in names:
        monkeypatch.setenv(name, "http://theirs:1")
    use_proxy(None)
    use_proxy("")
    assert {os.environ[name] for name in names} == {"http://theirs:1"}
    use_proxy("http://ours:2")
    assert {os.environ[name] for name in names} == {"http://ours:2"}


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


# ----------------------------------------------------------------------------------------------------------------------
# From a hostile hand: the flags, or one line and exit status 2

FLAGS = sorted(train_script.PARSER.settings().keys() - {"load_config"})[::6]  # one mechanism refuses them all


def parsed(argv, parser=train_script.build_parser):
    """(the flags, "") or (None, the one line on stderr); anything else that happens fails the test."""
    printed = io.StringIO()
    try:
        with no_hang(), contextlib.redirect_stderr(printed), contextlib.redirect_stdout(io.StringIO()):
            return parser().parse([str(item) for item in argv]), ""
    except SystemExit as stop:
        line = printed.getvalue()
        assert stop.code == 2, (stop.code, line)
        assert line.endswith("\n") and is_one_line(line[:-1]) and len(line) < 1000, line
        return None, line


# ----------------------------------------------------------------------------------------------------------------------
# The file

FILES = {  # kind: (content, what the line says)
    "empty": ("", "JSON"),
    "no json": ("epochs = 3", "JSON"),
    "single quotes": ("{'epochs': 3}", "JSON"),
    "cut short": ('{"epochs": 3, "see', "JSON"),
    "array": ('[{"epochs": 3}]', "object"),
    "number": ("3", "object"),
    "utf-16": ('{"epochs": 3}'.encode("utf-16"), "JSON"),
    "latin-1": ('{"vae1_path": "bücher"}'.encode("latin-1"), "JSON"),
    "same key twice": ('{"epochs": 3, "epochs": 4}', "'epochs' is there twice"),
    "same key twice, spelt differently": ('{"epochs": 3, "\\u0065pochs": 4}', "'epochs' is there twice"),
    "arrays 100,000 deep": ("[" * 100_000, "JSON"),
    "value 900 deep": ('{"epochs": ' + "[" * 900 + "]" * 900 + "}", ""),
    "whole number of 5,000 digits": ('{"epochs": ' + "9" * 5000 + "}", "JSON"),
    "whole number of 4,000 digits": ('{"epochs": ' + "9" * 4000 + "}", "epochs"),
    "key of a megabyte": (json.dumps({"epochs" * 170_000: 3}), "unknown key"),
    "value of a megabyte": (json.dumps({"loss_type": "mse" * 350_000}), "loss_type"),
    "100,000 unknown keys": (json.dumps({f"epochs{number}": 3 for number in range(100_000)}), "did you mean epochs?"),
    "longer than 16 MB": (b" " * (1 << 24) + b"{}", "longer than 16 MB"),
    "key with a newline": ('{"two\\nlines": 1}', "'two\\nlines'"),
    "key that is half a letter": ('{"\\ud800": 1}', "unknown key"),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_config_is_one_line_and_status_2(config, kind):
    """A traceback, a page of a megabyte, or (worse) a key that is silently dropped."""
    content, said = FILES[kind]
    path = config(content)
    flags, line = parsed(["--load_config", path])
    assert flags is None and path in line and said in line, line
    with contextlib.suppress(UserError):  # wrong keys and values are not its business
        load_config(path)


def test_a_config_with_a_byte_order_mark_is_read(config):
    """What Windows' editor saves, refused as no JSON."""
    assert parse_args(["--load_config", config(b"\xef\xbb\xbf" + b'{"epochs": 3}')]).epochs == 3


PLACES = {
    "nothing there": lambda path: None,
    "folder": lambda path: path.mkdir(),
    "named pipe": os.mkfifo,
    "device without end": lambda path: path.symlink_to("/dev/zero"),
    "dangling link": lambda path: path.symlink_to("nowhere"),
    "link to itself": lambda path: path.symlink_to(path.name),
    "within a file": lambda path: (path.parent / "file").touch() or path.symlink_to("file/config.json"),
}


@pytest.mark.parametrize("kind", PLACES)
def test_a_config_that_is_no_file_is_one_line_and_status_2(tmp_path, kind):
    """Waiting for someone to write into a pipe; reading a device until the memory is full."""
    path = tmp_path / "config.json"
    PLACES[kind](path)
    flags, line = parsed(["--load_config", path])
    assert flags is None and str(path) in line


@pytest.mark.parametrize("path", ["", "a\0b", "\ud800", "x" * 5000], ids=["empty", "NUL", "half a letter", "too long"])
def test_a_config_that_cannot_be_named_is_one_line(path):
    """A ValueError or UnicodeError of the system's in place of a message; `--load_config "$UNSET"` that is ignored."""
    flags, line = parsed(["--load_config", path])
    assert flags is None and "load_config" in line
    refusal(lambda: load_config(path))


# ----------------------------------------------------------------------------------------------------------------------
# The values

ABSURD = [
    True, False, None, "", "3", "nan", 1.0, 0.5, -1, -(10**30), 10**30, 10**400, 1e308, -1e308, math.nan, math.inf, -math.inf,
    [], [[]], [1], [None], ["x"], {}, {"value": 3}, "a\0b", "\ud800", "x" * 10_000, "two\nlines", "\x1b[2J",
]  # fmt: skip


def is_sane(name, value):
    """Whether `value` is of its flag's kind and, for numbers, finite and of a size that can be meant."""
    default = vars(parse_args([]))[name]
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(default, bool) and isinstance(value, bool)
    if isinstance(default, (int, float)):
        return isinstance(value, type(default)) and math.isfinite(value) and 0 <= value <= 2**32
    if isinstance(default, list):
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    return (value is None and default is None) or (
        isinstance(value, str) and "\0" not in value and os.fsencode(value) is not None
    )


@pytest.mark.parametrize("name", FLAGS)
def test_an_absurd_value_of_any_flag_is_one_line_that_names_it(config, name):
    """A flag whose range nobody checks: true for 1, NaN, a billion workers, a name that no file can have."""
    for value in ABSURD:
        path = config(**{name: value})
        flags, line = parsed(["--load_config", path])
        if flags is None:
            assert f"{path}: {name}: " in line, line
        else:
            assert is_sane(name, getattr(flags, name)), (name, value)


@pytest.mark.parametrize("name", FLAGS)
def test_an_absurd_value_typed_is_one_line_that_names_the_flag(name):
    """The same from the command line, whose values take another path."""
    for value in ("-1", "nan", "1e400", "9" * 5000, "", "a\0b", "\ud800", "two\nlines"):
        flags, line = parsed([f"--{name}={value}"])
        if flags is None:
            assert name in line, line
        else:
            assert is_sane(name, getattr(flags, name)), (name, value)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.integers(-(10**40), 10**40) | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@settings(max_examples=150)
@given(st.dictionaries(st.sampled_from([*FLAGS, "load_config", "epoch"]), json_values, max_size=3))
@example({"vae1_path": "\udcff"})
def test_any_config_gives_the_flags_or_one_line(tmp_path_factory, values):
    """Whatever else a value can do to the parser; and that flags which are taken can be saved and read back the same."""
    folder = tmp_path_factory.getbasetemp()
    path, saved = folder / "any.json", folder / "saved.json"
    path.write_text(json.dumps(values))
    flags, _ = parsed(["--load_config", path])
    if flags is not None:
        assert all(is_sane(name, getattr(flags, name)) for name in values)
        flags.proxy = None  # which is saved without its user
        save_config(flags, saved)
        again, line = parsed(["--load_config", saved])
        assert again is not None, line
        assert {name: getattr(again, name) for name in FLAGS} == {name: getattr(flags, name) for name in FLAGS}


@settings(max_examples=120)
@given(st.binary(max_size=64) | st.text(max_size=32).map(lambda text: text.encode("utf-8", "surrogatepass")))
@example(b'{"epochs":1e999999999}')
@example(b"\xef\xbb\xbf\xef\xbb\xbf{}")
def test_any_bytes_as_a_config_give_the_flags_or_one_line(tmp_path_factory, content):
    """A decoder's or a number parser's own traceback."""
    path = tmp_path_factory.getbasetemp() / "bytes.json"
    path.write_bytes(content)
    parsed(["--load_config", path])


def test_a_config_with_any_byte_changed_gives_the_flags_or_one_line(config):
    """Damage that leaves most of the file intact, which random bytes never reach."""
    whole = json.dumps(config_dict(parse_args([])), indent=1).encode()
    draw = random.Random(0)
    taken = 0
    for _ in range(150):
        content = bytearray(whole)
        for _ in range(draw.randint(1, 3)):
            content[draw.randrange(len(content))] = draw.randrange(256)
        taken += parsed(["--load_config", config(bytes(content))])[0] is not None
    assert 0 < taken < 150  # both ways are walked


@pytest.mark.parametrize("parser", [train_script.build_parser, eval_align.build_parser], ids=["train", "eval"])
def test_any_command_line_gives_the_flags_or_one_line(parser):
    """argparse's own tracebacks and pages of usage; a stray word that breaks the line of the message."""
    options = [option for action in parser()._actions for option in action.option_strings if option not in ("-h", "--help")]
    word = (
        st.sampled_from(options) | st.text(max_size=12) | st.sampled_from(["1", "-1", "--", "-", "=", "--=", "latent", "l1=2"])
    )

    @settings(max_examples=100)
    @given(st.lists(word | st.tuples(st.sampled_from(options), st.text(max_size=6)).map("=".join), max_size=5))
    def check(argv):
        if not {"-h", "--help"} & {item[:6] for item in argv}:
            parsed(argv, parser)

    check()


def test_an_error_shows_no_password(config):
    """A proxy's password in the complaint about the flag beside it."""
    secret = "http://user:hunter22@proxy:1"
    for argv in (
        ["stray", secret],
        [f"--epochs={secret}"],
        ["--load_config", config(proxy=[secret])],
        ["--loss_type", secret],
    ):
        flags, line = parsed(argv)
        assert flags is None and "hunter22" not in line and "user" not in line.replace("true", ""), line


# ----------------------------------------------------------------------------------------------------------------------
# Outputs that cannot be written


def test_claim_writable_folder_creates_it_and_leaves_nothing_in_it(tmp_path):
    """A probe file left behind, or a folder missing at the first save."""
    folder = claim_writable_folder(tmp_path / "a" / "b", "--save_dir")
    assert folder.is_dir() and not os.listdir(folder)


def test_claim_writable_folder_on_a_file_names_the_flag(tmp_path):
    """A traceback at the first save, hours into a run."""
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=r"^--save_dir .*another folder$"):
            claim_writable_folder(path, "--save_dir")


@pytest.mark.parametrize("path", ["a\0b", "/dev/null/x", "/proc/x", "/dev/full"])
def test_a_place_that_cannot_be_written_is_one_line(path):
    """Whatever way the system has to refuse."""
    refusal(lambda: claim_writable_folder(path, "--save_dir"), "--save_dir")
    refusal(lambda: claim_writable_file(f"{path}/file", "--config_save_path"), "--config_save_path")


PRINTING = """
import sys
from functools import partial
from runtime.cli import run
def main():
    for _ in range(3000):
        print("said", file=sys.stderr)
        print("said")
    open(sys.argv[1], "w").close()
run(main)
"""


@pytest.mark.parametrize("place", ["2>/dev/full", ">/dev/full", "2>&-", ">&- 2>&-", "| true", "2>&1 | true"])
def test_what_is_printed_never_ends_what_is_done(tmp_path, place):
    """A night's training ended by a full log disk, a log that nobody reads any more, or a closed stream."""
    command = f'"{sys.executable}" -c "$0" "$1" {place}; echo "${{PIPESTATUS[0]}}" > "$2"'
    status = tmp_path / "status"
    run_it = ["bash", "-c", command, PRINTING, str(tmp_path / "done"), str(status)]
    subprocess.run(run_it, cwd=ROOT, timeout=120, stdin=subprocess.DEVNULL, capture_output=True)
    assert (tmp_path / "done").exists() and status.read_text().strip() == "0"


def test_the_home_folder_is_meant_by_a_tilde_in_every_path(tmp_path, monkeypatch):
    """A folder called ~ in the current one, which is dangerous to remove."""
    monkeypatch.setenv("HOME", str(tmp_path))
    places = ("save_dir", "log_dir", "latent_cache_dir", "train_data_dir", "eval_data_dir", "cache_dir", "config_save_path")
    (tmp_path / "config.json").write_text(json.dumps({place: f"~/{place}" for place in places}))
    args = parse_args(["--load_config", "~/config.json", "--vae1_path", "~/v"])
    assert all(getattr(args, place) == str(tmp_path / place) for place in places) and args.vae1_path == str(tmp_path / "v")
    assert eval_align.build_parser().parse(["--checkpoint", "~/a", "--eval_data_dir", "e"]).checkpoint == [str(tmp_path / "a")]


def test_a_config_in_another_encoding_is_refused_with_the_remedy(tmp_path):
    """A codec's words for a config that Notepad or PowerShell has written."""
    for encoding in ("gbk", "utf-16"):
        path = tmp_path / f"{encoding}.json"
        path.write_bytes('{"train_data_dir": "/data/训练图片"}'.encode(encoding))
        refusal(partial(load_config, path), path, "save it as UTF-8")


def test_a_typed_proxy_wins_over_that_of_the_environment(monkeypatch):
    """A proxy tool's ALL_PROXY=socks://… that ends every download though --proxy is right; its password in a message."""
    monkeypatch.setenv("ALL_PROXY", "socks://127.0.0.1:7891/")
    monkeypatch.setenv("all_proxy", "socks://127.0.0.1:7891/")
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "")
    use_proxy("http://me:hidden@127.0.0.1:1")
    assert {os.environ[name] for name in ("ALL_PROXY", "ALL_PROXY".lower())} == {"http://me:hidden@127.0.0.1:1"}
    monkeypatch.setenv("ALL_PROXY", "socks5://me:veiled@127.0.0.1:1")
    assert "veiled" not in str(UserError("cannot use veiled"))


@pytest.mark.parametrize(
    "name, value", [("ACCELERATE_USE_DEEPSPEED", "true"), ("ACCELERATE_USE_FSDP", "1"), ("WORLD_SIZE", "many")]
)
def test_a_launchers_environment_that_does_not_fit_is_one_line(monkeypatch, name, value):
    """A traceback of a library that the user has never heard of, for a variable that a launcher has set."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setenv(name, value)
    for other in ("RANK", "LOCAL_RANK") if name == "WORLD_SIZE" else ():
        monkeypatch.setenv(other, "0")
    args = parse_args(["--device", "cpu", "--precision", "float32"])
    refusal(partial(train_script.create_accelerator, args), name)


def test_the_environment_does_not_change_what_is_learnt(monkeypatch):
    """A launcher's gradient accumulation that divides every gradient though flags and seed are the same."""
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    args = parse_args(["--device", "cpu", "--precision", "float32"])
    assert train_script.create_accelerator(args).gradient_accumulation_steps == 1
