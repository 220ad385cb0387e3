"""Each reward part against numbers worked by hand from the paper or its code."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from transformers import TrainerState

from rlstab.errors import ConfigError, RewardError
from rlstab.tasks import (
    Accuracy,
    CosineLength,
    DifficultyTag,
    EasyLength,
    ExactAnswer,
    Gated,
    MatchesPattern,
    OverlongPenalty,
    Product,
    Refined,
    RelativeLength,
    Reward,
    RewardBatch,
    Stage,
    Stepped,
    TagFormat,
)


@dataclass(frozen=True, kw_only=True)
class Given(Reward):
    """The values of a column."""

    column: str = "given"

    @property
    def separable(self) -> bool:
        return True

    def rewards(self, batch: RewardBatch) -> Sequence[float | None]:
        return batch.column(self.column)


def call(part: Reward, completions: Sequence[str], **columns: Any) -> Any:
    return part(columns.pop("prompts", ["?"] * len(completions)), completions, **columns)


def tokens(*lengths: int) -> list[list[int]]:
    return [[0] * length for length in lengths]


GOOD = "<think>a</think><answer>b</answer>"
FORMATS = {
    GOOD: ("nothing", "space", "anything"),
    f"\n{GOOD}  ": ("nothing", "space", "anything"),
    "<think></think><answer>b</answer>": ("nothing", "space", "anything"),
    "<think>a\nb</think>\n<answer>b\nc</answer>": ("space", "anything"),
    "<think>a</think> so <answer>b</answer>": ("anything",),
    f"well {GOOD}": ("anything",),
    f"{GOOD} end": ("anything",),
    f"{GOOD}{GOOD}": (),
    "<think>a</think>": (),
    "<answer>b</answer><think>a</think>": (),
    "<think>a<answer>b</answer></think>": (),
    "<think><think>a</think><answer>b</answer>": (),
    "": (),
}


@pytest.mark.parametrize("around", ["nothing", "space", "anything"])
def test_tag_format(around: Any) -> None:
    expected = [1.0 if around in holds else 0.0 for holds in FORMATS.values()]
    assert call(TagFormat(around=around), list(FORMATS)) == expected


def test_tag_format_with_other_tags_and_values() -> None:
    part = TagFormat(answer="translate", around="anything", wrong=-1.0)
    assert call(part, ["<think>a</think>\n<translate>b</translate>", GOOD]) == [1.0, -1.0]


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        (r"so \boxed{4}</think> Done.", 1.0),
        ("\\boxed{4}\n</think>", 1.0),
        (r"</think> \boxed{4}", 0.0),
        (r"\boxed{4}", 0.0),
    ],
)
def test_the_format_of_fast_math(completion: str, reward: float) -> None:
    assert call(MatchesPattern(pattern=r"\\boxed\{.*?\}.*?</think>"), [completion]) == [reward]


def test_a_pattern_that_is_none() -> None:
    with pytest.raises(ConfigError, match=r"MatchesPattern: pattern '\(' is no regular expression"):
        MatchesPattern(pattern="(")


def test_accuracy_inside_a_tag() -> None:
    part = Accuracy(scorer=ExactAnswer(), column="gold", inside="answer")
    completions = ["<answer>1</answer><answer>2</answer>", "<answer>\n2\n</answer>", "2", "<answer>2</answer>"]
    assert call(part, completions, gold=["2", "2", "2", None]) == [1.0, 1.0, 0.0, None]


def test_lmm_r1() -> None:
    parts: dict[str, Reward] = {
        "format": 0.5 * TagFormat(),
        "accuracy": Accuracy(scorer=ExactAnswer(), inside="answer"),
    }
    rewards = [call(part, [GOOD, GOOD, "b"], answer=["b", "c", "b"]) for part in parts.values()]
    totals = [sum(p.weight * r for p, r in zip(parts.values(), row, strict=True)) for row in zip(*rewards, strict=True)]
    assert totals == [1.5, 0.5, 0.0]


def test_r1_reward() -> None:
    correct, judge, layout = (Given(column=name) for name in ("correct", "consistent", "form"))
    parts = {"format": 0.5 * layout, "correct": correct, "agrees": 0.5 * Product(factors=[correct, judge])}
    columns = {"form": [1, 1, 0, 1], "correct": [1, 1, 1, 0], "consistent": [1, -1, 0, 1]}
    rewards = [call(part, ["x"] * 4, **columns) for part in parts.values()]
    totals = [sum(p.weight * r for p, r in zip(parts.values(), row, strict=True)) for row in zip(*rewards, strict=True)]
    assert totals == [2.0, 1.0, 1.0, 0.5]


def test_mt_r1_zero() -> None:
    tags = TagFormat(answer="translate", around="anything", wrong=-1.0)
    translation = Gated(part=Given(), gate=tags, otherwise=-2.0)
    good, bad = "<think>a</think><translate>b</translate>", "<translate>b</translate>"
    totals = [
        sum(values)
        for values in zip(call(tags, [good, bad]), call(translation, [good, bad], given=[0.25, 0.25]), strict=True)
    ]
    assert totals == [1.25, -3.0]


def test_mt_r1_zero_in_steps() -> None:
    part = Stepped(part=Given(), threshold=0.3)
    assert call(part, ["a"] * 4, given=[0.31, 0.3, 0.1, None]) == [2.0, -1.5, -1.5, None]


def test_products_and_gates_pass_on_what_cannot_be_judged() -> None:
    pair = [Given(column="a"), Given(column="b")]
    columns = {"a": [2.0, None, 0.0], "b": [3.0, 3.0, None]}
    assert call(Product(factors=pair), ["x"] * 3, **columns) == [6.0, None, None]
    assert call(Gated(part=pair[1], gate=pair[0], otherwise=-1.0), ["x"] * 3, **columns) == [3.0, None, -1.0]
    with pytest.raises(ConfigError, match="Product: factors has 1 parts; expected at least 2"):
        Product(factors=pair[:1])


def test_separable_if_all_parts_are() -> None:
    comparing = RelativeLength()
    assert not comparing.separable
    assert Product(factors=[Given(), Given()]).separable
    assert not Product(factors=[Given(), comparing]).separable
    assert not Gated(part=Given(), gate=comparing, otherwise=0.0).separable
    assert not Stepped(part=comparing).separable
    assert not CosineLength(max_length=4, correct=comparing).separable
    assert not Refined(part=comparing).separable


def test_soft_overlong_punishment() -> None:
    part = OverlongPenalty(max_length=20480, cache=4096)
    ids = tokens(100, 16384, 18432, 20480, 21000)
    assert call(part, ["a"] * 5, completion_ids=ids) == [0.0, 0.0, -0.5, -1.0, -1.0]


def test_lengths_in_tokens_need_the_ids() -> None:
    with pytest.raises(RewardError, match=r"column 'completion_ids' is missing"):
        call(OverlongPenalty(max_length=4, cache=2), ["a"])


@pytest.mark.parametrize(("max_length", "cache"), [(4, 0), (4, 5), (0, 0)])
def test_the_cache_lies_within_the_length(max_length: int, cache: int) -> None:
    with pytest.raises(ConfigError, match=f"OverlongPenalty: cache {cache}; expected from 1 to max_length"):
        OverlongPenalty(max_length=max_length, cache=cache)


@pytest.mark.parametrize(
    ("length", "verdict", "reward"),
    [
        (0, 1.0, 1.0),
        (50, 1.0, 0.55),
        (100, 1.0, 0.1),
        (1000, 1.0, 0.1),
        (0, 0.0, -1.0),
        (50, 0.0, -0.55),
        (100, 0.0, -0.1),
        (25, 1.0, 0.1 + 0.45 * (1 + math.cos(math.pi / 4))),
        (25, -1.0, -0.1 - 0.45 * (1 + math.cos(math.pi / 4))),
        (25, None, None),
    ],
)
def test_cosine_length(length: int, verdict: float | None, reward: float | None) -> None:
    part = CosineLength(max_length=100, correct=Given())
    (given,) = call(part, ["a"], given=[verdict], completion_ids=tokens(length))
    assert given == (None if reward is None else pytest.approx(reward))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_length": 0}, "max_length 0; expected at least 1"),
        ({"wrong": (0.0, -1.0)}, r"wrong \(0\.0, -1\.0\); expected"),
    ],
)
def test_cosine_length_refuses(changes: Mapping[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"CosineLength: {message}"):
        CosineLength(**{"max_length": 8, **changes})


def test_relative_length_within_groups_and_over_the_call() -> None:
    columns = {"given": [1, 0, 1, 1, 0, None], "completion_ids": tokens(10, 10, 20, 40, 60, 50)}
    prompts = ["p", "q", "p", "q", "q", "q"]
    within = call(RelativeLength(correct=Given()), ["a"] * 6, prompts=prompts, **columns)
    assert within[:5] == pytest.approx([0.5, 0.0, -0.5, -0.1, -0.5])
    assert within[5] is None
    over = call(RelativeLength(correct=Given(), over="call"), ["a"] * 6, prompts=prompts, **columns)
    assert over[:5] == pytest.approx([0.5, 0.0, 0.3, -0.1, -0.5])


def test_equal_lengths_earn_nothing() -> None:
    assert call(RelativeLength(correct=Given()), ["a"] * 2, given=[1, 0], completion_ids=tokens(3, 3)) == [0.0, 0.0]


@pytest.mark.parametrize(("right", "easy"), [(5, False), (6, True)])
def test_a_problem_is_easy_above_five_of_eight(right: int, easy: bool) -> None:
    completions = ["[Easy] a", "[hard] a", "a", " [Easy]", "[Easy", "[EASY]", "[Hard]", "[Medium]"]
    rewards = call(DifficultyTag(correct=Given()), completions, given=[1.0] * right + [0.0] * (8 - right))
    tagged = [1.0, 0.0, -1.0, -1.0, -1.0, 1.0, 0.0, -1.0]
    assert rewards == [reward if reward < 0 or easy else 1.0 - reward for reward in tagged]


def test_difficulty_is_told_from_what_could_be_judged() -> None:
    prompts = ["p", "p", "q"]
    part = DifficultyTag(correct=Given())
    assert call(part, ["[Easy]"] * 3, prompts=prompts, given=[1.0, None, None]) == [1.0, 1.0, None]
    with pytest.raises(ConfigError, match=r"DifficultyTag: threshold 1\.0; expected a share"):
        DifficultyTag(threshold=1.0)


def test_short_answers_to_easy_problems() -> None:
    completions = ["[Easy]", "[Easy]", "[Hard]", "[Easy]", "none", "[Easy]"]
    columns = {"given": [1, 1, 1, 0, 1, None], "completion_ids": tokens(500, 1000, 100, 100, 100, 100)}
    assert call(EasyLength(correct=Given()), completions, **columns) == pytest.approx([0.5, 0.0, 0.0, 0.0, 0.0, None])


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, [0.0, 0.5, 0.6, 0.75, 1.0, 1.0]),
        (1499, [0.0, 0.5, 0.6, 0.75, 1.0, 1.0]),
        (1500, [0.0, 0.0, 0.0, 0.75, 0.9, 1.0]),
    ],
)
def test_progressive_rule_refinement(step: int, expected: list[float]) -> None:
    values = [0.49, 0.5, 0.6, 0.75, 0.9, 0.91]
    state = TrainerState(global_step=step)
    assert call(Refined(part=Given()), ["a"] * 6, given=values, trainer_state=state) == expected


def test_refinement_needs_the_step_and_ordered_stages() -> None:
    with pytest.raises(RewardError, match=r"'trainer_state' is missing"):
        call(Refined(part=Given()), ["a"], given=[0.5])
    for starts in ([], [1], [0, 0], [0, 5, 3]):
        with pytest.raises(ConfigError, match=r"Refined: stages begin at steps .* expected 0 first"):
            Refined(part=Given(), stages=[Stage(start=start, low=0.1, high=0.2) for start in starts])
    with pytest.raises(ConfigError, match=r"Stage: low 0\.5; expected at most high \(0\.2\)"):
        Stage(start=0, low=0.5, high=0.2)
    with pytest.raises(ConfigError, match=r"Stage: start -1; expected at least 0"):
        Stage(start=-1, low=0.1, high=0.2)


def test_groups_are_prompts_plain_or_conversational() -> None:
    one, other = [{"role": "user", "content": "1"}], [{"role": "user", "content": "2"}]
    batch = RewardBatch(prompts=[one, one, other, [dict(one[0])]], completions=["a"] * 4)
    assert batch.groups == [[0, 1, 3], [2]]
