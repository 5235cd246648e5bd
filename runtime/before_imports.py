"""The first lines of a program, before its imports: those take seconds, and read variables of the environment."""

import sys

try:
    import signal
except KeyboardInterrupt:  # it imports others itself
    raise SystemExit(130) from None


def before_imports() -> None:
    """Until `cli.run` takes over, SIGINT ends the program without a traceback, and a failed import with one line."""
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # as a shell has its background jobs ignore it
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.excepthook = _import_failed


def _import_failed(kind, error, trace) -> None:
    import traceback  # not before the signals are dealt with: it takes time

    last = [frame for frame in traceback.extract_tb(trace) if not frame.filename.startswith("<")][-1]
    said = f"{kind.__name__}: {' '.join(str(error).split())}; {last.filename}, line {last.lineno}"
    remedy = "install requirements.txt into this Python, or unset the variable of the environment that this is about"
    print(f"error: the program's libraries cannot be imported ({said}); {remedy}", file=sys.stderr)
