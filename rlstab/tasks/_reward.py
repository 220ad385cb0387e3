"""Reward parts: callables with TRL's reward signature that compose, fail by name, and are logged one by one."""

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from numbers import Real
from typing import Any, Literal, Self, final

from rlstab.errors import ConfigError, RewardError
from rlstab.tasks._attempt import Attempt, described, shown
from rlstab.tasks._task import Messages, Task, text_of

__all__ = ["Correct", "Reward", "RewardBatch", "RewardFunction", "SampleReward", "reward_functions"]


@dataclass(frozen=True, kw_only=True)
class RewardBatch:
    """The completions of one call of the host, with everything that it passed beside them.

    Args:
        prompts: plain or conversational, one per completion.
        completions: plain text, or messages that end in the answer.
        columns: the host's keyword arguments: the dataset's columns and `completion_ids`, one value per completion, and
            `trainer_state`, `environments` and others where it passes them.
        task: the task that the prompts come from, where there is one.

    Raises:
        RewardError: if there are not as many completions as prompts.

    Example:
        >>> batch = RewardBatch(prompts=["a", "b", "a"], completions=["1", "2", "3"])
        >>> batch.groups
        [[0, 2], [1]]
    """

    prompts: Sequence[str | Messages]
    completions: Sequence[str | Messages]
    columns: Mapping[str, Any] = field(default_factory=dict)
    task: Task | None = None

    def __post_init__(self) -> None:
        if len(self.completions) != len(self.prompts):
            raise RewardError(
                f"completions has {len(self.completions)} values; expected one for each of {len(self.prompts)} prompts"
            )

    def __len__(self) -> int:
        return len(self.completions)

    @cached_property
    def texts(self) -> list[str]:
        """The text of each completion; of a conversation the last message's."""
        return [text_of(completion, owner="rewards") for completion in self.completions]

    @cached_property
    def groups(self) -> list[list[int]]:
        """The completions of each prompt, by position, in the order in which prompts first appear."""
        groups: dict[str, list[int]] = {}
        for index, prompt in enumerate(self.prompts):
            groups.setdefault(repr(prompt), []).append(index)
        return list(groups.values())

    @cached_property
    def verdicts(self) -> list[float | None]:
        """The task's own reward of each completion, computed once for all parts that read it.

        Raises:
            ConfigError: if the batch has no task.
            RewardError: if the task cannot score the batch.
        """
        if self.task is None:
            raise ConfigError(
                "Correct: no task says what is correct; pass task=..., or make the functions with "
                "reward_functions(rewards, task)"
            )
        return self.task.reward(self.prompts, self.completions, **self.columns)

    def column(self, name: str) -> Sequence[Any]:
        """The values of a column, one per completion.

        Raises:
            RewardError: if it is missing or has another length.
        """
        if name not in self.columns:
            raise RewardError(f"column {name!r} is missing; there are {sorted(self.columns)}")
        values: Sequence[Any] = self.columns[name]
        if len(values) != len(self):
            raise RewardError(f"column {name!r} has {len(values)} values; expected one for each of {len(self)} prompts")
        return values

    @property
    def state(self) -> Any:
        """The trainer's state (`global_step`, `max_steps`, ...), for rewards that change in the course of training.

        Raises:
            RewardError: if the caller did not pass `trainer_state`, as TRL's trainers do.
        """
        if "trainer_state" not in self.columns:
            raise RewardError(
                "'trainer_state' is missing, with the step that the reward depends on; TRL's trainers pass it"
            )
        return self.columns["trainer_state"]

    def only(self, index: int) -> "RewardBatch":
        """The batch of one completion; a column that is not one value per completion is kept as it is."""
        columns = {
            name: [value[index]] if isinstance(value, list | tuple) and len(value) == len(self) else value
            for name, value in self.columns.items()
        }
        return replace(self, prompts=[self.prompts[index]], completions=[self.completions[index]], columns=columns)


