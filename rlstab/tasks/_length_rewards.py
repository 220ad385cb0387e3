"""Reward parts that look at the length of a completion."""

import math
from dataclasses import dataclass, field
from typing import Literal, final

from rlstab.tasks._checks import check_fields
from rlstab.tasks._reward import Correct, Reward, RewardBatch

__all__ = ["CosineLength", "LengthUnit", "OverlongPenalty", "RelativeLength"]

LengthUnit = Literal["tokens", "characters"]
"""In what a completion's length is counted; tokens are read from the host's `completion_ids`."""


def lengths(batch: RewardBatch, unit: LengthUnit) -> list[int]:
    """The length of each completion."""
    counted = batch.column("completion_ids") if unit == "tokens" else batch.texts
    return [len(item) for item in counted]


@final
@dataclass(frozen=True, kw_only=True)
class OverlongPenalty(Reward):
    r"""DAPO's soft overlong punishment.

    $0$ for $n \le L - C$, $(L - C - n)/C$ for $L - C < n \le L$, and $-1$ beyond. The paper has $L = 20480$ and
    $C = 4096$.

    Args:
        max_length: $L$, the length from which on the penalty is whole.
        cache: $C$, the length over which it grows.
        unit: in what lengths are counted.

    Raises:
        ConfigError: if `cache` is not positive or above `max_length`.

    Example:
        >>> part = OverlongPenalty(max_length=10, cache=4)
        >>> part(["?"] * 3, ["a", "b", "c"], completion_ids=[[0] * 6, [0] * 8, [0] * 12])
        [0.0, -0.5, -1.0]

    Reference: DAPO: An Open-Source LLM Reinforcement Learning System at Scale, https://arxiv.org/abs/2503.14476.
    """

    max_length: int
    cache: int
    unit: LengthUnit = "tokens"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, {"cache": (0 < self.cache <= self.max_length, "from 1 to max_length")})

    @property
    def separable(self) -> bool:
        """Each completion is scored by itself."""
        return True

    def rewards(self, batch: RewardBatch) -> list[float | None]:
        """The penalties."""
        free = self.max_length - self.cache
        return [min(0.0, max(-1.0, (free - length) / self.cache)) for length in lengths(batch, self.unit)]


@final
@dataclass(frozen=True, kw_only=True)
class CosineLength(Reward):
    r"""A reward for correctness that follows a cosine in the length: right answers are best short, wrong ones long.

    $r = a + \tfrac12 (b - a)\,(1 + \cos(\pi\, n / L))$, from $b$ at length 0 to $a$ at $L$: for right answers from
    `right[1]` down to `right[0]`, for wrong ones from `wrong[0]` up to `wrong[1]`. A length above $L$ counts as $L$.

    kaggle-aimo2-fast-math-r1 uses it with the default values and $L$ = 30000 or 48000 characters.

    Args:
        max_length: $L$.
        right: least and greatest reward of a right answer.
        wrong: least and greatest reward of a wrong answer.
        correct: tells right answers, by a positive reward.
        unit: in what lengths are counted.

    Raises:
        ConfigError: if `max_length` is not positive, or a pair is not in order.

    Example:
        >>> from rlstab.tasks import Accuracy, ExactAnswer
        >>> part = CosineLength(max_length=4, correct=Accuracy(scorer=ExactAnswer()), unit="characters")
        >>> [round(reward, 2) for reward in part(["?"] * 3, ["ab", "abcd", "x"], answer=["ab", "abcd", "y"])]
        [0.55, 0.1, -0.87]

    Reference: Demystifying Long Chain-of-Thought Reasoning in LLMs, https://arxiv.org/abs/2502.03373; values of
        https://github.com/analokmaus/kaggle-aimo2-fast-math-r1.
    """

    max_length: int
    right: tuple[float, float] = (0.1, 1.0)
    wrong: tuple[float, float] = (-1.0, -0.1)
    correct: Reward = field(default_factory=Correct)
    unit: LengthUnit = "tokens"

    def __post_init__(self) -> None:
        super().__post_init__()
        pairs = {
            key: (pair[0] <= pair[1], "least, greatest") for key, pair in (("right", self.right), ("wrong", self.wrong))
        }
        check_fields(self, {"max_length": (self.max_length > 0, "at least 1"), **pairs})

    @property
    def separable(self) -> bool:
        """Whether correctness is."""
        return self.correct.separable

    def rewards(self, batch: RewardBatch) -> list[float | None]:
        """The rewards; None where correctness is None."""
        verdicts = self.correct.judge(batch)[0]
        return [
            None if verdict is None else self._reward(verdict > 0, length)
            for verdict, length in zip(verdicts, lengths(batch, self.unit), strict=True)
        ]

    def _reward(self, right: bool, length: int) -> float:
        end, start = self.right if right else self.wrong[::-1]
        return end + 0.5 * (start - end) * (1.0 + math.cos(math.pi * min(1.0, length / self.max_length)))


@final
@dataclass(frozen=True, kw_only=True)
class RelativeLength(Reward):
    r"""A bonus for being shorter than other completions, in full for right answers only.

    $\lambda = \tfrac12 - \dfrac{n - n_\min}{n_\max - n_\min}$ for a right answer, $\min(0, \lambda)$ for a wrong one,
    and $0$ for all if all are equally long.

    Args:
        over: among which completions the shortest and longest are sought: those of the same prompt, as in Kimi k1.5, or
            the whole call of the host, as in kaggle-aimo2-fast-math-r1.
        correct: tells right answers, by a positive reward.
        unit: in what lengths are counted.

    With several processes a call holds the completions of one of them; let its share be whole groups.

    Example:
        >>> from rlstab.tasks import Accuracy, ExactAnswer
        >>> part = RelativeLength(correct=Accuracy(scorer=ExactAnswer()), unit="characters")
        >>> part(["?"] * 3, ["a", "bb", "ccc"], answer=["a", "x", "ccc"])
        [0.5, 0.0, -0.5]

    Reference: Kimi k1.5, https://arxiv.org/abs/2501.12599; https://github.com/analokmaus/kaggle-aimo2-fast-math-r1.
    """

    over: Literal["group", "call"] = "group"
    correct: Reward = field(default_factory=Correct)
    unit: LengthUnit = "tokens"

    def rewards(self, batch: RewardBatch) -> list[float | None]:
        """The bonuses; None where correctness is None."""
        verdicts, sizes = self.correct.judge(batch)[0], lengths(batch, self.unit)
        rewards: list[float | None] = [None] * len(batch)
        for group in batch.groups if self.over == "group" else [list(range(len(batch)))]:
            least, greatest = min(sizes[index] for index in group), max(sizes[index] for index in group)
            for index in group:
                verdict = verdicts[index]
                if verdict is not None:
                    bonus = 0.5 - (sizes[index] - least) / (greatest - least) if greatest > least else 0.0
                    rewards[index] = bonus if verdict > 0 else min(0.0, bonus)
        return rewards
