"""The entropy of the policy as a bonus."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from rlstab.batch import Requirement, TokenBatch, VocabStat
from rlstab.losses._metrics import Sum
from rlstab.losses._parts import StepStatistic
from rlstab.losses._term import Loss, Term
from rlstab.losses._weight import Weight, weights_of


@dataclass(frozen=True, kw_only=True)
class KeptShare(StepStatistic):
    """The share of an optimizer step's tokens that masks keep.

    Args:
        weights: the masks.

    >>> import torch
    >>> from rlstab.losses import TruncatedCompletions
    >>> batch = TokenBatch(mask=torch.ones(4, 2), truncated=torch.tensor([True, False, False, False]))
    >>> KeptShare(weights=(TruncatedCompletions(),)).compute(batch)
    tensor(0.7500)
    """

    weights: Sequence[Weight]

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", weights_of("KeptShare.weights", self.weights))
        super().__post_init__()

    def compute(self, batch: TokenBatch) -> Float[Tensor, ""]:
        """Kept tokens over all tokens."""
        return kept_tokens(self.weights, batch).sum() / batch.loss_mask.sum().clamp(min=1)


def kept_tokens(weights: Sequence[Weight], batch: TokenBatch) -> Float[Tensor, "B T"]:
    """1 for the tokens that all masks keep."""
    kept = batch.token_weight
    for weight in weights:
        kept = kept * weight.factor(batch).values
    return kept


@dataclass(frozen=True, kw_only=True)
class EntropyBonus(Term):
    r"""Minus the exact entropy of the policy at each position: $-H(\pi(\cdot|s_t))$, with gradient.

    Unbiased: the entropy is the sum over the whole vocabulary, not an estimate from the sampled token.

    Args:
        weights: masks of the tokens that get a bonus, such as `TopEntropy`. The mean is over the tokens they keep
            (of the micro-batch where the mean is over that, else of the whole step).
        share: set by the part itself, the step statistic that counts the kept tokens.

    Metrics: `entropy`, the mean over the tokens that get a bonus, in nats.

    >>> import torch
    >>> from rlstab.losses import EntropyBonus
    >>> batch = TokenBatch(mask=torch.ones(1, 2), vocab={"entropy": torch.tensor([[0.5, 1.5]])})
    >>> EntropyBonus().loss(batch).values
    tensor([[-0.5000, -1.5000]])
    """

    weights: Sequence[Weight] = ()
    share: KeptShare = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "weights", weights_of("EntropyBonus.weights", self.weights))
        object.__setattr__(self, "share", KeptShare(weights=self.weights))

    @property
    def requires(self) -> frozenset[Requirement]:
        """The entropy, and what the masks read."""
        counted = {self.share.needed} if self.weights and self.mean.over != "micro_batch" else set()
        return super().requires | {VocabStat("entropy")} | counted

    def loss(self, batch: TokenBatch) -> Loss:
        """Minus the entropy of the tokens that are kept, scaled so that the mean is over those alone."""
        entropy = batch.statistic("entropy")
        if not self.weights:
            return Loss(-entropy, {"entropy": Sum(batch.total("entropy"), batch.tokens)})
        kept = kept_tokens(self.weights, batch).to(entropy.dtype)
        metrics = {"entropy": Sum((entropy.detach() * kept).sum(), kept.sum())}
        local = self.mean.over == "micro_batch"
        share = self.share.compute(batch) if local else batch.part(self.share.key)
        return Loss(-entropy * kept / torch.where(share > 0, share, 1.0), metrics)
