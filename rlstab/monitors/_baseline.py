"""What is normal for a signal: centre, spread and autocorrelation of the steps that a detector starts from."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

WINSOR = 4.0
MAX_RHO = 0.9
_TO_SIGMA = 1.4826  # the median absolute deviation of a normal distribution is σ / 1.4826


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """Centre, spread and lag-1 autocorrelation of a stretch of values.

    Args:
        median: centre.
        spread: 1.4826 · median absolute deviation, or the floor below which a deviation is rounding noise.
        rho: lag-1 autocorrelation of the winsorised values, within [0, 0.9].
    """

    median: float
    spread: float
    rho: float

    @classmethod
    def of(cls, values: Sequence[float], *, least_spread: float = 0.0) -> "Baseline":
        """The baseline of a stretch of finite values.

        Args:
            values: at least two.
            least_spread: floor of the spread, in the unit of the values.

        >>> Baseline.of([0.0, 0.2, -0.1, 0.1, 0.0], least_spread=0.0).median
        0.0
        """
        centre, deviation = median_and_mad(values)
        spread = robust_spread(centre, deviation, least_spread)
        z = np.clip((np.asarray(values, dtype=float) - centre) / spread, -WINSOR, WINSOR)
        z = z - z.mean()
        power = float(z @ z)
        rho = float(z[1:] @ z[:-1]) / power if power > 0 else 0.0
        return cls(median=centre, spread=spread, rho=min(max(rho, 0.0), MAX_RHO))

    def robust_z(self, value: float) -> float:
        """Deviations from the median, in robust standard deviations.

        >>> round(Baseline.of([0.0, 0.2, -0.1, 0.1, 0.0]).robust_z(1.5), 4)
        10.1174
        """
        return (value - self.median) / self.spread

    def standardised(self, value: float) -> float:
        """Winsorised deviation, shrunk so that a chart made for independent values keeps its false-alarm rate.

        z = clip(robust z, ±4) / √((1 + ρ) / (1 − ρ))

        The mean of n values with lag-1 autocorrelation ρ has (1 + ρ)/(1 − ρ) times the variance of a mean of n
        independent ones.

        >>> Baseline(median=0.0, spread=1.0, rho=0.6).standardised(9.0)
        2.0
        """
        z = min(max(self.robust_z(value), -WINSOR), WINSOR)
        return z / math.sqrt((1 + self.rho) / (1 - self.rho))


def median_and_mad(values: Sequence[float]) -> tuple[float, float]:
    """Median, and median of the absolute deviations from it.

    >>> median_and_mad([0.0, 0.2, -0.1, 0.1, 0.0])
    (0.0, 0.1)
    """
    centre = median(values)
    return centre, median(abs(value - centre) for value in values)


def robust_spread(centre: float, deviation: float, least_spread: float) -> float:
    """1.4826 · MAD, but no less than the floor, nor than what rounding makes of the centre.

    >>> robust_spread(0.0, 0.0, 0.1)
    0.1
    """
    return max(_TO_SIGMA * deviation, least_spread, 1e-6 * abs(centre), 1e-300)
