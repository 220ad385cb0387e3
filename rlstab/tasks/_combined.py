"""Reward parts made of other parts."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import final

from rlstab.errors import ConfigError
from rlstab.tasks._checks import check_fields
from rlstab.tasks._reward import Correct, Reward, RewardBatch

__all__ = ["Gated", "Product", "Refined", "Stage", "Stepped"]


@final
@dataclass(frozen=True, kw_only=True)
class Product(Reward):
    r"""The product of parts; None as soon as one of them is.

    R1-Reward adds a bonus for reasoning that agrees with the answer, to right answers only:
    $0.5\,R_\text{format} + R_\text{accuracy}\,(1 + 0.5\,R_\text{consistency})$ is
    `{format: 0.5 * TagFormat(), correct: Correct(), agrees: 0.5 * Product(factors=[Correct(), judge])}`, with a judge
    that returns 1, 0 or -1.

    Args:
        factors: the parts; their own weights do not count.

    Raises:
        ConfigError: if there are fewer than two.

    Example:
        >>> from rlstab.tasks import MatchesPattern
        >>> both = Product(factors=[MatchesPattern(pattern="a"), MatchesPattern(pattern="b", right=2.0)])
        >>> both(["?"] * 3, ["ab", "a", "b"])
        [2.0, 0.0, 0.0]

    Reference: R1-Reward: Training Multimodal Reward Model Through Stable Reinforcement Learning,
        https://arxiv.org/abs/2505.02835; the formula is that of its code, https://github.com/yfzhang114/r1_reward.
    """

    factors: Sequence[Reward]

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.factors) < 2:
            raise ConfigError(f"Product: factors has {len(self.factors)} parts; expected at least 2")

    @property
    def separable(self) -> bool:
        """Whether all factors are."""
        return all(part.separable for part in self.factors)

    def rewards(self, batch: RewardBatch) -> list[float | None]:
        """The products."""
        columns = [part.judge(batch)[0] for part in self.factors]
        return [_product(values) for values in zip(*columns, strict=True)]


def _product(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return prod(known) if len(known) == len(values) else None


@final
@dataclass(frozen=True, kw_only=True)
class Gated(Reward):
    r"""A part's reward where another one is positive, a constant elsewhere.

    MT-R1-Zero scores a translation only if the format holds, and else gives -1 for the format and -2 for the
    translation: `{format: tags, translation: Gated(part=bleu, gate=tags, otherwise=-2.0)}` with
    `tags = TagFormat(answer="translate", around="anything", wrong=-1.0)`.

    Args:
        part: the reward where the gate is open.
        gate: open where this is positive.
        otherwise: the reward where it is not.

    Example:
        >>> from rlstab.tasks import MatchesPattern
        >>> gated = Gated(part=MatchesPattern(pattern="yes"), gate=MatchesPattern(pattern=r"^<.*>$"), otherwise=-2.0)
        >>> gated(["?"] * 3, ["<yes>", "<no>", "yes"])
        [1.0, 0.0, -2.0]

    Reference: MT-R1-Zero: Advancing LLM-based Machine Translation via R1-Zero-like Reinforcement Learning,
        https://arxiv.org/abs/2504.10160; the values are those of its code, https://github.com/fzp0424/MT-R1-Zero.
    """

    part: Reward
    gate: Reward
    otherwise: float

    @property
    def separable(self) -> bool:
        """Whether both parts are."""
        return self.part.separable and self.gate.separable

    def rewards(self, batch: RewardBatch) -> list[float | None]:
        """The part's reward or the constant; None where the gate is None."""
        gates, values = self.gate.judge(batch)[0], self.part.judge(batch)[0]
        return [
            None if gate is None else value if gate > 0 else self.otherwise
            for gate, value in zip(gates, values, strict=True)
        ]


