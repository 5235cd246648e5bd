"""What a program does before its libraries are there: their imports take seconds, and read variables of the environment."""

import signal
import sys
import traceback


def before_imports() -> None:
    """Until `cli.run` takes over, SIGINT ends the program without a traceback, and a failed import with one line."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.excepthook = _import_failed


def _import_failed(kind, error, trace) -> None:
    frames = [frame for frame in traceback.extract_tb(trace) if not frame.filename.startswith("<")]
    reason = " ".join(f"{kind.__name__}: {error}".split())
    print(
        f"error: the program's libraries cannot be imported ({reason}; {frames[-1].filename}, line {frames[-1].lineno}); "
        "install requirements.txt into this Python, or unset the variable of the environment that this is about",
        file=sys.stderr,
    )
