"""Runs that end when their time is up. The clock is the test's own: it goes on by what a step is said to take."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from runs import QUIET, end_after, train

import train_align_with_args as train_script
from training import budget
from training.budget import Budget
from utils import StopWaiting

ALONE = SimpleNamespace(num_processes=1)


@pytest.fixture
def time(monkeypatch):
    """The seconds that `training.budget` sees; a test moves `time.now`."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(budget, "clock", lambda: clock.now)
    return clock


def steps_of(limit, time, seconds_of, step=0, until=None, accelerator=ALONE):
    """Go through a run: [(step, the schedule's position)]; `seconds_of` a step. It ends at the limit's end, or at `until`."""
    limit.start(step)
    positions = []
    while True:
        limit.look(step, accelerator)
        positions.append((step, limit.position(step)))
        if step == limit.end or step == until:
            return positions
        time.now += seconds_of(step)
        step += 1


PACES = {
    "even": lambda step: 0.5,
    "a first step that compiles": lambda step: 20.0 if step == 0 else 0.5,
    "half as fast after a while": lambda step: 0.5 if step < 60 else 1.0,
    "twice as fast after a while": lambda step: 0.5 if step < 60 else 0.25,
    "an evaluation at every twentieth": lambda step: 3.0 if step % 20 == 19 else 0.5,
}


@pytest.mark.parametrize("pace", PACES)
def test_the_schedule_comes_to_rest_as_the_time_is_up(time, pace):
    """A run that is cut off in the middle of its schedule, or overruns, since the machine became slower or faster; a schedule
    that runs ahead because the first step was slow, or that jumps."""
    begun = time.now
    positions = [position for _, position in steps_of(Budget(budget.UNKNOWN, 2.0), time, PACES[pace])]
    assert 120 - 4 < time.now - begun <= 120
    assert positions[0] == 0 and positions[-1] == 1
    moves = [later - earlier for earlier, later in itertools.pairwise(positions)]
    assert min(moves) >= 0 and max(moves) < 0.06
    assert positions[10] < 0.12  # ten of at least a hundred steps


def test_an_announced_change_of_pace_is_measured_at_once(time):
    """A pace that is the mean of before and after: the schedule runs late, and falls to its rest in the last steps."""
    limit = Budget(budget.UNKNOWN, 4.0)

    def seconds_of(step):
        limit.note_kind(step, step >= 320)
        return 0.5 if step < 320 else 2.0

    begun = time.now
    positions = dict(steps_of(limit, time, seconds_of))
    assert 240 - 4 < time.now - begun <= 240
    assert positions[340] == pytest.approx(5 / 6, abs=0.02)


def test_time_for_the_last_evaluation_is_kept_free(time):
    """A job that the scheduler kills during the evaluation at its end."""
    limit, begun = Budget(budget.UNKNOWN, 1.0), time.now
    limit.note_evaluation(10.0)
    steps_of(limit, time, lambda step: 0.5)
    assert 48 < time.now - begun <= 50


def test_processes_end_together_by_the_slowest_one(time):
    """Processes that each read their own clock, and of which one waits for ever for the other's next step."""
    behind = torch.tensor([[5.0, 0.0]])  # seconds that the other process has spent more
    two = SimpleNamespace(num_processes=2, device="cpu", gather=lambda mine: torch.cat([mine, mine + behind]))
    begun = time.now
    steps_of(Budget(budget.UNKNOWN, 1.0), time, lambda step: 0.5, accelerator=two)
    assert 53 < time.now - begun <= 55


def test_a_resumed_run_has_what_is_left_and_goes_on_where_its_schedule_stood(time):
    """A budget that starts anew at each resume; time between the sessions that counts; a learning rate that jumps; a finished
    run that cannot be given more time, or whose time starts from nothing."""
    first = Budget(budget.UNKNOWN, 1.0)
    before = steps_of(first, time, lambda step: 0.5, until=50)
    kept = first.state_dict()
    time.now += 1e6
    second = Budget(budget.UNKNOWN, 1.0)
    second.load_state_dict(kept)
    assert not second.is_over(50)
    begun = time.now
    after = steps_of(second, time, lambda step: 0.5, step=50)
    assert after[0][1] == before[-1][1] == pytest.approx(50 / 120, abs=0.02)
    assert 34 < time.now - begun <= 35
    assert second.is_over(second.end)
    longer = Budget(budget.UNKNOWN, 2.0)
    longer.load_state_dict(second.state_dict())
    assert not longer.is_over(second.end)
    begun = time.now
    positions = steps_of(longer, time, lambda step: 0.5, step=second.end)
    assert positions[0][1] == pytest.approx(0.5, abs=0.01)
    assert 58 < time.now - begun <= 61


@pytest.fixture
def second_a_step(time, monkeypatch):
    """Every training step takes a second."""
    endless = train_script.endless

    def slow(loader):
        for batch in endless(loader):
            time.now += 1
            yield batch

    monkeypatch.setattr(train_script, "endless", slow)


def test_a_real_run_ends_by_its_minutes_with_its_schedule(flags, tmp_path, second_a_step, caplog):
    """--minutes that nothing reads; a schedule by --epochs, which would still be at its start; a run that is finished at the
    first resume, or that is trained on although its time is up."""
    caplog.set_level("INFO")
    changes = {**QUIET, "minutes": 0.2, "warmup_steps": 0, "scheduler": "cosine"}
    run = train(flags, tmp_path, **changes)
    assert run.last["step"] == 12
    rates = [rate for _, rate in run.scalars["train/learning_rate"]]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] == pytest.approx(1e-3, rel=1e-3) and rates[-1] < 0.05e-3
    assert "0.2 minutes" in caplog.text
    assert train(flags, tmp_path, **changes, resume=True).last["step"] == 12
    assert train(flags, tmp_path, **changes | {"minutes": 0.25}, resume=True).last["step"] == 15


def test_a_real_run_that_is_resumed_has_what_is_left(flags, tmp_path, second_a_step, monkeypatch):
    """A time budget that the checkpoint forgets; a step schedule whose decays do not follow the time."""
    changes = {**QUIET, "minutes": 0.2, "warmup_steps": 0, "epochs": 4, "scheduler_step_size": 1}
    with monkeypatch.context() as patch:
        end_after(patch, 5, StopWaiting(143))
        with pytest.raises(SystemExit):
            train(flags, tmp_path, **changes)
    run = train(flags, tmp_path, **changes, resume=True)
    assert run.last["step"] == 12
    rates = [rate for _, rate in run.scalars["train/learning_rate"]]
    assert sorted({round(rate, 9) for rate in rates}) == pytest.approx([1e-3 / 8, 1e-3 / 4, 1e-3 / 2, 1e-3])
