"""Flags and configs: defaults, precedence default < JSON < typed, and one-line errors; a program from its start to its end."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys

import pytest
from conftest import ROOT, as_argv, run_script
from hostile import is_one_line, no_hang, refusal
from hypothesis import example, given, settings
from hypothesis import strategies as st

import eval_align
import train_align_with_args as train_script
from runtime.cli import claim_writable_folder, load_config, run, use_proxy
from train_align_with_args import parse_args, save_config
from utils import STOP_SIGNALS, UserError
from vae_align import AlignError

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


@pytest.fixture
def config(tmp_path):
    """A function: write its keywords, or one text or bytes, as config.json, and give the path."""

    def write(content=None, **values):
        path = tmp_path / "config.json"
        content = json.dumps(values) if content is None else content
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return str(path)

    return write


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


def mistake(*argv):
    """Parse flags that must be refused; the one line on stderr."""
    flags, line = parsed(argv)
    assert flags is None
    return line


# ----------------------------------------------------------------------------------------------------------------------
# Flags


def test_every_flag_of_the_specification_has_its_default():
    """A flag renamed, left out or with another default; a default list that one run changes for the next."""
    parse_args([]).input_types.remove("image")
    args = vars(parse_args([]))
    assert {name: args[name] for name in DEFAULTS} == DEFAULTS
    assert {type(args[name]) for name in ("epochs", "seed", "image_size", "max_train_steps")} == {int}
    for name in ("load_config", "load_checkpoint", "cache_dir", "proxy"):
        assert args[name] is None
    assert args["log_frequency"] >= 1
    assert args["typed_flags"] == ()


def test_a_switch_can_be_set_either_way_on_the_command_line(config):
    """A `--no_x` that a config cannot be overridden with, or that sets something else."""
    for value in (True, False):
        path = config(random_flip=not value)
        args = parse_args(["--load_config", path, "--random_flip" if value else "--no_random_flip"])
        assert args.random_flip is value
        assert parse_args(["--load_config", path]).random_flip is not value


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--learning_rates=1"], ("--learning_rates;", "did you mean --learning_rate?")),
        (["--epoch", "5"], ("--epoch;", "did you mean --epochs?")),  # not taken as an abbreviation
        (["--epochs", "0"], ("--epochs", "1")),
        (["--epochs", "9" * 5000], ("--epochs",)),
        (["--learning_rate", "inf"], ("--learning_rate", "inf")),
        (["--precision", "fp16"], ("--precision", "float16")),
        (["--input_types"], ("--input_types",)),
    ],
)
def test_a_flag_that_does_not_parse_is_one_line_that_names_it(argv, said):
    """argparse's page of usage; a typo that is silently taken for something else; a value that fails hours later."""
    line = mistake(*argv)
    assert all(part in line for part in said), line


# ----------------------------------------------------------------------------------------------------------------------
# Configs


def test_typed_wins_over_json_wins_over_default(config):
    """A config that beats the command line, a typed default that loses, a default taken for the user's wish."""
    args = parse_args(["--epochs", "200", "--load_config", config(epochs=5, num_blocks=9), "--seed", "1"])
    assert (args.epochs, args.num_blocks, args.seed, args.hidden_channels) == (200, 9, 1, 64)
    args = parse_args(["--load_config", config(device="cuda", out_channels=4), "--no_random_flip", "--epochs=200"])
    assert args.typed_flags == ("epochs", "load_config", "random_flip")
    assert args.given_flags == ("device", "epochs", "load_config", "out_channels", "random_flip")


@pytest.mark.parametrize(("key", "nearest"), [("learning_rat", "learning_rate"), ("no_random_flip", "random_flip")])
def test_unknown_key_names_the_nearest(config, key, nearest):
    """A misspelt key that is silently ignored; "unknown key 'load_config'; did you mean load_config?"."""
    line = mistake("--load_config", config(**{"epochs": 3, key: 1}))
    assert f"unknown key '{key}'; did you mean {nearest}?" in line
    line = mistake("--load_config", config(load_config="x"))
    assert "'load_config'" in line and "did you mean load_config" not in line
    assert repr("two\nlines") in mistake("--load_config", config(**{"two\nlines": "x"}))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("epochs", True),
        ("epochs", "200"),
        ("learning_rate", float("nan")),
        ("learning_rate", 10**400),
        ("vae1_path", "a\0b"),
        ("loss_type", "l2"),
        ("input_types", "image"),
        ("input_types", []),
        ("input_types", ["image", "--epochs=1"]),
        ("random_flip", "false"),
    ],
    ids=lambda value: ascii(value)[:20],
)
def test_value_of_the_wrong_kind_in_a_config_is_one_line_that_names_the_key(config, key, value):
    """A bool taken for 1, "false" taken for true, a string taken for a list of letters, a NaN learning rate."""
    path = config(**{key: value})
    assert f"{path}: {key}: " in mistake("--load_config", path)


