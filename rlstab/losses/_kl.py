"""Schulman's estimators of a KL as a penalty, with what their gradients really descend."""

from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from rlstab.batch import LogProbs, Requirement, TokenBatch
from rlstab.errors import ConfigError
from rlstab.losses._checks import check_choice
from rlstab.losses._metrics import token_mean
from rlstab.losses._ratio import Ratio, TokenRatio, finite_logp, ratio_of
from rlstab.losses._term import Loss, Term

Estimator = Literal["k1", "k2", "k3"]


def kl_estimate(log_ratio: Float[Tensor, "*shape"], *, estimator: Estimator) -> Float[Tensor, "*shape"]:
    r"""With $a = \log\pi - \log\text{ref}$: `k1` $= a$, `k2` $= a^2/2$, `k3` $= e^{-a} - 1 + a$.

    Reference: Approximating KL Divergence (J. Schulman), http://joschu.net/blog/kl-approx.html

    >>> kl_estimate(torch.tensor([0.0, 1.0]), estimator="k2")
    tensor([0.0000, 0.5000])
    """
    if estimator == "k1":
        return log_ratio
    if estimator == "k2":
        return log_ratio.square() / 2
    return torch.expm1(-log_ratio) + log_ratio


@dataclass(frozen=True, kw_only=True)
class KL(Term):
    r"""A sampled KL penalty, for compatibility with the hosts: an estimator times a weight $w = \pi/\pi_\text{old}$.

    Tokens are drawn from *old* (on policy: from the policy). Target: token, that is the divergence at the prefixes
    that were sampled. What the gradient of each combination descends:

    | estimator | `weight="none"` | `"detached"` | `"differentiable"` |
    |---|---|---|---|
    | `k1` | nothing (expected gradient 0 on policy): refused | nothing: refused | reverse KL, unbiased, noisy |
    | `k2` | reverse KL on policy; biased off policy | **reverse KL, unbiased** (its value is not) | biased: wrong sign below $a = -2$ |
    | `k3` | *forward* KL on policy; biased off policy | *forward* KL, unbiased (its value is the reverse KL's) | **reverse KL, unbiased in value and gradient** |

    `KL(estimator="k3")` is what GRPO prints; `KL(estimator="k3", weight="differentiable")` is DeepSeek-V3.2's. For an
    estimator that says what it descends, use `ReverseKL` or `ForwardKL`.

    Args:
        estimator: see the table.
        weight: factor of the estimate, without or with gradient.
        reference: source of the reference policy.
        ratio: the importance ratio used as weight.

    Raises:
        ConfigError: for `k1` with a gradient that is zero in expectation.

    Reference: Rethinking KL Regularization in RLHF, https://arxiv.org/abs/2510.01555; DeepSeek-V3.2,
    https://arxiv.org/abs/2512.02556

    >>> logp = torch.tensor([[-1.0]], requires_grad=True)
    >>> batch = TokenBatch(mask=torch.ones(1, 1), logps={"policy": logp, "initial": torch.tensor([[-2.0]])})
    >>> KL(estimator="k2").loss(batch).values
    tensor([[0.5000]], grad_fn=<DivBackward0>)
    """  # noqa: E501  # a table

    estimator: Estimator = "k3"
    weight: Literal["none", "detached", "differentiable"] = "none"
    reference: str = "initial"
    ratio: Ratio = field(default_factory=TokenRatio)

    def __post_init__(self) -> None:
        check_choice("KL.estimator", self.estimator, ("k1", "k2", "k3"))
        check_choice("KL.weight", self.weight, ("none", "detached", "differentiable"))
        if self.estimator == "k1" and self.weight != "differentiable":
            raise ConfigError(
                f"KL(estimator='k1', weight={self.weight!r}) has an expected gradient of zero: use "
                "weight='differentiable', or ReverseKL()"
            )

    @property
    def requires(self) -> frozenset[Requirement]:
        """Policy and reference, and the ratio where it weighs."""
        mine = frozenset({LogProbs("policy"), LogProbs(self.reference)})
        return mine if self.weight == "none" else mine | self.ratio.requires

    def loss(self, batch: TokenBatch) -> Loss:
        """The weighted estimate per token; metric `kl`, its token mean."""
        log_ratio = finite_logp(batch.logp("policy")) - finite_logp(batch.logp(self.reference))
        value = kl_estimate(log_ratio, estimator=self.estimator)
        if self.weight != "none":
            factor = ratio_of(self.ratio.log_ratio(batch))
            value = value * (factor if self.weight == "differentiable" else factor.detach())
        return Loss(value, {"kl": token_mean(value, batch.token_weight)})
