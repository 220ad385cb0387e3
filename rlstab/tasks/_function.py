"""A reward function that exists already, as a part."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

from rlstab.errors import ConfigError
from rlstab.tasks._checks import check_fields
from rlstab.tasks._reward import Reward, RewardBatch
from rlstab.tasks._worker import worker

__all__ = ["FunctionReward"]


@final
@dataclass(frozen=True, kw_only=True)
class FunctionReward(Reward):
    """A function with TRL's reward signature, TRL's own among them, with a weight, a time limit and a name for errors.

    Args:
        function: called with `prompts`, `completions` and all columns by name; a recipe gives its import path.
        per_sample: whether it scores each completion by itself, so that a failure can be pinned to one; false for a
            function that compares completions.
        timeout: seconds that a call may take. The function then runs in a process of its own, which imports it by its
            name and is given what has one value per completion; it cannot see the trainer's state.

    Raises:
        ConfigError: if the function is asynchronous, or with a timeout if it cannot be imported by its name.

    Example:
        >>> def short(completions, **columns):
        ...     return [1.0 if len(text) < 3 else 0.0 for text in completions]
        >>> FunctionReward(function=short)(["?", "?"], ["ab", "abc"])
        [1.0, 0.0]
    """

    function: Callable[..., Sequence[float | None]]
    per_sample: bool = True
    timeout: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if inspect.iscoroutinefunction(self.function):
            raise ConfigError(
                f"FunctionReward: {self.label} is asynchronous; give it to the trainer's reward_funcs itself"
            )
        if self.timeout is None:
            return
        check_fields(self, {"timeout": (self.timeout > 0, "seconds above 0")})
        if self.function.__module__ == "__main__" or "<" in self.label:
            raise ConfigError(
                f"FunctionReward: {self.label} cannot be imported by another process, as its timeout needs; move it to "
                "the top level of a module"
            )

    @property
    def label(self) -> str:
        """The function's import path."""
        if inspect.isroutine(self.function):
            return f"{self.function.__module__}.{self.function.__qualname__}"
        return type(self.function).__qualname__

    @property
    def separable(self) -> bool:
        """`per_sample`."""
        return self.per_sample

    def rewards(self, batch: RewardBatch) -> Sequence[float | None]:
        """What the function returns."""
        given = {"prompts": batch.prompts, "completions": batch.completions}
        if self.timeout is None:
            return self.function(**given, **batch.columns)
        columns = {
            name: value
            for name, value in batch.columns.items()
            if isinstance(value, list | tuple) and len(value) == len(batch)
        }
        own = worker(self.function.__module__, self.function.__qualname__)
        result: Sequence[float | None] = own.call(timeout=self.timeout, **given, **columns)
        return result
