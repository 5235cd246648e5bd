"""Flags and configs: checked values, one-line errors, and the precedence default < JSON < typed.

Both command lines are built on `Parser`. Knows no flag by name but --load_config.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import errno
import logging
import math
import os
import re
import signal
import sys
import threading
import traceback

from utils import UserError, one_line, printable, read_json, shown, without_secrets

UNSET = object()
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, whose flags cannot be abbreviated, and whose help shows defaults."""

    def __init__(self, **options):
        options.setdefault("formatter_class", _HelpFormatter)
        super().__init__(allow_abbrev=False, **options)

    def error(self, message):
        unknown = re.match(r"unrecognized arguments: (--[^\s=]+)", message)
        if unknown:
            message = f"unknown flag {unknown[1]}{nearest(unknown[1], self._option_string_actions)}"
        self.exit(2, f"{self.prog}: error: {one_line(message, limit=600)}\n")

    def add_switch(self, group, name: str, default: bool, text: str):
        """`--name` and `--no_name`, one of which is the default."""
        group.add_argument(f"--{name}", dest=name, action="store_true", default=default, help=f"{text} (default: {default})")
        group.add_argument(f"--no_{name}", dest=name, action="store_false", default=default, help=f"switch --{name} off")

    def parse(self, argv: list[str] | None = None) -> argparse.Namespace:
        """Parse with the precedence default < --load_config JSON < typed flags.

        The result's `typed_flags` names the flags that were typed on the command line, `given_flags` those in the JSON too.
        """
        actions = {action.dest: action for action in self._actions if action.dest != "help"}
        typed = self.parse_args(argv, argparse.Namespace(**dict.fromkeys(actions, UNSET)))
        given = {name: value for name, value in vars(typed).items() if value is not UNSET}
        values = {name: action.default for name, action in actions.items()}
        for name, value in given.items():
            for item in value if isinstance(value, list) else [value]:
                if isinstance(item, str) and not _is_name(item):
                    self.error(f"argument --{name}: {shown(item)} cannot be a name: a NUL or broken Unicode is in it")
        config = {}
        if "load_config" in given:
            try:
                config = checked_config(load_config(given["load_config"]), actions, given["load_config"])
            except UserError as error:
                self.error(str(error))
        names = {"typed_flags": tuple(sorted(given)), "given_flags": tuple(sorted(config | given))}
        return argparse.Namespace(**(values | config | given), **names)


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The description as written; the default after each help text, unless there is none to show."""

    def _get_help_string(self, action):
        if action.default is None or action.default == "" or isinstance(action.default, bool):
            return action.help
        return super()._get_help_string(action)


def nearest(name: str, known) -> str:
    """'; did you mean X?' for the known name nearest to `name`, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def integer(low: int, high: int = 10**9):
    """An argparse type: a whole number from `low` to `high`."""

    def convert(text):
        value = int(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{shown(text)}: must be a whole number from {low} to {high}")
        return value

    convert.__name__, convert.kind = "whole number", int
    return convert


def real(low: float, high: float = 1e9, above: bool = False):
    """An argparse type: a finite number from `low` (not itself, if `above`) to `high`."""

    def convert(text):
        value = float(text)
        if not (low <= value <= high) or (above and value == low) or not math.isfinite(value):
            side = "above" if above else "from"
            raise argparse.ArgumentTypeError(f"{shown(text)}: must be a number {side} {low:g} to {high:g}")
        return value

    convert.__name__, convert.kind = "number", float
    return convert


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
    except (OSError, ValueError) as error:
        raise UserError(f"--load_config {config_path}: cannot be read as JSON ({one_line(error)})") from None
    if not isinstance(config, dict):
        raise UserError(f"--load_config {config_path}: holds a {type(config).__name__}; it must be an object of flags")
    return config


def checked_config(config: dict, actions: dict, source: str) -> dict:
    """`config` with every value checked as its flag would be; UserError names the key and the nearest valid one."""
    checked = {}
    for name, value in config.items():
        action = actions.get(name)
        if action is None or name == "load_config":
            settings = [known for known in actions if known != "load_config"]
            raise UserError(f"{source}: unknown key {shown(name)}{nearest(name, settings)}")
        checked[name] = _checked_value(action, value, f"{source}: {name}")
    return checked


def _checked_value(action, value, where: str):
    if value is None and action.default is None:
        return None
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise UserError(f"{where}: {shown(value)} must be true or false")
        return value
    if action.nargs == "+":
        if not isinstance(value, list) or (not value and action.default != []):
            raise UserError(f"{where}: {shown(value)} must be a list{'' if action.default == [] else ' that is not empty'}")
        return [_checked_item(action, item, where) for item in value]
    return _checked_item(action, value, where)


def _checked_item(action, value, where):
    kind = getattr(action.type, "kind", str)
    if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else kind):
        expected = {int: "a whole number", float: "a number", str: "a string"}[kind]
        raise UserError(f"{where}: {shown(value)} must be {expected}")
    if isinstance(value, str) and not _is_name(value):
        raise UserError(f"{where}: {shown(value)} cannot be a name: a NUL or broken Unicode is in it")
    try:
        value = action.type(value) if action.type else value
    except (argparse.ArgumentTypeError, ValueError, OverflowError) as error:
        raise UserError(f"{where}: {error}") from None
    if action.choices and value not in action.choices:
        raise UserError(f"{where}: {shown(value)} must be one of {', '.join(map(str, action.choices))}")
    return value


