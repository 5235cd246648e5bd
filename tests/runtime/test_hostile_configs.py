"""Configs and flags from a hostile hand: every one gives the flags, or one line and exit status 2."""

import contextlib
import io
import json
import math
import os
import random

import pytest
from conftest import as_argv
from hostile import is_one_line, no_hang, refusal
from hypothesis import example, given, settings
from hypothesis import strategies as st

import eval_align
import train_align_with_args as train_script
from runtime.cli import claim_writable_file, claim_writable_folder, load_config
from train_align_with_args import parse_args, save_config
from utils import UserError

FLAGS = [name for name in train_script.PARSER.settings() if name != "load_config"]
DEFAULTS = vars(parse_args([]))


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


@pytest.fixture
def config(tmp_path):
    """A function: write bytes, text or a value as config.json, and give the path."""

    def write(content):
        path = tmp_path / "config.json"
        content = content if isinstance(content, (bytes, str)) else json.dumps(content)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


# ----------------------------------------------------------------------------------------------------------------------
# The file

FILES = {  # kind: (content, what the line says)
    "empty": ("", "JSON"),
    "white space": (" \n\t\n", "JSON"),
    "zero bytes": (bytes(64), "JSON"),
    "no json": ("epochs = 3", "JSON"),
    "yaml": ("epochs: 3\n", "JSON"),
    "single quotes": ("{'epochs': 3}", "JSON"),
    "trailing comma": ('{"epochs": 3,}', "JSON"),
    "comment": ('{"epochs": 3} // three', "JSON"),
    "cut short": ('{"epochs": 3, "see', "JSON"),
    "two objects": ('{"epochs": 3}{"seed": 1}', "JSON"),
    "array": ('[{"epochs": 3}]', "object"),
    "string": ('"epochs"', "object"),
    "number": ("3", "object"),
    "null": ("null", "object"),
    "nan": ("NaN", "object"),
    "utf-16": ('{"epochs": 3}'.encode("utf-16"), "JSON"),
    "latin-1": ('{"vae1_path": "bücher"}'.encode("latin-1"), "JSON"),
    "picture": (b"\x89PNG\r\n\x1a\n" + bytes(range(256)), "JSON"),
    "same key twice": ('{"epochs": 3, "epochs": 4}', "'epochs' is there twice"),
    "same key twice, spelt differently": ('{"epochs": 3, "\\u0065pochs": 4}', "'epochs' is there twice"),
    "arrays 100,000 deep": ("[" * 100_000, "JSON"),
    "objects 100,000 deep": ('{"a":' * 100_000, "JSON"),
    "value 900 deep": ('{"epochs": ' + "[" * 900 + "]" * 900 + "}", ""),
    "objects 900 deep": ('{"epochs": ' + '{"a":' * 900 + "1" + "}" * 900 + "}", ""),
    "whole number of 5,000 digits": ('{"epochs": ' + "9" * 5000 + "}", "JSON"),
    "whole number of 4,000 digits": ('{"epochs": ' + "9" * 4000 + "}", "epochs"),
    "key of a megabyte": (json.dumps({"epochs" * 170_000: 3}), "unknown key"),
    "value of a megabyte": (json.dumps({"loss_type": "mse" * 350_000}), "loss_type"),
    "100,000 unknown keys": (json.dumps({f"epochs{number}": 3 for number in range(100_000)}), "did you mean epochs?"),
    "longer than 16 MB": (b" " * (1 << 24) + b"{}", "longer than 16 MB"),
    "key with a newline": ('{"two\\nlines": 1}', "'two\\nlines'"),
    "key with a terminal command": ('{"\\u001b[2J": 1}', "'\\x1b[2J'"),
    "key that is half a letter": ('{"\\ud800": 1}', "unknown key"),
    "empty key": ('{"": 1}', "unknown key ''"),
    "another config": ('{"load_config": "other.json"}', "unknown key 'load_config'"),
    "inner part of the parser": ('{"typed_flags": ["device"]}', "unknown key 'typed_flags'"),
    "attribute of every object": ('{"__class__": "x"}', "unknown key '__class__'"),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_hostile_config_is_one_line_and_status_2(config, kind):
    """A traceback, a page of a megabyte, or (worse) a key that is silently dropped."""
    content, said = FILES[kind]
    path = config(content)
    flags, line = parsed(["--load_config", path])
    assert flags is None and str(path) in line and said in line, line
    with contextlib.suppress(UserError):  # wrong keys and values are not its business
        load_config(path)


def test_a_config_with_a_byte_order_mark_is_read(config):
    """What Windows' editor saves, refused as no JSON."""
    assert parse_args(["--load_config", str(config(b"\xef\xbb\xbf" + b'{"epochs": 3}'))]).epochs == 3


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
    default = DEFAULTS[name]
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
        path = config({name: value})
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
@example({"extra_losses": ["mse=1e-400"]})
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
    path = tmp_path_factory.getbasetemp() / "bytes.json"
    path.write_bytes(content)
    parsed(["--load_config", path])


def test_a_config_with_any_byte_changed_gives_the_flags_or_one_line(config):
    """Damage that leaves most of the file intact, which random bytes never reach."""
    whole = (json.dumps({name: getattr(parse_args([]), name) for name in FLAGS}, indent=1)).encode()
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
        ["--load_config", config({"proxy": [secret]})],
        ["--loss_type", secret],
    ):
        flags, line = parsed(argv)
        assert flags is None and "hunter22" not in line and "user" not in line.replace("true", ""), line


