"""The command line of a program: checked flags, configs with the precedence default < JSON < typed, and one-line errors.

The library below the programs knows no flags: its errors name settings, and `naming` adds the flag.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import copy
import difflib
import gc
import logging
import os
import re
import signal
import sys
import tempfile
import threading
import traceback
from pathlib import Path

from filelock import FileLock, Timeout

from utils import WARNINGS, UserError, handle_stop_signals, one_line, printable, read_json, shown
from vae_align import AlignError

MISTAKES = (UserError, AlignError)  # the user's mistakes: one line, no traceback
BACKSLASH = r"in JSON write the \ of a path as / or \\"
UNSET = object()  # in place of a default, so that a typed value that equals the default counts as typed


# ----------------------------------------------------------------------------------------------------------------------
# Flags and configs


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, whose flags cannot be abbreviated, and whose help shows defaults.

    Attributes:
        retired: {name: value} of flags that older configs hold. A config may hold that value, or any where it is None.
    """

    def __init__(self, **options):
        self.retired = {}
        super().__init__(allow_abbrev=False, **{"formatter_class": _HelpFormatter, **options})
        self.register("type", None, os.path.expanduser)  # of all words only a path begins with ~, and a config has no shell

    def add_switch(self, group, name: str, default: bool, text: str) -> None:
        """Add `--name` and `--no_name`, of which `default` says which one holds when neither is typed."""
        group.add_argument(f"--{name}", dest=name, action="store_true", default=default, help=f"{text} (default: {default})")
        group.add_argument(f"--no_{name}", dest=name, action="store_false", default=default, help=f"switch --{name} off")

    def settings(self) -> dict[str, object]:
        """{name: default} of every flag but --help, in the order of the help text."""
        return {name: copy.copy(action.default) for name, action in self._actions_by_name().items()}

    def parse(self, argv: list[str] | None = None) -> argparse.Namespace:
        """Parse with the precedence default < --load_config JSON < typed flags. A mistake ends the program with status 2.

        The result's `typed_flags` names the flags that were typed on the command line, `given_flags` those in the JSON too.
        """
        config = {}
        try:
            typed = self._typed(argv)
            if "load_config" in typed:
                config = self.check_config(load_config(typed["load_config"]), typed["load_config"])
                for name, value in config.items():
                    if isinstance(value, str) and re.search(r"[\b-\r]", value):
                        logging.warning("%s: %s %s: has a control character; %s", typed["load_config"], name, value, BACKSLASH)
        except UserError as error:
            self.exit(2, f"{self.prog}: error: {one_line(error, limit=600)}\n")
        names = {"typed_flags": tuple(sorted(typed)), "given_flags": tuple(sorted(config | typed))}
        return argparse.Namespace(**(self.settings() | config | typed), **names)

    def check_config(self, config: dict, source: str) -> dict:
        """The values of a JSON config as its flags would parse them.

        UserError names `source`, the key and the mistake: an unknown key with the nearest known one, or the kind that the value
        must have, or argparse's own complaint.
        """
        known = self._actions_by_name()
        known.pop("load_config", None)
        checked = {}
        for name, value in config.items():
            if name in self.retired and self.retired[name] in (None, value):
                continue
            if name in self.retired:
                raise UserError(
                    f"{source}: {name} {shown(value)}: this version has no such flag; set it to {self.retired[name]}"
                )
            if name not in known:
                raise UserError(f"{source}: unknown key {shown(name)}{nearest(name, known)}")
            try:
                checked[name] = self._from_json(known[name], value)
            except (UserError, ValueError) as error:  # ValueError: a word that no file name can hold, a number too long
                raise UserError(f"{source}: {name}: {str(error).removeprefix(f'argument --{name}: ')}") from None
        return checked

    def error(self, message: str):
        """argparse calls this with a mistake: UserError, which `parse` and `check_config` show in their own way."""
        unknown = re.match(r"unrecognized arguments: (--[^\s=]+)", message)
        if unknown:
            message = f"unknown flag {unknown[1]}{nearest(unknown[1], self._option_string_actions)}"
        raise UserError(message)

    def _actions_by_name(self) -> dict[str, argparse.Action]:
        return {action.dest: action for action in self._actions if action.dest != "help"}

    def _typed(self, argv: list[str] | None) -> dict:
        """{name: value} of the flags in `argv`. UserError for the first mistake."""
        unset = argparse.Namespace(**dict.fromkeys(self._actions_by_name(), UNSET))
        return {name: value for name, value in vars(self.parse_args(argv, unset)).items() if value is not UNSET}

    def _from_json(self, action: argparse.Action, value):
        """A JSON value as its flag would parse it. UserError or ValueError says what is wrong."""
        if value is None and action.default is None:
            return None
        words = value if isinstance(value, list) else [value]
        if action.nargs == 0:
            kind, fits = "true or false", isinstance(value, bool)
        elif action.nargs == "+":
            kind, fits = "a list of words", value is words and all(isinstance(word, str) and word[:1] != "-" for word in words)
        elif action.type:
            kind, fits = "a number", isinstance(value, (int, float)) and not isinstance(value, bool)
        else:
            kind, fits = "a string", isinstance(value, str)
        if not fits:
            raise UserError(f"{shown(value)} must be {kind}")
        if any(b"\0" in os.fsencode(str(word)) for word in words):
            raise UserError(f"{shown(value)} must hold no NUL")
        if action.nargs == 0:
            return value
        flag = f"--{action.dest}"
        return self._typed([flag, *words] if value is words else [f"{flag}={value}"])[action.dest]


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
    return _number(int, "whole number", low, high)


