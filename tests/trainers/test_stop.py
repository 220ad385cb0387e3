"""Ctrl-C, and what happens every so many steps."""

import signal
import threading

import pytest
from rich.console import Console
from transformers import TrainerControl, TrainerState

from rlstab.trainers import GracefulStop, Periodically

QUIET = Console(quiet=True)


def test_the_first_interrupt_asks_and_the_second_stops() -> None:
    stop, control = GracefulStop(QUIET), TrainerControl()
    with stop:
        stop.on_step_end(None, TrainerState(), control)
        assert (control.should_save, control.should_training_stop) == (False, False)
        signal.raise_signal(signal.SIGINT)
        assert stop.requested
        stop.on_step_end(None, TrainerState(), control)
        assert (control.should_save, control.should_training_stop) == (True, True)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_the_previous_handler_comes_back() -> None:
    before = signal.getsignal(signal.SIGINT)
    with GracefulStop(QUIET):
        assert signal.getsignal(signal.SIGINT) != before
    assert signal.getsignal(signal.SIGINT) == before


def test_outside_the_main_thread_only_a_request_stops() -> None:
    console, control, before = (
        Console(record=True, quiet=False, width=200),
        TrainerControl(),
        signal.getsignal(signal.SIGINT),
    )

    def train() -> None:
        with GracefulStop(console) as stop:
            assert signal.getsignal(signal.SIGINT) == before
            stop.requested = True
            stop.on_step_end(None, TrainerState(), control)

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert (control.should_save, control.should_training_stop) == (True, True)
    assert "outside the main thread Ctrl-C is not heard" in console.export_text()
    assert signal.getsignal(signal.SIGINT) == before


def test_what_happens_every_so_many_steps() -> None:
    steps: list[int] = []
    callback = Periodically(3, steps.append)
    for step in range(1, 8):
        callback.on_step_end(None, TrainerState(global_step=step), TrainerControl())
    assert steps == [3, 6]
