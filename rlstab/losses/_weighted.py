"""A term seen through weights: which tokens a regulariser acts on, and how strongly."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from rlstab.batch import LogProbs, Requirement, TokenBatch
from rlstab.errors import CompositionError
from rlstab.losses._checks import check_choice, check_number, check_part
from rlstab.losses._kl import KL
from rlstab.losses._metrics import Metric, Sum, token_mean
from rlstab.losses._ratio import missing, ratio_of
from rlstab.losses._surrogate import Surrogate
from rlstab.losses._term import Loss, Term
from rlstab.losses._weight import Factor, Weight, weights_of


@dataclass(frozen=True, kw_only=True)
class Weighted(Term):
    r"""Another term times weights: a penalty on some tokens only, as in KDRL's masked distillation.

    Coefficient and mean are this term's own. What a mask takes away stays in the count that the mean divides by.

    Args:
        term: the term; not a surrogate, which has weights of its own.
        weights: detached factors, multiplied in their order; a single one will do.

    Metrics: those of the term, before the weights, and those of the weights.

    Raises:
        ConfigError: if the term or a weight is none.
        CompositionError: around a surrogate, or a term of other rows.

    >>> from rlstab.losses import ForwardKL, TruncatedCompletions
    >>> part = Weighted(term=KL(estimator="k2"), weights=TruncatedCompletions())
    >>> batch = TokenBatch(
    ...     mask=torch.ones(2, 1),
    ...     truncated=torch.tensor([True, False]),
    ...     logps={"policy": -torch.ones(2, 1), "initial": torch.zeros(2, 1)},
    ... )
    >>> part.loss(batch).values
    tensor([[0.0000],
            [0.5000]])
    """

    term: Term = field(default_factory=KL)
    weights: Sequence[Weight] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_part("Weighted.term", self.term, Term, 'KL(estimator="k2")')
        object.__setattr__(self, "weights", weights_of("Weighted.weights", self.weights))
        if isinstance(self.term, Surrogate):
            raise CompositionError(
                f"Weighted.term: {type(self.term).__name__} has weights of its own: pass them to it, as in "
                f"{type(self.term).__name__}(weights=...)"
            )
        if self.term.rows != self.rows:
            raise CompositionError(
                f"Weighted: acts on {self.rows!r} rows and its term on {self.term.rows!r}: pass rows={self.term.rows!r}"
            )

    def loss(self, batch: TokenBatch) -> Loss:
        """The term's loss times the weights."""
        values, metrics = self.term.loss(batch)
        metrics = dict(metrics)
        for weight in self.weights:
            factor, more = weight.factor(batch)
            values = torch.where(factor == 0, 0.0, values * factor)  # 0 also of an infinite value
            metrics |= more
        return Loss(values, metrics)


Curve = Literal["reverse_kl", "forward_kl", "js", "softened_kl", "hellinger", "jeffreys"]


def score_weight(log_ratio: Float[Tensor, "*shape"], *, divergence: Curve) -> Float[Tensor, "*shape"]:
    r"""$h(r) = r^2 f''(r)$ at $r = e^{\log r}$, by which f-distill weighs the score difference.

    | divergence | $f(r)$ | $h(r)$ |
    |---|---|---|
    | reverse KL | $-\log r$ | $1$ |
    | softened KL | $(r+1) \log(\frac12 + \frac1{2r})$ | $1/(r+1)$ |
    | JS | $r \log r - (r+1) \log\frac{r+1}{2}$ | $r/(r+1)$ |
    | Hellinger | $1 - \sqrt r$ | $\frac14 \sqrt r$ |
    | forward KL | $r \log r$ | $r$ |
    | Jeffreys | $(r-1) \log r$ | $r + 1$ |

    >>> score_weight(torch.tensor([0.0]), divergence="js")
    tensor([0.5000])
    """
    if divergence == "reverse_kl":
        return torch.ones_like(log_ratio)
    if divergence in ("js", "softened_kl"):
        return torch.sigmoid(log_ratio if divergence == "js" else -log_ratio)
    if divergence == "hellinger":
        return ratio_of(log_ratio / 2) / 4
    return ratio_of(log_ratio) + (1.0 if divergence == "jeffreys" else 0.0)


