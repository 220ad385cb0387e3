"""Restart and explore: go on from the middle of an earlier attempt."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, final

from rlstab.errors import ConfigError
from rlstab.tasks._checks import check_fields
from rlstab.tasks._reward import Correct, Reward, RewardBatch

__all__ = ["RestartBonus", "restart_row"]


def restart_row(
    prompt: str, steps: Sequence[str], *, right: bool, rng: random.Random, marker: str = "<|reflect|>"
) -> dict[str, Any]:
    """A row whose prompt goes on from a random step of an earlier attempt, after Satori's restart-and-explore.

    The prompt is followed by the first steps of the attempt and by a marker that asks for reflection. How many steps
    are kept is drawn uniformly, from one to all; what distribution the authors' data were made with is not in their
    code. Add the dataset's answer columns, give `restart` 0 to ordinary rows, and train on both with `RestartBonus`.

    Args:
        prompt: the problem.
        steps: the attempt, step by step, as text that can be joined.
        right: whether the attempt came to a right answer.
        rng: draws where to restart.
        marker: text, often one special token, after the kept steps.

    Returns:
        `prompt`, and in `restart` 1 for an attempt that was right and -1 for one that was wrong.

    Raises:
        ConfigError: if the attempt has no step.

    Example:
        >>> restart_row("2 + 3 * 4 = ", ["2 + 3 = 5. ", "5 * 4 = 20. "], right=False, rng=random.Random(1))
        {'prompt': '2 + 3 * 4 = 2 + 3 = 5. <|reflect|>', 'restart': -1}

    Reference: Satori: Reinforcement Learning with Chain-of-Action-Thought, https://arxiv.org/abs/2502.02508.
    """
    if not steps:
        raise ConfigError("restart_row: steps is empty; expected an attempt of at least one step")
    kept = "".join(steps[: rng.randint(1, len(steps))])
    return {"prompt": f"{prompt}{kept}{marker}", "restart": 1 if right else -1}


@final
@dataclass(frozen=True, kw_only=True)
class RestartBonus(Reward):
    """Satori's reflection bonus: for mending a wrong attempt, against spoiling a right one.

    `scale` if the attempt was wrong and the completion is right, `-scale` if the attempt was right and the completion
    is wrong, 0 otherwise and without a restart. The authors use it with scale 0.5, beside 0 for a right and -1 for a
    wrong answer (`Stepped`), with PPO, and with a reward model that is not part of this.

    Args:
        scale: size of the bonus.
        correct: tells right completions, by a positive reward.

    Raises:
        ConfigError: if `scale` is negative.

    Example:
        >>> from rlstab.tasks import MatchesPattern
        >>> part = RestartBonus(correct=MatchesPattern(pattern="14"))
        >>> part(["?"] * 4, ["14", "20", "20", "14"], restart=[-1, -1, 1, 0])
        [0.5, 0.0, -0.5, 0.0]

    Reference: Satori, https://arxiv.org/abs/2502.02508; as in its code, https://github.com/satori-reasoning/Satori.
    """

    scale: float = 0.5
    correct: Reward = field(default_factory=Correct)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, {"scale": (self.scale >= 0, "at least 0")})

    @property
    def columns(self) -> tuple[str, ...]:
        """What the completion goes on from: 1 a right attempt, -1 a wrong one, 0 none."""
        return ("restart",)

    @property
    def separable(self) -> bool:
        """Whether correctness is."""
        return self.correct.separable

    def rewards(self, batch: RewardBatch) -> list[float | None]:
        """The bonuses; None where correctness is None."""
        verdicts = self.correct.judge(batch)[0]
        return [
            None if verdict is None else self._bonus(int(restart), verdict > 0)
            for restart, verdict in zip(batch.column("restart"), verdicts, strict=True)
        ]

    def _bonus(self, restart: int, right: bool) -> float:
        if restart == -1 and right:
            return self.scale
        return -self.scale if restart == 1 and not right else 0.0
