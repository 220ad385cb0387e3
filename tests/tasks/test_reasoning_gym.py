"""Data sets of reasoning-gym by name."""

import sys
from typing import Any

import pytest

from rlstab.errors import ConfigError
from rlstab.tasks import ReasoningGymTask, Split


def test_without_reasoning_gym(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    monkeypatch.setitem(sys.modules, "reasoning_gym.factory", None)
    with pytest.raises(ConfigError, match=r"ReasoningGymTask needs reasoning-gym, .*: pip install 'rlstab\[tasks\]'$"):
        ReasoningGymTask(dataset="an uncached name")


def test_a_tag_is_a_word() -> None:
    with pytest.raises(ConfigError, match=r"ReasoningGymTask: tag 'a b'; expected letters, digits and underscores"):
        ReasoningGymTask(dataset="basic_arithmetic", tag="a b")


@pytest.fixture
def gym() -> type[ReasoningGymTask]:
    pytest.importorskip("reasoning_gym", reason="needs reasoning-gym, of the extra `tasks`")
    return ReasoningGymTask


@pytest.fixture
def task(gym: type[ReasoningGymTask]) -> ReasoningGymTask:
    return gym(dataset="chain_sum", parameters={"min_terms": 2, "max_terms": 3})


def answers(task: ReasoningGymTask, rows: Any) -> list[str]:
    """The right answers, from the library itself."""
    from reasoning_gym import create_dataset

    return [
        create_dataset(task.dataset, **task.parameters, size=1000, seed=row["generator"])[row["index"]]["answer"]
        for row in rows
    ]


@pytest.mark.parametrize("split", ["train", "test"])
def test_prompts_follow_split_and_seed(task: ReasoningGymTask, split: Split) -> None:
    rows = task.prompts(20, split=split, seed=3)
    assert rows.column_names == ["prompt", "generator", "index"]
    assert len(rows) == 20
    assert rows[:] == task.prompts(20, split=split, seed=3)[:]
    assert rows["prompt"][:] != task.prompts(20, split=split, seed=4)["prompt"][:]
    assert rows[0]["prompt"][0]["role"] == "user"
    assert rows[0]["prompt"][0]["content"].endswith("Give the final answer between <answer> and </answer>.")


def test_splits_are_disjoint(gym: type[ReasoningGymTask]) -> None:
    small = gym(dataset="chain_sum", parameters={"max_terms": 2, "max_digits": 1}, chat=False)
    train, test = (set(small.prompts(60, split=split)["prompt"]) for split in ("train", "test"))
    assert not train & test


def test_the_answer_is_taken_out_of_its_tag(task: ReasoningGymTask) -> None:
    rows = task.prompts(3)
    right = answers(task, rows)
    columns = {"generator": rows["generator"][:], "index": rows["index"][:]}
    for form, reward in (
        ("<answer>{}</answer>", 1.0),
        ("<answer>1</answer> no, <answer>\n{} </answer> Done.", 1.0),
        ("{}", 0.0),
        ("<answer>nothing like {}1</answer>", 0.0),
    ):
        assert task.reward(rows["prompt"][:], [form.format(text) for text in right], **columns) == [reward] * 3


def test_partial_credit_where_asked_for(gym: type[ReasoningGymTask]) -> None:
    strict, lenient = (gym(dataset="chain_sum", partial=partial) for partial in (False, True))
    row = strict.prompts(1)[0]
    (right,) = answers(strict, [row])
    completion = f"<answer>it is {right}</answer>"
    assert strict.score(completion, row) == 0.0
    assert 0.0 < lenient.score(completion, row) < 1.0


def test_names_and_parameters_are_checked(gym: type[ReasoningGymTask]) -> None:
    with pytest.raises(
        ConfigError, match=r"dataset 'chain_sums' is none of the \d+ of reasoning-gym; nearest: chain_sum"
    ):
        gym(dataset="chain_sums")
    with pytest.raises(ConfigError, match=r"dataset 'chain_sum' refuses parameters \{\"terms\": 2\}: .*'terms'"):
        gym(dataset="chain_sum", parameters={"terms": 2})
    with pytest.raises(ConfigError, match=r"dataset 'chain_sum' refuses parameters \{\"min_terms\": -1\}: "):
        gym(dataset="chain_sum", parameters={"min_terms": -1})
    with pytest.raises(ConfigError, match="n 0; expected at least 1"):
        gym(dataset="chain_sum").prompts(0)


def test_a_split_that_cannot_be_filled(task: ReasoningGymTask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlstab.tasks._reasoning_gym.MOST_TRIES", 0)
    with pytest.raises(ConfigError, match=r"600 prompts of split 'test'; found \d+ among 1000 problems of 'chain_sum'"):
        task.prompts(600, split="test")
