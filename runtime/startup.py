"""What a program does before its libraries are there: their imports take seconds, and read variables of the environment."""

import signal
import sys
import traceback

from utils import one_line


def before_imports() -> None:
    """Until `cli.run` takes over, SIGINT ends the program without a traceback, and a failed import with one line."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.excepthook = _import_failed


def _import_failed(kind, error, trace) -> None:
    last = [frame for frame in traceback.extract_tb(trace) if not frame.filename.startswith("<")][-1]
    where = f"{last.filename}, line {last.lineno}"
    print(
        f"error: the program's libraries cannot be imported ({kind.__name__}: {one_line(error)}; {where}); "
        "install requirements.txt into this Python, or unset the variable of the environment that this is about",
        file=sys.stderr,
    )
