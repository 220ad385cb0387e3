"""A reward that fails is named with its sample, or its failures are counted; what parts share is computed once."""

import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
from datasets import Dataset

from rlstab.errors import ConfigError, RewardError
from rlstab.tasks import (
    Correct,
    Product,
    Reward,
    RewardBatch,
    SampleReward,
    SortDigits,
    Split,
    Task,
    reward_functions,
)

TASK = SortDigits(digits=3)
ROWS = {"answer": ["035"] * 3}
PROMPTS = ["503="] * 3


@dataclass(frozen=True, kw_only=True)
class Inverse(SampleReward):
    """Divides by the completion: fails for 0, for text, and for what is no finite number."""

    def score(self, completion: str, row: Mapping[str, Any]) -> float:
        return 1 / float(completion)


@dataclass(frozen=True, kw_only=True)
class Compared(Reward):
    """Returns what it was made with, for the whole batch."""

    values: Any = ()

    def rewards(self, batch: RewardBatch) -> Sequence[float | None]:
        values: Sequence[float | None] = self.values
        return values


@dataclass(frozen=True, kw_only=True)
class Named(SampleReward):
    """Reads a column."""

    @property
    def columns(self) -> tuple[str, ...]:
        return ("hint",)

    def score(self, completion: str, row: Mapping[str, Any]) -> float:
        return float(completion == row["hint"])


class Counted(Task):
    """Counts how often it scores."""

    name: ClassVar[str] = "counted"
    answer_columns: ClassVar[tuple[str, ...]] = ("answer",)

    def __init__(self) -> None:
        self.scored = 0

    def prompts(self, n: int, *, split: Split = "train", seed: int = 0) -> Dataset:
        return Dataset.from_dict({"prompt": ["?"] * n, "answer": ["a"] * n})

    def score(self, completion: str, row: Mapping[str, Any]) -> float:
        self.scored += 1
        return float(completion == row["answer"])


def test_the_failing_sample_is_named() -> None:
    with pytest.raises(RewardError, match=r"^Inverse: ZeroDivisionError: float division by zero; completion 1 is '0'$"):
        Inverse()(PROMPTS, ["2", "0", "x"])


def test_a_name_stands_for_the_class() -> None:
    (function,) = reward_functions({"inverse": Inverse()}, TASK)
    with pytest.raises(RewardError, match=r"^inverse: ValueError: .*'x'; completion 2 is 'x'$"):
        function(PROMPTS, ["2", "4", "x"])


def test_a_long_completion_is_cut() -> None:
    with pytest.raises(RewardError, match=r"completion 0 is 'x{79}\.\.\.$"):
        Inverse()(["?"], ["x" * 1000])


def test_failures_are_left_unscored_and_counted_where_asked_for() -> None:
    part = Inverse(on_error="none")
    batch = RewardBatch(prompts=PROMPTS, completions=["2", "0", "x"])
    assert part.judge(batch) == ([0.5, None, None], 2)

    logged: dict[str, float] = {}
    (function,) = reward_functions({"inverse": part}, TASK)
    assert function(PROMPTS, ["2", "0", "4"], log_metric=logged.__setitem__) == [0.5, None, 0.25]
    assert logged == {"rewards/inverse/failed": 1 / 3}


def test_nothing_is_counted_where_failures_raise() -> None:
    logged: dict[str, float] = {}
    (function,) = reward_functions({"inverse": Inverse()}, TASK)
    assert function(PROMPTS, ["2", "2", "4"], log_metric=logged.__setitem__) == [0.5, 0.5, 0.25]
    assert logged == {}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0, 2.0], "returned 2 rewards for 3 completions"),
        ([1.0, 2.0, float("nan")], "returned nan; expected a finite number or None"),
        ([1.0, 2.0, float("-inf")], "returned -inf; expected a finite number or None"),
        ([1.0, 2.0, "3"], "returned '3'; expected a finite number or None"),
        ([1.0, 2.0, True], "returned True; expected a finite number or None"),
        (7, r"TypeError: object of type 'int' has no len\(\)"),
    ],
)
def test_a_part_that_compares_completions_fails_for_the_batch(values: Any, message: str) -> None:
    with pytest.raises(RewardError, match=rf"^Compared: {message}; in a batch of 3 completions, the first is '1'$"):
        Compared(values=values)(PROMPTS, ["1", "2", "3"])
    unscored = Compared(values=values, on_error="none")
    assert unscored.judge(RewardBatch(prompts=PROMPTS, completions=["1", "2", "3"])) == ([None] * 3, 3)


