"""Sums, differences and products of whole numbers."""

import math
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, final

from rlstab.tasks._checks import check_fields
from rlstab.tasks._task import DIGITS, EmbeddedTask, Problem

__all__ = ["Arithmetic"]

OPERATORS = "+-*"


@final
@dataclass(frozen=True, kw_only=True)
class Arithmetic(EmbeddedTask):
    """Compute: `37+58=` is answered by `95`.

    The reward is 1 for the exact number and 0 for anything else. Written from its last digit to its first (`reverse`),
    a sum is far easier to learn, since carries run in the order of writing. With sums or products alone, problems that
    differ only in the order of the operands share a split.

    Args:
        digits: digits of each operand, from 1 to 6; the first digit of several is not 0.
        operands: numbers to combine, from 2 to 4.
        operators: which of `+`, `-` and `*` are drawn; `*` binds first, as usual.
        reverse: whether the answer is written backwards, a minus sign last.

    Raises:
        ConfigError: if an argument is outside its range.

    Example:
        >>> task = Arithmetic(digits=2)
        >>> task.reward(["37+58="] * 3, ["95", "59", "095"], answer=["95"] * 3)
        [1.0, 0.0, 0.0]
        >>> Arithmetic(reverse=True).score("59", {"answer": "59"})
        1.0
    """

    name: ClassVar[str] = "arithmetic"
    alphabet: ClassVar[str] = DIGITS + OPERATORS + "="
    answer_columns: ClassVar[tuple[str, ...]] = ("answer",)

    digits: int = 2
    operands: int = 2
    operators: str = "+"
    reverse: bool = False

    def __post_init__(self) -> None:
        known = bool(self.operators) and set(self.operators) <= set(OPERATORS)
        check_fields(
            self,
            {
                "digits": (1 <= self.digits <= 6, "between 1 and 6"),
                "operands": (2 <= self.operands <= 4, "between 2 and 4"),
                "operators": (known, f"some of {', '.join(OPERATORS)}"),
            },
        )

    @property
    def completion_length(self) -> int:
        """Number of characters of the longest answer, its sign included."""
        factors = self.operands if "*" in self.operators else 1
        return self.digits * factors + int("*" not in self.operators) + int("-" in self.operators)

    def draw(self, rng: random.Random) -> Problem:
        """Draw uniform operands and operators."""
        least = 10 ** (self.digits - 1) if self.digits > 1 else 0
        numbers = [rng.randrange(least, 10**self.digits) for _ in range(self.operands)]
        signs = rng.choices(self.operators, k=self.operands - 1)
        text = str(numbers[0]) + "".join(f"{sign}{number}" for sign, number in zip(signs, numbers[1:], strict=True))
        answer = str(_value(text))
        answer = answer[::-1] if self.reverse else answer
        commutes = set(self.operators) in ({"+"}, {"*"})
        key = self.operators[0].join(map(str, sorted(numbers))) if commutes else text
        return Problem(prompt=f"{text}=", solution=answer, key=key, answer={"answer": answer})

    def score(self, completion: str, row: Mapping[str, Any]) -> float:
        """1 if the completion is the number, else 0."""
        return float(completion == row["answer"])


def _value(text: str) -> int:
    """The value of a sum of products."""
    terms = re.findall(r"([+-]?)([0-9*]+)", text)
    return sum((-1 if sign == "-" else 1) * math.prod(map(int, term.split("*"))) for sign, term in terms)