def test_a_number_too_long_to_print_is_one_line():
    """Python's refusal to print a number of 4,300 digits, which no JSON but a checkpoint's config can hold, as a traceback."""
    refusal(lambda: train_script.PARSER.check_config({"epochs": 10**5000}, "a checkpoint"), "a checkpoint: epochs: ")


def test_whole_numbers_serve_as_numbers_and_null_as_not_set(config):
    """`"learning_rate": 1`, a saved `"proxy": null` or a byte order mark refused."""
    args = parse_args(["--load_config", config(learning_rate=1, grad_clip=2, proxy=None, cache_dir=None)])
    assert (args.learning_rate, args.grad_clip, args.proxy, args.cache_dir) == (1.0, 2.0, None, None)
    assert isinstance(args.learning_rate, float)
    assert parse_args(["--load_config", config(b"\xef\xbb\xbf" + b'{"epochs": 3}')]).epochs == 3


def test_a_path_of_windows_that_is_valid_json_gets_a_word(config, caplog):
    """ "D: ew rain: no such folder" for D:\new\train, whose backslashes JSON has taken for a line break and a tab."""
    assert parse_args(["--load_config", config(r'{"train_data_dir": "D:\new\train"}')]).train_data_dir == "D:\new\train"
    (line,) = [record.getMessage() for record in caplog.records]
    assert "train_data_dir" in line and r"write the \ of a path as / or \\" in line


# ----------------------------------------------------------------------------------------------------------------------
# Saving


TYPED = "--epochs 3 --input_types latent --learning_rate 2.5e-4 --no_random_flip --train_data_dir bücher/图像 --seed 0"


@pytest.mark.parametrize("line", ["", TYPED], ids=["defaults", "typed"])
def test_saved_config_reads_back_as_the_same_flags(tmp_path, line):
    """A saved config that --load_config refuses, such as for an empty list, or that has lost or changed a value."""
    args = parse_args(line.split())
    save_config(args, tmp_path / "sub" / "saved.json")
    loaded = load_config(tmp_path / "sub" / "saved.json")
    assert not {"load_config", "resume", "dry_run"} & loaded.keys()  # how it was started, not what it is
    assert len(loaded) > len(DEFAULTS) and loaded.items() <= vars(args).items()
    again = vars(parse_args(["--load_config", str(tmp_path / "sub" / "saved.json")]))
    assert loaded.items() <= again.items()


@pytest.mark.parametrize("scheme, user", [("http://", "user:s@cr/et@"), ("", "user:secret@")])
def test_proxy_is_saved_without_name_and_password(tmp_path, scheme, user):
    """A password in every checkpoint and config, however the URL was typed."""
    args = parse_args(["--proxy", f"{scheme}{user}127.0.0.1:7890"])
    save_config(args, tmp_path / "saved.json")
    assert load_config(tmp_path / "saved.json")["proxy"] == f"{scheme}127.0.0.1:7890"
    assert user in args.proxy  # the run itself still needs it


@pytest.mark.parametrize("path", sorted((ROOT / "config").glob("*.json")), ids=lambda path: path.name)
def test_every_shipped_config_parses_to_its_values(path):
    """A config left behind when a flag was renamed."""
    args = vars(parse_args(["--load_config", str(path)]))
    values = json.loads(path.read_text(encoding="utf-8"))
    assert values and {name: args[name] for name in values} == values


# ----------------------------------------------------------------------------------------------------------------------
# From a hostile hand: the flags, or one line and exit status 2

