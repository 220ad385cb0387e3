"""ZClip: a gradient clip that follows the run."""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from rlstab.errors import ConfigError
from rlstab.optim._gradients import Decision, GradientStabiliser


@dataclass(kw_only=True, eq=False)
class ZClip(GradientStabiliser):
    r"""Clip gradients whose norm stands out from those before by more than `threshold` standard deviations.

    With the mean $\mu$ and variance $\sigma^2$ of the norms so far and $z = (g - \mu)/(\sigma + \epsilon)$: where
    $z > z_t$ the gradient is scaled down to $c = \mu + z_t^2 \sigma / z$, the closer to the mean the wilder the spike;
    else $c = g$. Then $\mu \leftarrow \alpha\mu + (1 - \alpha) c$ and, with the new mean,
    $\sigma^2 \leftarrow \alpha\sigma^2 + (1 - \alpha)(c - \mu)^2$. The first `warmup` norms are collected, and give the
    first mean and (population) variance.

    A gradient that is not finite is skipped, and teaches nothing. (The released class has no rule for it.)

    Stabilises: spikes of the gradient, whatever its scale at the time.

    Differs: `max_norm` is None here and 1.0 there, where it decides most steps of norm above 1.

    Proof: vector `zclip`.

    Args:
        alpha: $\alpha$, how slowly the statistics follow.
        threshold: $z_t$.
        warmup: how many norms are collected first.
        eps: $\epsilon$.
        max_norm: a fixed limit on top, during the warm-up too; None for none.
        mode: `reciprocal` as above; `mean` scales spikes down to $\mu$; `percentile` everything above
            $\mu + z_t \sigma$ to that.
        factor: multiplies what spikes are scaled down to.
        learn_from_spikes: whether a clipped norm enters the statistics.

    Raises:
        ConfigError: for numbers out of range, or another mode.

    Example:
        >>> clip = ZClip(warmup=5)
        >>> for norm in (1.0, 1.2, 0.8, 1.1, 0.9, 1.0):
        ...     decision = clip.decide(norm)
        >>> round(clip.decide(5.0).limit, 4)
        1.0303

    Reference: ZClip: Adaptive Spike Mitigation for LLM Pre-Training, https://arxiv.org/abs/2504.02507
    """

    alpha: float = 0.97
    threshold: float = 2.5
    warmup: int = 25
    eps: float = 1e-6
    max_norm: float | None = None
    mode: Literal["reciprocal", "mean", "percentile"] = "reciprocal"
    factor: float = 1.0
    learn_from_spikes: bool = True
    _first: list[float] = field(init=False, default_factory=list)
    _mean: float | None = field(init=False, default=None)
    _variance: float = field(init=False, default=0.0)

    def __post_init__(self) -> None:
        checks = {
            "alpha": (self.alpha, 0 <= self.alpha < 1, "a number from 0 to below 1"),
            "threshold": (self.threshold, 0 < self.threshold < math.inf, "a number > 0"),
            "warmup": (self.warmup, self.warmup >= 2, "at least 2 norms, for a variance"),
            "eps": (self.eps, 0 < self.eps < math.inf, "a number > 0"),
            "max_norm": (self.max_norm, self.max_norm is None or self.max_norm > 0, "a norm > 0, or None"),
            "mode": (self.mode, self.mode in ("reciprocal", "mean", "percentile"), "reciprocal, mean or percentile"),
            "factor": (self.factor, 0 < self.factor < math.inf, "a number > 0"),
        }
        for key, (value, holds, wanted) in checks.items():
            if not holds:
                raise ConfigError(f"ZClip.{key}: expected {wanted}, got {value!r}")

    @property
    def mean(self) -> float | None:
        """Mean of the norms; None during the warm-up."""
        return self._mean

    @property
    def variance(self) -> float | None:
        """Variance of the norms; None during the warm-up."""
        return None if self._mean is None else self._variance

    def decide(self, norm: float) -> Decision:
        """Scale a spike down; leave out what is not finite."""
        if not math.isfinite(norm):
            return Decision(norm=norm, skip=True, reason=f"gradient norm {norm}")
        if self._mean is None:
            self._collect(norm)
            return self._limited(norm, norm, "")
        spread = math.sqrt(self._variance)
        z = (norm - self._mean) / (spread + self.eps)
        spike = z > self.threshold
        clipped = min(norm, self.factor * self._target(spread, z)) if spike else norm
        if self.learn_from_spikes or not spike:
            self._mean = self.alpha * self._mean + (1 - self.alpha) * clipped
            self._variance = self.alpha * self._variance + (1 - self.alpha) * (clipped - self._mean) ** 2
        return self._limited(norm, clipped, f"z = {z:.3g} > {self.threshold:g}" if clipped < norm else "")

    def _collect(self, norm: float) -> None:
        self._first.append(norm)
        if len(self._first) == self.warmup:
            self._mean = sum(self._first) / self.warmup
            self._variance = sum((x - self._mean) ** 2 for x in self._first) / self.warmup
            self._first = []

    def _target(self, spread: float, z: float) -> float:
        """What a spike is scaled down to."""
        assert self._mean is not None
        if self.mode == "mean":
            return self._mean
        return self._mean + self.threshold * spread * (self.threshold / z if self.mode == "reciprocal" else 1.0)

    def _limited(self, norm: float, clipped: float, reason: str) -> Decision:
        if self.max_norm is not None and self.max_norm < clipped:
            return Decision(norm=norm, limit=self.max_norm, reason=reason or f"norm {norm:.3g} > {self.max_norm:g}")
        return Decision(norm=norm, limit=clipped if clipped < norm else None, reason=reason)

    def state_dict(self) -> dict[str, Any]:
        """Statistics, and what the warm-up has collected."""
        return {"first": list(self._first), "mean": self._mean, "variance": self._variance}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self._first, self._mean, self._variance = list(state["first"]), state["mean"], state["variance"]
