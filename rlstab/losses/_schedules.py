"""Schedules and feedback for the coefficient of a KL penalty."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from rlstab.errors import ConfigError
from rlstab.losses._checks import check_number, check_positive, check_range
from rlstab.losses._controllers import Controller


@dataclass(kw_only=True, eq=False)
class Cosine(Controller):
    r"""From `start` to `end` along half a cosine over `steps` optimizer steps, constant afterwards.

    $\beta = \text{end} + \frac12 (\text{start} - \text{end}) (1 + \cos(\pi s / S))$ after $s$ of $S$ steps.

    Raises:
        ConfigError: if `steps` is below 1, or an end no number.

    >>> beta = Cosine(start=1.0, end=0.0, steps=4)
    >>> beta.observe(1, {}); round(float(beta.value), 4)
    0.8536
    >>> beta.observe(9, {}); float(beta.value)
    0.0
    """

    start: float
    end: float
    steps: int

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError(f"Cosine.steps: expected at least 1, got {self.steps}")
        check_number("Cosine.start", self.start)
        check_number("Cosine.end", self.end)
        self._set(self.start)

    def observe(self, step: int, metrics: Mapping[str, float]) -> None:
        """Move along the curve: after step `k` the coefficient is that of `k` finished steps."""
        share = min(step / self.steps, 1.0)
        self._set(self.end + (self.start - self.end) * (1 + math.cos(math.pi * share)) / 2)


@dataclass(kw_only=True, eq=False)
class DynamicKL(Controller):
    r"""GRPO-D's coefficient: from the middle down to `min` while the policy explores, then up to `max`.

    With $m = (\min + \max)/2$ and $E = \text{explore} \cdot S$: $\beta = m - (m - \min) s/E$ for $s \le E$, then
    $\min + (\max - \min) (s - E)/(S - E)$; constant after $S$ steps. As the paper's formula has it, it begins in the
    middle; its prose says that it begins small.

    Args:
        min: smallest coefficient; 0.04 and 0.1 are the paper's for counting, 0 and 0.02 for geometry.
        max: largest coefficient.
        steps: $S$, the optimizer steps of the run.
        explore: share of the steps during which it falls.

    Raises:
        ConfigError: unless min <= max, `explore` lies strictly between 0 and 1, and `steps` is at least 2.

    Reference: OThink-MR1 (GRPO-D), https://arxiv.org/abs/2503.16081

    >>> beta = DynamicKL(min=0.04, max=0.1, steps=1000)
    >>> def after(step: int) -> float:
    ...     beta.observe(step, {})
    ...     return round(float(beta.value), 6)
    >>> float(beta.value), after(150), after(300), after(650), after(1000)
    (0.07, 0.055, 0.04, 0.07, 0.1)
    """

    min: float = 0.04
    max: float = 0.1
    steps: int
    explore: float = 0.3

    def __post_init__(self) -> None:
        check_number("DynamicKL.min", self.min)
        check_range("DynamicKL.max", self.max, self.min)
        if self.steps < 2:
            raise ConfigError(f"DynamicKL.steps: expected at least 2, got {self.steps}")
        if not 0 < self.explore < 1:
            raise ConfigError(f"DynamicKL.explore: expected a share between 0 and 1, got {self.explore!r}")
        self._set((self.min + self.max) / 2)

    def observe(self, step: int, metrics: Mapping[str, float]) -> None:
        """Fall to the smallest coefficient, then rise to the largest."""
        middle, turn = (self.min + self.max) / 2, self.explore * self.steps
        if step <= turn:
            self._set(middle - (middle - self.min) * step / turn)
        else:
            self._set(self.min + (self.max - self.min) * min(1.0, (step - turn) / (self.steps - turn)))


@dataclass(kw_only=True, eq=False)
class AdaptiveKL(Controller):
    r"""Raise the coefficient while the measured KL lies above `target`, lower it below.

    $\beta \leftarrow \beta (1 + K e)$ after each step with $e = \operatorname{clip}(\mathrm{KL}/\text{target} - 1, -c,
    c)$, within [`min`, `max`]. Reads a metric of the controlled term, which must measure the KL without the weight of
    the coefficient: `kl` of `KL`, `value` of a divergence.

    Args:
        target: the KL to hold, in the term's unit (nats per token for a token mean).
        start: first coefficient.
        gain: $K$; the paper's horizon of 10 000 episodes is `gain=episodes_per_step / 10_000`.
        bound: $c$.
        min: smallest coefficient.
        max: largest coefficient.
        metric: the metric to read; None takes `kl`, else `value`.

    Raises:
        ConfigError: for numbers out of range, or at the first step if the term has no such metric.

    Reference: Fine-Tuning Language Models from Human Preferences, https://arxiv.org/abs/1909.08593

    >>> beta = AdaptiveKL(target=0.1, start=0.05)
    >>> beta.observe(1, {"kl": 0.5}); round(float(beta.value), 6)  # 0.05 (1 + 0.1 * 0.2)
    0.051
    >>> beta.observe(2, {"kl": 0.1}); round(float(beta.value), 6)
    0.051
    """

    target: float
    start: float = 0.04
    gain: float = 0.1
    bound: float = 0.2
    min: float = 1e-6
    max: float = 10.0
    metric: str | None = None

    def __post_init__(self) -> None:
        for name in ("target", "gain", "bound", "min"):
            check_positive(f"AdaptiveKL.{name}", vars(self)[name])
        check_range("AdaptiveKL.start", self.start, self.min, self.max)
        self._set(self.start)

    def observe(self, step: int, metrics: Mapping[str, float]) -> None:
        """Move the coefficient against the error; a KL that is not finite pushes it up as far as a step may."""
        names = ("kl", "value") if self.metric is None else (self.metric,)
        found = [metrics[name] for name in names if name in metrics]
        if not found:
            raise ConfigError(
                f"AdaptiveKL: its term reports no metric {' or '.join(map(repr, names))} (it has {sorted(metrics)}): "
                "use it as the coefficient of KL or of a divergence, or name another in metric=..."
            )
        error = found[0] / self.target - 1
        error = max(-self.bound, min(error, self.bound)) if math.isfinite(error) else self.bound
        self._set(max(self.min, min(float(self.value) * (1 + self.gain * error), self.max)))