@dataclass(frozen=True, kw_only=True)
class Reward(ABC):
    """A reward part: subclass it with `rewards`, or `SampleReward` with `score`, and give it to a recipe or a trainer.

    A part is itself a reward function with TRL's signature. `0.5 * part` is a copy with half the weight.

    Args:
        weight: factor of this part in the total reward; 0 logs a part without training on it.
        on_error: what becomes of a completion whose reward cannot be computed: `"raise"` ends the run with an error
            that names it, `"none"` leaves it unscored and counts it.

    Raises:
        ConfigError: if the weight is no finite number.

    Example:
        >>> @dataclass(frozen=True, kw_only=True)
        ... class Distinct(Reward):
        ...     def rewards(self, batch):
        ...         return [1 / batch.texts.count(text) for text in batch.texts]
        >>> Distinct()(["a", "a"], ["x", "x"]), (0.5 * Distinct()).weight
        ([0.5, 0.5], 0.5)
    """

    weight: float = 1.0
    on_error: Literal["raise", "none"] = "raise"

    def __post_init__(self) -> None:
        if isinstance(self.weight, bool) or not math.isfinite(self.weight):
            raise ConfigError(f"{type(self).__name__}: weight {self.weight!r}; expected a finite number")

    @property
    def label(self) -> str:
        """What errors call the part where it has no other name."""
        return type(self).__name__

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that the part reads, beside prompts and completions."""
        return ()

    @property
    def separable(self) -> bool:
        """Whether each completion's reward depends on that completion alone."""
        return False

    @abstractmethod
    def rewards(self, batch: RewardBatch) -> Sequence[float | None]:
        """The reward of each completion, None where it cannot be judged.

        Args:
            batch: the completions of one call of the host.
        """

    @final
    def judge(self, batch: RewardBatch, *, name: str | None = None) -> tuple[list[float | None], int]:
        """The checked rewards, and how many completions are unscored because of an error.

        Args:
            batch: the completions of one call of the host.
            name: what errors call this part; its `label` if not given.

        Raises:
            RewardError: if a column is missing; and, unless `on_error` is `"none"`, if the part raises, or returns
                something other than one finite number or None per completion.
        """
        name = name or self.label
        for column in self.columns:
            with _naming(name):
                batch.column(column)
        scores: list[float | None] = []
        with Attempt() as attempt:
            scores = _checked(self.rewards(batch), len(batch))
        if attempt.error is None:
            return scores, 0
        if self.separable:
            return self._one_by_one(batch, name, attempt.error)
        if self.on_error == "raise":
            raise RewardError(
                f"{name}: {described(attempt.error)}; in a batch of {len(batch)} completions, the first is "
                f"{shown(batch.completions[0])}"
            ) from attempt.error
        return [None] * len(batch), len(batch)

    def _one_by_one(self, batch: RewardBatch, name: str, error: Exception) -> tuple[list[float | None], int]:
        """Each completion by itself, to name the one that fails or to keep the others."""
        scores: list[float | None] = []
        failed = 0
        for index in range(len(batch)):
            with Attempt() as attempt:
                scores += _checked(self.rewards(batch.only(index)), 1)
            if attempt.error is None:
                continue
            if self.on_error == "raise":
                raise RewardError(
                    f"{name}: {described(attempt.error)}; completion {index} is {shown(batch.completions[index])}"
                ) from attempt.error
            scores.append(None)
            failed += 1
        if not failed and self.on_error == "raise":
            raise RewardError(f"{name}: {described(error)}; no completion fails by itself") from error
        return scores, failed

    @final
    def __call__(
        self, prompts: Sequence[str | Messages], completions: Sequence[str | Messages], **columns: Any
    ) -> list[float | None]:
        """The rewards; the signature is that of a TRL reward function."""
        return self.judge(RewardBatch(prompts=prompts, completions=completions, columns=columns))[0]

    def __mul__(self, factor: float) -> Self:
        return replace(self, weight=self.weight * factor)

    __rmul__ = __mul__


@dataclass(frozen=True, kw_only=True)
class SampleReward(Reward):
    """A reward part that looks at one completion at a time: subclass it with `score`.

    Example:
        >>> @dataclass(frozen=True, kw_only=True)
        ... class Shout(SampleReward):
        ...     def score(self, completion, row):
        ...         return float(completion.isupper())
        >>> Shout()(["?", "?"], ["YES", "no"])
        [1.0, 0.0]
    """

    @property
    def separable(self) -> bool:
        """Each completion is scored by itself."""
        return True

    @abstractmethod
    def score(self, completion: str, row: Mapping[str, Any]) -> float | None:
        """The reward of one completion, None if it cannot be judged.

        Args:
            completion: the text that the model wrote, of a conversation the last message's.
            row: the values of `columns`.
        """

    def rewards(self, batch: RewardBatch) -> list[float | None]:
        """The score of each completion; a row with None in one of the columns is left unscored."""
        columns = [batch.column(name) for name in self.columns]
        rows = [dict(zip(self.columns, values, strict=True)) for values in zip(*columns, strict=True)]
        return [
            None if None in row.values() else self.score(text, row)
            for text, row in zip(batch.texts, rows or [{}] * len(batch), strict=True)
        ]


