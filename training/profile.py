"""Where a training step's time goes: a few steps by the clock, part by part, and torch's trace of them."""

from __future__ import annotations

import time
from pathlib import Path

import torch

SKIPPED = 2  # steps of a session before the first that counts: they start and compile things
TRACE = "profile_trace.json.gz"  # for chrome://tracing or ui.perfetto.dev
# the parts in the order of a step; the backward pass counts as the part that it goes through
PARTS = {
    "data": "waiting for data",
    "encoding": "encoding",
    "module": "module",
    "decoding": "losses and decoding",
    "optimizer": "optimizer",
    "logging": "logging",
}


class StepProfile:
    """The profile of `steps` steps of a session, of this process.

    The loop names the part that begins, and the time until the next one is that part's. While the profile is at work each
    `enter` waits for the device, so that a part's work is its own; at other times it does nothing.

        profile.begin(step)             # a step begins
        profile.enter("data")
        ...
        profile.enter(None)             # what follows is no part of a step

    Attributes:
        active: whether this step counts. shares: {part: share of the time}, of all that was profiled; {} before its end.
    """

    def __init__(self, steps: int, first_step: int, device: torch.device, folder: Path | None):
        """`folder`: where the trace goes; None: nothing is profiled."""
        self.steps = steps if folder else 0
        self.active = False
        self.shares = {}
        self._first, self._device, self._folder = first_step + SKIPPED, device, folder
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self._part, self._since, self._counted = None, 0.0, 0
        self._profiler = None

    def begin(self, step: int) -> None:
        """The step after `step` steps begins."""
        if not self.steps or self.shares or step < self._first:
            return
        if not self.active:
            activities = [torch.profiler.ProfilerActivity.CPU]
            activities += [torch.profiler.ProfilerActivity.CUDA] if self._device.type == "cuda" else []
            self._profiler = torch.profiler.profile(activities=activities)
            self._profiler.start()
            self.active = True
        elif self._counted == self.steps:
            self.close()
        self._counted += 1

    def enter(self, part: str | None) -> None:
        """A part of the step begins, or with None what is no part of it."""
        if not self.active:
            return
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        if self._part:
            self._seconds[self._part] += now - self._since
        self._part, self._since = part, now

    def watch(self, output: torch.Tensor) -> None:
        """Let the backward pass count as the module's from where it reaches the module's output."""
        if self.active and output.requires_grad:
            output.register_hook(lambda _: self.enter("module"))

    def close(self) -> None:
        """End the profile, if there is one that is not ended, and write its trace."""
        if not self.active:
            return
        self.enter(None)
        self.active = False
        self._profiler.stop()
        self._profiler.export_chrome_trace(str(self._folder / TRACE))
        self._profiler = None
        total = sum(self._seconds.values())
        self.shares = {part: seconds / total for part, seconds in self._seconds.items()}

    def text(self) -> str:
        """ "a step: 3 % waiting for data, …", the parts that take any time; "" without a profile."""
        shown = [f"{100 * share:.0f} % {PARTS[part]}" for part, share in self.shares.items() if share >= 0.005]
        return f"a step: {', '.join(shown)}; trace: {self._folder / TRACE}" if shown else ""
