"""A task of several steps, each of which needs the one before."""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, ClassVar, final

from rlstab.tasks._checks import check_fields
from rlstab.tasks._task import DIGITS, EmbeddedTask, Problem

__all__ = ["RunningSum"]

FEWEST, MOST = 2, 12


@final
@dataclass(frozen=True, kw_only=True)
class RunningSum(EmbeddedTask):
    """Write every partial sum of the digits, modulo 10: `38561=` is answered by `31623`.

    Each character is a step that adds one digit to the step before, so one error spoils what follows. The reward is 1
    if all steps are right, and 0 otherwise; `steps_right` tells how far a completion came.

    Args:
        digits: number of digits to add, from 2 to 12, and so of steps; more are harder.

    Raises:
        ConfigError: if `digits` is outside its range.

    Example:
        >>> task = RunningSum(digits=5)
        >>> task.reward(["38561="] * 2, ["31623", "31624"], answer=["31623"] * 2)
        [1.0, 0.0]
        >>> task.steps_right("31723", {"answer": "31623"})
        2
    """

    name: ClassVar[str] = "running_sum"
    alphabet: ClassVar[str] = DIGITS + "="
    answer_columns: ClassVar[tuple[str, ...]] = ("answer",)

    digits: int = 5

    def __post_init__(self) -> None:
        check_fields(self, {"digits": (FEWEST <= self.digits <= MOST, f"between {FEWEST} and {MOST}")})

    @property
    def completion_length(self) -> int:
        """Number of characters of the answer, one for each step."""
        return self.digits

    def draw(self, rng: random.Random) -> Problem:
        """Draw a number of `digits` digits, each uniform."""
        digits = rng.choices(range(10), k=self.digits)
        number = "".join(map(str, digits))
        answer = "".join(str(total % 10) for total in accumulate(digits))
        return Problem(prompt=f"{number}=", solution=answer, key=number, answer={"answer": answer})

    def score(self, completion: str, row: Mapping[str, Any]) -> float:
        """1 if all steps are right, else 0."""
        return float(completion == row["answer"])

    def steps_right(self, completion: str, row: Mapping[str, Any]) -> int:
        """How many steps are right before the first that is not."""
        pairs = zip(completion, row["answer"], strict=False)
        return next(
            (index for index, (given, right) in enumerate(pairs) if given != right), min(len(completion), self.digits)
        )