@final
@dataclass(frozen=True, kw_only=True)
class Correct(Reward):
    """The task's own reward, as `Task.reward` gives it; in a recipe the recipe's task.

    However many parts build on it, a completion is verified once.

    Args:
        task: the task that judges; None for the one that `reward_functions` was given.

    Example:
        >>> from rlstab.tasks import SortDigits
        >>> Correct(task=SortDigits(digits=3))(["503=", "503="], ["035", "053"], answer=["035", "035"])
        [1.0, 0.0]
    """

    task: Task | None = None

    @property
    def separable(self) -> bool:
        """A task scores each completion by itself."""
        return True

    def rewards(self, batch: RewardBatch) -> list[float | None]:
        """The task's verdicts."""
        if self.task is not None:
            return self.task.reward(batch.prompts, batch.completions, **batch.columns)
        return batch.verdicts


@final
class RewardFunction:
    """A reward part under a name, bound to a task, for a trainer's `reward_funcs`; made by `reward_functions`.

    The host logs it as `rewards/<name>/mean`. A part that leaves failures unscored also logs their share, as
    `rewards/<name>/failed`.
    """

    def __init__(self, name: str, part: Reward, batches: "_Batches") -> None:
        self.__name__ = name
        self.part = part
        self._batches = batches

    def __call__(
        self, prompts: Sequence[str | Messages], completions: Sequence[str | Messages], **columns: Any
    ) -> list[float | None]:
        """The rewards; the signature is that of a TRL reward function."""
        with _naming(self.__name__):
            batch = self._batches.get(prompts, completions, columns)
        rewards, failed = self.part.judge(batch, name=self.__name__)
        if self.part.on_error == "none" and "log_metric" in columns:
            columns["log_metric"](f"rewards/{self.__name__}/failed", failed / max(1, len(batch)))
        return rewards


def reward_functions(rewards: Mapping[str, Reward], task: Task) -> list[RewardFunction]:
    """Named reward functions for a trainer; their weights, in the same order, go to `reward_weights`.

    Args:
        rewards: name to part; the names stand in the logs.
        task: judges for `Correct`, wherever a part uses it.

    Returns:
        One function per part.

    Raises:
        ConfigError: if there is no part, or a name has other characters than letters, digits and underscores.

    Example:
        >>> from rlstab.tasks import OverlongPenalty, SortDigits
        >>> rewards = {"correct": Correct(), "short": 0.5 * OverlongPenalty(max_length=8, cache=4)}
        >>> functions = reward_functions(rewards, SortDigits(digits=3))
        >>> [function.__name__ for function in functions], [part.weight for part in rewards.values()]
        (['correct', 'short'], [1.0, 0.5])
        >>> rows = {"answer": ["035"], "completion_ids": [[1, 2, 3, 4, 5, 6]]}
        >>> [function(["503="], ["035"], **rows) for function in functions]
        [[1.0], [-0.5]]
    """
    if not rewards:
        raise ConfigError("rewards: expected at least one part, got none")
    for name in rewards:
        if re.fullmatch(r"\w+", name) is None:
            raise ConfigError(f"rewards: name {name!r}; expected letters, digits and underscores")
    batches = _Batches(task)
    return [RewardFunction(name, part, batches) for name, part in rewards.items()]


class _Batches:
    """Gives functions that are called with the same completions the same batch, so that they share its verdicts."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.last: RewardBatch | None = None

    def get(
        self, prompts: Sequence[str | Messages], completions: Sequence[str | Messages], columns: Mapping[str, Any]
    ) -> RewardBatch:
        """The batch of these arguments: the last one if the host passes the very same objects again."""
        last = self.last
        if last is None or last.completions is not completions or not _same_values(last.columns, columns):
            last = self.last = RewardBatch(prompts=prompts, completions=completions, columns=columns, task=self.task)
        return last


def _same_values(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    return old.keys() == new.keys() and all(old[name] is new[name] for name in new)


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Put a name before the message of a `RewardError`."""
    try:
        yield
    except RewardError as error:
        raise RewardError(f"{name}: {error}") from error


def _checked(values: Sequence[Any], size: int) -> list[float | None]:
    if len(values) != size:
        raise RewardError(f"returned {len(values)} rewards for {size} completions")
    for value in values:
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
            raise RewardError(f"returned {value!r}; expected a finite number or None")
    return [None if value is None else float(value) for value in values]
