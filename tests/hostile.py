"""What the tests of bad input share: a limit on time, and what a good refusal looks like."""

import contextlib
import signal

import pytest

from runtime.cli import MISTAKES


@contextlib.contextmanager
def no_hang(seconds=120):
    """Fail instead of waiting forever, such as for someone to write into a pipe."""

    def give_up(*_):
        raise AssertionError(f"still busy after {seconds} s")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def flip_bit(path):
    """Damage a file by one bit in its middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def is_one_line(text):
    return bool(text) and text.isprintable() and "Traceback" not in text


def refusal(call, *parts):
    """`call()` must end soon in an error of the user's kind, on one line with all `parts` in it; the line."""
    with no_hang(), pytest.raises(MISTAKES) as error:
        call()
    text = str(error.value)
    assert is_one_line(text), text
    for part in parts:
        assert str(part) in text, text
    return text
