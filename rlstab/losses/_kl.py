"""Schulman's estimators of a KL as a penalty, with what their gradients really descend."""

from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from rlstab.batch import LogProbs, Requirement, TokenBatch
from rlstab.errors import ConfigError
from rlstab.losses._checks import check_choice, check_part
from rlstab.losses._estimate import Estimate
from rlstab.losses._metrics import Metric, Sum, Total, overflow
from rlstab.losses._ratio import Ratio, TokenRatio, bounded_log, missing, scored_log_ratio, with_slope
from rlstab.losses._term import Loss, Term

Estimator = Literal["k1", "k2", "k3"]

FAR = 60.0  # e^FAR times any log-ratio fits float32


@torch.no_grad()
def estimate(estimator: Estimator, log_ratio: Float[Tensor, "*shape"]) -> Estimate:
    r"""With $a = \log\pi - \log\text{ref}$: `k1` $= a$, `k2` $= a^2/2$, `k3` $= e^{-a} - 1 + a$.

    >>> estimate("k2", torch.tensor([0.0, 3.0]))
    Estimate(value=tensor([0.0000, 4.5000]), slope=tensor([0., 3.]))
    """
    if estimator == "k1":
        return Estimate(log_ratio, torch.ones_like(log_ratio))
    if estimator == "k2":
        return Estimate(log_ratio * (log_ratio / 2), log_ratio)
    change = torch.expm1(-log_ratio)
    return Estimate(change + log_ratio, -change.clamp(max=torch.finfo(change.dtype).max))


@torch.no_grad()
def weighted_estimate(
    estimator: Estimator,
    log_ratio: Float[Tensor, "*shape"],
    log_weight: Float[Tensor, "*#shape"],
    *,
    joint: bool,
    near: bool = False,
) -> Estimate:
    r"""The estimate times $w$, with the slope at fixed $w$ or, `joint`, where $w \propto \pi$.

    | | value | slope | joint slope |
    |---|---|---|---|
    | `k1` | $w a$ | $w$ | $w (1 + a)$ |
    | `k2` | $w a^2 / 2$ | $w a$ | $w (a + a^2 / 2)$ |
    | `k3` | $w (e^{-a} - 1 + a)$ | $-w (e^{-a} - 1)$ | $w a$ |

    Where $e^{-a}$ is large, its exponent is added to that of $w$ before `exp`, unless all $a$ are known to be `near` 0,
    within 40 nats. Slopes are held at the largest number.

    >>> weighted_estimate("k3", torch.tensor([-199.0]), torch.tensor([-199.0]), joint=True).value  # exp(-199 + 199)
    tensor([1.])
    """
    weight = log_weight.exp()
    limit = torch.finfo(weight.dtype).max
    if estimator == "k3":
        opposite, scale = -log_ratio, weight
        if not near:
            opposite = opposite.clamp(max=FAR)
            scale = (log_weight - (log_ratio + opposite)).exp()
        change = torch.expm1(opposite)
        value = scale * (change + log_ratio)
        return Estimate(value, weight * log_ratio if joint else (-scale * change).clamp(min=-limit))
    plain = estimate(estimator, log_ratio)
    value, slope = weight * plain.value, weight * plain.slope
    return Estimate(value, (slope + value if joint else slope).clamp(-limit, limit))


