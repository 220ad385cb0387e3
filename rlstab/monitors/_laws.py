"""Laws that a run's numbers are held against: reward against √KL or held-out reward, and trends towards a bound."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import fmean
from typing import Any

from rlstab.monitors._checks import check


@dataclass(kw_only=True, eq=False)
class RewardKLLaw:
    r"""How much reward a unit of $\sqrt{\mathrm{KL}(\pi \Vert \pi_0)}$ still buys.

    In RLHF the reward grows about linearly with $\sqrt{\mathrm{KL}}$; over-optimisation shows as a slope that falls
    towards 0 and below while the distance still grows. The slope is that of least squares over the last measurements.

    Args:
        window: measurements that the local slope is taken from.
        least: measurements that must have been made before there is a slope.

    Raises:
        ConfigError: a number is out of its range.

    Reference: Bai et al., Training a Helpful and Harmless Assistant with Reinforcement Learning from Human Feedback,
    section 4.3, https://arxiv.org/abs/2204.05862

    >>> law = RewardKLLaw(window=4, least=3)
    >>> for distance in (0.0, 0.1, 0.2, 0.3):
    ...     law.observe(distance**2, 0.5 + 2.0 * distance)
    >>> round(law.slope, 6)
    2.0
    """

    window: int = 10
    least: int = 5
    _points: list[tuple[float, float]] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        check(self.least >= 3, "RewardKLLaw.least", "at least 3 measurements", self.least)
        check(self.window >= self.least, "RewardKLLaw.window", f"at least least={self.least}", self.window)

    def observe(self, kl: float, reward: float) -> None:
        """Take a measurement: KL to the start in nats, and mean reward. What is not finite is passed over."""
        if math.isfinite(kl) and math.isfinite(reward):
            self._points = [*self._points, (math.sqrt(max(kl, 0.0)), reward)][-self.window :]

    @property
    def slope(self) -> float:
        """Reward per square root of a nat; NaN before there are enough measurements of differing distance."""
        return line(self._points).slope if len(self._points) >= self.least else math.nan

    def state_dict(self) -> list[list[float]]:
        """What a checkpoint has to hold."""
        return [list(point) for point in self._points]

    def load_state_dict(self, state: Sequence[Sequence[float]]) -> None:
        """Go on from a checkpoint."""
        self._points = [(point[0], point[1]) for point in state]


@dataclass(kw_only=True, eq=False)
class Surprise:
    r"""How much less probable what the policy writes is to its start than what the start wrote itself.

    $$\mathrm{KL}(\pi \Vert \pi_0) + H(\pi) - H(\pi_0) = -\mathbb{E}_\pi \log \pi_0 - H(\pi_0)$$

    A policy that learns by sharpening what it could do loses entropy at least as fast as it gains distance: it writes
    what was probable from the start, and the surprise falls below 0. It rises where the policy takes up what its start
    hardly ever did: a leak of the reward, a walk for want of a reward, steps too large. Distance alone does not tell
    the two apart, nor does entropy.

    Args:
        first: entropies whose mean is the start's.
        window: entropies whose mean is the policy's.
        measurements: of the distance that are averaged; one alone rests on few positions.

    Raises:
        ConfigError: a number is out of its range.

    >>> law = Surprise(first=2, window=1, measurements=1)
    >>> for entropy, kl in ((0.7, 0.0), (0.7, math.nan), (0.6, 0.3)):
    ...     law.observe(entropy, kl=kl)
    >>> round(law.value, 6)
    0.2
    """

    first: int = 10
    window: int = 5
    measurements: int = 2
    _first: list[float] = field(init=False, default_factory=list)
    _last: list[float] = field(init=False, default_factory=list)
    _distances: list[float] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        check(self.first >= 1, "Surprise.first", "at least 1 entropy", self.first)
        check(self.window >= 1, "Surprise.window", "at least 1 entropy", self.window)
        check(self.measurements >= 1, "Surprise.measurements", "at least 1", self.measurements)

    def observe(self, entropy: float, *, kl: float = math.nan) -> None:
        """Take the entropy of a step, and KL to the start where it was measured. What is not finite is passed over."""
        if math.isfinite(kl):
            self._distances = [*self._distances, kl][-self.measurements :]
        if not math.isfinite(entropy):
            return
        if len(self._first) < self.first:
            self._first.append(entropy)
        else:
            self._last = [*self._last, entropy][-self.window :]

    @property
    def value(self) -> float:
        """Nats per token; NaN before there are enough entropies, and while the distance is not known."""
        if len(self._last) < self.window or not self._distances:
            return math.nan
        return fmean(self._distances) + fmean(self._last) - fmean(self._first)

    def state_dict(self) -> dict[str, list[float]]:
        """What a checkpoint has to hold."""
        return {"first": list(self._first), "last": list(self._last), "distances": list(self._distances)}

    def load_state_dict(self, state: Mapping[str, Sequence[float]]) -> None:
        """Go on from a checkpoint."""
        self._first, self._last = list(state["first"]), list(state["last"])
        self._distances = list(state["distances"])


@dataclass(kw_only=True, eq=False)
class HeldOutGap:
    r"""How much more the training reward has gained than the held-out one, in spreads of the training reward.

    $$\frac{(R_t - R_0) - (E_t - E_0)}{\sigma_0}$$

    $E_0$ is the first held-out reward, $R_0$ and $\sigma_0$ are mean and spread of the training reward over the first
    steps after it, $R_t$ is its mean over the steps before the held-out reward $E_t$. Both gains count from their own
    start, so that held-out prompts of another difficulty make no gap; what is learned by heart does, and so does a
    reward that is won without doing the task.

    Args:
        window: steps that the training reward is averaged over.

    Raises:
        ConfigError: a number is out of its range.

    >>> law = HeldOutGap(window=2)
    >>> law.examine(0.4) is None
    True
    >>> for reward in (0.5, 0.5, 0.9, 0.9):
    ...     law.observe(reward, 0.5)
    >>> round(law.examine(0.4), 6)
    0.8
    """

    window: int = 10
    _held_out: float | None = field(init=False, default=None)
    _first: list[tuple[float, float]] = field(init=False, default_factory=list)
    _last: list[float] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        check(self.window >= 1, "HeldOutGap.window", "at least 1 step", self.window)

    def observe(self, reward: float, spread: float) -> None:
        """Take the mean training reward of a step and its spread. What is not finite is passed over."""
        if not (math.isfinite(reward) and math.isfinite(spread)):
            return
        self._last = [*self._last, reward][-self.window :]
        if self._held_out is not None and len(self._first) < self.window:
            self._first.append((reward, spread))

    def examine(self, held_out: float) -> float | None:
        """Take a mean held-out reward.

        Returns:
            The gap; None where there is nothing yet to compare, or the reward did not vary at the start.
        """
        if not math.isfinite(held_out):
            return None
        if self._held_out is None:
            self._held_out = held_out
        if len(self._first) < self.window:
            return None
        rewards, spreads = zip(*self._first, strict=True)
        if not fmean(spreads) > 0:
            return None
        return ((fmean(self._last) - fmean(rewards)) - (held_out - self._held_out)) / fmean(spreads)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint has to hold."""
        return {"held_out": self._held_out, "first": [list(pair) for pair in self._first], "last": list(self._last)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        self._held_out, self._last = state["held_out"], list(state["last"])
        self._first = [(pair[0], pair[1]) for pair in state["first"]]


@dataclass(kw_only=True, eq=False)
class Crossing:
    """When a signal that grows or falls exponentially will cross a bound, from the line through its logarithm.

    A trend counts if its slope is more than `sure` standard errors from 0; the standard error allows for the lag-1
    autocorrelation of the residuals.

    Args:
        bound: what must not be crossed, above 0.
        rising: whether the signal comes from below the bound, or from above.
        window: measurements that the line goes through.
        least: measurements before which nothing is said.
        sure: standard errors.

    Raises:
        ConfigError: a number is out of its range.

    Reference: the extrapolation of attention logits to 10⁴: Wortsman et al., Small-scale proxies for large-scale
    Transformer training instabilities, https://arxiv.org/abs/2309.14322

    >>> crossing = Crossing(bound=1e4, least=4)
    >>> [crossing.observe(10 * i, 100.0 * 1.1**i) for i in range(3)]
    [None, None, None]
    >>> round(crossing.observe(30, 100.0 * 1.1**3))  # ln(1e4 / 133.1) / ln(1.1) of 10 steps each
    453
    """

    bound: float
    rising: bool = True
    window: int = 20
    least: int = 8
    sure: float = 4.0
    _points: list[tuple[float, float]] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        check(0 < self.bound < math.inf, "Crossing.bound", "a number > 0", self.bound)
        check(self.least >= 3, "Crossing.least", "at least 3 measurements", self.least)
        check(self.window >= self.least, "Crossing.window", f"at least least={self.least}", self.window)

    def observe(self, step: int, value: float) -> float | None:
        """Take a measurement.

        Returns:
            Steps that are left, 0 beyond the bound; None where no trend leads there.
        """
        if not (math.isfinite(value) and value > 0):
            return None
        self._points = [*self._points, (float(step), math.log(value))][-self.window :]
        if (value >= self.bound) if self.rising else (value <= self.bound):
            return 0.0
        if len(self._points) < self.least:
            return None
        found = line(self._points)
        towards = found.slope > 0 if self.rising else found.slope < 0
        if not towards or abs(found.slope) <= self.sure * found.error:
            return None
        return max(0.0, (math.log(self.bound) - found.at(step)) / found.slope)

    def state_dict(self) -> list[list[float]]:
        """What a checkpoint has to hold."""
        return [list(point) for point in self._points]

    def load_state_dict(self, state: Sequence[Sequence[float]]) -> None:
        """Go on from a checkpoint."""
        self._points = [(point[0], point[1]) for point in state]


@dataclass(frozen=True)
class Line:
    """A least-squares line: where it is, and the standard error of its slope."""

    x: float
    y: float
    slope: float
    error: float

    def at(self, x: float) -> float:
        """Its height."""
        return self.y + self.slope * (x - self.x)


def line(points: Sequence[tuple[float, float]]) -> Line:
    """The least-squares line through points; slope and error are NaN where all lie at one x.

    >>> line([(0.0, 1.0), (1.0, 3.0), (2.0, 5.0)]).slope
    2.0
    """
    n = len(points)
    x, y = (sum(column) / n for column in zip(*points, strict=True))
    spread = sum((px - x) ** 2 for px, _ in points)
    if spread == 0:
        return Line(x, y, math.nan, math.nan)
    slope = sum((px - x) * (py - y) for px, py in points) / spread
    residuals = [py - y - slope * (px - x) for px, py in points]
    squares = sum(r * r for r in residuals)
    if squares == 0 or n < 3:
        return Line(x, y, slope, 0.0)
    rho = sum(a * b for a, b in pairwise(residuals)) / squares
    rho = min(max(rho, 0.0), 0.9)
    return Line(x, y, slope, math.sqrt(squares / (n - 2) / spread * (1 + rho) / (1 - rho)))
