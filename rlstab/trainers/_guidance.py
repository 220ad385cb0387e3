"""How much of an expert's demonstration the rollouts of a prompt begin with: the schedules of the papers."""

import math
import random
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import final

from rlstab.batch import Column, Requirement
from rlstab.errors import ConfigError

__all__ = [
    "CARRIED",
    "ROLE",
    "Branching",
    "Guidance",
    "Hints",
    "MicroGroups",
    "PrefixSampling",
    "Progress",
    "WholeDemonstrations",
    "rows_of",
]

ROLE = "demonstration"
BREAK = "\n\n"
#: What the rows of prefixes bring along.
CARRIED: frozenset[Requirement] = frozenset({Column("advantages"), Column("rewards"), Column("group")})


@dataclass(kw_only=True)
class Progress:
    """What has become of the rollouts of one prompt so far.

    Args:
        step: optimizer steps that are finished.
        draw: the prompt's own source of randomness, the same on every process.
        passed: of each rollout whether it succeeded; None where there is none yet, or nobody has looked.
        tried: the shares that were asked for, turn by turn.
        succeeded: whether any of that did.
    """

    step: int
    draw: random.Random
    passed: list[bool | None]
    tried: list[Mapping[int, float]] = field(default_factory=list)
    succeeded: list[bool] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """The share of the rollouts so far that succeeded; 0 without any."""
        known = [passed for passed in self.passed if passed is not None]
        return sum(known) / len(known) if known else 0.0


@dataclass(frozen=True, kw_only=True)
class Guidance(ABC):
    """How much of an expert's demonstration the rollouts of a prompt begin with. Abstract: `plan` holds the schedule.

    The tokens of the expert, the prefix, belong to the completion: rewards see them. They are no tokens of the policy's
    loss, unless a subclass says so (`trains_prefixes`); where `imitates` holds, each distinct prefix of a prompt is a
    row of role `demonstration`, with the advantage of its rollout, at no cost of its own.

    Args:
        demonstration: column of the data set that holds the expert's completion, as text or as a conversation. A prompt
            without one is left to the policy.
        success: total reward from which on a rollout has succeeded.
        seed: seed of what is drawn.

    Example:
        >>> class Half(Guidance):
        ...     def plan(self, turn, progress):
        ...         return {rollout: 0.5 for rollout in range(len(progress.passed))}
        >>> Half().plan(0, Progress(step=0, draw=random.Random(0), passed=[None, None]))
        {0: 0.5, 1: 0.5}
    """

    demonstration: str = "demonstration"
    success: float = 0.5
    seed: int = 0

    @property
    def turns(self) -> int:
        """How many times the rollouts of a prompt are looked at before the generation is over."""
        return 1

    @property
    def imitates(self) -> bool:
        """Whether prefixes are rows of role `demonstration`."""
        return True

    @property
    def trains_prefixes(self) -> bool:
        """Whether prefixes are trained on as tokens of their rollouts, with the rollouts' advantage."""
        return False

    def column(self, turn: int) -> str:
        """The column of the demonstration that rollouts of this turn begin with; `demonstration` where it is empty."""
        return self.demonstration

    def cut(self, share: float, pieces: Sequence[str]) -> int:
        """How many tokens of a demonstration a share of less than 1 is.

        Args:
            share: of the tokens, at least 0.
            pieces: the text of each token.
        """
        return int(share * len(pieces))

    def check(self, group: int) -> None:  # noqa: B027
        """Refuse a number of rollouts per prompt that the schedule does not fit."""

    @abstractmethod
    def plan(self, turn: int, progress: Progress) -> Mapping[int, float]:
        """The rollouts of a prompt to make in this turn, each with the share of the demonstration that it begins with.

        The first turn makes rollouts; a later one makes those that are missing, or makes some anew. What is made anew
        takes the place of what was only if any of it succeeded.

        Args:
            turn: 0 is the first.
            progress: what there is.
        """


def rows_of(guidance: Guidance | None) -> dict[str, frozenset[Requirement]]:
    """What rows of prefixes bring along, by their role; none where nothing is imitated."""
    return {ROLE: CARRIED} if guidance is not None and guidance.imitates else {}


def everyone(progress: Progress, share: float) -> dict[int, float]:
    """All rollouts of a prompt with the same share."""
    return dict.fromkeys(range(len(progress.passed)), share)


@final
@dataclass(frozen=True, kw_only=True)
class WholeDemonstrations(Guidance):
    """Some of the rollouts of every prompt are the demonstration itself: LUFFY, SRFT.

    Their reward is that of the demonstration, and their advantage that of the group with it.

    Args:
        count: how many, at the end of the group. The demonstration is imitated once all the same.

    Raises:
        ConfigError: if `count` is below 1 or leaves no rollout of the policy's own.

    Reference: LUFFY, https://arxiv.org/abs/2504.14945; SRFT, https://arxiv.org/abs/2506.19767

    Example:
        >>> WholeDemonstrations().plan(0, Progress(step=0, draw=random.Random(0), passed=[None] * 3))
        {0: 0.0, 1: 0.0, 2: 1.0}
    """

    count: int = 1

    def check(self, group: int) -> None:
        """Leave the policy rollouts of its own."""
        if not 1 <= self.count < group:
            raise ConfigError(
                f"WholeDemonstrations.count: expected 1 to {group - 1} of {group} rollouts, got {self.count}"
            )

    def plan(self, turn: int, progress: Progress) -> Mapping[int, float]:
        """The whole demonstration for the last rollouts, nothing for the others."""
        own = len(progress.passed) - self.count
        return everyone(progress, 0.0) | dict.fromkeys(range(own, len(progress.passed)), 1.0)


