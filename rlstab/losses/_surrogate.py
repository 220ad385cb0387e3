"""Policy surrogates: how ratio and advantage become a loss."""

from abc import abstractmethod
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from rlstab.batch import Column, LogProbs, Requirement, TokenBatch
from rlstab.errors import CompositionError
from rlstab.losses._metrics import Metric
from rlstab.losses._ratio import Ratio, TokenRatio
from rlstab.losses._term import Loss, Term
from rlstab.losses._weight import SamplerCorrection, Weight


@dataclass(frozen=True, kw_only=True)
class Surrogate(Term):
    """A policy-gradient loss, multiplied by its weights. An objective holds one per row source.

    Args:
        ratio: the importance ratio.
        weights: detached factors, multiplied in their order.
    """

    ratio: Ratio = field(default_factory=TokenRatio)
    weights: tuple[Weight, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", tuple(self.weights))
        corrections = [type(w).__name__ for w in self.weights if isinstance(w, SamplerCorrection)]
        if corrections and self.ratio.against == "sampler":
            raise CompositionError(
                f"{type(self).__name__}: the ratio is taken against the sampler, so {', '.join(corrections)} would count "
                "the same mismatch twice: drop the weight, or take the ratio against 'old'"
            )

    @property
    def requires(self) -> frozenset[Requirement]:
        """Advantages, the policy, and what ratio and weights read."""
        return super().requires | {Column("advantages"), LogProbs("policy")}

    def loss(self, batch: TokenBatch) -> Loss:
        """The surrogate times its weights."""
        values, metrics = self.surrogate(batch)
        metrics = dict(metrics)
        for weight in self.weights:
            factor, more = weight.factor(batch)
            values = values * factor
            metrics |= more
        return Loss(values, metrics)

    @abstractmethod
    def surrogate(self, batch: TokenBatch) -> tuple[Tensor, dict[str, Metric]]:
        """The unweighted loss and its metrics."""


def clipped_surrogate(
    ratio: Float[Tensor, "B T"], advantages: Float[Tensor, "B T"], *, low: float, high: float
) -> Float[Tensor, "B T"]:
    r"""$-\min(r A, \operatorname{clip}(r, 1 - \text{low}, 1 + \text{high}) A)$."""
    return -torch.min(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)