# ----------------------------------------------------------------------------------------------------------------------
# What only shows when flags meet each other, the machine and the disk

REFUSED = {  # changes to a run's flags, and what the line says
    "cache only without a cache": ({"cache_only": True, "no_cache_latents": True}, "--cache_only"),
    "image size that no stride divides": ({"image_size": 33}, "--image_size 33"),
    "module larger than the memory": ({"hidden_channels": 8192, "num_blocks": 1000}, "--hidden_channels"),
    "evaluation batch larger than the memory": ({"eval_batch_size": 65536, "image_size": 16384}, "--eval_batch_size"),
    "config into nowhere": ({"config_save_path": "/proc/x/config.json"}, "--config_save_path /proc/x/config.json"),
    "config onto a folder": ({"config_save_path": "{}"}, "--config_save_path"),
    "config below a file": ({"config_save_path": "{}/file/config.json"}, "--config_save_path"),
    "checkpoints below a device": ({"save_dir": "/dev/null/x"}, "--save_dir /dev/null/x"),
    "checkpoints onto a file": ({"save_dir": "{}/file"}, "--save_dir"),
    "logs into the system": ({"log_dir": "/proc/x"}, "--log_dir /proc/x"),
    "logs onto a file": ({"log_dir": "{}/file"}, "--log_dir"),
    "logs that are not utf-8": ({"log_dir": os.fsdecode(b"\xff\xfe")}, "--log_dir \\udcff\\udcfe"),
    "logs with too long a name": ({"log_dir": "{}/" + "x" * 300}, "--log_dir"),
    "cache onto a file": ({"latent_cache_dir": "{}/file"}, "--latent_cache_dir"),
    "cache below a device": ({"latent_cache_dir": "/dev/null/x"}, "--latent_cache_dir /dev/null/x"),
    "decoder that is not there": ({"decoder_loss_weight": 1, "decoder_loss_path": "{}/none"}, "--decoder_loss_path"),
    "decoder of another space": ({"decoder_loss_weight": 1, "decoder_loss_path": "kl4"}, "--decoder_loss_path"),
    "images that are a file": ({"train_data_dir": "{}/file"}, "--train_data_dir"),
    "images in a pipe": ({"eval_data_dir": "{}/pipe"}, "--eval_data_dir"),
    "images that are nowhere": ({"train_data_dir": "{}/none", "vae1_path": "{}/none"}, "--train_data_dir"),
    "a checkpoint without a name": ({"resume": ""}, "--resume ''"),
    "weights without a name": ({"load_checkpoint": ""}, "--load_checkpoint ''"),
    "compiling without a compiler": ({"compile": True}, "--compile"),
    "device that nobody has": ({"device": "cuda:99"}, "--device cuda:99"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_flags_that_cannot_work_together_are_refused_before_anything_is_encoded(
    flags, vae_folders, tmp_path, monkeypatch, kind
):
    """An hour of encoding, or a whole training run, that is lost to a flag which could not work from the start."""
    monkeypatch.setattr("train_align_with_args.cache_latents", lambda *_, **__: pytest.fail("the cache is built"))
    monkeypatch.setattr("latents.vaes.FrozenVAE.model", property(lambda vae: pytest.fail("a VAE's weights are read")))
    monkeypatch.setattr("runtime.device.torch.compile", lambda _: lambda _: (_ for _ in ()).throw(RuntimeError("no compiler")))
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    changes, said = REFUSED[kind]
    changes = {name: value.replace("{}", str(tmp_path)) if isinstance(value, str) else value for name, value in changes.items()}
    if changes.get("decoder_loss_path") == "kl4":
        changes["decoder_loss_path"] = vae_folders["kl4"]
    monkeypatch.chdir(tmp_path)
    refusal(lambda: train_script.main(as_argv(flags | changes)), said)


@pytest.mark.parametrize("path", ["a\0b", "/dev/null/x", "/proc/x", "/dev/full"])
def test_a_place_that_cannot_be_written_is_one_line(path):
    """Whatever way the system has to refuse."""
    refusal(lambda: claim_writable_folder(path, "--save_dir"), "--save_dir")
    refusal(lambda: claim_writable_file(f"{path}/file", "--config_save_path"), "--config_save_path")