def real(low: float, high: float = 1e9, above: bool = False):
    """An argparse type: a finite number from `low` (not itself, if `above`) to `high`."""
    return _number(float, "number", low, high, above)


def _number(kind, name, low, high, above=False):
    def convert(text):
        value = kind(text)
        if not low <= value <= high or (above and value == low):
            side = "above" if above else "from"
            raise argparse.ArgumentTypeError(f"{shown(text)}: must be a {name} {side} {low:.12g} to {high:.12g}")
        return value

    convert.__name__ = name  # argparse says "invalid whole number value"
    return convert


def load_config(config_path) -> dict:
    """The JSON object in `config_path` as a dict; UserError when it cannot be read or is not an object."""
    try:
        config = read_json(config_path)
    except (OSError, ValueError) as error:
        remedy = "; save it as UTF-8" if isinstance(error, UnicodeDecodeError) else ""
        remedy = f"; {BACKSLASH}" if "escape" in str(error) else remedy
        raise UserError(f"--load_config {config_path}: cannot be read as JSON ({one_line(error)}){remedy}") from None
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
        if any(re.match(rf"{flag.removeprefix('--')}[ :]", str(error)) for flag in flags):
            raise UserError(f"--{error}") from None
        raise


# ----------------------------------------------------------------------------------------------------------------------
# The program


def claim_writable_folder(path: str | os.PathLike, label: str, create: bool = True) -> Path:
    """Create folder `path` where it is missing and prove that files in it can be written. UserError begins with `label`.

    Without `create` nothing is written: the folder, or the nearest existing one above it, must have write permission.
    """
    path = Path(path)
    try:
        if create:
            path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=path) as file:
                file.write(b"0")  # a full disk still accepts new names, but no content
        else:
            existing = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
            if not existing.is_dir() or not os.access(existing, os.W_OK):
                raise OSError(f"{existing} is no writable folder")
    except (OSError, ValueError) as error:
        raise UserError(f"{label} {path}: cannot write there ({one_line(error)}); name another folder") from None
    return path


@contextlib.contextmanager
def alone_in(folder: Path, label: str, work: str):
    """Within this context no other process does this `work` in `folder`; UserError, which begins with `label`, if one does.
    The lock ends with its process. Nothing is checked on a disk that knows no locks."""
    lock = FileLock(folder / f".{work}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"{label} {folder}: another {work} is at work there; wait until it ends, or name another folder"
        ) from None
    except (OSError, NotImplementedError):
        lock = None
    try:
        yield
    finally:
        if lock:
            with contextlib.suppress(OSError):  # Windows deletes no open file
                os.unlink(lock.lock_file)
            lock.release()


