"""The entropy of the policy as a bonus."""

from dataclasses import dataclass

from rlstab.batch import Requirement, TokenBatch, VocabStat
from rlstab.losses._metrics import Sum
from rlstab.losses._term import Loss, Term
from rlstab.losses._weight import Weight


@dataclass(frozen=True, kw_only=True)
class EntropyBonus(Term):
    r"""Minus the exact entropy of the policy at each position: $-H(\pi(\cdot|s_t))$, with gradient.

    Unbiased: the entropy is the sum over the whole vocabulary, not an estimate from the sampled token.

    Args:
        weights: masks of the tokens that get a bonus, such as `TopEntropy`. The mean is over the tokens they keep.

    Metrics: `entropy`, the mean over the tokens that get a bonus, in nats.

    >>> import torch
    >>> from rlstab.losses import EntropyBonus
    >>> batch = TokenBatch(mask=torch.ones(1, 2), vocab={"entropy": torch.tensor([[0.5, 1.5]])})
    >>> EntropyBonus().loss(batch).values
    tensor([[-0.5000, -1.5000]])
    """

    weights: tuple[Weight, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", tuple(self.weights))

    @property
    def requires(self) -> frozenset[Requirement]:
        """The entropy, and what the masks read."""
        return super().requires | {VocabStat("entropy")}

    def loss(self, batch: TokenBatch) -> Loss:
        """Minus the entropy of the tokens that are kept, scaled so that the mean is over those alone."""
        entropy = batch.statistic("entropy")
        mask = batch.loss_mask.to(entropy.dtype)
        kept = mask
        for weight in self.weights:
            kept = kept * weight.factor(batch).values
        count = kept.sum()
        share = mask.sum() / count.clamp(min=1) if self.weights else 1.0
        return Loss(-entropy * kept * share, {"entropy": Sum((entropy.detach() * kept).sum(), count)})