@final
@dataclass(frozen=True, kw_only=True)
class Stepped(Reward):
    """One of two values, by whether a part's reward is above a threshold.

    MT-R1-Zero's discrete variant gives 2 above a threshold of BLEU or COMET and -1.5 up to it.

    Args:
        part: the reward that is compared.
        threshold: what it must exceed.
        above: the reward where it does.
        below: the reward where it does not.

    Example:
        >>> from rlstab.tasks import Correct, SortDigits
        >>> signed = Stepped(part=Correct(task=SortDigits(digits=2)), threshold=0.5, above=1.0, below=-1.0)
        >>> signed(["31=", "31="], ["13", "31"], answer=["13", "13"])
        [1.0, -1.0]

    Reference: MT-R1-Zero, https://arxiv.org/abs/2504.10160, and its code, https://github.com/fzp0424/MT-R1-Zero.
    """

    part: Reward = field(default_factory=Correct)
    threshold: float = 0.0
    above: float = 2.0
    below: float = -1.5

    @property
    def separable(self) -> bool:
        """Whether the part is."""
        return self.part.separable

    def rewards(self, batch: RewardBatch) -> list[float | None]:
        """The value of each completion's side; None where the part is None."""
        return [
            None if value is None else self.above if value > self.threshold else self.below
            for value in self.part.judge(batch)[0]
        ]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """From which step on a rule holds, and between which values it leaves a reward as it is.

    Args:
        start: first optimizer step of the stage.
        low: a reward below becomes 0.
        high: a reward above becomes 1.

    Raises:
        ConfigError: if `start` is negative or `low` above `high`.

    Example:
        >>> stage = Stage(start=0, low=0.5, high=0.75)
        >>> [stage.refined(value) for value in (0.4, 0.5, 0.75, 0.8)]
        [0.0, 0.5, 0.75, 1.0]
    """

    start: int
    low: float
    high: float

    def __post_init__(self) -> None:
        check_fields(
            self,
            {"start": (self.start >= 0, "at least 0"), "low": (self.low <= self.high, f"at most high ({self.high})")},
        )

    def refined(self, value: float) -> float:
        """The reward that the stage gives for a raw one."""
        return 0.0 if value < self.low else 1.0 if value > self.high else value


@final
@dataclass(frozen=True, kw_only=True)
class Refined(Reward):
    r"""Vision-R1's progressive rule refinement of a graded reward, such as an IoU or a share of passed tests.

    What is poor earns nothing and what is good earns everything, and both bars rise in the course of training:
    $r \mapsto 0$ if $r < \xi_1$, $1$ if $r > \xi_2$, else $r$. The default stages are those of the authors' code for
    precision: $(0.5, 0.75)$, from step 1500 on $(0.75, 0.9)$.

    Args:
        part: the graded reward, between 0 and 1.
        stages: the rules, in the order of their first steps, the first from step 0 on.

    Raises:
        ConfigError: if the stages are not in order, or the first does not begin at 0.

    Example:
        >>> from types import SimpleNamespace
        >>> from rlstab.tasks import MatchesPattern
        >>> graded = Refined(part=MatchesPattern(pattern="a", right=0.8))
        >>> [graded(["?"], ["a"], trainer_state=SimpleNamespace(global_step=step)) for step in (0, 1500)]
        [[1.0], [0.8]]

    Reference: Vision-R1: Evolving Human-Free Alignment in Large Vision-Language Models via Vision-Guided Reinforcement
        Learning, https://arxiv.org/abs/2503.18013; code at https://github.com/jefferyZhan/Griffon.
    """

    part: Reward
    stages: Sequence[Stage] = (Stage(start=0, low=0.5, high=0.75), Stage(start=1500, low=0.75, high=0.9))

    def __post_init__(self) -> None:
        super().__post_init__()
        starts = [stage.start for stage in self.stages]
        if not starts or starts[0] != 0 or starts != sorted(set(starts)):
            raise ConfigError(f"Refined: stages begin at steps {starts}; expected 0 first, then later and later ones")

    @property
    def separable(self) -> bool:
        """Whether the part is."""
        return self.part.separable

    def rewards(self, batch: RewardBatch) -> list[float | None]:
        """The refined rewards, by the stage of the trainer's step."""
        stage = [stage for stage in self.stages if stage.start <= batch.state.global_step][-1]
        return [None if value is None else stage.refined(value) for value in self.part.judge(batch)[0]]
