"""When a run ends, after a number of steps or when its time is up, and which periodic work is due at a step."""

from __future__ import annotations

import contextlib
import datetime
import logging
import math
import sys
import time

from tqdm.contrib.logging import logging_redirect_tqdm

from runtime.processes import gathered
from utils import count_of

UNKNOWN = sys.maxsize  # the end of a run whose pace is not measured yet
LOOK_SECONDS = 10.0  # at most so long the measured pace is taken for that of the next steps
SAVE_SECONDS = 300.0  # between the checkpoints that a run with limited time writes besides those by epochs and steps
FEW_STEPS = 10  # a run with limited time that makes fewer is probably a mistake
LATER = 1 / 3  # of the first evaluation's time: it measures all six rungs of the ladder, later ones the module's and VAE2's
clock = time.perf_counter

log = logging.getLogger(__name__)


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
        between: steps from one evaluation to the next; 0: there are none. The last step always evaluates.

    Attributes:
        end: the step after which the run ends, as far as is known.
        pace: seconds a step, without periodic work; 0: not measured.
        took: {periodic work: seconds that it will take the next time}.
        paused: seconds of periodic work so far, over all sessions of the run.
        save_is_due: whether a run with limited time is to save at this step, since some minutes have passed.
    """

    def __init__(self, steps: int, minutes: float = 0.0, between: int = 0):
        self.steps, self.minutes, self.between = steps, minutes, between
        self.end = steps
        self.pace = self.paused = 0.0
        self.took = {}
        self.save_is_due = False
        self._anchor = (0, 0.0)  # a step, and the position there
        self._seconds_before = 0.0  # of earlier sessions of this run
        self._started = None
        self._first_step = self._look_at = 0
        self._mark = (0, 0.0)  # the step, and the seconds of steps until then, from which on the pace is measured
        self._kind = None  # of the steps since then
        self._looked = 0.0  # seconds at the last look
        self._warned = False

    @property
    def known(self) -> bool:
        return self.end != UNKNOWN

    @property
    def seconds(self) -> float:
        """Seconds of training so far, over all sessions of the run."""
        return self._seconds_before + (0.0 if self._started is None else clock() - self._started)

    @property
    def reserve(self) -> float:
        """Seconds of all periodic work at one step, kept free for the last one."""
        return sum(self.took.values())

    def position(self, step: int) -> float:
        """The schedule's position after `step` steps, from 0 at the start to 1 at the end."""
        begun, position = self._anchor
        return 1.0 if step >= self.end else position + (1 - position) * (step - begun) / (self.end - begun)

    def seconds_left(self, step: int) -> float:
        """Seconds until the run ends, when the step `step` has just been made."""
        pace = self.pace or (self.seconds - self.paused) / max(1, step)  # none is measured before the third step
        by_steps = (self.end - step) * pace + (1 + self.evaluations_left(step - 1)) * self.reserve
        return min(by_steps, max(0.0, 60 * self.minutes - self.seconds)) if self.minutes else by_steps

    def evaluations_left(self, step: int) -> int:
        """The number of evaluations after `step` steps and before the last one."""
        return (self.end - 1) // self.between - step // self.between if self.between else 0

    def start(self, step: int) -> None:
        """The training loop begins, after `step` steps."""
        self._started = clock()
        self._first_step = self._look_at = step

    @contextlib.contextmanager
    def timed(self, what: str, first: bool = False):
        """A context for periodic work, which is expected to take as long the next time; `first`: it judges the whole ladder."""
        began = self.seconds
        yield
        seconds = self.seconds - began
        self.paused += seconds
        self.took[what] = LATER * seconds if first else seconds

    def affords_evaluation(self, accelerator) -> bool:
        """Whether evaluations take at most a third of the time if one follows now, and time is left for the one at the end. All
        processes find the same."""
        if not self.minutes:
            return True
        self._look_at = 0  # at the next step
        seconds, reserve, paused = self._agreed(accelerator)
        affords = 3 * (paused + reserve) <= seconds + reserve
        if not affords:
            self._warn("evaluations would take over a third of the time, so some are left out")
        return affords and seconds + 2 * reserve <= 60 * self.minutes

    def look(self, step: int, accelerator, kind=None) -> None:
        """At times measure the pace and, with limited time, move the end. All processes find the same end.

        `kind`: of the next step. Steps of another kind take another time: the pace is measured anew.
        """
        self.save_is_due = False
        kind = kind if step > self._first_step else "first"  # the first step starts and compiles things
        if step < self._look_at and kind == self._kind:
            return
        before = self._looked
        self._looked, reserve, paused = self._agreed(accelerator)
        self.save_is_due = bool(self.minutes) and self._looked // SAVE_SECONDS > before // SAVE_SECONDS
        if kind == self._kind:
            self.pace = (self._looked - paused - self._mark[1]) / (step - self._mark[0])
        else:
            self._kind, self._mark = kind, (step, self._looked - paused)
        if self.minutes and step > self._first_step:
            position = self.position(step)
            self._anchor, self.end = (step, position), self.plan(step, self._looked, reserve, paused)[0]
        ahead = LOOK_SECONDS / self.pace if self.pace else 1
        self._look_at = step + max(1, int(min(ahead, step - self._mark[0], (self.end - step) / 8)))

    def plan(self, step: int, seconds: float, reserve: float, paused: float) -> tuple[int, int]:
        """(the step that limited time reaches, the number of evaluations before it), seen after `step` steps in `seconds`, of
        which periodic work took `paused`."""
        left, end, evaluations = 60 * self.minutes - seconds - reserve, self.end, 0
        if left <= 0:
            end = step
        elif self.pace:
            if self.between and reserve:
                due = (left + step % self.between * self.pace) / (self.between * self.pace + reserve)
                evaluations = int(min(due, max(0.0, 20 * self.minutes - reserve / 3 - paused) / reserve))
            end = min(self.steps, step + math.floor((left - evaluations * reserve) / self.pace))
        end = max(1, end)  # a run makes one step before it looks at its time
        if end < min(FEW_STEPS, self.steps):
            evaluating = f"{paused + (evaluations + 1) * reserve:.0f} of {60 * self.minutes:.0f} s"
            self._warn(f"time for {count_of(end, 'step')} beside evaluations, which take {evaluating}")
        return end, evaluations

    def _warn(self, warning: str) -> None:
        """Warn of evaluations that take much of the time, once."""
        if not self._warned:
            self._warned, advice = True, "give more minutes, fewer evaluation images, or --visualize_frequency 0"
            with logging_redirect_tqdm():
                log.warning("--minutes %g: %s; %s", self.minutes, warning, advice)

    def _agreed(self, accelerator) -> tuple[float, float, float]:
        """The run's seconds, the reserve and the seconds of periodic work, of the slowest process."""
        mine = (self.seconds, self.reserve, self.paused)
        return tuple(map(max, zip(*gathered(mine, accelerator)))) if self.minutes else mine

    def state_dict(self) -> dict:
        return {
            "seconds": self.seconds,
            "minutes": self.minutes,
            "steps": self.steps,
            "end": self.end,
            "anchor": list(self._anchor),
            "pace": self.pace,
            "reserve": self.reserve,
            "paused": self.paused,
        }

    def load_state_dict(self, state: dict) -> None:
        """Go on with the remaining time. With another time or limit the position follows from the time spent so far."""
        self._seconds_before = self._looked = float(state["seconds"])
        self.pace, self.paused = float(state["pace"]), float(state.get("paused", 0.0))  # older checkpoints lack the latter
        self.took = {"evaluation": float(state["reserve"])}
        step, position = state["anchor"]
        if (self.minutes, self.steps) == (state["minutes"], state["steps"]):
            self._anchor, self.end = (step, float(position)), state["end"]
        elif self.minutes:
            self._anchor = (step, min(1.0, self._seconds_before / (60 * self.minutes)))

    def is_over(self, step: int) -> bool:
        """Whether nothing is left after `step` steps."""
        return step >= min(self.end, self.steps) or bool(self.minutes and self.seconds >= 60 * self.minutes)


def time_of_day(seconds: float) -> str:
    """The time of day in `seconds` seconds, such as "15:42", with the date where that is another day."""
    now = datetime.datetime.now()
    then = now + datetime.timedelta(seconds=seconds)
    return f"{then:%H:%M}" if then.date() == now.date() else f"{then:%d %b %H:%M}"


def is_due(epoch: float, last: bool, frequency: int) -> bool:
    """Whether something that happens every `frequency` epochs (0: never) happens now; the last step always counts."""
    return frequency > 0 and (last or epoch % frequency == 0)
