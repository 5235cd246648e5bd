"""The command line of a program: checked flags, configs with the precedence default < JSON < typed, and one-line errors.

Both programs are built on `Parser` and end through `run`. The library below them knows no flags: its errors name settings,
and `naming` adds the flag. The only flag that this module knows itself is --load_config.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import difflib
import errno
import logging
import math
import os
import re
import signal
import sys
import tempfile
import threading
import traceback
from pathlib import Path

from runtime.interrupts import Terminated, unwinding_on_signals
from utils import UserError, one_line, printable, read_json, shown, without_secrets
from vae_align import AlignError

MISTAKES = (UserError, AlignError)  # exceptions that are a mistake of the user's: one line, no traceback
UNSET = object()  # in place of a default, so that a typed value that equals the default counts as typed
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
SAID_OF_A_FLAG = re.compile(r"argument --\w+: ")  # argparse's opening of an error about a flag's value


# ----------------------------------------------------------------------------------------------------------------------
# Flags and configs


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, whose flags cannot be abbreviated, and whose help shows defaults."""

    def __init__(self, **options):
        options.setdefault("formatter_class", _HelpFormatter)
        super().__init__(allow_abbrev=False, **options)

    def add_switch(self, group, name: str, default: bool, text: str) -> None:
        """Add `--name` and `--no_name`, of which `default` says which one holds when neither is typed."""
        group.add_argument(f"--{name}", dest=name, action="store_true", default=default, help=f"{text} (default: {default})")
        group.add_argument(f"--no_{name}", dest=name, action="store_false", default=default, help=f"switch --{name} off")

    def settings(self) -> dict[str, object]:
        """{name: default} of every flag but --help, in the order of the help text."""
        return {name: copy.copy(action.default) for name, action in self._by_name().items()}

    def parse(self, argv: list[str] | None = None) -> argparse.Namespace:
        """Parse with the precedence default < --load_config JSON < typed flags. A mistake ends the program with status 2.

        The result's `typed_flags` names the flags that were typed on the command line, `given_flags` those in the JSON too.
        """
        config = {}
        try:
            typed = self._given(argv)
            if "load_config" in typed:
                config = self.check_config(load_config(typed["load_config"]), typed["load_config"])
        except UserError as error:
            self.exit(2, f"{self.prog}: error: {one_line(error, limit=600)}\n")
        names = {"typed_flags": tuple(sorted(typed)), "given_flags": tuple(sorted(config | typed))}
        return argparse.Namespace(**(self.settings() | config | typed), **names)

    def check_config(self, config: dict, source: str) -> dict:
        """The values of a JSON config as its flags would parse them.

        UserError names `source`, the key and the mistake: an unknown key with the nearest known one, or whatever argparse
        says of the value.
        """
        known = self._by_name()
        known.pop("load_config", None)
        checked = {}
        for name, value in config.items():
            if name not in known:
                raise UserError(f"{source}: unknown key {shown(name)}{nearest(name, known)}")
            try:
                checked[name] = self._from_json(known[name], value)
            except (UserError, ValueError) as error:  # ValueError: a whole number too long for Python to print
                raise UserError(f"{source}: {name}: {SAID_OF_A_FLAG.sub('', str(error))}") from None
        return checked

    def error(self, message: str):
        """Called by argparse with whatever is wrong: UserError, which `parse` and `check_config` show in their own way."""
        unknown = re.match(r"unrecognized arguments: (--[^\s=]+)", message)
        if unknown:
            message = f"unknown flag {unknown[1]}{nearest(unknown[1], self._option_string_actions)}"
        raise UserError(message)

    def _by_name(self) -> dict[str, argparse.Action]:
        """{name: its action}; of a switch, the action of --name rather than of --no_name."""
        actions = {}
        for action in self._actions:
            if action.dest != "help":
                actions.setdefault(action.dest, action)
        return actions

    def _given(self, argv: list[str] | None) -> dict:
        """{name: value} of the flags in `argv`. UserError for the first mistake."""
        given = vars(self.parse_args(argv, argparse.Namespace(**dict.fromkeys(self.settings(), UNSET))))
        given = {name: value for name, value in given.items() if value is not UNSET}
        for name, value in given.items():
            for item in value if isinstance(value, list) else [value]:
                if isinstance(item, str) and not _is_name(item):
                    raise UserError(f"argument --{name}: {shown(item)} cannot be a name: a NUL or broken Unicode is in it")
        return {name: _at_home(value) for name, value in given.items()}

    def _from_json(self, action: argparse.Action, value):
        """A JSON value as its flag would parse it, written as words of a command line. UserError says what is wrong."""
        flag = f"--{action.dest}"
        if value is None and action.default is None:
            return None
        if action.nargs == 0:
            if not isinstance(value, bool):
                raise UserError(f"{shown(value)} must be true or false")
            return value
        if action.nargs == "+":
            if not isinstance(value, list) or any(not isinstance(item, str) or item.startswith("-") for item in value):
                raise UserError(f"{shown(value)} must be a list of words")
            return self._given([flag, *value])[action.dest]
        if isinstance(value, bool) or not isinstance(value, (str, int, float)):
            raise UserError(f"{shown(value)} must be a single number or string")
        parsed = self._given([f"{flag}={value}"])[action.dest]
        if isinstance(value, str) != isinstance(parsed, str):
            raise UserError(f"{shown(value)} must be a {'number' if isinstance(value, str) else 'string'}")
        return parsed


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The description as written; the default after each help text, unless there is none to show."""

    def _get_help_string(self, action):
        if action.default is None or action.default == "" or isinstance(action.default, bool):
            return action.help
        return super()._get_help_string(action)


def nearest(name: str, known) -> str:
    """The words "; did you mean X?" for the known name nearest to `name`, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def integer(low: int, high: int = 10**9):
    """An argparse type: a whole number from `low` to `high`."""

    def convert(text):
        value = int(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{shown(text)}: must be a whole number from {low} to {high}")
        return value

    convert.__name__ = "whole number"  # argparse says "invalid whole number value"
    return convert


def real(low: float, high: float = 1e9, above: bool = False):
    """An argparse type: a finite number from `low` (not itself, if `above`) to `high`."""

    def convert(text):
        value = float(text)
        if not (low <= value <= high) or (above and value == low) or not math.isfinite(value):
            side = "above" if above else "from"
            raise argparse.ArgumentTypeError(f"{shown(text)}: must be a number {side} {low:g} to {high:g}")
        return value

    convert.__name__ = "number"
    return convert


def _at_home(value):
    """`value` with the home folder for `~`, as a shell has it: no flag but a path begins so, and a config knows no shell."""
    if isinstance(value, list):
        return [_at_home(item) for item in value]
    return os.path.expanduser(value) if isinstance(value, str) and value.startswith("~") else value


def _is_name(text: str) -> bool:
    """Whether the system could take `text` for the name of a file."""
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeError:
        return False


def load_config(config_path) -> dict:
    """The JSON object in `config_path` as a dict; UserError when it cannot be read or is not an object."""
    try:
        config = read_json(config_path)
    except UnicodeDecodeError:
        raise UserError(f"--load_config {config_path}: cannot be read as JSON: it is not in UTF-8; save it as UTF-8") from None
    except (OSError, ValueError) as error:
        raise UserError(f"--load_config {config_path}: cannot be read as JSON ({one_line(error)})") from None
    if not isinstance(config, dict):
        raise UserError(f"--load_config {config_path}: holds a {type(config).__name__}; it must be an object of flags")
    return config


@contextlib.contextmanager
def naming(*flags: str):
    """Within this context, an error of the library about one of `flags` names the flag.

    Library errors open with the setting: "device cuda:9: not available …" becomes "--device cuda:9: not available …" within
    `naming("--device")`. Errors that open otherwise pass unchanged.
    """
    try:
        yield
    except MISTAKES as error:
        message = str(error)
        for flag in flags:
            if re.match(rf"{re.escape(flag.lstrip('-'))}[ :]", message):
                raise UserError(f"--{message}") from None
        raise


# ----------------------------------------------------------------------------------------------------------------------
# Outputs that flags name


def claim_writable_folder(path: str | os.PathLike, label: str, create: bool = True) -> Path:
    """Create folder `path` where it is missing and prove that files in it can be written. UserError begins with `label`.

    Without `create` nothing is written: the folder, or the nearest existing one above it, must have write permission.
    """
    path = Path(path)
    if not create:
        existing = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
        if not existing.is_dir() or not os.access(existing, os.W_OK):
            raise UserError(f"{label} {path}: cannot write there ({existing} is no writable folder); name another folder")
        return path
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path) as file:
            file.write(b"0")  # a full disk still accepts new names, but no content
            file.flush()
            return path
    except (OSError, ValueError) as error:
        raise UserError(f"{label} {path}: cannot write there ({one_line(error)}); name another folder") from None


