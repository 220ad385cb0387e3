"""Importance ratios between the policy and the policy that the rollouts are judged by, in log space."""

from abc import abstractmethod
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from rlstab.batch import LogProbs, Requirement, TokenBatch
from rlstab.losses._parts import Part


@dataclass(frozen=True, kw_only=True)
class Ratio(Part):
    r"""The log of an importance ratio $\pi/\pi_\text{against}$, with gradient.

    Args:
        against: source of the denominator: `old`, or `sampler` (PPO against the behaviour policy, "bypass": the
            mismatch is then inside the ratio and must not be corrected again by a weight).
    """

    against: str = "old"

    @property
    def requires(self) -> frozenset[Requirement]:
        """Policy and denominator."""
        return super().requires | {LogProbs("policy"), LogProbs(self.against)}

    @abstractmethod
    def log_ratio(self, batch: TokenBatch) -> Float[Tensor, "B T"] | Float[Tensor, "B 1"]:
        """The log-ratio per token, or `[B, 1]` where a sequence has one."""


@dataclass(frozen=True, kw_only=True)
class TokenRatio(Ratio):
    r"""$\log r_t = \log\pi(y_t) - \log\pi_\text{old}(y_t)$."""

    def log_ratio(self, batch: TokenBatch) -> Float[Tensor, "B T"]:
        """One log-ratio per token."""
        return batch.logp("policy") - batch.logp(self.against)
