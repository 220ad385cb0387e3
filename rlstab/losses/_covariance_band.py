"""Clip-Cov: a few tokens of high covariance, drawn at random, lose their gradient."""

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlstab.batch import Column, LogProbs, Requirement, TokenBatch
from rlstab.errors import ConfigError
from rlstab.losses._checks import check_choice, check_positive, check_range
from rlstab.losses._covariance import covariance
from rlstab.losses._metrics import Sum, token_mean
from rlstab.losses._parts import StepStatistic
from rlstab.losses._ratio import missing
from rlstab.losses._weight import Factor, Weight

_ODD = (-0x61C8864680B583EB, -0x4B47D0C5D5C6E1DB, -0x6B2FB644ECCEEE15)  # odd constants of 64 bits, of splitmix64


def _mixed(x: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """Numbers of 64 bits, scrambled one to one."""
    for shift, factor in ((30, _ODD[1]), (27, _ODD[2])):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def lots(tokens: Int[Tensor, "N T"], mask: Bool[Tensor, "N T"], salt: Int[Tensor, ""]) -> Int[Tensor, "N T"]:
    """A number for each token as if drawn at random, which only salt, completion and position decide.

    It does not depend on padding, on the order of rows or on rounding, so that any split of a step draws the same.

    >>> tokens = torch.tensor([[5, 6], [5, 7]])
    >>> drawn = lots(tokens, tokens > 0, torch.tensor(0))
    >>> torch.equal(lots(tokens.flip(0), tokens > 0, torch.tensor(0)), drawn.flip(0)), drawn.unique().numel()
    (True, 4)
    """
    place = (mask.cumsum(-1) * _ODD[0]) + salt
    each = torch.where(mask, _mixed(place + _mixed(tokens.long())), 0)
    return _mixed(each.sum(-1, keepdim=True) + place)


@dataclass(frozen=True, kw_only=True)
class CovarianceSample(StepStatistic):
    r"""A random few of the tokens whose covariance of advantage and log-prob lies in a band.

    A token is eligible if $\min < C_t < \max$ with $C_t = (A_t - \bar A)(\log\pi_t - \overline{\log\pi})$ over the $N$
    trained tokens of the step, and PPO's clip has not stopped its gradient already. Of the eligible ones
    $\max(1, \lfloor \rho N \rfloor)$ are drawn, or all if there are fewer. What is drawn is a function of the tokens,
    of how many are eligible and of `seed`: the same step draws the same under any split.

    Args:
        fraction: $\rho$.
        min: lower end of the band.
        max: upper end of the band.
        low: lower clip of the surrogate.
        high: upper clip of the surrogate.
        seed: another one draws others.

    Returns of `compute`: `[N, T]`, true where a token is drawn.

    Raises:
        ConfigError: if `fraction` is not in (0, 1], or the band is empty.

    Reference: The Entropy Mechanism of Reinforcement Learning for Reasoning Language Models,
    https://arxiv.org/abs/2505.22617

    >>> batch = TokenBatch(
    ...     mask=torch.ones(2, 2),
    ...     advantages=torch.tensor([1.0, -1.0]),
    ...     logps={"policy": torch.tensor([[-0.1, -1.0], [-0.1, -2.0]])},
    ...     token_ids=torch.tensor([[5, 6], [5, 7]]),
    ... )
    >>> CovarianceSample(fraction=0.5).compute(batch)  # one is eligible
    tensor([[False, False],
            [False,  True]])
    """

    fraction: float = 2e-4
    min: float = 1.0
    max: float = 5.0
    low: float = 1.0
    high: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        name = type(self).__name__
        check_positive(f"{name}.fraction", self.fraction)
        check_range(f"{name}.fraction", self.fraction, 0, 1)
        check_range(f"{name}.seed", self.seed, 0, 2**31 - 1)
        if not self.min < self.max:
            raise ConfigError(f"{name}.max: expected a covariance above min={self.min}, got {self.max!r}")

    @property
    def requires(self) -> frozenset[Requirement]:
        """Advantages, tokens, current and old log-probs."""
        return super().requires | {
            Column("advantages"),
            Column("token_ids"),
            LogProbs("policy"),
            LogProbs("old"),
        }

    def eligible(self, batch: TokenBatch) -> Bool[Tensor, "N T"]:
        """The tokens among which the lot falls."""
        logp = batch.held("policy").double()  # a choice has no gradient
        mask = batch.loss_mask & logp.isfinite() & ~missing(batch, "old")
        advantages, log_ratio = batch.token_advantages().double(), logp - batch.logp("old")
        summand = covariance(torch.where(mask, logp, 0.0), advantages, mask)
        stopped = torch.where(
            advantages > 0,
            log_ratio > math.log1p(self.high),
            log_ratio < (math.log1p(-self.low) if self.low < 1 else -math.inf),
        )
        return mask & ~stopped & (summand > self.min) & (summand < self.max)

    def compute(self, batch: TokenBatch) -> Bool[Tensor, "N T"]:
        """The tokens that are drawn."""
        eligible = self.eligible(batch)
        drawn = lots(batch.column("token_ids"), batch.mask, eligible.sum() + (self.seed << 32))
        order = torch.where(eligible, drawn >> 1, torch.iinfo(torch.int64).max).flatten().argsort(stable=True)
        place = torch.empty_like(order).scatter(0, order, torch.arange(len(order), device=order.device))
        count = (self.fraction * batch.loss_mask.sum().double()).floor().clamp(min=1)
        return (place < count).view(eligible.shape) & eligible


@dataclass(frozen=True, kw_only=True)
class ClipCov(Weight):
    r"""Clip-Cov: take the gradient from a random few of the tokens that drive the entropy down.

    The tokens are those of `CovarianceSample`. They have loss 0 and stay in the count of the mean. Made for a surrogate
    whose own clip is wide: `ClippedSurrogate(low=1.0, high=1.0, weights=ClipCov())`. `low` and `high` must be those of
    the surrogate: what its clip has stopped is not drawn.

    Args:
        fraction: $\rho$, share of the tokens that are drawn.
        min: lower end of the band of covariances.
        max: upper end of the band.
        low: lower clip of the surrogate.
        high: upper clip of the surrogate.
        seed: another one draws others.
        over: `step`, which does not depend on how the step is split, or `micro_batch`, as in the released code.
        sample: set by the part itself, the statistic that draws the tokens.

    Metrics: `clip_cov/drawn`, the share of the tokens that lose their gradient.

    Raises:
        ConfigError: if `fraction` is not in (0, 1], the band is empty, or `over` is another word.

    Reference: The Entropy Mechanism of Reinforcement Learning for Reasoning Language Models,
    https://arxiv.org/abs/2505.22617

    >>> from rlstab.losses import run_parts
    >>> weight = ClipCov(fraction=0.5)
    >>> batch = TokenBatch(
    ...     mask=torch.ones(2, 2),
    ...     advantages=torch.tensor([1.0, -1.0]),
    ...     logps={"policy": torch.tensor([[-0.1, -1.0], [-0.1, -2.0]])},
    ...     token_ids=torch.tensor([[5, 6], [5, 7]]),
    ... )
    >>> weight.factor(run_parts(weight.requires, batch)).values
    tensor([[1., 1.],
            [1., 0.]])
    """

    fraction: float = 2e-4
    min: float = 1.0
    max: float = 5.0
    low: float = 1.0
    high: float = 1.0
    seed: int = 0
    over: Literal["step", "micro_batch"] = "step"
    sample: CovarianceSample = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_choice("ClipCov.over", self.over, ("step", "micro_batch"))
        sample = CovarianceSample(
            fraction=self.fraction, min=self.min, max=self.max, low=self.low, high=self.high, seed=self.seed
        )
        object.__setattr__(self, "sample", sample)

    @property
    def requires(self) -> frozenset[Requirement]:
        """The drawn tokens, or what drawing them reads."""
        return frozenset({self.sample.needed}) if self.over == "step" else self.sample.requires

    def factor(self, batch: TokenBatch) -> Factor:
        """0 for the drawn tokens, else 1."""
        drawn = batch.part(self.sample.key) if self.over == "step" else self.sample.compute(batch)
        keep = torch.where(drawn, 0.0, batch.token_weight.new_ones(()))
        return Factor(keep, {"clip_cov/drawn": token_mean(1 - keep, batch.token_weight)})


@dataclass(frozen=True, kw_only=True)
class MeanCovariance(StepStatistic):
    r"""The covariance of advantage and log-prob over the trained tokens of a step: what moves the entropy.

    A natural policy-gradient step of size $\eta$ on a tabular softmax policy changes its entropy by
    $-\eta \operatorname{Cov}(\log\pi, A)$.

    Reference: The Entropy Mechanism of Reinforcement Learning for Reasoning Language Models,
    https://arxiv.org/abs/2505.22617

    >>> batch = TokenBatch(
    ...     mask=torch.ones(1, 2),
    ...     advantages=torch.tensor([[1.0, -1.0]]),
    ...     logps={"policy": torch.tensor([[-1.0, -3.0]])},
    ... )
    >>> MeanCovariance().compute(batch)
    tensor(1., dtype=torch.float64)
    """

    @property
    def requires(self) -> frozenset[Requirement]:
        """Advantages and current log-probs."""
        return super().requires | {Column("advantages"), LogProbs("policy")}

    def compute(self, batch: TokenBatch) -> Float[Tensor, ""]:
        """The mean of the summands."""
        logp = batch.held("policy").double()  # a measurement
        mask = batch.loss_mask & logp.isfinite()
        summand = covariance(torch.where(mask, logp, 0.0), batch.token_advantages().double(), mask)
        return torch.where(mask, summand, 0.0).sum() / mask.sum().clamp(min=1)


@dataclass(frozen=True, kw_only=True)
class EntropyCovariance(Weight):
    r"""A weight of 1 that measures how fast the entropy is driven down: `MeanCovariance` as a metric.

    Args:
        covariance: set by the part itself, the step statistic that is shown.

    Metrics: `entropy_covariance/mean`, the covariance of advantage and log-prob over the step, in nats per unit of
    advantage; positive while the entropy falls.

    Reference: The Entropy Mechanism of Reinforcement Learning for Reasoning Language Models,
    https://arxiv.org/abs/2505.22617

    >>> from rlstab.losses import run_parts
    >>> batch = TokenBatch(
    ...     mask=torch.ones(1, 2),
    ...     advantages=torch.tensor([[1.0, -1.0]]),
    ...     logps={"policy": torch.tensor([[-1.0, -3.0]])},
    ... )
    >>> weight = EntropyCovariance()
    >>> weight.factor(run_parts(weight.requires, batch)).metrics["entropy_covariance/mean"].value()
    tensor(1., dtype=torch.float64)
    """

    covariance: MeanCovariance = field(init=False, repr=False, compare=False, default_factory=MeanCovariance)

    @property
    def requires(self) -> frozenset[Requirement]:
        """The covariance of the step."""
        return frozenset({self.covariance.needed})

    def factor(self, batch: TokenBatch) -> Factor:
        """1, and the covariance of the step, weighted by the tokens of the micro-batch."""
        tokens = batch.tokens
        mean = Sum(batch.part(self.covariance.key) * tokens, tokens)
        return Factor(torch.ones_like(batch.token_weight[:, :1]), {"entropy_covariance/mean": mean})