def claim_writable_file(path: str | os.PathLike, label: str) -> None:
    """Prove that file `path` could be written, without changing an existing file. UserError begins with `label`."""
    if os.path.isdir(path):
        raise UserError(f"{label} {path}: a folder; name a file")
    try:
        claim_writable_folder(Path(path).parent, label)
    except UserError:
        raise UserError(f"{label} {path}: cannot write there; name a file in another folder") from None


# ----------------------------------------------------------------------------------------------------------------------
# The program


def use_proxy(url: str | None) -> None:
    """Send the hub client, and every library that reads the standard variables, through the proxy at `url`, whatever the
    environment says."""
    if url:
        for name in ("NO_PROXY", "no_proxy"):
            os.environ.pop(name, None)
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):  # an ALL_PROXY that is there would stop what it does not serve
            os.environ[name] = os.environ[name.lower()] = url


def run(main) -> None:
    """Call `main()` as a program.

    A mistake of the user's, or an error of the operating system, becomes one line on stderr and exit status 1. SIGINT,
    SIGTERM and the like become one line and exit status 128 + their number. Any other exception is a bug: its traceback,
    without secrets.
    Every log message stays on one line, and characters that the terminal's encoding lacks are printed as escapes.
    """
    sys.excepthook = sys.__excepthook__
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")  # it warns of every config key that a VAE class does not use
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # it warns at each retry; the last failure is a UserError's one line
    sys.stdout, sys.stderr = Lenient(sys.stdout, 1), Lenient(sys.stderr, 2)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for handler in logging.getLogger().handlers:
        handler.setFormatter(_PrintableFormatter("%(message)s"))
    for chatty in ("httpx", "httpx2"):  # one line per request of the hub client
        logging.getLogger(chatty).setLevel(logging.WARNING)
    threading.excepthook = _thread_failed
    try:
        with unwinding_on_signals():
            main()
    except MISTAKES as error:
        sys.exit(f"error: {one_line(error, limit=600)}")
    except OSError as error:
        full = error.errno in DISK_FULL
        remedy = "free some space or name another folder" if full else "check its permissions, or name another"
        sys.exit(f"error: {one_line(error, limit=600)}; {remedy}")
    except KeyboardInterrupt as interrupt:
        number = interrupt.number if isinstance(interrupt, Terminated) else signal.SIGINT
        print(
            f"\nstopped by {signal.Signals(number).name}; what was finished is kept; start the same command again",
            file=sys.stderr,
        )
        sys.exit(128 + number)
    except Exception:  # tracebacks of libraries quote URLs and headers
        sys.exit(without_secrets(traceback.format_exc().rstrip()))