@dataclass(frozen=True, kw_only=True)
class ScoreWeight(Weight):
    r"""Weigh a pull towards a teacher by how the two differ, after f-distill: $h(r)$ with $r = \text{teacher}/\pi$.

    The weight makes the gradient of a reverse KL that of another divergence where samples are continuous and have a
    score (f-distill's case). Tokens have none: there the exact counterpart is the divergence itself, by its name in
    this library, and this is a heuristic on top of a reverse KL.

    Args:
        divergence: `reverse_kl` (weight 1), `forward_kl`, `js`, `softened_kl`, `hellinger` or `jeffreys`.
        teacher: source of the teacher.

    Metrics: `score_weight/mean`, the mean weight.

    Raises:
        ConfigError: for another divergence.

    Reference: One-step Diffusion Models with f-Divergence Distribution Matching, https://arxiv.org/abs/2502.15681

    >>> logps = {"policy": torch.tensor([[0.2]]).log(), "teacher": torch.tensor([[0.6]]).log()}
    >>> ScoreWeight().factor(TokenBatch(mask=torch.ones(1, 1), logps=logps)).values  # 3 / (3 + 1)
    tensor([[0.7500]])
    """

    divergence: Curve = "js"
    teacher: str = "teacher"

    def __post_init__(self) -> None:
        check_choice(
            "ScoreWeight.divergence",
            self.divergence,
            ("reverse_kl", "forward_kl", "js", "softened_kl", "hellinger", "jeffreys"),
        )

    @property
    def requires(self) -> frozenset[Requirement]:
        """Policy and teacher."""
        return super().requires | {LogProbs("policy"), LogProbs(self.teacher)}

    def factor(self, batch: TokenBatch) -> Factor:
        """The weight per token; 0 where the policy gives it probability 0."""
        known = batch.loss_mask & ~missing(batch, "policy")
        log_ratio = batch.logp(self.teacher) - batch.held("policy")  # a weight has no gradient
        weight = torch.where(known, score_weight(torch.where(known, log_ratio, 0.0), divergence=self.divergence), 0.0)
        return Factor(weight, {"score_weight/mean": token_mean(weight, batch.token_weight)})


@dataclass(frozen=True, kw_only=True)
class ImplicitReward(Weight):
    r"""A weight of 1 that measures the implicit reward $\beta \log(\pi/\text{ref})$ of the completions.

    A policy that maximises reward minus $\beta$ KL has $\beta \log(\pi/\text{ref}) = R - \beta \log Z$: where this mean
    leaves the reward's own scale, the policy is paid by something else. To be watched, not optimised.

    Args:
        beta: $\beta$.
        reference: source of the reference policy.

    Metrics: `implicit_reward/token`, its mean over tokens; `implicit_reward/sequence`, the mean over rows of its sum.
    Tokens to which one of the two gives probability 0 are left out.

    Raises:
        ConfigError: if `beta` is no number.

    Reference: Direct Preference Optimization, https://arxiv.org/abs/2305.18290

    >>> logps = {"policy": torch.tensor([[-1.0, -1.0]]), "initial": torch.tensor([[-2.0, -4.0]])}
    >>> metrics = ImplicitReward(beta=0.1).factor(TokenBatch(mask=torch.ones(1, 2), logps=logps)).metrics
    >>> metrics["implicit_reward/token"].value(), metrics["implicit_reward/sequence"].value()
    (tensor(0.2000), tensor(0.4000))
    """

    beta: float = 1.0
    reference: str = "initial"

    def __post_init__(self) -> None:
        check_number("ImplicitReward.beta", self.beta)

    @property
    def requires(self) -> frozenset[Requirement]:
        """Policy and reference."""
        return super().requires | {LogProbs("policy"), LogProbs(self.reference)}

    def factor(self, batch: TokenBatch) -> Factor:
        """1, and the implicit reward."""
        known = batch.loss_mask & ~missing(batch, "policy") & ~missing(batch, self.reference)
        log_ratio = batch.held("policy") - batch.logp(self.reference)  # a measurement
        reward = torch.where(known, self.beta * log_ratio, 0.0)
        rows = (batch.row_tokens > 0).sum()
        metrics: dict[str, Metric] = {
            "implicit_reward/token": token_mean(reward, known),
            "implicit_reward/sequence": Sum(reward.sum(), rows),
        }
        return Factor(torch.ones_like(batch.token_weight[:, :1]), metrics)
