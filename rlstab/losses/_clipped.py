"""Surrogates that bound the importance ratio: PPO's clips, CISPO, SAPO, GMPO."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.nn.functional import threshold

from rlstab.batch import TokenBatch
from rlstab.errors import ConfigError, ShapeError
from rlstab.losses._checks import check_positive, check_range
from rlstab.losses._estimate import Estimate
from rlstab.losses._mean import Mean, MeanField
from rlstab.losses._metrics import Metric
from rlstab.losses._ratio import TokenRatio, masked_row_mean, ratio_max, ratio_of, scored_logp
from rlstab.losses._surrogate import RatioSurrogate, clip_metrics, clip_share


def clipped_surrogate(
    ratio: Float[Tensor, "B #T"],
    advantages: Float[Tensor, "B #T"],
    *,
    low: float,
    high: float,
    dual: float | None = None,
    cap: float | None = None,
) -> Float[Tensor, "B #T"]:
    r"""$-\min(r A, \operatorname{clip}(r, 1 - \text{low}, 1 + \text{high}) A)$; for $A < 0$ at most $\text{dual} |A|$.

    >>> import torch
    >>> clipped_surrogate(torch.tensor([[1.5, 0.5]]), torch.tensor([[1.0]]), low=0.2, high=0.28)
    tensor([[-1.2800, -0.5000]])
    """
    return clip_loss(ratio * -advantages, advantages, low=low, high=high, dual=dual, cap=cap)


def clip_loss(
    loss: Float[Tensor, "B #T"],
    advantages: Float[Tensor, "B #T"],
    *,
    low: float,
    high: float,
    dual: float | None,
    cap: float | None,
) -> Float[Tensor, "B #T"]:
    r"""The clips of the ratio as bounds of $-r A$: PPO's minimum does not let it fall below $-A$ times its bound.

    >>> clip_loss(torch.tensor([[-1.5, 0.5]]), torch.tensor([[1.0, -1.0]]), low=0.2, high=0.28, dual=None, cap=None)
    tensor([[-1.2800,  0.8000]])
    """
    below, above = 1 - low, 1 + high if cap is None else min(cap, 1 + high)
    outer = torch.minimum if above >= below else torch.maximum  # takes `above` where A > 0, else `below`
    loss = loss.clamp(min=outer(advantages * -above, advantages * -below))
    largest = dual if cap is None else max(cap, 1 + high)
    if largest is None:
        return loss
    return loss.clamp(max=torch.where(advantages > 0, math.inf, advantages * -largest))


@dataclass(frozen=True, kw_only=True)
class ClippedSurrogate(RatioSurrogate):
    r"""PPO's clipped surrogate: $-\min(r A, \operatorname{clip}(r, 1 - \text{low}, 1 + \text{high}) A)$.

    The gradient is $-r A$, and 0 where the clip binds. It leaves a large $r$ at $A < 0$ alone: `dual` (the loss is at
    most $c|A|$) or `cap` ($r \leftarrow \min(r, \delta)$ in the first branch) bounds it there, to the same effect. With
    `GeometricRatio` this is GSPO.

    Args:
        low: how far below 1 the ratio counts, in [0, 1].
        high: how far above 1 the ratio counts; DAPO ("clip higher") takes 0.28.
        dual: $c > 1$ of dual clip, 3 in verl.
        cap: $\delta$ of two-sided clip, 4 in INTELLECT-2.
        ratio: the importance ratio.
        weights: detached factors.

    Metrics: `clip_low`, `clip_high`, `clip_region`, `clip_low_min`, `clip_high_max` (shares where the clip stops the
    gradient), `ratio_max`, `impossible` (tokens without a ratio); with `dual` also `clip_dual`.

    Raises:
        ConfigError: for bounds out of range, or both `dual` and `cap`.

    Reference: Proximal Policy Optimization Algorithms, https://arxiv.org/abs/1707.06347; DAPO,
    https://arxiv.org/abs/2503.14476; dual clip, https://arxiv.org/abs/1912.09729; INTELLECT-2,
    https://arxiv.org/abs/2505.07291

    >>> import torch
    >>> logp = torch.tensor([[0.5, 0.9]]).log().requires_grad_()
    >>> batch = TokenBatch(
    ...     mask=torch.ones(1, 2),
    ...     advantages=torch.ones(1),
    ...     logps={"policy": logp, "old": torch.tensor([[0.5, 0.5]]).log()},
    ... )
    >>> ClippedSurrogate(low=0.2, high=0.28).loss(batch).values.detach()
    tensor([[-1.0000, -1.2800]])
    """

    low: float = 0.2
    high: float = 0.2
    dual: float | None = None
    cap: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("ClippedSurrogate.low", self.low, 0, 1)
        check_range("ClippedSurrogate.high", self.high, 0)
        if self.dual is not None and not self.dual > 1:
            raise ConfigError(f"ClippedSurrogate.dual: expected a bound > 1 on the ratio, got {self.dual!r}")
        if self.cap is not None:
            check_positive("ClippedSurrogate.cap", self.cap)
        if self.dual is not None and self.cap is not None:
            raise ConfigError(
                f"ClippedSurrogate: dual={self.dual} and cap={self.cap} both bound the ratio at negative advantages: "
                "keep one"
            )

    @property
    def inert_at_ratio_one(self) -> tuple[str, ...]:
        """The clip."""
        return ("the clip of ClippedSurrogate",)

    def surrogate(self, batch: TokenBatch) -> tuple[Float[Tensor, "B #T"], dict[str, Metric]]:
        """The clipped loss."""
        ratio, advantages = ratio_of(self.ratio.log_ratio(batch)), batch.token_advantages()
        unclipped = ratio * -advantages
        loss = clip_loss(unclipped, advantages, low=self.low, high=self.high, dual=self.dual, cap=self.cap)
        metrics = clip_metrics(unclipped < loss, advantages, batch)
        metrics["ratio_max"] = ratio_max(ratio, batch)
        if self.dual is not None:
            metrics["clip_dual"] = clip_share((ratio.detach() > self.dual) & (advantages < 0), batch)
        return loss, metrics


@dataclass(frozen=True, kw_only=True)
class CISPO(RatioSurrogate):
    r"""REINFORCE with a clipped, detached ratio: $-\operatorname{sg}(\operatorname{clip}(r, \min, \max)) A \log\pi$.

    Every token keeps a gradient: $-\operatorname{clip}(r) A$.

    Mind the units: `max` is the largest ratio itself, as TRL's `epsilon_high` is for CISPO (5.0 in ScaleRL). verl and
    slime write the same method with distances from 1: `clip_ratio_high=0.28` there is `max=1.28` here, and
    `clip_ratio_low=0.2` is `min=0.8`. The paper has no lower bound.

    Args:
        max: largest ratio.
        min: smallest ratio, or None.
        ratio: the importance ratio.
        weights: detached factors.

    Metrics: `clip_high`, the share of ratios above `max` at A > 0; with `min` also `clip_low`, that of ratios below it
    at A < 0; `ratio_max`; `impossible`, the number of tokens left out because the policy or the old one gives them
    probability 0.

    Raises:
        ConfigError: unless 0 <= min < max.

    Reference: MiniMax-M1, https://arxiv.org/abs/2506.13585; The Art of Scaling Reinforcement Learning Compute for LLMs
    (ScaleRL), https://arxiv.org/abs/2510.13786

    >>> import torch
    >>> logps = {"policy": torch.tensor([[0.9]]).log().requires_grad_(), "old": torch.tensor([[0.1]]).log()}
    >>> batch = TokenBatch(mask=torch.ones(1, 1), advantages=torch.ones(1), logps=logps)
    >>> CISPO(max=5.0).loss(batch).values.sum().backward(); logps["policy"].grad
    tensor([[-5.]])
    """

    max: float = 5.0
    min: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("CISPO.max", self.max)
        if self.min is not None and not 0 <= self.min < self.max:
            raise ConfigError(f"CISPO.min: expected a ratio in [0, max={self.max}), got {self.min!r}")

    @property
    def inert_at_ratio_one(self) -> tuple[str, ...]:
        """The bounds, if 1 lies between them."""
        return ("the clip of CISPO",) if (self.min or 0.0) <= 1 <= self.max else ()

    @property
    def scored_by(self) -> tuple[str, ...]:
        """The policy, whose log-prob is the loss, and the denominator of the ratio."""
        return ("policy", self.ratio.against)

    @property
    def zero_without(self) -> tuple[str, ...]:
        """The policy, without whose log-prob the ratio is 0 if nothing holds it above."""
        return () if self.min or type(self.ratio) is not TokenRatio else ("policy",)

    def surrogate(self, batch: TokenBatch) -> tuple[Float[Tensor, "B T"], dict[str, Metric]]:
        """The weighted log-probs."""
        ratio = self.ratio.bounded(batch).exp()  # sg(r): a weight
        advantages = batch.token_advantages()
        clipped = ratio.clamp(self.min, self.max)
        loss = clipped * -advantages * scored_logp(batch, "policy")
        metrics: dict[str, Metric] = {"ratio_max": self.ratio.largest(ratio, batch)}
        above, side = ratio - clipped, advantages.sign()  # numbers: comparisons are several times slower on a CPU
        metrics["clip_high"] = clip_share(above.relu() * side.relu(), batch)
        if self.min is not None:
            metrics["clip_low"] = clip_share((-above).relu() * (-side).relu(), batch)
        return loss, metrics


def sapo_surrogate(
    ratio: Float[Tensor, "B #T"], advantages: Float[Tensor, "B #T"], *, tau_pos: float, tau_neg: float
) -> Estimate:
    r"""$-\frac{4}{\tau} \sigma A$ with $\sigma = \sigma(\tau (r - 1))$, and its slope $-4 \sigma (1 - \sigma) r A$.

    $\tau$ goes by the sign of $A$; the slope at $r = 1$ is always $-A$.

    >>> sapo_surrogate(torch.tensor([[1.0]]), torch.tensor([[1.0]]), tau_pos=1.0, tau_neg=1.05)
    Estimate(value=tensor([[-2.]]), slope=tensor([[-1.]]))
    """
    tau = threshold(advantages.sign(), 0, tau_neg / tau_pos)  # 1 where A > 0
    tau = tau if tau_pos == 1 else tau * tau_pos
    exponent = ratio * tau
    gate = (exponent - tau).sigmoid_()
    value = gate * (advantages / tau * -4)
    return Estimate(value, torch.addcmul(value, value, gate, value=-1).mul_(exponent))


@dataclass(frozen=True, kw_only=True)
class SAPO(RatioSurrogate):
    r"""Soft adaptive policy optimization: a sigmoid gate instead of a clip, $-\frac{4}{\tau} \sigma(\tau (r - 1)) A$.

    The gradient is $-4 \sigma (1 - \sigma) r A$: $-A$ at $r = 1$, fading on both sides, faster for a larger $\tau$.

    Args:
        tau_pos: $\tau$ where $A > 0$.
        tau_neg: $\tau$ elsewhere.
        ratio: the importance ratio.
        weights: detached factors.

    Metrics: `ratio_max`; `impossible`, the number of tokens without a ratio.

    Raises:
        ConfigError: if a temperature is not positive.

    Reference: Soft Adaptive Policy Optimization, https://arxiv.org/abs/2511.20347

    >>> import torch
    >>> logp = torch.tensor([[-1.0]], requires_grad=True)
    >>> batch = TokenBatch(mask=torch.ones(1, 1), advantages=torch.tensor([3.0]), logps={"policy": logp})
    >>> SAPO().loss(batch).values.sum().backward(); logp.grad
    tensor([[-3.]])
    """

    tau_pos: float = 1.0
    tau_neg: float = 1.05

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("SAPO.tau_pos", self.tau_pos)
        check_positive("SAPO.tau_neg", self.tau_neg)

    @property
    def inert_at_ratio_one(self) -> tuple[str, ...]:
        """The gate: its slope there does not depend on the temperature."""
        return ("the soft gate of SAPO",)

    def surrogate(self, batch: TokenBatch) -> tuple[Float[Tensor, "B #T"], dict[str, Metric]]:
        """The gated loss."""
        ratio = self.ratio.bounded(batch).exp()
        gated = sapo_surrogate(ratio, batch.token_advantages(), tau_pos=self.tau_pos, tau_neg=self.tau_neg)
        return self.ratio.attached(gated, batch), {"ratio_max": self.ratio.largest(ratio, batch)}


def gmpo_surrogate(
    log_ratio: Float[Tensor, "B T"],
    advantages: Float[Tensor, "B 1"],
    mask: Shaped[Tensor, "B T"],
    *,
    low: float,
    high: float,
) -> Float[Tensor, "B 1"]:
    r"""$-A \exp(\overline{c})$ with $c = \min(\log r, \text{high})$ for $A > 0$, else $c = \max(\log r, -\text{low})$.

    >>> import torch
    >>> mask = torch.tensor([[True, True]])
    >>> gmpo_surrogate(torch.tensor([[0.9, 0.0]]), torch.ones(1, 1), mask, low=0.4, high=0.4)  # -exp(0.2)
    tensor([[-1.2214]])
    """
    clipped = torch.where(advantages > 0, log_ratio.clamp(max=high), log_ratio.clamp(min=-low))
    return -advantages * ratio_of(masked_row_mean(clipped, mask))


@dataclass(frozen=True, kw_only=True)
class GMPO(RatioSurrogate):
    r"""Geometric-mean policy optimization: $-A \exp(\frac{1}{|o|} \sum_t c_t)$, one loss per sequence.

    The token log-ratios are clipped on one side: $c_t = \min(\log r_t, \text{high})$ for $A > 0$ and
    $\max(\log r_t, -\text{low})$ for $A < 0$.

    Args:
        low: how far below 0 the log-ratio counts.
        high: how far above 0 the log-ratio counts. Both are distances in log space: 0.4 is the paper's
            $(e^{-0.4}, e^{0.4})$.
        ratio: the importance ratio, per token.
        weights: detached factors.

    Metrics: as of `ClippedSurrogate`, of the token ratios.

    Raises:
        ConfigError: if a bound is negative, or the ratio has one value per sequence.
        ShapeError: for advantages per token.

    Reference: Geometric-Mean Policy Optimization, https://arxiv.org/abs/2507.20673

    >>> import torch
    >>> logp = torch.tensor([[-1.0, -1.0]], requires_grad=True)
    >>> batch = TokenBatch(mask=torch.ones(1, 2), advantages=torch.ones(1), logps={"policy": logp})
    >>> GMPO().loss(batch).values.sum().backward(); logp.grad
    tensor([[-0.5000, -0.5000]])
    """

    mean: Mean = MeanField("sequence")  # type: ignore[assignment]
    low: float = 0.4
    high: float = 0.4

    def __post_init__(self) -> None:
        super().__post_init__()
        self._token_ratio_only()
        check_range("GMPO.low", self.low, 0)
        check_range("GMPO.high", self.high, 0)

    @property
    def inert_at_ratio_one(self) -> tuple[str, ...]:
        """The clip."""
        return ("the clip of GMPO",)

    def surrogate(self, batch: TokenBatch) -> tuple[Float[Tensor, "B 1"], dict[str, Metric]]:
        """One loss per row."""
        log_ratio, advantages = self.ratio.log_ratio(batch), batch.token_advantages()
        if advantages.shape[-1] != 1:
            raise ShapeError(f"GMPO: expected one advantage per row, got {list(advantages.shape)}")
        loss = gmpo_surrogate(log_ratio, advantages, batch.token_weight, low=self.low, high=self.high)
        with torch.no_grad():
            below, above = (log_ratio < -self.low) & (advantages < 0), (log_ratio > self.high) & (advantages > 0)
        metrics = clip_metrics(below | above, advantages, batch)
        return loss, metrics | {"ratio_max": ratio_max(ratio_of(log_ratio.detach()), batch)}