class Lenient:
    """A standard stream that may fail: what is printed never ends what is done. After the first failure (a full disk, a reader
    or a terminal that has gone) what is printed goes nowhere.

    Args:
        stream: None where the program was started with the stream closed. descriptor: 1 or 2.
    """

    def __init__(self, stream, descriptor: int):
        self._descriptor = descriptor
        if stream is None:
            stream = os.fdopen(self._to_nowhere(), "w", closefd=False)
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
        self._stream = stream

    def __getattr__(self, name):
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._forgiving():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._forgiving():
            self._stream.flush()

    @contextlib.contextmanager
    def _forgiving(self):
        try:
            yield
        except OSError:
            self._to_nowhere()

    def _to_nowhere(self) -> int:
        """Let the descriptor lead to nowhere, for libraries and for what is still in a buffer."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        if nowhere != self._descriptor:
            os.dup2(nowhere, self._descriptor)
            os.close(nowhere)
        return self._descriptor


def _thread_failed(failure):
    """One line for an error of the operating system in a library's thread, such as TensorBoard's writer; the main thread gets
    the same error. Any other exception is a bug, with its traceback."""
    if isinstance(failure.exc_value, OSError):
        logging.warning("%s", one_line(failure.exc_value))
    else:
        text = traceback.format_exception(failure.exc_type, failure.exc_value, failure.exc_traceback)
        print(without_secrets("".join(text).rstrip()), file=sys.stderr)


class _PrintableFormatter(logging.Formatter):
    """Messages on one line each, without secrets."""

    def formatMessage(self, record):
        return printable(super().formatMessage(record))
