"""Something to do after every so many optimizer steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback

__all__ = ["Periodically"]


class Periodically(TrainerCallback):
    """Calls a function after every so many optimizer steps.

    Args:
        every: optimizer steps between two calls.
        action: called with the number of the step.
    """

    def __init__(self, every: int, action: Callable[[int], None]) -> None:
        self._every = every
        self._action = action

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Call it if it is time."""
        if state.global_step % self._every == 0:
            self._action(state.global_step)
