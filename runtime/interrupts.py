"""How the signals that ask a run to stop pass by its workers, which decode images: their parent ends them."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from multiprocessing import resource_tracker

from utils import STOP_SIGNALS as POLITE
from utils import WARNINGS as ONCE


@contextlib.contextmanager
def signals_held_back():
    """Within this context the signals of `POLITE` wait, and processes that are started in it start with them blocked.

    Without it, a signal to all processes of a job could end a worker before `leave_signals_to_parent` has run in it, and the
    lost worker would end the run, which is to save first. No effect outside the main thread, or on Windows.
    """
    if not hasattr(signal, "sigwaitinfo") or threading.current_thread() is not threading.main_thread():
        yield
        return
    if multiprocessing.get_start_method() != "fork":
        resource_tracker.ensure_running()  # it would lift the block when it starts
    before = signal.pthread_sigmask(signal.SIG_BLOCK, POLITE)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_signals_to_parent(worker: int) -> None:
    """A `worker_init_fn`: the worker ignores the signals of a terminal or a job, and its parent ends the run.

    A SIGTERM that the parent itself sends still ends the worker. Otherwise a parent that exits early would wait for it
    without end.
    """
    for number in (signal.SIGINT, *ONCE):
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # without it, on Windows, a SIGTERM to all ends the workers at once
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_exit_on_sigterm_from, args=(multiprocessing.parent_process().pid,), daemon=True).start()


def _exit_on_sigterm_from(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
