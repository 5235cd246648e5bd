"""SIGINT and SIGTERM at the moments that whole runs in test_resume.py seldom meet."""

import os
import signal

import pytest
from hostile import is_one_line

from runtime.cli import run
from runtime.interrupts import ONCE, POLITE, RELAY, StopRequest, unwinding_on_signals


@pytest.fixture(autouse=True)
def handlers_of_the_suite():
    """A run that is stopped leaves the default handlers behind; this interpreter runs on."""
    before = {number: signal.getsignal(number) for number in POLITE}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", POLITE, ids=lambda number: number.name)
def test_a_signal_before_the_first_step_unwinds_and_says_so(capsys, number):
    """Temporary files and workers that a SIGTERM at start-up leaves behind; another exit status than 128 + its number."""
    unwound = []

    def main():
        try:
            os.kill(os.getpid(), number)
            signal.sigtimedwait({signal.SIGCHLD}, 60)  # a handler runs at the next instruction; this is one
        finally:
            unwound.append(True)

    with pytest.raises(SystemExit) as stop:
        run(main)
    assert stop.value.code == 128 + number and unwound
    said = capsys.readouterr().err.strip()
    assert is_one_line(said) and number.name in said


def test_what_a_launcher_passes_on_is_no_second_signal(monkeypatch, capfd):
    """Ctrl-C under `accelerate launch`, which comes twice to each process, ends it unsaved."""
    monkeypatch.setenv("LOCAL_RANK", "0")
    times = iter([0.0, 1.0, 1.0 + RELAY / 2])
    monkeypatch.setattr("runtime.interrupts.time.monotonic", lambda: next(times))
    with StopRequest() as stop:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        assert stop.signal == signal.SIGINT
    assert capfd.readouterr().err.count("finishing the step") == 1


def test_a_signal_is_heard_when_nobody_reads_the_log_any_more():
    """Ctrl-C under `2>&1 | tee log`, which ends tee as well: the run would fail on its own message, unsaved."""
    reader, writer = os.pipe()
    stderr = os.dup(2)
    os.close(reader)
    os.dup2(writer, 2)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            os.write(2, b"the progress bar goes on")
        assert stop.signal == signal.SIGINT
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(writer)


@pytest.mark.parametrize("number", ONCE, ids=lambda number: number.name)
def test_a_warning_stops_the_run_and_a_second_one_does_not_kill_it(number):
    """A closed terminal or a scheduler's warning that ends the run unsaved; a closed terminal sends two."""
    with StopRequest() as stop:
        for _ in range(2):
            os.kill(os.getpid(), number)
        assert stop.signal == number
    os.kill(os.getpid(), number)  # while the checkpoint is written out


def test_what_nohup_has_a_program_ignore_stays_ignored():
    """A run under nohup that a closed terminal stops all the same."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with unwinding_on_signals(), StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
    assert stop.signal is None


class Steps:
    """An accelerator of two processes; the other takes 0.1 s a step and has been sent `number`."""

    num_processes, device = 2, "cpu"

    def __init__(self):
        self.number, self.step, self.asked = 0, 0, [0]

    def gather(self, mine):
        seconds = 0.1 * (self.step - self.asked[-1])
        self.asked.append(self.step)
        return mine.new_tensor([mine.tolist()[0], [self.number, seconds]])


def test_processes_agree_to_stop_without_asking_at_every_step():
    """A process that stops alone, and leaves the others waiting; a wait for the device at every step."""
    accelerator, stop = Steps(), StopRequest()

    def agreed(steps):
        for accelerator.step in steps:
            yield stop.agreed(accelerator, accelerator.step)

    assert set(agreed(range(200))) == {None}
    assert len(accelerator.asked) < 30
    accelerator.number = signal.SIGTERM
    assert signal.SIGTERM in agreed(range(200, 230))
