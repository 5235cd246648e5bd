"""How a run lets itself be interrupted: a signal asks it to stop, and all its processes stop at the same step."""

from __future__ import annotations

import contextlib
import os
import signal
import time

import torch

RELAY = 2.0  # seconds within which a launcher has passed a signal on
ASK = 2.0  # seconds between two askings whether some process shall stop


class StopRequest:
    """Within this context SIGINT and SIGTERM ask the run to stop instead of stopping it: `signal` says which came.

    The second one of a kind acts as if this context were not there, so that it ends the process at once. With a launcher
    that only goes for one that comes later than `RELAY` seconds: what a terminal sends to all, the launcher sends once more.
    """

    def __init__(self):
        self.signal: int | None = None
        self._before, self._came = {}, {}
        self._ask_at, self._interval, self._asked = 0, 1, time.monotonic()

    def __enter__(self):
        with contextlib.suppress(ValueError):  # not in the main thread: whoever runs us there handles signals
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number, frame):
        self.signal, now = number, time.monotonic()
        if number in self._came:
            if now - self._came[number] > RELAY:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        self._came[number] = now
        if "LOCAL_RANK" not in os.environ:  # which launchers set
            signal.signal(number, signal.SIG_DFL)
        # os.write: a handler may come upon a half-done print, which buffered streams do not bear
        said = f"\n{signal.Signals(number).name}: finishing the step and saving; once more to leave at once\n"
        try:
            os.write(2, said.encode())
        except OSError:  # the same Ctrl-C has ended whoever read it, and the progress bar would fail on it next
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)

    def __exit__(self, *exception):
        for number, handler in self._before.items():
            leaving = self.signal or handler is None  # then once more is at once
            signal.signal(number, signal.SIG_DFL if leaving else handler)

    def agreed(self, accelerator, step: int) -> int | None:
        """The signal that came, to every process the same and at the same step.

        Several processes must wait for each other to agree, so they ask only about every `ASK` seconds: at steps that all of
        them work out from the slowest one's time.
        """
        if accelerator.num_processes == 1:
            return self.signal
        if step < self._ask_at:
            return None
        mine = [float(self.signal or 0), time.monotonic() - self._asked]
        number, seconds = accelerator.gather(torch.tensor([mine], device=accelerator.device)).amax(dim=0).tolist()
        self._asked = time.monotonic()
        self._interval = max(1, min(2 * self._interval, int(self._interval * ASK / max(seconds, 1e-3))))
        self._ask_at = step + self._interval
        return int(number) or None
