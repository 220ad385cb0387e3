from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import pytest
from datasets import Dataset

from rlstab.errors import RewardError
from rlstab.tasks import Split, Task


class Lookup(Task):
    """Scores by looking the completion up, so that a test decides what `score` returns."""

    name: ClassVar[str] = "lookup"
    answer_columns: ClassVar[tuple[str, ...]] = ("scores", "offset")

    def prompts(self, n: int, *, split: Split = "train", seed: int = 0) -> Dataset:
        return Dataset.from_dict({"prompt": ["?"] * n, "scores": [{"a": 1.0}] * n, "offset": [seed] * n})

    def score(self, completion: str, row: Mapping[str, Any]) -> float | None:
        value: float | None = row["scores"][completion]
        return value if row["offset"] == 0 or value is None else value + row["offset"]


def score(value: Any, **changes: Any) -> list[float | None]:
    columns = {"scores": [{"a": value}], "offset": [0]} | changes
    return Lookup().reward(["?"], ["a"], **columns)


@pytest.mark.parametrize("value", [0.0, 1.0, -2.5, 3, np.float64(0.25)])
def test_a_finite_number_passes_as_a_float(value: float) -> None:
    (reward,) = score(value)
    assert reward == value
    assert isinstance(reward, float)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), True, "1.0", [1.0]])
def test_anything_else_is_an_error_that_shows_it(value: Any) -> None:
    with pytest.raises(RewardError, match=r"^task lookup: score .*; expected a finite number or None; completion 'a'$"):
        score(value)


def test_a_verifier_that_raises_is_named_with_the_completion() -> None:
    with pytest.raises(RewardError, match=r"^task lookup: KeyError: 'b'; completion 'b'$"):
        Lookup().reward(["?"] * 3, ["a", "b", "c"], scores=[{"a": 1.0}] * 3, offset=[0] * 3)


class Together(Lookup):
    """Scores only all at once."""

    def scores(self, completions: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[float | None]:
        return [1.0]


def test_a_failure_of_all_together() -> None:
    assert Together().reward(["?"], ["a"], scores=[{}], offset=[0]) == [1.0]
    with pytest.raises(RewardError, match=r"^task lookup: 1 scores for 2 completions; no completion fails by itself$"):
        Together().reward(["?"] * 2, ["a"] * 2, scores=[{}] * 2, offset=[0] * 2)


def test_none_from_the_verifier_stays_none() -> None:
    assert score(None) == [None]


def test_a_row_without_an_answer_is_left_unscored() -> None:
    rewards = Lookup().reward(["?", "?"], ["a", "a"], scores=[None, {"a": 1.0}], offset=[0, 2])
    assert rewards == [None, 3.0]


def test_other_arguments_of_the_trainer_are_ignored() -> None:
    assert score(1.0, trainer_state=object(), completion_ids=[[1]], log_metric=print) == [1.0]


def test_conversational_completions_are_scored_by_their_last_message() -> None:
    conversation = [{"role": "assistant", "content": "b"}, {"role": "assistant", "content": "a"}]
    prompt = [{"role": "user", "content": "?"}]
    assert Lookup().reward([prompt], [conversation], scores=[{"a": 1.0, "b": 0.0}], offset=[0]) == [1.0]


@pytest.mark.parametrize("completion", [[], [{"role": "assistant", "content": None}], [{"role": "assistant"}]])
def test_a_completion_without_text_is_an_error(completion: list[dict[str, Any]]) -> None:
    with pytest.raises(RewardError, match="expected text or messages ending in text"):
        Lookup().reward(["?"], [completion], scores=[{}], offset=[0])


def test_a_missing_column_is_named_with_those_there_are() -> None:
    with pytest.raises(RewardError, match=r"column 'offset' is missing; the dataset has \['answer', 'scores'\]"):
        Lookup().reward(["?"], ["a"], scores=[{"a": 1.0}], answer=["a"])


@pytest.mark.parametrize(
    ("completions", "offset", "key"), [(["a"], [0, 0], "completions has 1"), (["a", "a"], [0], "offset has 1")]
)
def test_lengths_must_agree(completions: list[str], offset: list[int], key: str) -> None:
    with pytest.raises(RewardError, match=f"{key} values; expected one for each of 2 prompts"):
        Lookup().reward(["?", "?"], completions, scores=[{"a": 1.0}] * 2, offset=offset)


def test_an_empty_batch_gives_no_rewards() -> None:
    assert Lookup().reward([], [], scores=[], offset=[]) == []