FILES = {  # kind: (content or what makes it, the words that the line must hold)
    "no json": ("epochs = 3", "JSON"),
    "array": ('[{"epochs": 3}]', "object"),
    "same key twice, spelt differently": ('{"epochs": 3, "\\u0065pochs": 4}', "'epochs' is there twice"),
    "a path of Windows": (r'{"train_data_dir": "D:\photos"}', r"write the \ of a path as / or \\"),
    "arrays 100,000 deep": ("[" * 100_000, "JSON"),
    "key of a megabyte": (json.dumps({"epochs" * 170_000: 3}), "unknown key"),
    "longer than 16 MB": (b" " * (1 << 24) + b"{}", "longer than 16 MB"),
    "utf-16, as PowerShell writes it": ('{"epochs": 3}'.encode("utf-16"), "save it as UTF-8"),
    "nothing": (lambda path: None, "No such file"),
    "a pipe": (os.mkfifo, "pipe"),
    "a device": (lambda path: path.symlink_to("/dev/zero"), "device"),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_config_is_one_line_and_status_2(config, tmp_path, kind):
    """A traceback, a page of a megabyte, a key silently dropped, waiting for a pipe, reading a device without end."""
    content, said = FILES[kind]
    make = content if callable(content) else lambda path: config(content)
    make(tmp_path / "config.json")
    line = mistake("--load_config", tmp_path / "config.json")
    assert str(tmp_path / "config.json") in line and said in line, line


FLAGS = sorted(train_script.PARSER.settings().keys() - {"load_config"})[::6]  # one mechanism refuses them all
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.integers(-(10**40), 10**40) | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@settings(max_examples=150)
@given(st.dictionaries(st.sampled_from([*FLAGS, "load_config", "epoch"]), json_values, max_size=3))
@example({"vae1_path": "\udcff"})
def test_any_config_gives_the_flags_or_one_line(tmp_path_factory, values):
    """A flag whose range nobody checks, such as true for 1 or NaN; flags that are taken and that JSON gives back otherwise."""
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_text(json.dumps(values))
    flags, _ = parsed(["--load_config", path])
    if flags is not None:
        taken = {name: getattr(flags, name) for name in {*FLAGS, *values}}
        path.write_text(json.dumps(taken, allow_nan=False))
        again, line = parsed(["--load_config", path])
        assert again is not None, line
        assert {name: getattr(again, name) for name in taken} == taken
        assert all(isinstance(taken[name], bool) == isinstance(values[name], bool) for name in values)


def test_an_error_shows_no_password(config):
    """A proxy's password in the complaint about the flag beside it."""
    secret = "http://user:hunter22@proxy:1"
    for argv in (["stray", secret], [f"--epochs={secret}"], ["--load_config", config(proxy=[secret])]):
        line = mistake(*argv)
        assert "hunter22" not in line and "user" not in line.replace("true", ""), line


# ----------------------------------------------------------------------------------------------------------------------
# Places


def test_the_home_folder_is_meant_by_a_tilde_in_every_path(config, monkeypatch):
    """A folder called ~ in the current one, which is dangerous to remove."""
    monkeypatch.setenv("HOME", "/home/me")
    args = parse_args(["--load_config", config(save_dir="~/s", cache_dir="~/c"), "--vae1_path", "~/v"])
    assert (args.save_dir, args.cache_dir, args.vae1_path) == ("/home/me/s", "/home/me/c", "/home/me/v")
    assert eval_align.build_parser().parse(["--checkpoint", "~/a", "--eval_data_dir", "e"]).checkpoint == ["/home/me/a"]


def test_claim_writable_folder_creates_it_and_leaves_nothing_in_it(tmp_path):
    """A probe file left behind, or a folder missing at the first save; a dry run that makes folders."""
    assert not claim_writable_folder(tmp_path / "a" / "b", "--save_dir", create=False).exists()
    folder = claim_writable_folder(tmp_path / "a" / "b", "--save_dir")
    assert folder.is_dir() and not os.listdir(folder)


@pytest.mark.parametrize("create", [True, False])
@pytest.mark.parametrize("path", ["/dev/null/x", "/proc/x", "/dev/full"])
def test_a_place_that_cannot_be_written_is_one_line(path, create):
    """A traceback at the first save, hours into a run."""
    if create or path != "/proc/x":  # os.access thinks that root may write there
        refusal(lambda: claim_writable_folder(path, "--save_dir", create), "--save_dir", "another folder")


def test_logs_that_tensorboard_would_look_for_elsewhere_are_refused(flags, monkeypatch):
    """Images encoded for an hour, then no such file: Python writes the name in the locale's encoding, TensorBoard in UTF-8."""
    monkeypatch.setattr(os, "fsencode", lambda path: str(path).encode("gbk"))
    args = parse_args(as_argv(flags | {"log_dir": "日志"}))
    refusal(lambda: train_script.check_outputs(args), "--log_dir 日志", "UTF-8", "PYTHONUTF8=1")
    train_script.check_outputs(parse_args(as_argv(flags | {"save_dir": flags["save_dir"] / "日志"})))


def test_use_proxy_wins_over_the_environment_and_none_leaves_it_alone(monkeypatch):
    """A proxy that reaches plain http only; an empty --proxy that wipes the user's own; an ALL_PROXY that ends downloads."""
    names = [spelt for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY") for spelt in (name, name.lower())]
    for url, expected in (("http://theirs:1", "http://theirs:1"), ("", "http://theirs:1"), ("http://ours:2", "http://ours:2")):
        use_proxy(url)
        assert {os.environ[name] for name in names} == {expected}


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


def test_a_library_that_does_not_bear_the_environment_is_one_line():
    """A traceback for a variable that nobody foresaw; our modules not found by a Python that leaves out a script's folder."""
    env = {"TQDM_MININTERVAL": "often", "PYTHONSAFEPATH": "1"}
    ended = run_script("train_align_with_args.py", "--help", check=False, env=env)
    assert ended.returncode == 1 and ended.stdout == ""
    assert ended.stderr.count("\n") == 1 and "ValueError" in ended.stderr and "'often'" in ended.stderr


def python(program, *argv, shell='"$@"', **options):
    """Run `program` in an interpreter of its own, started by a line of bash; what it printed."""
    command = ["bash", "-c", shell, "bash", sys.executable, "-c", program, *map(str, argv)]
    return subprocess.run(command, cwd=ROOT, timeout=120, stdin=subprocess.DEVNULL, capture_output=True, check=True, **options)


def test_the_first_lines_of_a_program_come_before_torch():
    """Seconds of imports before Ctrl-C is quiet and a failed import is one line; a background job that Ctrl-C ends."""
    program = """
import signal, sys
from runtime.before_imports import before_imports
assert "torch" not in sys.modules
before_imports()
print(signal.getsignal(signal.SIGINT).name)
"""
    assert python(program).stdout == b"SIG_DFL\n"
    assert python(program, shell="trap '' INT; \"$@\"").stdout == b"SIG_IGN\n"


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (UserError("--a D:\new\train: no such folder"), "error: --a D:\\new\\train: no such folder"),
        (AlignError("checkpoint D:\new: no such file\n"), "error: checkpoint D:\\new: no such file"),
        (KeyboardInterrupt(), 130),
    ],
)
def test_a_users_mistake_and_ctrl_c_end_a_program_without_a_traceback(error, status):
    """A page of Python for a missing folder; exit status 0 after a failure; "D: ew rain" for a folder that JSON misread."""

    def main():
        raise error

    with pytest.raises(SystemExit) as stop:
        run(main)
    assert stop.value.code == status  # a text is printed to stderr and means status 1