@final
@dataclass(frozen=True, kw_only=True)
class Hints(Guidance):
    r"""UFT's hints: all rollouts of a prompt begin with the same chunks of the demonstration, fewer as time goes by.

    The number of chunks is drawn from $\text{Binomial}(\text{chunks}, P_t)$ for each prompt, with $P_t$ falling from
    `high` to `low` along half a cosine over `steps` optimizer steps; after that there are no hints.

    Args:
        chunks: how many chunks a demonstration has.
        high: $P_0$.
        low: $P$ at the end of the schedule.
        steps: its length.

    Raises:
        ConfigError: for numbers out of range.

    Reference: UFT: Unifying Supervised and Reinforcement Fine-Tuning, https://arxiv.org/abs/2505.16984

    Example:
        >>> round(Hints().probability(150), 6), Hints().probability(301)
        (0.5, 0.0)
    """

    chunks: int = 5
    high: float = 0.95
    low: float = 0.05
    steps: int = 300

    def __post_init__(self) -> None:
        if self.chunks < 1 or self.steps < 1 or not 0 <= self.low <= self.high <= 1:
            raise ConfigError(
                f"Hints: expected chunks and steps of at least 1 and 0 <= low <= high <= 1, got {self.chunks}, "
                f"{self.steps}, {self.low} and {self.high}"
            )

    def probability(self, step: int) -> float:
        """That of each chunk after so many optimizer steps."""
        if step > self.steps:
            return 0.0
        return self.low + (self.high - self.low) * (1 + math.cos(math.pi * step / self.steps)) / 2

    def plan(self, turn: int, progress: Progress) -> Mapping[int, float]:
        """As many chunks as were drawn, for all rollouts."""
        probability = self.probability(progress.step)
        drawn = sum(progress.draw.random() < probability for _ in range(self.chunks))
        return everyone(progress, drawn / self.chunks)


@final
@dataclass(frozen=True, kw_only=True)
class PrefixSampling(Guidance):
    r"""Prefix-RFT's sampling: one rollout of every prompt begins with a random share of the demonstration.

    The share is drawn evenly between a lower end and `high`; the lower end falls from `start` to `end` along half a
    cosine over `steps` optimizer steps. The expert's tokens carry the rollout's advantage as its own do; which of them
    are trained on is for a weight (`PrefixEntropy`).

    Args:
        high: upper end of the share.
        start: lower end at the beginning.
        end: lower end after the schedule.
        steps: its length.

    Raises:
        ConfigError: for numbers out of range.

    Reference: Prefix-RFT: Blending Supervised and Reinforcement Fine-Tuning with Prefix Sampling,
    https://arxiv.org/abs/2507.01679

    Example:
        >>> round(PrefixSampling().low(250), 6)
        0.5
    """

    high: float = 0.95
    start: float = 0.95
    end: float = 0.05
    steps: int = 500

    def __post_init__(self) -> None:
        if self.steps < 1 or not 0 <= self.end <= self.start <= self.high <= 1:
            raise ConfigError(
                f"PrefixSampling: expected steps of at least 1 and 0 <= end <= start <= high <= 1, got {self.steps}, "
                f"{self.end}, {self.start} and {self.high}"
            )

    @property
    def imitates(self) -> bool:
        """No: the outcome decides."""
        return False

    @property
    def trains_prefixes(self) -> bool:
        """With the rollout's advantage."""
        return True

    def low(self, step: int) -> float:
        """The lower end after so many optimizer steps."""
        done = min(step / self.steps, 1.0)
        return self.end + (self.start - self.end) * (1 + math.cos(math.pi * done)) / 2

    def plan(self, turn: int, progress: Progress) -> Mapping[int, float]:
        """A drawn share for the last rollout, nothing for the others."""
        last = len(progress.passed) - 1
        return everyone(progress, 0.0) | {last: progress.draw.uniform(self.low(progress.step), self.high)}


