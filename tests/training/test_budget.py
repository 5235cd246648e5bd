"""Runs that end when their time is up. The clock is the test's own: it goes on by what a step is said to take."""

import itertools
from types import SimpleNamespace

import pytest
from runs import QUIET, end_after, train

import train_align_with_args as train_script
from training import budget
from training.budget import Budget
from utils import StopWaiting


@pytest.fixture
def time(monkeypatch):
    """The seconds that `training.budget` sees; a test moves `time.now`."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(budget, "clock", lambda: clock.now)
    return clock


def steps_of(limit, time, seconds_of, step=0, until=None, kind_of=lambda step: None, evaluate=None):
    """Go through a run: [(step, the schedule's position)]; `seconds_of` a step, which has a kind. It ends at the limit's end,
    or at `until`. `evaluate(first)` is called where the limit has evaluations and affords one."""
    limit.start(step)
    positions = []
    while True:
        limit.look(step, None, kind_of(step))
        if limit.between and (step == limit.end or (step % limit.between == 0 and limit.affords_evaluation(None))):
            with limit.timed("evaluation", first=step == 0):
                evaluate(step == 0)
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

    begun = time.now
    late = {"seconds_of": lambda step: 0.5 if step < 320 else 2.0, "kind_of": lambda step: step >= 320}
    positions = dict(steps_of(limit, time, **late))
    assert 240 - 4 < time.now - begun <= 240
    assert positions[340] == pytest.approx(5 / 6, abs=0.02)


@pytest.mark.parametrize("minutes", [1, 3, 10])
def test_a_run_makes_the_steps_that_its_plan_promises(time, minutes):
    """A job that the scheduler kills during the evaluation at its end; time for the dear first one that is kept free once more;
    evaluations that a plan forgets, or that take most of the time; a dry run and a run that reckon differently."""

    def evaluate(first):
        evaluations.append(time.now)
        time.now += 24 if first else 8

    limit, begun, evaluations = Budget(budget.UNKNOWN, minutes, between=20), time.now, []
    steps_of(limit, time, lambda step: 0.5, evaluate=evaluate)
    assert 60 * minutes - 4 < time.now - begun <= 60 * minutes
    plan = Budget(budget.UNKNOWN, minutes, between=20)
    plan.pace, plan.paused, plan.took = 0.5, 24.0, {"evaluation": 8.0}
    assert plan.plan(0, 24.0, 8.0, 24.0) == (pytest.approx(limit.end, rel=0.1), pytest.approx(len(evaluations) - 2, abs=2))
    assert 24 + 8 * (len(evaluations) - 2) <= max(24, 20 * minutes)


def test_a_plan_without_time_for_steps_is_said_with_its_cause(time, caplog):
    """A run of one step without a word; a warning for each look, or for a run that is to be short."""
    steps_of(Budget(3, 1.0, between=20), time, lambda step: 0.5, evaluate=lambda first: None)
    assert not caplog.text
    limit = Budget(budget.UNKNOWN, 1.0, between=20)
    steps_of(limit, time, lambda step: 0.5, evaluate=lambda first: setattr(time, "now", time.now + (44 if first else 14)))
    (said,), cause = caplog.messages, "--minutes 1: time for 2 steps beside evaluations, which take 59 of 60 s; "
    assert said.startswith(cause) and "--visualize_frequency 0" in said


def test_steps_may_end_a_run_before_its_time_does(time):
    """A run that never ends since its last step came before its pace was known."""
    assert steps_of(Budget(1, 1.0), time, lambda step: 0.5, until=5)[-1] == (1, 1.0)


def test_a_run_by_time_saves_by_time(time):
    """Hours that a power cut takes; a checkpoint at each step; a resumed run that saves at once, or no more."""
    limit, saved = Budget(budget.UNKNOWN, 30.0), []

    def seconds_of(step):
        saved.extend([step] if limit.save_is_due else [])
        return 1.0

    steps_of(limit, time, seconds_of, until=1000)
    assert len(saved) == 3 and all(0 <= step - due <= 10 for step, due in zip(saved, (300, 600, 900)))
    kept, limit, saved = limit.state_dict(), Budget(budget.UNKNOWN, 30.0), []
    limit.load_state_dict(kept)
    steps_of(limit, time, seconds_of, step=1000, until=1300)
    assert len(saved) == 1 and 1200 <= saved[0] <= 1210


def test_processes_end_together_by_the_slowest_one(time, monkeypatch):
    """Processes that each read their own clock, and of which one waits for ever for the other's next step."""
    slow, ends = {"seconds_of": lambda step: 0.5 if step < 40 else 1.0, "kind_of": lambda step: step >= 40}, []
    for more in (5.0, -5.0):  # seconds that the other process has spent more
        monkeypatch.setattr(budget, "gathered", lambda mine, _, more=more: [mine, (mine[0] + more, *mine[1:])])
        begun, limit = time.now, Budget(budget.UNKNOWN, 1.0)
        limit.load_state_dict(limit.state_dict() | {"seconds": max(0, -more)})
        ends.append(steps_of(limit, time, **slow)[-1])
        assert 53 < time.now - begun <= 55
    assert ends[0] == ends[1]


def test_a_resumed_run_has_what_is_left_and_goes_on_where_its_schedule_stood(time):
    """A budget that starts anew at each resume; time between the sessions that counts; a learning rate that jumps; a finished
    run that cannot be given more time, or whose time starts from nothing; one that ends in time which no longer limits it."""
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
    by_steps = Budget(1000)
    by_steps.load_state_dict(kept | {"steps": 1000})  # it had --max_train_steps beside its time
    assert by_steps.end == 1000
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
