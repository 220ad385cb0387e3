"""Sort the digits of a number."""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, final

from rlstab.errors import ConfigError
from rlstab.tasks._task import DIGITS, EmbeddedTask, Problem

__all__ = ["SortDigits"]

FEWEST, MOST = 2, 12


@final
@dataclass(frozen=True, kw_only=True)
class SortDigits(EmbeddedTask):
    """Write the digits of the prompt in ascending order: `503912=` is answered by `012359`.

    The reward is 1 for the exact answer and 0 for anything else. No reordering of a training problem is held out: all
    orders of the same digits share a split, so a held-out answer was never shown in training.

    Args:
        digits: number of digits to sort, from 2 to 12; more digits are harder.

    Raises:
        ConfigError: if `digits` is outside its range.

    Example:
        >>> task = SortDigits(digits=3)
        >>> task.reward(["503="] * 3, ["035", "053", "0355"], answer=["035"] * 3)
        [1.0, 0.0, 0.0]
        >>> task.prompts(2, split="test").column_names
        ['prompt', 'answer']
    """

    name: ClassVar[str] = "sort_digits"
    alphabet: ClassVar[str] = DIGITS + "="
    answer_columns: ClassVar[tuple[str, ...]] = ("answer",)

    digits: int = 6

    def __post_init__(self) -> None:
        if not FEWEST <= self.digits <= MOST:
            raise ConfigError(f"SortDigits: digits {self.digits}; expected between {FEWEST} and {MOST}")

    @property
    def completion_length(self) -> int:
        """Number of characters of the answer."""
        return self.digits

    def draw(self, rng: random.Random) -> Problem:
        """Draw a number of `digits` digits, each uniform."""
        number = "".join(rng.choices(DIGITS, k=self.digits))
        answer = "".join(sorted(number))
        return Problem(prompt=f"{number}=", solution=answer, key=answer, answer={"answer": answer})

    def score(self, completion: str, row: Mapping[str, Any]) -> float:
        """1 if the completion is the sorted digits, else 0."""
        return float(completion == row["answer"])
