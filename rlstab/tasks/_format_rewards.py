"""Reward parts that look at the form of a completion, and at the answer within it."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, final

from rlstab.errors import ConfigError
from rlstab.tasks._reward import Reward, RewardBatch, SampleReward
from rlstab.tasks._scorers import Scorer, answer_text

__all__ = ["Accuracy", "MatchesPattern", "TagFormat"]


@final
@dataclass(frozen=True, kw_only=True)
class Accuracy(Reward):
    r"""A scorer's verdict on the completion, or on what stands inside a tag.

    Args:
        scorer: compares with the right answer, as `MathAnswer` or `UnitTests`.
        column: the dataset's column with the right answer; where it is None, the completion is left unscored.
        inside: name of a tag: only what its last block holds is compared, and a completion without one earns 0. None
            compares the whole completion.

    Example:
        >>> from rlstab.tasks import ExactAnswer
        >>> part = Accuracy(scorer=ExactAnswer(), inside="answer")
        >>> part(["2 + 2?"] * 2, ["<think>…</think><answer> 4 </answer>", "4"], answer=["4", "4"])
        [1.0, 0.0]
    """

    scorer: Scorer
    column: str = "answer"
    inside: str | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        """The column with the right answer."""
        return (self.column,)

    @property
    def separable(self) -> bool:
        """Each completion is scored by itself."""
        return True

    def rewards(self, batch: RewardBatch) -> list[float | None]:
        """The scorer's verdicts."""
        scores: list[float | None] = [None] * len(batch)
        asked, given, answers = [], [], []
        for index, answer in enumerate(batch.column(self.column)):
            if answer is None:
                continue
            text = batch.texts[index] if self.inside is None else _block(batch.texts[index], self.inside)
            if text is None:
                scores[index] = 0.0
                continue
            asked.append(index)
            given.append(text)
            answers.append(answer_text(answer))
        for index, verdict in zip(asked, self.scorer.scores(given, answers), strict=True):
            scores[index] = verdict
        return scores


def _block(text: str, tag: str) -> str | None:
    """What stands in the last block of a tag, None if there is no such block."""
    blocks = re.findall(rf"<{re.escape(tag)}>(.*?)</{re.escape(tag)}>", text, re.DOTALL)
    return str(blocks[-1]) if blocks else None


@final
@dataclass(frozen=True, kw_only=True)
class MatchesPattern(SampleReward):
    r"""One of two values, by whether a regular expression is found in the completion.

    `.` also stands for a line break. The format reward of kaggle-aimo2-fast-math-r1, an answer in a box before the
    thought ends, is `MatchesPattern(pattern=r"\\boxed\{.*?\}.*?</think>")`.

    Args:
        pattern: regular expression; `^` and `$` bind it to the completion's ends.
        right: the reward where it is found.
        wrong: the reward where it is not.

    Raises:
        ConfigError: if the pattern is no regular expression.

    Example:
        >>> MatchesPattern(pattern=r"\\boxed\{.+?\}")(["?"] * 2, [r"It is \boxed{4}.", "It is 4."])
        [1.0, 0.0]
    """

    pattern: str
    right: float = 1.0
    wrong: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ConfigError(f"MatchesPattern: pattern {self.pattern!r} is no regular expression: {error}") from error

    def score(self, completion: str, row: Mapping[str, object]) -> float:
        """The value of the side on which the completion falls."""
        return self.right if re.search(self.pattern, completion, re.DOTALL) else self.wrong


@final
@dataclass(frozen=True, kw_only=True)
class TagFormat(SampleReward):
    """Whether a completion is one thought followed by one answer: `<think>…</think><answer>…</answer>`.

    Each of the four tags must stand exactly once, in this order. A thought may be empty, as TON's are where the policy
    chooses not to think. What the works of the field ask for differs:

    | work | settings | weight beside accuracy |
    |---|---|---|
    | LMM-R1, R1-Reward | `around="nothing"` | 0.5 |
    | TON | `around="space"` (its own check does not count the tags) | 1 |
    | MT-R1-Zero | `answer="translate", around="anything", wrong=-1.0`, and it gates the answer (`Gated`) | 1 |

    Args:
        answer: name of the answer's tag.
        around: what may stand before, between and after the blocks; space at both ends never matters.
        right: the reward where the format holds.
        wrong: the reward where it does not.

    Example:
        >>> TagFormat()(["?"] * 3, [
        ...     "<think>2 + 2</think><answer>4</answer>",
        ...     "<think>2 + 2</think> So: <answer>4</answer>",
        ...     "<think>2 + 2<answer>4</answer>",
        ... ])
        [1.0, 0.0, 0.0]

    Reference: LMM-R1, https://arxiv.org/abs/2503.07536; R1-Reward, https://arxiv.org/abs/2505.02835; Think or Not?
        (TON), https://arxiv.org/abs/2505.16854; MT-R1-Zero, https://arxiv.org/abs/2504.10160; each as in its code.
    """

    answer: str = "answer"
    around: Literal["nothing", "space", "anything"] = "nothing"
    right: float = 1.0
    wrong: float = 0.0

    def score(self, completion: str, row: Mapping[str, object]) -> float:
        """`right` if the format holds, else `wrong`."""
        tags = ("<think>", "</think>", f"<{self.answer}>", f"</{self.answer}>")
        if any(completion.count(tag) != 1 for tag in tags):
            return self.wrong
        gap = {"nothing": "", "space": r"\s*", "anything": ".*"}[self.around]
        thought, answer = (f"{re.escape(opened)}.*{re.escape(closed)}" for opened, closed in (tags[:2], tags[2:]))
        found = re.fullmatch(f"{gap}{thought}{gap}{answer}{gap}", completion.strip(), re.DOTALL)
        return self.right if found else self.wrong
