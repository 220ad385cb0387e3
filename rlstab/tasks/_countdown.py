"""Reach a target by adding and subtracting some of the given numbers."""

import random
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, final

from rlstab.errors import ConfigError
from rlstab.tasks._task import DIGITS, EmbeddedTask, Problem

__all__ = ["Countdown"]

FEWEST, MOST = 2, 9
SIGNED_DIGITS = re.compile(r"(?:[+-][0-9])+")


@final
@dataclass(frozen=True, kw_only=True)
class Countdown(EmbeddedTask):
    """Hit the target with signed digits: `352:+06=` is answered by `+3+5-2`, by `+5+3-2`, and so on.

    Each given digit may be used once, not all need be, in any order; the reward is 1 for every sum that hits the
    target and 0 for anything else. Most problems have several answers, which makes the task fit for the study of
    diversity. Problems that differ only in the order of the digits share a split.

    Args:
        numbers: how many digits are given, from 2 to 9; more numbers are harder.

    Raises:
        ConfigError: if `numbers` is outside its range.

    Example:
        >>> task = Countdown(numbers=3)
        >>> task.reward(["352:+06="] * 3, ["+3+5-2", "-2+5+3", "+6"], numbers=["352"] * 3, target=[6] * 3)
        [1.0, 1.0, 0.0]
    """

    name: ClassVar[str] = "countdown"
    alphabet: ClassVar[str] = DIGITS + "+-:="
    answer_columns: ClassVar[tuple[str, ...]] = ("numbers", "target")

    numbers: int = 3

    def __post_init__(self) -> None:
        if not FEWEST <= self.numbers <= MOST:
            raise ConfigError(f"Countdown: numbers {self.numbers}; expected between {FEWEST} and {MOST}")

    @property
    def completion_length(self) -> int:
        """Number of characters of an answer that uses every digit."""
        return 2 * self.numbers

    def draw(self, rng: random.Random) -> Problem:
        """Draw uniform digits, and a target that a random signed choice of them reaches."""
        numbers = "".join(rng.choices(DIGITS, k=self.numbers))
        chosen = rng.sample(numbers, k=rng.randint(1, self.numbers))
        solution = "".join(rng.choice("+-") + digit for digit in chosen)
        target = _total(solution)
        return Problem(
            prompt=f"{numbers}:{target:+03d}=",
            solution=solution,
            key=f"{''.join(sorted(numbers))}:{target}",
            answer={"numbers": numbers, "target": target},
        )

    def score(self, completion: str, row: Mapping[str, Any]) -> float:
        """1 if the completion uses the given digits at most once each and adds up to the target, else 0."""
        if SIGNED_DIGITS.fullmatch(completion) is None:
            return 0.0
        affordable = Counter(completion[1::2]) <= Counter(row["numbers"])
        return float(affordable and _total(completion) == row["target"])


def _total(signed_digits: str) -> int:
    return sum(int(signed_digits[start : start + 2]) for start in range(0, len(signed_digits), 2))