@dataclass(frozen=True, kw_only=True)
class OnlyAlone(SampleReward):
    """Fails for more than one completion at a time."""

    def score(self, completion: str, row: Mapping[str, Any]) -> float:
        raise AssertionError

    def rewards(self, batch: RewardBatch) -> list[float | None]:
        return [1.0] if len(batch) == 1 else []


def test_a_failure_of_the_whole_only() -> None:
    with pytest.raises(RewardError, match=r"returned 0 rewards for 3 completions; no completion fails by itself$"):
        OnlyAlone()(PROMPTS, ["1", "2", "3"])
    batch = RewardBatch(prompts=PROMPTS, completions=["1", "2", "3"])
    assert OnlyAlone(on_error="none").judge(batch) == ([1.0] * 3, 0)


def test_a_failure_within_another_part_keeps_its_name() -> None:
    both = Product(factors=[Correct(task=TASK), Inverse()])
    with pytest.raises(RewardError, match=r"Inverse: ZeroDivisionError: .*; completion 0 is '0'; completion 1 is '0'$"):
        both(PROMPTS, ["2", "0", "4"], **ROWS)
    assert Product(factors=[Correct(task=TASK), Inverse(on_error="none")])(PROMPTS, ["035", "0", "4"], **ROWS) == [
        1 / 35,
        None,
        0.0,
    ]


@pytest.mark.parametrize("on_error", ["raise", "none"])
def test_a_missing_column_is_never_counted(on_error: Any) -> None:
    with pytest.raises(RewardError, match=r"^Named: column 'hint' is missing; there are \['answer'\]$"):
        Named(on_error=on_error)(PROMPTS, ["1", "2", "3"], **ROWS)
    with pytest.raises(RewardError, match=r"^Named: column 'hint' has 2 values; expected one for each of 3 prompts$"):
        Named(on_error=on_error)(PROMPTS, ["1", "2", "3"], hint=["a", "b"])


def test_a_row_without_a_value_is_left_unscored() -> None:
    assert Named()(PROMPTS, ["a", "b", "c"], hint=["a", None, "a"]) == [1.0, None, 0.0]


def test_completions_must_be_as_many_as_prompts() -> None:
    with pytest.raises(RewardError, match=r"^named: completions has 2 values; expected one for each of 3 prompts$"):
        reward_functions({"named": Named()}, TASK)[0](PROMPTS, ["a", "b"], hint=["a"] * 3)


def test_an_interrupt_is_not_a_failure() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Interrupted(SampleReward):
        def score(self, completion: str, row: Mapping[str, Any]) -> float:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Interrupted(on_error="none")(PROMPTS, ["1", "2", "3"])


def test_who_is_correct_must_be_known() -> None:
    with pytest.raises(
        ConfigError, match=r"no task says what is correct; pass task=\.\.\., or make the functions with"
    ):
        Correct(on_error="none")(PROMPTS, ["1", "2", "3"], **ROWS)


def test_a_completion_is_verified_once_for_all_functions() -> None:
    task = Counted()
    rewards: dict[str, Reward] = {
        "correct": Correct(),
        "twice": 2 * Correct(),
        "squared": Product(factors=[Correct(), Correct()]),
    }
    functions = reward_functions(rewards, task)
    for size in (2, 3):
        completions = ["a"] * size
        columns = {"answer": ["a"] * size, "trainer_state": object()}
        assert [f(["?"] * size, completions, **columns) for f in functions] == [[1.0] * size] * 3
    assert task.scored == 5


def test_other_columns_are_another_batch() -> None:
    (function,) = reward_functions({"correct": Correct()}, TASK)
    completions = ["035"]
    assert function(["503="], completions, answer=["035"]) == [1.0]
    assert function(["503="], completions, answer=["036"]) == [0.0]


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        ({}, "rewards: expected at least one part, got none"),
        ({"a b": Correct()}, "rewards: name 'a b'; expected letters, digits and underscores"),
    ],
)
def test_names_of_functions(rewards: dict[str, Reward], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        reward_functions(rewards, TASK)


def test_a_weight_is_a_finite_number() -> None:
    assert (0.5 * Correct(weight=3.0) * 2).weight == 3.0
    with pytest.raises(ConfigError, match="Inverse: weight inf; expected a finite number"):
        Inverse(weight=float("inf"))


def test_functions_travel_between_processes() -> None:
    (function,) = pickle.loads(pickle.dumps(reward_functions({"correct": Correct()}, TASK)))
    assert (function.__name__, function(["503="], ["035"], answer=["035"])) == ("correct", [1.0])
