"""AdaCtrl: the policy says how hard a problem is, and spends tokens accordingly."""

import math
import re
from dataclasses import dataclass, field
from typing import final

from rlstab.tasks._checks import check_fields
from rlstab.tasks._length_rewards import LengthUnit, lengths
from rlstab.tasks._reward import Correct, Reward, RewardBatch

__all__ = ["DifficultyTag", "EasyLength"]

TAG = re.compile(r"\[(easy|hard)\]", re.IGNORECASE)


def difficulty(completion: str) -> str | None:
    """The tag with which a completion begins, `"easy"` or `"hard"`; None without one."""
    found = TAG.match(completion)
    return found[1].lower() if found else None


@final
@dataclass(frozen=True, kw_only=True)
class DifficultyTag(Reward):
    """AdaCtrl's reward for a right self-assessment: a completion begins with `[Easy]` or `[Hard]`.

    1 for the tag that fits the group, 0 for the other, -1 without a tag. A problem is easy if more than `threshold` of
    its completions are right. The authors weigh it with 0.5, beside ±1 for the answer (`Stepped`) and 0.5 times
    `EasyLength`.

    Args:
        threshold: share of right completions above which a problem is easy.
        correct: tells right answers, by a positive reward.

    With several processes a call holds the completions of one of them; let its share be whole groups.

    Example:
        >>> from rlstab.tasks import Accuracy, MatchesPattern
        >>> part = DifficultyTag(correct=MatchesPattern(pattern="4"))
        >>> part(["2 + 2?"] * 3, ["[Easy] 4", "[Hard] 4", "4"])
        [1.0, 0.0, -1.0]

    Reference: AdaCtrl: Towards Adaptive and Controllable Reasoning via Difficulty-Aware Budgeting,
        https://arxiv.org/abs/2505.18822; as in its code, https://github.com/JoeYing1019/AdaCtrl.
    """

    threshold: float = 0.625
    correct: Reward = field(default_factory=Correct)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, {"threshold": (0 <= self.threshold < 1, "a share from 0 to below 1")})

    def rewards(self, batch: RewardBatch) -> list[float | None]:
        """The rewards; None for a group of which nothing could be judged."""
        verdicts = self.correct.judge(batch)[0]
        rewards: list[float | None] = [None] * len(batch)
        for group in batch.groups:
            judged = [verdict for index in group if (verdict := verdicts[index]) is not None]
            if not judged:
                continue
            label = "easy" if sum(verdict > 0 for verdict in judged) / len(judged) > self.threshold else "hard"
            for index in group:
                tag = difficulty(batch.texts[index])
                rewards[index] = -1.0 if tag is None else float(tag == label)
        return rewards


@final
@dataclass(frozen=True, kw_only=True)
class EasyLength(Reward):
    r"""AdaCtrl's bonus for short right answers to problems that the policy itself called easy.

    $\tfrac12 (1 + \cos(\pi\, n / n_\max))$ for a right completion that begins with `[Easy]`, with the length $n_\max$
    of the longest completion of its prompt; 0 for all others.

    Args:
        correct: tells right answers, by a positive reward.
        unit: in what lengths are counted.

    With several processes a call holds the completions of one of them; let its share be whole groups.

    Example:
        >>> from rlstab.tasks import MatchesPattern
        >>> part = EasyLength(correct=MatchesPattern(pattern="4"), unit="characters")
        >>> part(["2 + 2?"] * 3, ["[Easy] 4", "[Easy] 2 + 2 = 4", "[Hard] 4"])
        [0.5, 0.0, 0.0]

    Reference: AdaCtrl, https://arxiv.org/abs/2505.18822; as in its code, https://github.com/JoeYing1019/AdaCtrl.
    """

    correct: Reward = field(default_factory=Correct)
    unit: LengthUnit = "tokens"

    def rewards(self, batch: RewardBatch) -> list[float | None]:
        """The bonuses; None where correctness is None."""
        verdicts, sizes = self.correct.judge(batch)[0], lengths(batch, self.unit)
        rewards: list[float | None] = [None] * len(batch)
        for group in batch.groups:
            longest = max(sizes[index] for index in group)
            for index in group:
                verdict = verdicts[index]
                if verdict is None:
                    continue
                easy = verdict > 0 and difficulty(batch.texts[index]) == "easy"
                rewards[index] = 0.5 * (1.0 + math.cos(math.pi * sizes[index] / longest)) if easy else 0.0
        return rewards