def use_proxy(url: str | None) -> None:
    """Send the hub client, and every library that reads the standard variables, through the proxy at `url`."""
    if url:
        for name in ("NO_PROXY", "no_proxy"):
            os.environ.pop(name, None)
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):  # an earlier ALL_PROXY may be of a kind that no client knows
            os.environ[name] = os.environ[name.lower()] = url


def run(main) -> None:
    """Call `main()` as a program.

    A user's mistake, or an error of the operating system, becomes one line on stderr and exit status 1. The first signal to
    stop unwinds the program, so that temporary files and workers go, and becomes one line and exit status 128 + its number; the
    second SIGINT or SIGTERM ends it at once. Any other exception is a bug: its traceback, without secrets. Each log message
    stays on one line. The program goes on when nobody reads its output any more.
    """
    sys.excepthook = sys.__excepthook__
    atexit.register(gc.freeze)  # the interpreter's last collection would take seconds to go through all libraries
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")  # it warns of every config key that a VAE class does not use
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # it warns at each retry; the last failure is a UserError's one line
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        _survive(stream)
    first = os.environ.get("RANK", "0") in ("", "0")  # of the processes that a launcher has started
    logging.basicConfig(level=logging.INFO if first else logging.ERROR, stream=sys.stderr)
    for handler in logging.getLogger().handlers:
        handler.setFormatter(_PrintableFormatter())
    for chatty in ("httpx", "httpx2"):  # one line per request of the hub client
        logging.getLogger(chatty).setLevel(logging.WARNING)
    threading.excepthook = _thread_failed
    stopped_by = signal.SIGINT

    def unwind(number, _):
        nonlocal stopped_by
        stopped_by = number
        signal.signal(number, signal.SIG_IGN if number in WARNINGS else signal.SIG_DFL)
        raise KeyboardInterrupt

    before = handle_stop_signals(unwind)
    try:
        main()
    except MISTAKES as error:
        sys.exit(1 if getattr(error, "told", False) else f"error: {one_line(error, limit=600)}")
    except OSError as error:
        sys.exit(f"error: {one_line(error, limit=600)}; check the permissions and the free space there, or name another place")
    except KeyboardInterrupt:
        name = signal.Signals(stopped_by).name
        print(f"\nstopped by {name}; what was finished is kept; start the same command again", file=sys.stderr)
        sys.exit(128 + stopped_by)
    except Exception:  # tracebacks of libraries quote URLs and headers
        sys.exit(printable(traceback.format_exc().rstrip(), keep="\n"))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _survive(stream) -> None:
    """Drop the output of `stream` once its reader or terminal has gone or its disk is full, and let the program go on."""

    def surviving(call):
        def attempt(*text):
            try:
                return call(*text)
            except OSError:  # the descriptor itself, so that libraries and the rest of the buffer do not fail on it
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())

        return attempt

    if hasattr(stream, "reconfigure"):  # a notebook's stream has it not
        stream.reconfigure(errors="backslashreplace")  # for characters that the terminal's encoding lacks
    write = surviving(stream.write)
    # names of strangers' files are printed; on stderr, progress bars move the cursor, and messages are printable by themselves
    stream.write = (lambda text: write(printable(text, keep="\n"))) if stream is sys.stdout else write
    stream.flush = surviving(stream.flush)


def _thread_failed(failure) -> None:
    """An error in a library's thread, such as TensorBoard's writer: one line if it is the operating system's, which the main
    thread gets too, else its traceback without secrets."""
    if isinstance(failure.exc_value, OSError):
        logging.warning("%s", one_line(failure.exc_value))
    else:
        print(printable("".join(traceback.format_exception(failure.exc_value)).rstrip(), keep="\n"), file=sys.stderr)


class _PrintableFormatter(logging.Formatter):
    """Messages on one line each, without secrets. A member of a tar may have a name of megabytes, so they are cut."""

    def formatMessage(self, record):
        return printable(super().formatMessage(record))[:4000]
