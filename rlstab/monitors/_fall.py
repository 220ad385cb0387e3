"""A detector of losing what had been reached."""

import math
from dataclasses import dataclass, field
from statistics import fmean, median

from rlstab.monitors._checks import check
from rlstab.monitors._detectors import Detector, Reading, Tracker

_DIFFERENCES = 50
_MEDIAN_TO_SIGMA = 1.4826 / math.sqrt(2)  # of the size of the difference of two independent normal values
_MEAN_TO_SIGMA = math.sqrt(math.pi) / 2


@dataclass(frozen=True, kw_only=True)
class Fall(Detector):
    """A signal that was good and has lost a share of its best, by more than its noise explains.

    Means of `window` values are compared: raised while the latest is below `share` of the best one so far, and the
    loss is more than `noise` standard errors. The noise is taken from differences of neighbouring values, which a trend
    hardly changes, so that it needs no baseline and works from the first steps on. For positive signals for which high
    is good.

    Args:
        share: of the best mean, below which it counts as lost.
        window: values in a mean.
        noise: standard errors of the difference of two means that the loss must exceed.

    Raises:
        ConfigError: a number is out of its range.

    >>> tracker = Fall(window=2).track()
    >>> readings = [tracker.update(step, 0.8 + 0.02 * (step % 2), 1.0) for step in range(20)]
    >>> [tracker.update(20 + step, 0.1, 1.0).raised for step in range(3)]
    [True, True, True]
    """

    share: float = 0.75
    window: int = 5
    noise: float = 6.0

    def __post_init__(self) -> None:
        check(0 < self.share < 1, "Fall.share", "a share in (0, 1)", self.share)
        check(self.window >= 2, "Fall.window", "at least 2 values", self.window)
        check(self.noise >= 0, "Fall.noise", "a number of at least 0", self.noise)

    def track(self) -> Tracker:
        """A tracker that has seen nothing yet."""
        return _FallTracker(detector=self)


@dataclass(kw_only=True)
class _FallTracker(Tracker):
    detector: Fall
    values: list[float] = field(default_factory=list)
    differences: list[float] = field(default_factory=list)
    best: float = 0.0
    best_step: int = 0

    def update(self, step: int, value: float, rate: float) -> Reading:
        detector = self.detector
        if not math.isfinite(value):
            return Reading(self.raised, False, self.since)
        if self.values and not self.raised:
            self.differences = [*self.differences, abs(value - self.values[-1])][-_DIFFERENCES:]
        self.values = [*self.values, value][-detector.window :]
        if len(self.values) < detector.window:
            return Reading(False, False)
        mean = fmean(self.values)
        if mean > self.best:
            self.best, self.best_step = mean, step
        error = _noise(self.differences) * math.sqrt(2 / detector.window)
        beyond = mean < detector.share * self.best - 1e-12 and self.best - mean > detector.noise * error
        calm = mean > (1 + detector.share) / 2 * self.best
        self._settle(step, beyond=beyond, calm=calm, since=self.best_step + 1, calm_steps=detector.window)
        finding = f"{mean:.3g} on average, best was {self.best:.3g} at step {self.best_step}"
        return Reading(self.raised, beyond, self.since, finding)


def _noise(differences: list[float]) -> float:
    """Standard deviation of single values; by the mean where most values are equal, as sparse rewards are."""
    return _MEDIAN_TO_SIGMA * median(differences) or _MEAN_TO_SIGMA * fmean(differences)