@pytest.mark.parametrize("number", STOP_SIGNALS, ids=lambda number: number.name)
def test_a_signal_before_the_first_step_unwinds_and_says_so(capsys, number):
    """Temporary files and workers that a SIGTERM at start-up leaves behind; another exit status than 128 + its number."""
    unwound, before = [], signal.getsignal(number)

    def main():
        try:
            signal.raise_signal(number)
        finally:
            unwound.append(True)

    with pytest.raises(SystemExit) as stop:
        run(main)
    assert stop.value.code == 128 + number and unwound
    assert signal.getsignal(number) == before
    said = capsys.readouterr().err.strip()
    assert is_one_line(said) and number.name in said


PRINTING = """
import logging, sys
from runtime.cli import run
def main():
    print("é")
    for _ in range(3000):
        logging.warning("said")
        print("said", file=sys.stderr)
        print("said")
    open(sys.argv[1], "w").close()
run(main)
"""


@pytest.mark.parametrize("place", ["2>/dev/full", ">&- 2>&-", "2>&1 | true"])
def test_what_is_printed_never_ends_what_is_done(tmp_path, place):
    """A night's training ended by a full log disk, a log that nobody reads any more, or a letter that a terminal lacks."""
    env = os.environ | {"PYTHONIOENCODING": "ascii"}
    python(PRINTING, tmp_path / "done", shell=f'"$@" {place}; exit "${{PIPESTATUS[0]}}"', env=env)
    assert (tmp_path / "done").exists()


def test_no_name_that_is_printed_commands_the_terminal(capsys):
    """A stranger's file name that retitles the terminal, or worse, in a program's result or a bug's traceback."""

    def main():
        print("\x1b]0;owned\x07", "一\nnext line")
        raise RuntimeError("\x1b]0;owned\x07")

    with pytest.raises(SystemExit) as stop:
        run(main)
    assert capsys.readouterr().out == "\\x1b]0;owned\\x07 一\nnext line\n"
    assert "\x1b" not in stop.value.code and "\nRuntimeError: \\x1b]0;owned\\x07" in stop.value.code


def test_importing_the_script_has_no_side_effects():
    """Files, a CUDA context, changed settings or seconds of heavy imports for who only wants one function."""
    program = """
import logging, os, random, sys, warnings
import torch
before = dict(os.environ), list(warnings.filters), torch.initial_seed(), random.getstate(), torch.is_grad_enabled()
import train_align_with_args
assert before == (dict(os.environ), list(warnings.filters), torch.initial_seed(), random.getstate(), torch.is_grad_enabled())
assert not torch.cuda.is_initialized() and not logging.getLogger().handlers
heavy = {"diffusers", "accelerate", "datasets", "transformers", "tensorboard", "torchmetrics", "torchvision"}
print(sorted(heavy & set(sys.modules)))
"""
    printed = python(program)
    assert (printed.stdout, printed.stderr) == (b"[]\n", b"")
