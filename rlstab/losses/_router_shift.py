"""The router-shift ratio of RSPO: tokens count less, the more the routers of a mixture of experts have moved."""

from dataclasses import dataclass, field

from jaxtyping import Float
from torch import Tensor

from rlstab.batch import Column, Requirement, TokenBatch
from rlstab.losses._checks import check_part, check_positive, check_range
from rlstab.losses._ratio import Ratio, TokenRatio


def router_shift(log_ratios: Float[Tensor, "B T L K"]) -> Float[Tensor, "B T"]:
    r"""$\gamma = \exp\big(-\frac{1}{LK} \sum_{l,k} \lvert \log r_l(e_k) - \log r^\text{old}_l(e_k) \rvert\big) \le 1$.

    The distance of the routers from those of the old policy, at the experts $e_k$ that the old policy activated in each
    of L sparse layers; 1 where nothing moved.

    Args:
        log_ratios: new minus old log-probs of these experts, in nats, from the router's distribution over all experts.

    Returns:
        One factor per token, without gradient of its own making: that of `log_ratios`, if they have any.

    Reference: Router-Shift Policy Optimization, https://arxiv.org/abs/2510.23027

    >>> import torch
    >>> moved = torch.tensor([[[[0.5, -0.5], [0.0, 0.0]]]])  # one token, two layers, two experts
    >>> router_shift(moved)  # exp(-0.25)
    tensor([[0.7788]])
    """
    return (-log_ratios.abs().mean((-1, -2))).exp()


@dataclass(frozen=True, kw_only=True)
class RouterShiftRatio(Ratio):
    r"""Another ratio, made of token ratios times the router shift: $\log\tilde w_t = \log w_t + \log\tilde\gamma_t$.

    $\tilde\gamma_t = \operatorname{sg}(\max(\gamma_t, \text{min}))$ with the $\gamma$ of `router_shift`. It acts before
    any clip or mean, as in version 2 of the paper, so it also decides which tokens a clip stops. It has no gradient: a
    policy cannot raise its ratio by moving its routers. Sequence and geometric ratios take the sum and the mean of
    $\log\tilde w_t$.

    With one update per batch the routers are those of the old policy, $\gamma = 1$ and this is the ratio inside.

    Args:
        ratio: the ratio to rescale.
        min: floor of the factor, $\gamma_\text{min}$.

    Raises:
        ConfigError: unless 0 < min <= 1.

    Reference: Router-Shift Policy Optimization, https://arxiv.org/abs/2510.23027

    >>> import torch
    >>> batch = TokenBatch(
    ...     mask=torch.ones(1, 2),
    ...     logps={"policy": torch.tensor([[-1.0, -2.0]]), "old": torch.tensor([[-1.5, -2.0]])},
    ...     router_log_ratios=torch.tensor([[[[0.1, -0.1]], [[2.0, 2.0]]]]),
    ... )
    >>> RouterShiftRatio().log_ratio(batch)  # 0.5 - 0.1, and 0 + ln 0.8
    tensor([[ 0.4000, -0.2231]])
    """

    against: str = field(init=False, default="old")  # that of `ratio`
    ratio: Ratio = field(default_factory=TokenRatio)
    min: float = 0.8

    def __post_init__(self) -> None:
        check_part("RouterShiftRatio.ratio", self.ratio, Ratio, "TokenRatio()")
        check_positive("RouterShiftRatio.min", self.min)
        check_range("RouterShiftRatio.min", self.min, 0, 1)
        object.__setattr__(self, "against", self.ratio.against)

    @property
    def requires(self) -> frozenset[Requirement]:
        """What the ratio inside reads, and how the routers moved."""
        return super().requires | {Column("router_log_ratios")}

    @property
    def sequence_level(self) -> bool:
        """As the ratio that is rescaled."""
        return self.ratio.sequence_level

    @property
    def inert_on_policy(self) -> tuple[str, ...]:
        """The router shift: the routers have not moved."""
        return (*super().inert_on_policy, "the router shift of RouterShiftRatio")

    def log_ratio(self, batch: TokenBatch) -> Float[Tensor, "B #T"]:
        """The log-ratio of the rescaled tokens."""
        shift = router_shift(batch.column("router_log_ratios")).clamp(min=self.min).log().detach()  # sg: a weight
        logps = {**batch.logps, self.against: batch.logp(self.against)}
        logps["policy"] = batch.logp("policy") + shift
        return self.ratio.log_ratio(batch.replace(logps=logps, zeroed=True))
