"""Two skills in one model, of which training exercises one: what becomes of the other?"""

import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Literal, final

from rlstab.tasks._checks import check_fields
from rlstab.tasks._countdown import Countdown
from rlstab.tasks._sort_digits import SortDigits
from rlstab.tasks._task import EmbeddedTask, Problem, Split

__all__ = ["TwoSkills"]

Skill = Literal["trained", "kept"]
MARKS: dict[Skill, str] = {"trained": "A", "kept": "B"}


@final
@dataclass(frozen=True, kw_only=True)
class TwoSkills(EmbeddedTask):
    """A task for the study of forgetting: demonstrations show two skills, training asks for one, the test for either.

    The warm-up learns both from a mixture of demonstrations. Training prompts come from `trained` alone; what the
    held-out prompts ask for is `tested`, so that their pass@1 is what is left of the other skill, or the mean of both.
    A letter before each prompt (`A` trained, `B` kept) tells them apart.

    Args:
        trained: the skill that training prompts ask for.
        kept: the skill that only demonstrations show.
        share: share of the trained skill among the demonstrations.
        tested: what the held-out prompts ask for.

    Raises:
        ConfigError: if `share` is no probability.

    Example:
        >>> task = TwoSkills(trained=SortDigits(digits=3), kept=Countdown(numbers=2))
        >>> [row["prompt"][0] for row in (task.prompts(1)[0], task.prompts(1, split="test")[0])]
        ['A', 'B']
        >>> task.score("035", {"skill": "trained", "answer": '{"answer": "035"}'})
        1.0
    """

    name: ClassVar[str] = "two_skills"
    answer_columns: ClassVar[tuple[str, ...]] = ("skill", "answer")

    trained: EmbeddedTask = field(default_factory=Countdown)
    kept: EmbeddedTask = field(default_factory=SortDigits)
    share: float = 0.5
    tested: Literal["trained", "kept", "both"] = "kept"

    def __post_init__(self) -> None:
        check_fields(self, {"share": (0 <= self.share <= 1, "a share between 0 and 1")})

    @property
    def alphabet(self) -> str:
        """The characters of both skills, and the two letters."""
        return "".join(dict.fromkeys("".join(MARKS.values()) + self.trained.alphabet + self.kept.alphabet))

    @property
    def completion_length(self) -> int:
        """That of the skill with the longer one."""
        return max(self.trained.completion_length, self.kept.completion_length)

    def draw(self, rng: random.Random) -> Problem:
        """Draw a problem of either skill."""
        return self._problem("trained" if rng.random() < self.share else "kept", rng)

    def score(self, completion: str, row: Mapping[str, Any]) -> float | None:
        """The verdict of the row's own skill."""
        return self._skills[row["skill"]].score(completion, json.loads(row["answer"]))

    @property
    def _skills(self) -> dict[str, EmbeddedTask]:
        return {"trained": self.trained, "kept": self.kept}

    def _drawn_from(self, split: Split) -> Callable[[random.Random], Problem]:
        if split == "train":
            return partial(self._problem, "trained")
        if self.tested == "both":
            return lambda rng: self._problem(rng.choice(("trained", "kept")), rng)
        return partial(self._problem, self.tested)

    def _problem(self, skill: Skill, rng: random.Random) -> Problem:
        problem = self._skills[skill].draw(rng)
        return Problem(
            prompt=MARKS[skill] + problem.prompt,
            solution=problem.solution,
            key=f"{skill} {problem.key}",
            answer={"skill": skill, "answer": json.dumps(problem.answer)},
        )
