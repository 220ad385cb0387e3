"""Detectors: when is a signal out of order. Each is a frozen description that starts trackers, which hold the state."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any, NamedTuple

from rlstab.monitors._checks import check


class Reading(NamedTuple):
    """What a tracker says of one value.

    Args:
        raised: whether the detector is raised, with its hysteresis.
        beyond: whether this very value is out of order.
        since: step since which the signal is out of order, while raised.
        evidence: the finding in words: value, bound, and what the bound is.
    """

    raised: bool
    beyond: bool
    since: int | None = None
    evidence: str = ""


@dataclass(kw_only=True)
class Tracker(ABC):
    """A detector at work on one signal; its state is numbers and lists, so that it can be saved and go on exactly."""

    detector: Any
    raised: bool = False
    since: int | None = None
    calm: int = 0

    @abstractmethod
    def update(self, step: int, value: float, rate: float) -> Reading:
        """Take the value of one step.

        Args:
            step: optimizer step.
            value: the signal; NaN says nothing, except to `NonFinite`.
            rate: false alarms per 1000 steps that this detector may give.
        """

    def state_dict(self) -> dict[str, Any]:
        """The state, made of numbers, strings and lists."""
        state = {name: value for name, value in vars(self).items() if name != "detector"}
        return {name: list(value) if isinstance(value, list) else value for name, value in state.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state."""
        vars(self).update({name: list(value) if isinstance(value, list) else value for name, value in state.items()})

    def _settle(self, step: int, *, beyond: bool, calm: bool, since: int, calm_steps: int) -> None:
        """Raise at once where the value is `beyond`; lower after `calm_steps` calm values in a row."""
        self.calm = self.calm + 1 if calm else 0
        if beyond and not self.raised:
            self.raised, self.since = True, since
        elif self.raised and self.calm >= calm_steps:
            self.raised, self.since = False, None


@dataclass(frozen=True, kw_only=True)
class Detector(ABC):
    """What is out of order for a signal. A detector is data: comparable, hashable, written in a recipe."""

    @property
    def statistical(self) -> bool:
        """Whether chance alone can raise it, so that it shares in the budget of false alarms."""
        return False

    @abstractmethod
    def track(self) -> Tracker:
        """A tracker that has seen nothing yet."""


@dataclass(frozen=True, kw_only=True)
class NonFinite(Detector):
    """Raised at once by NaN or infinity; lowered after `steps` finite values.

    Args:
        steps: finite values in a row after which it is over.

    >>> NonFinite().track().update(1, float("nan"), 1.0).raised
    True
    """

    steps: int = 10

    def __post_init__(self) -> None:
        check(self.steps >= 1, "NonFinite.steps", "at least 1", self.steps)

    def track(self) -> Tracker:
        """A tracker that has seen nothing yet."""
        return _NonFiniteTracker(detector=self)


@dataclass(kw_only=True)
class _NonFiniteTracker(Tracker):
    detector: NonFinite

    def update(self, step: int, value: float, rate: float) -> Reading:
        bad = not math.isfinite(value)
        self._settle(step, beyond=bad, calm=not bad, since=step, calm_steps=self.detector.steps)
        return Reading(self.raised, bad, self.since, f"{value:g} is not finite")


@dataclass(frozen=True, kw_only=True)
class Level(Detector):
    """An absolute bound, passed for several steps in a row.

    A bound that holds for one kind of run is often normal in another. `growth` asks, beside the bound, that the signal
    has left the level of its own start by a factor; it needs a signal that is positive.

    Args:
        above: raised while the signal is above this.
        below: raised while the signal is below this; give one of the two.
        clear: the signal is back in order below (above) this; default: the bound itself.
        growth: the signal must also be this many times its start (for `below`: a fraction of 1 / growth), the start
            being the median of its first `start` values.
        start: how many values make the start.
        steps: values in a row that raise and that clear.

    >>> tracker = Level(above=0.5, steps=2).track()
    >>> [tracker.update(step, value, 1.0).raised for step, value in enumerate([0.6, 0.1, 0.6, 0.7, 0.1, 0.2])]
    [False, False, False, True, True, False]
    """

    above: float | None = None
    below: float | None = None
    clear: float | None = None
    growth: float | None = None
    start: int = 10
    steps: int = 3

    def __post_init__(self) -> None:
        given = (self.above is not None) + (self.below is not None)
        check(given == 1, "Level", "one of above and below", (self.above, self.below))
        check(
            math.isfinite(self.bound), f"Level.{'above' if self.sign > 0 else 'below'}", "a finite number", self.bound
        )
        check(self.growth is None or self.growth > 1, "Level.growth", "a factor above 1", self.growth)
        check(self.start >= 1, "Level.start", "at least 1", self.start)
        check(self.steps >= 1, "Level.steps", "at least 1", self.steps)
        if self.clear is not None:
            inside = self.sign * self.clear <= self.sign * self.bound
            check(inside, "Level.clear", f"a number on the good side of {self.bound}", self.clear)

    @property
    def sign(self) -> float:
        """1 where high is out of order, −1 where low is."""
        return 1.0 if self.above is not None else -1.0

    @property
    def bound(self) -> float:
        """The bound, `above` or `below`."""
        return next(bound for bound in (self.above, self.below) if bound is not None)

    def track(self) -> Tracker:
        """A tracker that has seen nothing yet."""
        return _LevelTracker(detector=self)


@dataclass(kw_only=True)
class _LevelTracker(Tracker):
    detector: Level
    run: int = 0
    first: int = 0
    head: list[float] = field(default_factory=list)

    def update(self, step: int, value: float, rate: float) -> Reading:
        if math.isnan(value):
            return Reading(self.raised, False, self.since)
        detector, sign = self.detector, self.detector.sign
        bound = self._moved_bound(value)
        beyond = sign * value > sign * bound
        self.first = self.first if self.run and beyond else step
        self.run = self.run + 1 if beyond else 0
        clear = bound if detector.clear is None else detector.clear
        calm = sign * value <= sign * clear
        self._settle(step, beyond=self.run >= detector.steps, calm=calm, since=self.first, calm_steps=detector.steps)
        word = "above" if sign > 0 else "below"
        return Reading(self.raised, beyond, self.since, f"{value:.3g} is {word} {bound:.3g} (step {self.run} in a row)")

    def _moved_bound(self, value: float) -> float:
        """The bound, or what `growth` makes of the start where that is further out."""
        detector = self.detector
        if detector.growth is None:
            return detector.bound
        if len(self.head) < detector.start:
            if math.isfinite(value):
                self.head.append(value)
            return detector.sign * math.inf
        centre = median(self.head)
        if detector.sign > 0:
            return max(detector.bound, centre * detector.growth)
        return min(detector.bound, centre / detector.growth)
