"""How a signal that asks politely ends a program: before training by unwinding, in training by a request to stop, and never
in a worker.

A terminal or a job scheduler sends a signal to all processes of a run. `unwinding_on_signals` covers a whole program,
`StopRequest` the training loop within it. Data workers ignore these signals, see `dataloader`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time

import torch

# who asks: a terminal and a scheduler; a terminal or connection that goes away; schedulers that warn; a limit of CPU time
ONCE = [getattr(signal, name) for name in ("SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU", "SIGBREAK") if hasattr(signal, name)]
POLITE = [signal.SIGINT, signal.SIGTERM, *ONCE]  # of `ONCE`, a second one ends nothing: a closed terminal sends two
RELAY = 2.0  # seconds within which a launcher repeats a signal to its processes
ASK = 2.0  # seconds between two times at which the processes of a run ask each other whether to stop


# ----------------------------------------------------------------------------------------------------------------------
# A whole program


class Terminated(KeyboardInterrupt):
    """What a signal of `POLITE` raises that is not SIGINT; `number` says which."""

    def __init__(self, number: int):
        super().__init__()
        self.number = number


def heard() -> list[int]:
    """The signals of `POLITE` that this process is to hear: of `ONCE` not those that whoever started it has it ignore, such as
    SIGHUP under nohup."""
    return [number for number in POLITE if number not in ONCE or signal.getsignal(number) != signal.SIG_IGN]


@contextlib.contextmanager
def unwinding_on_signals():
    """Within this context the first SIGINT raises KeyboardInterrupt and the first other signal of `POLITE` `Terminated`; the
    second SIGINT or SIGTERM ends the process at once. Unwinding removes temporary files and ends workers."""

    def unwind(number, _):
        signal.signal(number, signal.SIG_IGN if number in ONCE else signal.SIG_DFL)
        raise KeyboardInterrupt if number == signal.SIGINT else Terminated(number)

    before = {}
    with contextlib.suppress(ValueError):  # outside the main thread the caller handles signals
        for number in heard():
            before[number] = signal.signal(number, unwind)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


# ----------------------------------------------------------------------------------------------------------------------
# The training loop


class StopRequest:
    """Within this context the signals of `POLITE` ask the run to stop, and `signal` is the number of the one that came.

    The second SIGINT, or the second SIGTERM, ends the process at once. Under a launcher (LOCAL_RANK is set) a second one that
    comes within `RELAY` seconds is ignored: the launcher repeats to its processes what the terminal has sent to all.
    """

    def __init__(self):
        self.signal: int | None = None
        self._handlers_before = {}
        self._came_at = {}  # {signal number: when it came first, seconds}
        self._ask_at_step = 0
        self._steps_between = 1
        self._asked_at = time.monotonic()

    def __enter__(self):
        with contextlib.suppress(ValueError):  # outside the main thread the caller handles signals
            for number in heard():
                self._handlers_before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number, _):
        now = time.monotonic()
        self.signal = number
        if number in self._came_at and number in ONCE:
            return
        if number in self._came_at:
            if now - self._came_at[number] > RELAY:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        self._came_at[number] = now
        if "LOCAL_RANK" not in os.environ and number not in ONCE:
            signal.signal(number, signal.SIG_DFL)
        said = f"\n{signal.Signals(number).name}: finishing the step and saving; once more to leave at once\n"
        try:
            # not print: a handler may interrupt a print, and a buffered stream refuses a second one inside the first
            os.write(2, said.encode())
        except OSError:  # the same Ctrl-C has ended the reader of stderr; the progress bar must not fail on it
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)

    def __exit__(self, *exception):
        for number, handler in self._handlers_before.items():
            # after a request to stop, one more SIGINT or SIGTERM ends the process at once
            asked = signal.SIG_IGN if number in ONCE else signal.SIG_DFL
            signal.signal(number, asked if self.signal or handler is None else handler)

    def agreed(self, accelerator, step: int) -> int | None:
        """The signal on which all processes stop after `step` steps, or None. Every process gets the same answer.

        One process answers at every step. Several must wait for each other to agree, and waiting at every step would leave
        their devices idle. They ask about every `ASK` seconds instead, at steps that all of them compute from the time of the
        slowest one. A fixed number of steps would not do: a launcher kills its processes half a minute after a signal.
        """
        if accelerator.num_processes == 1:
            return self.signal
        if step < self._ask_at_step:
            return None
        mine = [float(self.signal or 0), time.monotonic() - self._asked_at]
        number, seconds = accelerator.gather(torch.tensor([mine], device=accelerator.device)).amax(dim=0).tolist()
        self._asked_at = time.monotonic()
        in_time = int(self._steps_between * ASK / max(seconds, 1e-3))
        self._steps_between = max(1, min(2 * self._steps_between, in_time))
        self._ask_at_step = step + self._steps_between
        return int(number) or None
