"""Rollouts: their parts fit together, turns join, equality looks at every field."""

import dataclasses

import pytest
import torch

from rlstab.errors import ConfigError, ShapeError
from rlstab.rollouts import NOT_SAMPLED, KeptSets, Rollout, Timing, Turn, join_turns


def turn(prompt: list[int], tokens: list[int], *, version: int = 0, experts: int = 0) -> Rollout:
    size = len(tokens)
    return Rollout(
        prompt_ids=torch.tensor(prompt),
        token_ids=torch.tensor(tokens),
        loss_mask=torch.ones(size, dtype=torch.bool),
        logprobs=-torch.tensor(tokens).float(),
        weight_versions=torch.full((size,), version),
        turns=(Turn("policy", 0, size),),
        finish_reason="stop",
        engine=f"engine {version}",
        timing=Timing(waiting=1.0, generating=2.0),
        kept=KeptSets(torch.tensor(tokens), torch.ones(size, dtype=torch.int64)),
        routed_experts=torch.full((len(prompt) + size - 1, 1, 1), experts),
    )


FIRST = turn([1, 2], [3, 4], version=5, experts=8)
SECOND = turn([1, 2, 3, 4, 50, 60, 70], [6, 7], version=6, experts=9)


def test_joined_turns_mark_what_the_tool_wrote() -> None:
    whole = join_turns([FIRST, SECOND])
    assert whole.prompt_ids.tolist() == [1, 2]
    assert whole.token_ids.tolist() == [3, 4, 50, 60, 70, 6, 7]
    assert whole.loss_mask.tolist() == [True, True, False, False, False, True, True]
    assert whole.logprobs.nan_to_num(1.0).tolist() == [-3, -4, 1, 1, 1, -6, -7]
    assert whole.weight_versions.tolist() == [5, 5, *[NOT_SAMPLED] * 3, 6, 6]
    assert whole.turns == (Turn("policy", 0, 2), Turn("tool", 2, 5), Turn("policy", 5, 7))
    assert (whole.engine, whole.finish_reason) == ("engine 6", "stop")
    assert whole.timing == Timing(waiting=2.0, generating=4.0)


def test_joined_turns_keep_kept_sets_and_each_turns_own_routes() -> None:
    whole = join_turns([FIRST, SECOND])
    assert whole.kept is not None
    assert whole.routed_experts is not None
    assert [kept.tolist() for kept in whole.kept.split()] == [[3], [4], [], [], [], [6], [7]]
    assert whole.routed_experts.flatten().tolist() == [8, 8, 8, 9, 9, 9, 9, 9]
    without = join_turns([FIRST, dataclasses.replace(SECOND, kept=None, routed_experts=None)])
    assert without.kept is None
    assert without.routed_experts is None


def test_three_turns_join_like_two_and_one() -> None:
    third = turn([1, 2, 3, 4, 50, 60, 70, 6, 7, 80], [9])
    assert join_turns([FIRST, SECOND, third]) == join_turns([join_turns([FIRST, SECOND]), third])


def test_a_turn_without_a_tool_between_adds_no_tool_turn() -> None:
    whole = join_turns([FIRST, turn([1, 2, 3, 4], [5])])
    assert whole.turns == (Turn("policy", 0, 2), Turn("policy", 2, 3))


@pytest.mark.parametrize("prompt", [[1, 2, 3], [1, 2, 9, 4, 50]])
def test_turns_of_different_conversations_do_not_join(prompt: list[int]) -> None:
    with pytest.raises(ConfigError, match="does not begin with prompt and completion"):
        join_turns([FIRST, turn(prompt, [5])])
    with pytest.raises(ConfigError, match="no rollout"):
        join_turns([])


@pytest.mark.wrong_shapes
@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("loss_mask", torch.ones(3, dtype=torch.bool), "loss_mask covers 3 tokens; expected 2"),
        ("logprobs", torch.zeros(1), "logprobs covers 1"),
        ("logprobs", torch.zeros(2, dtype=torch.float64), "expected a vector of torch.float32"),
        ("token_ids", torch.zeros(2, 1, dtype=torch.int64), "expected a vector of torch.int64"),
        ("turns", (Turn("policy", 0, 1),), "turns covers 1"),
        ("kept", KeptSets(torch.tensor([1]), torch.tensor([1])), "kept covers 1"),
        ("routed_experts", torch.zeros(4, 1, 1), "for 3 tokens"),
    ],
)
def test_parts_that_do_not_fit_are_refused(field: str, value: object, message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        dataclasses.replace(FIRST, **{field: value})  # type: ignore[arg-type]


def test_equality_sees_every_field() -> None:
    again = turn([1, 2], [3, 4], version=5, experts=8)
    assert again == FIRST
    changes: dict[str, object] = {
        "prompt_ids": torch.tensor([1, 3]),
        "token_ids": torch.tensor([3, 5]),
        "loss_mask": torch.tensor([True, False]),
        "logprobs": torch.tensor([-3.0, torch.nan]),
        "weight_versions": torch.tensor([5, 6]),
        "turns": (Turn("tool", 0, 2),),
        "finish_reason": "length",
        "engine": "other",
        "timing": Timing(waiting=1.0, generating=2.5),
        "kept": None,
        "routed_experts": None,
        "images": (torch.zeros(1, 1, 1),),
        "features": {"a": torch.zeros(1)},
    }
    assert changes.keys() == {field.name for field in dataclasses.fields(Rollout)}
    for name, value in changes.items():
        changed = dataclasses.replace(FIRST, **{name: value})  # type: ignore[arg-type]
        assert changed != FIRST
        assert changed == dataclasses.replace(changed)
    assert FIRST != "a rollout"
