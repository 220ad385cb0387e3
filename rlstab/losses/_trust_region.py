"""DPPO: a trust region on the probabilities of the sampled tokens instead of their ratio."""

from dataclasses import dataclass

import torch

from rlstab.batch import Column, LogProbs, Requirement, TokenBatch
from rlstab.losses._checks import check_range
from rlstab.losses._metrics import token_mean
from rlstab.losses._weight import Factor, Weight


@dataclass(frozen=True, kw_only=True)
class TotalVariationMask(Weight):
    r"""Keep a token while the policy's probability of it has moved little: the trust region of DPPO (binary TV).

    At $A > 0$ a token stays while $\pi - \mu \le$ `high`, at $A \le 0$ while $\pi - \mu \ge -$`low`. A ratio clip stops
    rare tokens, whose ratio grows fast, and lets frequent ones move far; a bound on the difference does neither. On
    detached ratios: `CISPO(max=20.0, weights=TotalVariationMask())`.

    Args:
        low: how far the probability may fall where that is wanted.
        high: how far it may rise where that is wanted.
        against: source of $\mu$: `old`, or `sampler`. A token without a log-prob there stays.

    Metrics: `total_variation_mask/kept`, the share of the tokens that stay.

    Raises:
        ConfigError: unless both bounds lie in [0, 1].

    Reference: Rethinking the Trust Region in LLM Reinforcement Learning (DPPO), https://arxiv.org/abs/2602.04879

    >>> logps = {"policy": torch.tensor([[0.9, 0.02]]).log(), "old": torch.tensor([[0.5, 0.01]]).log()}
    >>> batch = TokenBatch(mask=torch.ones(1, 2), advantages=torch.ones(1), logps=logps)
    >>> TotalVariationMask().factor(batch).values  # a ratio of 2 stays
    tensor([[0., 1.]])
    """

    low: float = 0.2
    high: float = 0.2
    against: str = "old"

    def __post_init__(self) -> None:
        check_range("TotalVariationMask.low", self.low, 0, 1)
        check_range("TotalVariationMask.high", self.high, 0, 1)

    @property
    def requires(self) -> frozenset[Requirement]:
        """Advantages, policy and what it is compared with."""
        return super().requires | {Column("advantages"), LogProbs("policy"), LogProbs(self.against)}

    @property
    def inert_on_policy(self) -> tuple[str, ...]:
        """All of it."""
        return ("TotalVariationMask",) if self.against == "old" else ()

    def factor(self, batch: TokenBatch) -> Factor:
        """1 or 0 per token."""
        policy = batch.held("policy")  # a mask has no gradient
        moved = (policy.exp() - batch.logp(self.against).exp()).nan_to_num(nan=0.0)
        keep = torch.where(batch.token_advantages() > 0, moved <= self.high, moved >= -self.low).to(policy.dtype)
        return Factor(keep, {"total_variation_mask/kept": token_mean(keep, batch.token_weight)})