def run(main) -> None:
    """Call `main()` as a program: a UserError, or what the system refuses, becomes one line on stderr and exit status 1;
    SIGINT and SIGTERM one line and 128 + their number. Nothing that is printed or logged breaks its line, or on a terminal
    that lacks its letters."""
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")  # it warns of every config key that a VAE class does not use
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # what it warns of while it retries ends in a UserError's one line
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for handler in logging.getLogger().handlers:
        handler.setFormatter(_PrintableFormatter("%(message)s"))
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
    for chatty in ("httpx", "httpx2"):  # one line per request of the hub client
        logging.getLogger(chatty).setLevel(logging.WARNING)
    threading.excepthook = _thread_failed
    try:
        with _unwinding_on_signals():
            main()
    except UserError as error:
        sys.exit(f"error: {one_line(error, limit=600)}")
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        remedy = "free some space or name another folder" if error.errno in FULL else "check its permissions, or name another"
        sys.exit(f"error: {one_line(error, limit=600)}; {remedy}")
    except KeyboardInterrupt as interrupt:
        number = signal.SIGTERM if isinstance(interrupt, _Terminated) else signal.SIGINT
        print(f"\nstopped by {number.name}; what was finished is kept; start the same command again", file=sys.stderr)
        sys.exit(128 + number)
    except Exception:  # a bug, and all that is known of it; libraries quote URLs and headers
        sys.exit(without_secrets(traceback.format_exc().rstrip()))


class _Terminated(KeyboardInterrupt):
    """SIGTERM, as KeyboardInterrupt is SIGINT."""


@contextlib.contextmanager
def _unwinding_on_signals():
    """Within this context the first SIGINT or SIGTERM raises, so that temporary files go and workers end."""

    def unwind(number, _):
        signal.signal(number, signal.SIG_DFL)  # the second one ends at once
        raise _Terminated if number == signal.SIGTERM else KeyboardInterrupt

    before = {}
    with contextlib.suppress(ValueError):  # not in the main thread: whoever runs us there handles signals
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, unwind)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


def _thread_failed(failure):
    """One line for what the system refuses a library's thread, such as TensorBoard's writer: the main thread is told too."""
    if isinstance(failure.exc_value, OSError):
        logging.warning("%s", one_line(failure.exc_value))
    else:
        text = traceback.format_exception(failure.exc_type, failure.exc_value, failure.exc_traceback)
        print(without_secrets("".join(text).rstrip()), file=sys.stderr)


class _PrintableFormatter(logging.Formatter):
    """Messages on one line each, without secrets."""

    def formatMessage(self, record):
        return printable(super().formatMessage(record))
