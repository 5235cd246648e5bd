"""Flags and configs: checked values, one-line errors, and the precedence default < JSON < typed.

Both command lines are built on `Parser`. Knows no flag by name but --load_config.
"""

from __future__ import annotations

import argparse
import difflib
import json
import logging
import math
import os
import re
import sys
from pathlib import Path

from utils import UserError, one_line

UNSET = object()


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, whose flags cannot be abbreviated, and whose help shows defaults."""

    def __init__(self, **options):
        options.setdefault("formatter_class", _HelpFormatter)
        super().__init__(allow_abbrev=False, **options)

    def error(self, message):
        unknown = re.match(r"unrecognized arguments: (--[^\s=]+)", message)
        if unknown:
            message = f"unknown flag {unknown[1]}{nearest(unknown[1], self._option_string_actions)}"
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")

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
        config = {}
        if given.get("load_config"):
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
            raise argparse.ArgumentTypeError(f"{text}: must be a whole number from {low} to {high}")
        return value

    convert.__name__, convert.kind = "whole number", int
    return convert


def real(low: float, high: float = 1e9, above: bool = False):
    """An argparse type: a finite number from `low` (not itself, if `above`) to `high`."""

    def convert(text):
        value = float(text)
        if not (low <= value <= high) or (above and value == low) or not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"{text}: must be a number {'above' if above else 'from'} {low:g} to {high:g}")
        return value

    convert.__name__, convert.kind = "number", float
    return convert


def load_config(config_path) -> dict:
    """The JSON object in `config_path` as a dict; UserError when it cannot be read or is not an object."""
    try:
        config = json.loads(Path(config_path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
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
            raise UserError(f"{source}: unknown key {name!r}{nearest(name, settings)}")
        checked[name] = _checked_value(action, value, f"{source}: {name}")
    return checked


def _checked_value(action, value, where: str):
    if value is None and action.default is None:
        return None
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise UserError(f"{where}: {value!r} must be true or false")
        return value
    if action.nargs == "+":
        if not isinstance(value, list) or (not value and action.default != []):
            raise UserError(f"{where}: {value!r} must be a list{'' if action.default == [] else ' that is not empty'}")
        return [_checked_item(action, item, where) for item in value]
    return _checked_item(action, value, where)


def _checked_item(action, value, where):
    kind = getattr(action.type, "kind", str)
    if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else kind):
        expected = {int: "a whole number", float: "a number", str: "a string"}[kind]
        raise UserError(f"{where}: {value!r} must be {expected}")
    try:
        value = action.type(value) if action.type else value
    except (argparse.ArgumentTypeError, ValueError, OverflowError) as error:
        raise UserError(f"{where}: {error}") from None
    if action.choices and value not in action.choices:
        raise UserError(f"{where}: {value!r} must be one of {', '.join(map(str, action.choices))}")
    return value


def run(main) -> None:
    """Call `main()` as a program: a UserError becomes one line on stderr and exit status 1, an interrupt 130."""
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")  # it warns of every config key that a VAE class does not use
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # what it warns of while it retries ends in a UserError's one line
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for chatty in ("httpx", "httpx2"):  # one line per request of the hub client
        logging.getLogger(chatty).setLevel(logging.WARNING)
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {one_line(error, limit=600)}")
    except KeyboardInterrupt:
        sys.exit(130)
