"""Control charts: statistics that grow when standardised values stay high. Each is a pure fold over the values."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from rlstab.monitors._checks import check

State = tuple[float, ...]
"""What a chart carries from value to value; its first entry is the statistic."""


@dataclass(frozen=True, kw_only=True)
class Chart(ABC):
    """A control chart: folds standardised values, one at a time, into a statistic that is compared with a limit."""

    start: ClassVar[State]

    @abstractmethod
    def fold(self, state: State, x: float) -> State:
        """The state after one more value.

        Args:
            state: what the last fold returned, or `start`.
            x: the value, in standard deviations from the baseline; high is bad.
        """

    def statistics(self, values: Iterable[float]) -> list[float]:
        """The statistic after each value.

        >>> Cusum(k=0.5).statistics([0.0, 1.5, 2.0])
        [0.0, 1.0, 2.5]
        """
        states, state = [], self.start
        for x in values:
            state = self.fold(state, x)
            states.append(state[0])
        return states


@dataclass(frozen=True, kw_only=True)
class Cusum(Chart):
    """Cumulative sum of what exceeds an allowance: fastest for a shift of 2k that stays.

    C ← max(0, C + x − k)

    Args:
        k: allowance, in standard deviations; smaller shifts are let pass.

    Reference: Page, Continuous Inspection Schemes, Biometrika 1954, https://doi.org/10.2307/2333009

    >>> Cusum().statistics([3.0, 3.0, -5.0])
    [2.0, 4.0, 0.0]
    """

    k: float = 1.0
    start: ClassVar[State] = (0.0,)

    def __post_init__(self) -> None:
        check(0 <= self.k < math.inf, "Cusum.k", "a number of at least 0", self.k)

    def fold(self, state: State, x: float) -> State:
        """One step of the sum."""
        return (max(0.0, state[0] + x - self.k),)


@dataclass(frozen=True, kw_only=True)
class Ewma(Chart):
    """Exponentially weighted mean in units of its own standard deviation: good for small shifts.

    z ← λx + (1 − λ)z, statistic z / √(λ/(2 − λ) · (1 − (1 − λ)^(2t)))

    Args:
        lam: weight λ of the newest value, in (0, 1].

    Reference: Roberts, Control Chart Tests Based on Geometric Moving Averages, Technometrics 1959,
    https://doi.org/10.1080/00401706.1959.10489860

    >>> [round(statistic, 2) for statistic in Ewma(lam=0.2).statistics([1.0, 1.0])]
    [1.0, 1.41]
    """

    lam: float = 0.1
    start: ClassVar[State] = (0.0, 0.0, 0.0)

    def __post_init__(self) -> None:
        check(0 < self.lam <= 1, "Ewma.lam", "a number in (0, 1]", self.lam)

    def width(self, t: float) -> float:
        """Standard deviation of the mean after `t` independent values of variance 1.

        >>> round(Ewma(lam=0.2).width(1), 3)
        0.2
        """
        return math.sqrt(self.lam / (2 - self.lam) * (1 - (1 - self.lam) ** (2 * t)))

    def fold(self, state: State, x: float) -> State:
        """One step of the mean; the state is the statistic, the mean and the count."""
        _, mean, t = state
        mean = self.lam * x + (1 - self.lam) * mean
        return (mean / self.width(t + 1), mean, t + 1)


@dataclass(frozen=True, kw_only=True)
class PageHinkley(Chart):
    """Page and Hinkley's test: cumulative deviation from the running mean, above its own minimum. For slow drifts.

    m ← m + x − x̄_t − δ, statistic m − min m, with x̄_t the mean of all values so far

    Args:
        delta: allowance δ, in standard deviations.

    Reference: Hinkley, Inference about the change-point from cumulative sum tests, Biometrika 1971,
    https://doi.org/10.1093/biomet/58.3.509

    >>> PageHinkley(delta=0.0).statistics([0.0, 2.0])
    [0.0, 1.0]
    """

    delta: float = 0.25
    start: ClassVar[State] = (0.0, 0.0, 0.0, 0.0, 0.0)

    def __post_init__(self) -> None:
        check(0 <= self.delta < math.inf, "PageHinkley.delta", "a number of at least 0", self.delta)

    def fold(self, state: State, x: float) -> State:
        """One step of the test; the state is the statistic, the sum, its minimum, the mean and the count."""
        _, total, least, mean, t = state
        mean += (x - mean) / (t + 1)
        total += x - mean - self.delta
        least = min(least, total) if t else total
        return (total - least, total, least, mean, t + 1)
