"""The line that follows a run, in a terminal and in a log file."""

import io

import pytest
from rich.console import Console
from transformers import TrainerControl, TrainerState

from rlstab.trainers import ProgressCallback
from rlstab.trainers import _progress as module


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def begin(console: Console, *, start: int = 0, total: int = 40, main: bool = True) -> ProgressCallback:
    progress = ProgressCallback(console)
    state = TrainerState(global_step=start, max_steps=total, is_world_process_zero=main)
    progress.on_train_begin(None, state, TrainerControl())
    return progress


def log_file() -> Console:
    return Console(file=io.StringIO(), force_terminal=False, width=200)


def text(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_log_file_gets_a_line_every_ten_seconds_and_at_the_end(clock: Clock) -> None:
    console = log_file()
    progress = begin(console)
    for step in range(1, 41):
        clock.now += 1.0
        progress.on_row(step, {"train/reward": step / 40})
    assert text(console).splitlines() == [
        f"step {step}/40  left {40 - step} s  reward {step / 40:.3f}" for step in (10, 20, 30, 40)
    ]


def test_a_resumed_run_estimates_from_its_own_steps(clock: Clock) -> None:
    console = log_file()
    progress = begin(console, start=30)
    clock.now += 10.0
    progress.on_row(35, {})
    assert text(console) == "step 35/40  left 10 s\n"


def test_rare_numbers_keep_their_last_value(clock: Clock) -> None:
    console = log_file()
    progress = begin(console, total=2)
    progress.on_row(1, {"train/reward": 0.25, "drift/initial/kl": 0.03, "mismatch/k3": 2e-5})
    progress.on_row(2, {"train/reward": 0.5, "policy/entropy": 1.5})
    assert text(console) == "step 2/2  left 0 s  reward 0.500  KL 0.03  entropy 1.500  mismatch 2.0e-05\n"


def test_a_terminal_gets_one_live_line_that_close_ends(clock: Clock) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=160)
    progress = begin(console)
    progress.on_row(20, {"train/reward": 0.75})
    progress.close()
    drawn = text(console)
    assert "20/40" in drawn
    assert "reward 0.750" in drawn
    assert drawn.endswith("\x1b[?25h"), "the cursor is shown again"
    progress.close()
    assert text(console) == drawn


def test_only_the_first_process_draws(clock: Clock) -> None:
    console = log_file()
    progress = begin(console, main=False)
    clock.now += 60.0
    progress.on_row(20, {"train/reward": 0.5})
    assert text(console) == ""
