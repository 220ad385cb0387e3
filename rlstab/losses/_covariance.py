"""KL-Cov: a penalty on the few tokens that drive the entropy down."""

from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlstab.batch import Column, LogProbs, Requirement, TokenBatch
from rlstab.losses._checks import check_choice, check_positive, check_range
from rlstab.losses._metrics import Sum
from rlstab.losses._parts import StepStatistic
from rlstab.losses._ratio import missing
from rlstab.losses._term import Loss, Term


def covariance(
    logp: Float[Tensor, "B T"], advantages: Float[Tensor, "B T"] | Float[Tensor, "B 1"], mask: Bool[Tensor, "B T"]
) -> Float[Tensor, "B T"]:
    r"""The summands of the covariance of advantage and log-prob: $(A_t - \bar A)(\log\pi_t - \overline{\log\pi})$.

    The means are over the tokens of `mask`; elsewhere the value has no meaning.

    >>> logp, advantages = torch.tensor([[-1.0, -3.0]]), torch.tensor([[1.0, -1.0]])
    >>> covariance(logp, advantages, torch.tensor([[True, True]]))
    tensor([[1., 1.]])
    """
    count = mask.sum().clamp(min=1)
    mean_logp = torch.where(mask, logp, 0.0).sum() / count
    mean_advantage = torch.where(mask, advantages, 0.0).sum() / count
    return (advantages - mean_advantage) * (logp - mean_logp)


@dataclass(frozen=True, kw_only=True)
class TopCovariance(StepStatistic):
    r"""The share `fraction` of a step's tokens with the largest covariance of advantage and log-prob.

    Of $N$ trained tokens with a finite log-prob exactly $\max(1, \lfloor k N \rfloor)$ are chosen; among equals those
    that come first in the step.

    Args:
        fraction: $k$.

    Returns of `compute`: `[N, T]`, true where a token is chosen.

    Raises:
        ConfigError: if `fraction` is not in (0, 1].

    Reference: The Entropy Mechanism of Reinforcement Learning for Reasoning Language Models,
    https://arxiv.org/abs/2505.22617

    >>> batch = TokenBatch(
    ...     mask=torch.ones(2, 2),
    ...     advantages=torch.tensor([1.0, -1.0]),
    ...     logps={"policy": torch.tensor([[-0.1, -1.0], [-0.1, -2.0]])},
    ... )
    >>> TopCovariance(fraction=0.25).compute(batch)
    tensor([[False, False],
            [False,  True]])
    """

    fraction: float = 2e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("TopCovariance.fraction", self.fraction)
        check_range("TopCovariance.fraction", self.fraction, 0, 1)

    @property
    def requires(self) -> frozenset[Requirement]:
        """Advantages and current log-probs."""
        return super().requires | {Column("advantages"), LogProbs("policy")}

    def compute(self, batch: TokenBatch) -> Bool[Tensor, "N T"]:
        """The chosen tokens."""
        logp = batch.held("policy").double()  # double: padding must not change the order by rounding
        mask = batch.loss_mask & logp.isfinite()
        score = torch.where(mask, covariance(logp, batch.token_advantages().double(), mask), -torch.inf).flatten()
        order = score.argsort(descending=True, stable=True)
        place = torch.empty_like(order).scatter(0, order, torch.arange(len(order), device=order.device))
        chosen = (self.fraction * mask.sum().double()).floor().clamp(min=1)
        return (place < chosen).view(mask.shape) & mask


@dataclass(frozen=True, kw_only=True)
class KLCov(Term):
    r"""Keep the log-probs of a step's high-covariance tokens where they were: $|\log\pi - \log\pi_\text{old}|$ there.

    The tokens are those of `TopCovariance`: raising a likely token that has a high advantage (or lowering an unlikely
    one with a low advantage) is what lowers the entropy. All other tokens have loss 0 and stay in the mean's count, and
    so do those to which the old policy gave probability 0.
    Made for a surrogate without clip. With one update per batch the policy is the old one, and the term is exactly 0.

    Args:
        fraction: share of the step's tokens; 2e-3 for the paper's 7B, 2e-4 for its 32B model.
        over: `step`, which does not depend on how the step is split, or `micro_batch`, as in the released code.
        selection: set by the part itself, the statistic that chooses the tokens.

    Metrics: `selected`, the share of tokens chosen.

    Raises:
        ConfigError: if `fraction` is not in (0, 1], or `over` is another word.

    Reference: The Entropy Mechanism of Reinforcement Learning for Reasoning Language Models,
    https://arxiv.org/abs/2505.22617

    >>> from rlstab.losses import run_parts
    >>> term = KLCov(fraction=0.5)
    >>> batch = TokenBatch(
    ...     mask=torch.ones(1, 2),
    ...     advantages=torch.tensor([[1.0, -1.0]]),
    ...     logps={"policy": torch.tensor([[-0.5, -0.4]]), "old": torch.tensor([[-0.6, -0.9]])},
    ... )
    >>> term.loss(run_parts(term.requires, batch)).values
    tensor([[0.1000, 0.0000]])
    """

    fraction: float = 2e-3
    over: Literal["step", "micro_batch"] = "step"
    selection: TopCovariance = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("KLCov.fraction", self.fraction)
        check_range("KLCov.fraction", self.fraction, 0, 1)
        check_choice("KLCov.over", self.over, ("step", "micro_batch"))
        object.__setattr__(self, "selection", TopCovariance(fraction=self.fraction))

    @property
    def inert_on_policy(self) -> tuple[str, ...]:
        """All of it."""
        return ("KLCov",)

    @property
    def requires(self) -> frozenset[Requirement]:
        """Both log-probs, and the chosen tokens or what choosing them reads."""
        chosen = {self.selection.needed} if self.over == "step" else self.selection.requires
        return frozenset({LogProbs("policy"), LogProbs("old")}) | chosen

    def loss(self, batch: TokenBatch) -> Loss:
        """The distance to the old log-probs at the chosen tokens."""
        chosen = batch.part(self.selection.key) if self.over == "step" else self.selection.compute(batch)
        difference = batch.logp("policy") - batch.logp("old")
        metrics = {"selected": Sum(chosen.count_nonzero(), batch.tokens)}
        if batch.scores_all("old") and batch.scores_all("policy"):
            kept = difference * chosen  # several times faster on a CPU
        else:
            kept = torch.where(chosen & ~missing(batch, "old"), difference, 0.0)
        return Loss(kept.abs(), metrics)
