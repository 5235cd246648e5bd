"""When a run ends, after a number of steps or when its time is up, and which periodic work is due at a step."""

from __future__ import annotations

import datetime
import math
import sys
import time

import torch

UNKNOWN = sys.maxsize  # the end of a run whose pace is not measured yet
LOOK_SECONDS = 10.0  # at most so long the measured pace is taken for that of the next steps
clock = time.monotonic


class Budget:
    """The end of a run, in optimizer steps: `steps`, or with `minutes` the step that the measured pace reaches in time.

    The time is that of the training loop, with its evaluations, pictures and checkpoints. Work before the first step does not
    count. Now and then `look` measures the pace and moves the `end`. Moving the end never makes the schedule jump: its
    `position` continues linearly and reaches 1 at the new end. Between two looks the position depends on the step alone, and
    all processes agree on it.

        budget.start(step)
        while True:
            budget.look(step, accelerator)
            last = step == budget.end

    Args:
        steps: of the whole run, or `UNKNOWN`. minutes: of the whole run; 0: no limit.

    Attributes:
        end: the step after which the run ends, as far as is known.
        reserve: seconds that the last evaluation took, kept free for the one at the end.
    """

    def __init__(self, steps: int, minutes: float = 0.0):
        self.steps, self.minutes = steps, minutes
        self.end = UNKNOWN if minutes else steps
        self._anchor = (0, 0.0)  # a step, and the position there
        self._pace = 0.0  # seconds a step, with the evaluations among them; 0: not measured
        self.reserve = 0.0
        self._seconds_before = 0.0  # of earlier sessions of this run
        self._started = None
        self._first_step = self._look_at = 0
        self._mark = None  # the step, and the seconds then, from which on the pace is measured
        self._kind = None  # of the last step, see `note_kind`

    @property
    def known(self) -> bool:
        return self.end != UNKNOWN

    @property
    def seconds(self) -> float:
        """Seconds of training so far, over all sessions of the run."""
        return self._seconds_before + (0.0 if self._started is None else clock() - self._started)

    def position(self, step: int) -> float:
        """The schedule's position after `step` steps, from 0 at the start to 1 at the end."""
        begun, position = self._anchor
        if not self.known:
            return position
        return 1.0 if step >= self.end else position + (1 - position) * (step - begun) / (self.end - begun)

    def seconds_left(self, step: int, seconds_per_step: float) -> float:
        """Seconds until the run ends; at this pace where steps limit it."""
        return max(0.0, 60 * self.minutes - self.seconds) if self.minutes else (self.end - step) * seconds_per_step

    def start(self, step: int) -> None:
        """The training loop begins, after `step` steps."""
        self._started = clock()
        self._first_step = self._look_at = step

    def note_evaluation(self, seconds: float) -> None:
        """Remember the duration of the last evaluation with its pictures, to keep it free for the one at the end."""
        self.reserve = seconds

    def note_kind(self, step: int, kind) -> None:
        """Say of which kind the step after `step` is. Steps of another kind take another time: the pace is measured anew."""
        if kind != self._kind and self._mark and step > self._first_step + 1:
            self._mark = (step, self.seconds)
            self._look_at = step + 1
        self._kind = kind

    def stop(self, step: int) -> None:
        """End the run after `step` steps."""
        self.end = step

    def look(self, step: int, accelerator) -> None:
        """With limited time and a look due: measure the pace and move the end. All processes find the same end."""
        if not self.minutes or step < self._look_at:
            return
        seconds, self.reserve = self._agreed(accelerator)
        left = 60 * self.minutes - seconds - self.reserve
        if step == self._first_step + 1:  # the first step starts and compiles things: the pace is that of the others
            self._mark = (step, seconds)
        elif step > self._first_step:
            self._pace = (seconds - self._mark[1]) / (step - self._mark[0])
        if step > self._first_step and (left <= 0 or self._pace):
            self._move_end(step, left)
        ahead = LOOK_SECONDS / self._pace if self._pace else 1
        taken = step - self._mark[0] if self._mark else 0
        self._look_at = step + max(1, int(min(ahead, taken, (self.end - step) / 8)))

    def _move_end(self, step: int, left: float) -> None:
        self._anchor = (step, self.position(step))
        self.end = min(self.steps, step + (math.floor(left / self._pace) if left > 0 else 0))

    def _agreed(self, accelerator) -> tuple[float, float]:
        """The run's seconds and the reserve, of the slowest process."""
        mine = (self.seconds, self.reserve)
        if accelerator.num_processes == 1:
            return mine
        return tuple(accelerator.gather(torch.tensor([mine], device=accelerator.device)).amax(dim=0).tolist())

    def state_dict(self) -> dict:
        return {
            "seconds": self.seconds,
            "minutes": self.minutes,
            "steps": self.steps,
            "end": self.end,
            "anchor": list(self._anchor),
            "pace": self._pace,
            "reserve": self.reserve,
        }

    def load_state_dict(self, state: dict) -> None:
        """Go on with the remaining time. With another time or limit the position follows from the time spent so far."""
        self._seconds_before = float(state["seconds"])
        self._pace, self.reserve = float(state["pace"]), float(state["reserve"])
        step, position = state["anchor"]
        if not self.minutes:
            if self.steps == state["steps"]:
                self.end = state["end"]
            return
        if (self.minutes, self.steps) == (state["minutes"], state["steps"]):
            self._anchor, self.end = (step, float(position)), state["end"]
        else:
            self._anchor = (step, min(1.0, self._seconds_before / (60 * self.minutes)))

    def is_over(self, step: int) -> bool:
        """Whether nothing is left after `step` steps."""
        return step >= min(self.end, self.steps) or bool(self.minutes and self.seconds >= 60 * self.minutes)


def time_of_day(seconds: float) -> str:
    """The time of day in `seconds` seconds, such as "15:42", with the date where that is another day."""
    now = datetime.datetime.now()
    then = now + datetime.timedelta(seconds=seconds)
    return f"{then:%H:%M}" if then.date() == now.date() else f"{then:%d %b %H:%M}"


def total_steps(steps_per_epoch: int, epochs: int, max_train_steps: int = 0, minutes: float = 0.0) -> int:
    """Optimizer steps in the whole run; `UNKNOWN` where its time ends it."""
    steps = UNKNOWN if minutes else epochs * steps_per_epoch
    return min(steps, max_train_steps) if max_train_steps else steps


def is_due(epoch: float, last: bool, frequency: int) -> bool:
    """Whether something that happens every `frequency` epochs (0: never) happens now; the last step always counts."""
    return frequency > 0 and (last or epoch % frequency == 0)
