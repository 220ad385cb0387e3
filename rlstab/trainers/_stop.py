"""Ctrl-C during training: the first one finishes the step and saves, the second one stops at once."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any, Self

import torch
from rich.console import Console
from torch import distributed
from transformers import TrainerCallback

__all__ = ["GracefulStop"]


class GracefulStop(TrainerCallback):
    """While it is entered, an interrupt asks the trainer to save a checkpoint after the current step and to stop.

    A second interrupt raises `KeyboardInterrupt` where the program is. Ranks agree on the step at which they stop.
    Python hands interrupts to the main thread only: entered in another one it says so, catches none, and the run stops
    at the end of its step once `requested` is set.

    Args:
        console: where to say that the request was heard.

    Example:
        >>> import signal
        >>> with GracefulStop(Console()) as stop:  # trainer.train() with `stop` among its callbacks
        ...     signal.raise_signal(signal.SIGINT)
        interrupted: finishing the step and saving; press Ctrl-C again to stop at once
        >>> stop.requested
        True
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._previous: Any = None
        self.requested = False

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._on_signal)
        else:
            self._console.print(
                "outside the main thread Ctrl-C is not heard; set `requested` to finish the step and save"
            )
        return self

    def __exit__(self, *error: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
            self._previous = None

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        self._console.print("interrupted: finishing the step and saving; press Ctrl-C again to stop at once")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask for a checkpoint and for the end of training."""
        if distributed.is_initialized() and distributed.get_world_size() > 1:
            heard = torch.tensor(float(self.requested), device=args.device)
            distributed.all_reduce(heard, distributed.ReduceOp.MAX)
            self.requested = bool(heard)
        if self.requested:
            control.should_save = True
            control.should_training_stop = True
