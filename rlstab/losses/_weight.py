"""Detached factors of a surrogate: masks here, corrections for the sampler in `_sampler_weight`."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlstab.batch import Column, LogProbs, Requirement, TokenBatch, VocabStat
from rlstab.losses._checks import check_choice, check_part, check_range
from rlstab.losses._metrics import Metric, Sum, token_mean
from rlstab.losses._parts import Part, StepStatistic
from rlstab.losses._ratio import masked_row_mean


class Factor(NamedTuple):
    """What a weight multiplies a loss with (`[B, T]` or `[B, 1]`, detached), and its metrics.

    >>> batch = TokenBatch(mask=torch.ones(2, 1), truncated=torch.tensor([True, False]))
    >>> values, metrics = TruncatedCompletions().factor(batch)
    >>> values.flatten(), metrics["truncated_completions/kept"].value()
    (tensor([0., 1.]), tensor(0.5000))
    """

    values: Tensor
    metrics: Mapping[str, Metric]


@dataclass(frozen=True, kw_only=True)
class Weight(Part):
    """A factor of the surrogate that carries no gradient. The denominator of the mean stays what it was. Abstract.

    >>> @dataclass(frozen=True, kw_only=True)
    ... class Early(Weight):
    ...     tokens: int
    ...
    ...     def factor(self, batch: TokenBatch) -> Factor:
    ...         return Factor((batch.mask.cumsum(-1) <= self.tokens).float(), {})
    >>> Early(tokens=2).factor(TokenBatch(mask=torch.ones(1, 3))).values
    tensor([[1., 1., 0.]])
    """

    @abstractmethod
    def factor(self, batch: TokenBatch) -> Factor:
        """The factor and its metrics."""


def weights_of(key: str, weights: Sequence[Weight]) -> tuple[Weight, ...]:
    """The weights of a part as a tuple; a single one will do.

    Raises:
        ConfigError: for anything that is no weight.

    >>> weights_of("ClippedSurrogate.weights", TruncatedCompletions())
    (TruncatedCompletions(),)
    """
    found = tuple(weights) if isinstance(weights, list | tuple) else (weights,)
    for weight in found:
        check_part(key, weight, Weight, "TruncatedIS(max=2.0)")
    return found


@dataclass(frozen=True, kw_only=True)
class OffPolicySequenceMask(Weight):
    r"""Drop sequences of negative advantage that the policy has left.

    These have $A_i < 0$ and $\frac{1}{|o|} \sum_t (\log\mu - \log\pi) > \delta$, where $\mu$ sampled the tokens. Tokens
    that it could not score (NaN) are no evidence.

    Args:
        delta: $\delta$ in nats per token. The paper gives no number; TRL suggests 0.5, slime takes 1e-4.
        behaviour: source of $\mu$; if None, the sampler where its log-probs were recorded, else the old policy.

    Metrics: `off_policy_sequence_mask/kept`, the share of the rows (tokens, for advantages per token) that stay.

    Raises:
        ConfigError: if `delta` is negative.

    Reference: DeepSeek-V3.2, https://arxiv.org/abs/2512.02556 (off-policy sequence masking)

    >>> import torch
    >>> logps = {"policy": torch.tensor([[-2.0], [-2.0]]), "old": torch.tensor([[-1.0], [-1.0]])}
    >>> batch = TokenBatch(mask=torch.ones(2, 1), logps=logps, advantages=torch.tensor([1.0, -1.0]))
    >>> OffPolicySequenceMask(delta=0.5).factor(batch).values
    tensor([[1.],
            [0.]])
    """

    delta: float
    behaviour: str | None = None

    def __post_init__(self) -> None:
        check_range("OffPolicySequenceMask.delta", self.delta, 0)

    @property
    def requires(self) -> frozenset[Requirement]:
        """Advantages, the policy, and what sampled the tokens."""
        return super().requires | {Column("advantages"), LogProbs("policy"), LogProbs(self.behaviour or "old")}

    def factor(self, batch: TokenBatch) -> Factor:
        """1 or 0 per row, or per token where advantages are."""
        policy = batch.held("policy")  # a mask has no gradient
        evidence = (batch.logp(batch.behaviour(self.behaviour)) - policy).nan_to_num(nan=0.0)
        near = masked_row_mean(evidence, batch.token_weight) <= self.delta
        keep = ((batch.token_advantages() >= 0) | near).to(policy.dtype)
        return Factor(keep, {"off_policy_sequence_mask/kept": token_mean(keep, batch.token_weight)})


@dataclass(frozen=True, kw_only=True)
class EntropyThreshold(StepStatistic):
    """The entropy above which the `fraction` most uncertain tokens of an optimizer step lie.

    Args:
        fraction: share of the tokens above the threshold.

    >>> import torch
    >>> batch = TokenBatch(mask=torch.ones(1, 3), vocab={"entropy": torch.tensor([[0.1, 0.5, 0.9]])})
    >>> EntropyThreshold(fraction=0.5).compute(batch)
    tensor(0.5000)
    """

    fraction: float

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("EntropyThreshold.fraction", self.fraction, 0, 1)

    @property
    def requires(self) -> frozenset[Requirement]:
        """Entropies."""
        return super().requires | {VocabStat("entropy")}

    def compute(self, batch: TokenBatch) -> Float[Tensor, ""]:
        """The quantile of the entropies at `1 - fraction`, linearly interpolated; NaN without tokens."""
        return masked_quantile(batch.statistic("entropy").detach(), batch.loss_mask, 1 - self.fraction)


@dataclass(frozen=True, kw_only=True)
class TopEntropy(Weight):
    r"""Keep only the tokens at which the policy is most uncertain: the `fraction` of highest entropy.

    Args:
        fraction: share of the tokens that stay; 0 keeps the highest entropy only.
        over: the tokens that are ranked together: `step` (the whole optimizer step: the same under any split), or
            `micro_batch` (one micro-batch of one process, as TRL does where there is one process).
        threshold: set by the part itself, the step statistic that `over="step"` compares with.

    Metrics: `top_entropy/kept`, the share of the tokens that stay.

    Raises:
        ConfigError: if `fraction` is not in [0, 1].

    Reference: Beyond the 80/20 Rule, https://arxiv.org/abs/2506.01939

    >>> import torch
    >>> batch = TokenBatch(mask=torch.ones(1, 3), vocab={"entropy": torch.tensor([[0.1, 0.5, 0.9]])})
    >>> TopEntropy(fraction=0.4, over="micro_batch").factor(batch).values
    tensor([[0., 0., 1.]])
    """

    fraction: float
    over: Literal["step", "micro_batch"] = "step"
    threshold: EntropyThreshold = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_range("TopEntropy.fraction", self.fraction, 0, 1)
        check_choice("TopEntropy.over", self.over, ("step", "micro_batch"))
        object.__setattr__(self, "threshold", EntropyThreshold(fraction=self.fraction))

    @property
    def requires(self) -> frozenset[Requirement]:
        """Entropies and, over a step, their threshold."""
        return super().requires | {VocabStat("entropy")} | ({self.threshold.needed} if self.over == "step" else set())

    def keep(self, batch: TokenBatch) -> Bool[Tensor, "B T"]:
        """The tokens that stay."""
        part = self.threshold
        threshold = batch.part(part.key) if self.over == "step" else batch.once(part.key, part.compute)
        return (batch.statistic("entropy").detach() >= threshold) & batch.loss_mask  # ranks only: no gradient

    def factor(self, batch: TokenBatch) -> Factor:
        """1 or 0 per token."""
        keep = self.keep(batch).to(batch.statistic("entropy").dtype)
        return Factor(keep, {"top_entropy/kept": Sum(keep.sum(), batch.token_weight.sum())})


@dataclass(frozen=True, kw_only=True)
class TruncatedCompletions(Weight):
    """Leave out completions that were cut at the length limit: their reward says nothing about their end.

    Their tokens stay in the denominator of the mean. (TRL's `mask_truncated_completions` takes them out of it.)

    Metrics: `truncated_completions/kept`, the share of the rows that stay.

    Reference: DAPO (overlong filtering), https://arxiv.org/abs/2503.14476

    >>> import torch
    >>> batch = TokenBatch(mask=torch.ones(2, 1), truncated=torch.tensor([True, False]))
    >>> TruncatedCompletions().factor(batch).values
    tensor([[0.],
            [1.]])
    """

    @property
    def requires(self) -> frozenset[Requirement]:
        """Which rows were cut."""
        return super().requires | {Column("truncated")}

    def factor(self, batch: TokenBatch) -> Factor:
        """1 or 0 per row."""
        keep = (~batch.column("truncated")).to(torch.get_default_dtype()).unsqueeze(-1)
        return Factor(keep, {"truncated_completions/kept": Sum(keep.sum(), torch.ones_like(keep).sum())})


def masked_quantile(values: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], q: float) -> Float[Tensor, ""]:
    """`torch.quantile(values[mask], q)` without its limit of 2^24 values and without waiting for the device.

    >>> import torch
    >>> masked_quantile(torch.tensor([[1.0, 2.0, 9.0]]), torch.tensor([[True, True, False]]), 0.5)
    tensor(1.5000)
    """
    ordered = torch.where(mask, values, torch.inf).flatten().sort().values
    last = mask.sum() - 1
    rank = torch.full_like(ordered[0], q) * last
    below = rank.floor()
    ends = torch.stack([below, rank.ceil()]).long().clamp(min=0)
    lower, upper = ordered[ends]
    return torch.where(last >= 0, torch.lerp(lower, upper, rank - below), torch.nan)