@dataclass(frozen=True, kw_only=True)
class KL(Term):
    r"""A sampled KL penalty, for compatibility with the hosts: an estimator times a weight $w = \pi/\pi_\text{old}$.

    With $a = \log\pi - \log\text{ref}$: `k1` $= a$, `k2` $= a^2/2$, `k3` $= e^{-a} - 1 + a$.

    Tokens are drawn from *old* (on policy: from the policy). Target: token, that is the divergence at the prefixes
    that were sampled. What the gradient of each combination descends:

    | estimator | `weight="none"` | `"detached"` | `"differentiable"` |
    |---|---|---|---|
    | `k1` | nothing (expected gradient 0 on policy): refused | nothing: refused | reverse KL, unbiased, noisy |
    | `k2` | reverse KL on policy; biased off policy | **reverse KL, unbiased** (its value is not) | biased: wrong sign below $a = -2$ |
    | `k3` | *forward* KL on policy; biased off policy | *forward* KL, unbiased (its value is the reverse KL's) | **reverse KL, unbiased in value and gradient** |

    `KL(estimator="k3")` is what GRPO prints; `KL(estimator="k3", weight="differentiable")` is DeepSeek-V3.2's. For an
    estimator that says what it descends, use `ReverseKL` or `ForwardKL`.

    Values beyond the dtype are `+inf` and counted, with the gradient held at the largest number. A token to which the
    policy gives probability 0 has no gradient, and with a weight counts 0. One that has no weight (see `Ratio`) is left
    out and counted.

    Args:
        coef: coefficient, a number or a controller.
        mean: how the loss becomes a number.
        rows: which rows the term acts on.
        estimator: see the table.
        weight: factor of the estimate, without or with gradient.
        reference: source of the reference policy.
        ratio: the importance ratio used as weight.

    Metrics: `kl`, the token mean of the weighted estimate; `overflow`, at how many tokens it is infinite; with a weight
    `impossible` (for a ratio to the sampler `unscored`), the number of tokens left out.

    Raises:
        ConfigError: for `k1` with a gradient that is zero in expectation, or if the ratio is none.

    Reference: Approximating KL Divergence (J. Schulman), http://joschu.net/blog/kl-approx.html; Rethinking KL
    Regularization in RLHF, https://arxiv.org/abs/2510.01555; DeepSeek-V3.2, https://arxiv.org/abs/2512.02556

    >>> logp = torch.tensor([[-1.0]], requires_grad=True)
    >>> batch = TokenBatch(mask=torch.ones(1, 1), logps={"policy": logp, "initial": torch.tensor([[-2.0]])})
    >>> loss = KL(estimator="k2").loss(batch).values
    >>> loss.sum().backward(); loss.detach(), logp.grad
    (tensor([[0.5000]]), tensor([[1.]]))
    """  # noqa: E501  # a table

    estimator: Estimator = "k3"
    weight: Literal["none", "detached", "differentiable"] = "none"
    reference: str = "initial"
    ratio: Ratio = field(default_factory=TokenRatio)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("KL.estimator", self.estimator, ("k1", "k2", "k3"))
        check_choice("KL.weight", self.weight, ("none", "detached", "differentiable"))
        check_part("KL.ratio", self.ratio, Ratio, "TokenRatio()")
        _check_gradient(self.estimator, self.weight)

    @property
    def requires(self) -> frozenset[Requirement]:
        """Policy and reference, and the ratio where it weighs."""
        mine = frozenset({LogProbs("policy"), LogProbs(self.reference)})
        return mine if self.weight == "none" else mine | self.ratio.requires

    def loss(self, batch: TokenBatch) -> Loss:
        """The weighted estimate per token."""
        near = batch.close("policy", self.reference)
        log_ratio = scored_log_ratio(batch, self.reference)
        if self.weight == "none":
            return self._loss(estimate(self.estimator, log_ratio), batch)
        moves = self.weight == "differentiable"
        joint = moves and type(self.ratio) is TokenRatio  # one slope, where the sum of two would cancel
        log_weight = bounded_log(self.ratio.log_ratio(batch)) if moves and not joint else self.ratio.bounded(batch)
        against, limit = self.ratio.against, torch.finfo(log_weight.dtype).max
        all_drawn = batch.scores_all(against)
        drawn = log_weight if all_drawn else torch.where(missing(batch, against), -limit, log_weight)
        weighted = weighted_estimate(self.estimator, log_ratio, drawn, joint=joint, near=near)
        values, metrics = self._loss(weighted, batch)
        if moves and not joint:
            values = torch.addcmul(values, weighted.value.clamp(-limit, limit), log_weight - log_weight.detach())
        left_out = Total(batch.nothing if all_drawn else missing(batch, against).count_nonzero())
        return Loss(values, {**metrics, "unscored" if against == "sampler" else "impossible": left_out})

    def _loss(self, found: Estimate, batch: TokenBatch) -> Loss:
        """A loss with this value and this slope in the log-probs."""
        total = found.value.sum()  # outside the loss it is 0, as the log-probs are
        metrics: dict[str, Metric] = {"kl": Sum(total, batch.tokens), "overflow": overflow(found.value, total, batch)}
        return Loss(with_slope(found, batch), metrics)


def _check_gradient(estimator: Estimator, weight: str) -> None:
    if estimator == "k1" and weight != "differentiable":
        raise ConfigError(
            f"KL(estimator='k1', weight={weight!r}) has an expected gradient of zero: use "
            "weight='differentiable', or ReverseKL()"
        )