@final
@dataclass(frozen=True, kw_only=True)
class MicroGroups(Guidance):
    """TRAPO's micro-groups: the later rollouts of a prompt begin with more of the demonstration where the earlier fail.

    The rollouts of a prompt are made group after group. Before each, the share of all earlier ones that succeeded is
    compared with the group's threshold: below it the group begins with its share of the demonstration, else with none.
    A share of 1 is the demonstration itself.

    These are the paper's numbers. Those of its code are `shares=(0, 0.25, 0.5, 1)` and
    `thresholds=(-1, 0.5, 4 / 6, 1)`, with `paragraphs=True`, and `second` for another demonstration of the problem.

    Args:
        sizes: rollouts of each group.
        shares: how much of the demonstration each group may begin with.
        thresholds: below which success rate it does; -1 never.
        paragraphs: whether a prefix goes on to the end of its paragraph.
        reach: by how much of the demonstration it may grow so; where the paragraph is longer, it stays as it is.
        second: column of another demonstration, for the last group; None for the same.

    Raises:
        ConfigError: for lists of different lengths, or numbers out of range.

    Reference: Trust-Region Adaptive Policy Optimization (TRAPO), https://arxiv.org/abs/2512.17636

    Example:
        >>> later = Progress(step=0, draw=random.Random(0), passed=[True, False, False, False, None, None, None, None])
        >>> MicroGroups().plan(1, later)
        {4: 0.2, 5: 0.2}
    """

    sizes: Sequence[int] = (4, 2, 1, 1)
    shares: Sequence[float] = (0.0, 0.2, 0.5, 1.0)
    thresholds: Sequence[float] = (-1.0, 0.5, 0.7, 0.9)
    paragraphs: bool = False
    reach: float = 0.3
    second: str | None = None

    def __post_init__(self) -> None:
        if not len(self.sizes) == len(self.shares) == len(self.thresholds) >= 1:
            raise ConfigError(
                f"MicroGroups: expected as many sizes as shares and thresholds, got {len(self.sizes)}, "
                f"{len(self.shares)} and {len(self.thresholds)}"
            )
        if min(self.sizes) < 1 or not all(0 <= share <= 1 for share in self.shares):
            raise ConfigError(
                f"MicroGroups: expected sizes of at least 1 and shares from 0 to 1, got {list(self.sizes)} and "
                f"{list(self.shares)}"
            )
        if not 0 <= self.reach <= 1:
            raise ConfigError(f"MicroGroups.reach: expected a share from 0 to 1, got {self.reach}")

    @property
    def turns(self) -> int:
        """One for each group."""
        return len(self.sizes)

    def column(self, turn: int) -> str:
        """That of the second demonstration for the last group, if there is one."""
        return self.second if self.second is not None and turn == self.turns - 1 else self.demonstration

    def cut(self, share: float, pieces: Sequence[str]) -> int:
        """The share in whole tokens, or what ends with the next break between paragraphs."""
        tokens = super().cut(share, pieces)
        if not self.paragraphs or tokens == 0:
            return tokens
        text = ""
        for place, piece in enumerate(pieces[: super().cut(min(share + self.reach, 1.0), pieces)], start=1):
            text = text[-1:] + piece
            if place >= tokens and BREAK in text:
                return place
        return tokens

    def check(self, group: int) -> None:
        """The sizes add up to the rollouts of a prompt."""
        if sum(self.sizes) != group:
            raise ConfigError(f"MicroGroups.sizes: expected a sum of num_generations={group}, got {list(self.sizes)}")

    def plan(self, turn: int, progress: Progress) -> Mapping[int, float]:
        """The group of this turn, guided or not."""
        first = sum(self.sizes[:turn])
        share = self.shares[turn] if progress.rate < self.thresholds[turn] else 0.0
        return dict.fromkeys(range(first, first + self.sizes[turn]), share)


@final
@dataclass(frozen=True, kw_only=True)
class Branching(Guidance):
    """BREAD's branches: where all rollouts of a prompt fail, they begin anew from an expert's prefix, a short one.

    The shortest prefix from which any succeeds is searched by halving, among `anchors` evenly spaced ones; the rollouts
    from it take the place of those that failed. Where none succeeds these stay.

    Args:
        anchors: how many prefixes there are, a power of 2; the search takes as many further turns as it has halvings.

    Raises:
        ConfigError: if `anchors` is no power of 2 of at least 2.

    Reference: BREAD: Branched Rollouts from Expert Anchors Bridge SFT & RL for Reasoning,
    https://arxiv.org/abs/2506.17211

    Example:
        >>> failed = Progress(step=0, draw=random.Random(0), passed=[False] * 2, tried=[{}], succeeded=[False])
        >>> Branching(anchors=8).plan(1, failed)
        {0: 0.5, 1: 0.5}
    """

    anchors: int = 8

    def __post_init__(self) -> None:
        if self.anchors < 2 or self.anchors & (self.anchors - 1):
            raise ConfigError(f"Branching.anchors: expected a power of 2 of at least 2, got {self.anchors}")

    @property
    def turns(self) -> int:
        """One without guidance, and one for each halving."""
        return self.anchors.bit_length()

    @property
    def imitates(self) -> bool:
        """No."""
        return False

    def plan(self, turn: int, progress: Progress) -> Mapping[int, float]:
        """All rollouts at first; then none where any has succeeded unaided, else all from the next prefix."""
        if turn == 0:
            return everyone(progress, 0.0)
        if progress.succeeded[0]:
            return {}
        low, high = 0.0, 1.0  # prefixes that failed, and the one that has succeeded
        for tried, succeeded in zip(progress.tried[1:], progress.succeeded[1:], strict=True):
            low, high = (low, tried[0]) if succeeded else (tried[0], high)
        return everyone(progress, (low + high) / 2)
