"""Live progress of a run in the terminal: reward, drift, mismatch, entropy and the time that is left."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback

from rlstab.trainers._recorder import RowListener

__all__ = ["ProgressCallback"]

SHOWN = {
    "reward": ("train/reward", ".3f"),
    "loss": ("train/loss", ".3f"),
    "KL": ("drift/initial/kl", ".2g"),
    "entropy": ("policy/entropy", ".3f"),
    "mismatch": ("mismatch/k3", ".1e"),
}
SECONDS_BETWEEN_LINES = 10.0


class ProgressCallback(TrainerCallback, RowListener):
    """One line that follows the run: step, elapsed and remaining time, reward, KL to the start, entropy, mismatch.

    In a terminal the line is redrawn in place; elsewhere (a log file) a plain line is printed every ten seconds.

    Args:
        console: where to draw; standard output if not given.

    Example:
        >>> from transformers import TrainerControl, TrainerState
        >>> progress = ProgressCallback(Console(force_terminal=False))
        >>> progress.on_train_begin(None, TrainerState(max_steps=5), TrainerControl())
        >>> progress.on_row(5, {"train/reward": 0.5, "drift/initial/kl": 0.0123})
        step 5/5  left 0 s  reward 0.500  KL 0.012
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console()
        self._progress: Progress | None = None
        self._latest: dict[str, float] = {}
        self._first_step, self._total = 0, 0
        self._started = self._last_line = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the line at the step that the run starts from."""
        if not state.is_world_process_zero:
            return
        self._first_step, self._total = state.global_step, state.max_steps
        self._started = self._last_line = time.monotonic()
        if self._console.is_terminal:
            self._progress = Progress(
                TextColumn("[bold]train"),
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[numbers]}"),
                console=self._console,
            )
            self._progress.add_task("train", total=self._total, completed=self._first_step, numbers="")
            self._progress.start()

    def on_row(self, step: int, values: Mapping[str, float]) -> None:
        """Show the numbers of a finished step; what is measured more rarely keeps its last value."""
        self._latest |= {key: values[key] for key, _ in SHOWN.values() if key in values}
        if self._progress is not None:
            self._progress.update(self._progress.task_ids[0], completed=step, numbers=self._numbers())
            return
        now = time.monotonic()
        if self._total and (now - self._last_line >= SECONDS_BETWEEN_LINES or step == self._total):
            self._last_line = now
            left = (now - self._started) / max(step - self._first_step, 1) * (self._total - step)
            line = f"step {step}/{self._total}  left {left:.0f} s  {self._numbers()}"
            self._console.print(line.rstrip(), highlight=False)

    def _numbers(self) -> str:
        return "  ".join(
            f"{name} {format(self._latest[key], spec)}" for name, (key, spec) in SHOWN.items() if key in self._latest
        )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the last line standing."""
        self.close()

    def close(self) -> None:
        """Stop drawing; also after an exception, so that the terminal is left in order."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
