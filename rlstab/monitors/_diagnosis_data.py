"""What a diagnosis reads, and what it is made of: signs, explanations, claims."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

RunState = Literal["healthy", "warning", "collapsed"]
"""What a run is in: nothing found, something to look at, or harm done."""

Config = Mapping[str, object]
"""A recipe as nested mappings."""


class Curve(NamedTuple):
    """One signal over a run: `steps` and `values` of equal length, steps ascending.

    Example:
        >>> Curve(np.array([1, 2]), np.array([0.5, 0.75])).values.tolist()
        [0.5, 0.75]
    """

    steps: NDArray[np.int64]
    values: NDArray[np.float64]


class Happening(NamedTuple):
    """An event of a run: its kind, the step to which it belongs, and its fields.

    Example:
        >>> Happening("finished", 100, {}).step
        100
    """

    kind: str
    step: int | None
    fields: Mapping[str, object]


@dataclass(frozen=True, kw_only=True)
class Trace:
    """What a diagnosis reads of a run.

    Args:
        curves: Signals by the keys of `rlstab.schema`.
        happenings: Events.
        config: The recipe as nested mappings; empty where it is not known.

    Example:
        >>> reward = Curve(np.arange(20), np.linspace(0.0, 1.0, 20))
        >>> trace = Trace(curves={"train/reward": reward})
        >>> trace.start("train/reward") < 0.1, trace.end("train/reward") > 0.9
        (True, True)
    """

    curves: Mapping[str, Curve]
    happenings: Sequence[Happening] = ()
    config: Config = field(default_factory=dict)

    @cached_property
    def last_step(self) -> int:
        """Last step at which anything was measured; 0 for an empty trace."""
        return max((int(curve.steps[-1]) for curve in self.curves.values() if len(curve.steps)), default=0)

    def first_of(self, *keys: str) -> str | None:
        """Return the first key that has at least one finite value."""
        return next((key for key in keys if len(self.finite(key).steps)), None)

    def finite(self, key: str) -> Curve:
        """Return a signal where it is finite; empty where it was not taken."""
        curve = self.curves.get(key)
        if curve is None:
            return Curve(np.array([], dtype=np.int64), np.array([]))
        kept = np.isfinite(curve.values)
        return Curve(curve.steps[kept], curve.values[kept])

    def start(self, key: str) -> float:
        """Return the median of the first 5 % of a signal, of at least three values; NaN where there is none."""
        values = self.finite(key).values
        return _median(values[: max(3, len(values) // 20)])

    def end(self, key: str) -> float:
        """Return the median of the last 10 % of a signal, of at least three values; NaN where there is none."""
        values = self.finite(key).values
        return _median(values[-max(3, len(values) // 10) :])

    def part(self, key: str, low: float, high: float) -> float:
        """Return the median of a signal between two shares of the run; NaN where there is none."""
        values = self.finite(key).values
        return _median(values[int(low * len(values)) : max(int(high * len(values)), int(low * len(values)) + 1)])

    def lasting(self, key: str, holds: Callable[[NDArray[np.float64]], NDArray[np.bool_]], *, steps: int = 3) -> int:
        """Return the first step of a stretch of `steps` values that all hold; -1 where there is none."""
        curve = self.finite(key)
        width = max(1, min(steps, len(curve.steps)))
        run = np.convolve(holds(curve.values), np.ones(width), mode="valid") if len(curve.steps) else np.array([])
        where = np.flatnonzero(run == width)
        return int(curve.steps[where[0]]) if len(where) else -1

    @property
    def terms(self) -> tuple[str, Mapping[str, Mapping[str, object]]]:
        """The terms of the objective by name, and the dotted key under which they stand; none where there are none."""
        for path in ("objective.init_args.terms", "objective.terms"):
            found = self.setting(path)
            if isinstance(found, Mapping):
                return path, {str(name): term for name, term in found.items() if isinstance(term, Mapping)}
        return "", {}

    def setting(self, path: str) -> object:
        """Return what stands in the recipe under a dotted path, None where nothing does."""
        value: object = self.config
        for name in path.split("."):
            if not isinstance(value, Mapping) or name not in value:
                return None
            value = value[name]
        return value


def _median(values: NDArray[np.float64]) -> float:
    return float(np.median(values)) if len(values) else float("nan")


class Sighting(NamedTuple):
    """What a sign says of one run: whether it holds, the numbers in words, and since which step.

    Example:
        >>> Sighting(True, "k3 was 0.5", 30).since
        30
    """

    holds: bool
    says: str
    since: int | None = None


@dataclass(frozen=True, kw_only=True)
class Sign:
    """One thing that speaks for an explanation where it holds, and against it where it does not.

    Args:
        reads: Signals that it needs; of several in one entry, separated by `|`, any will do.
        look: Returns what it sees, None where it cannot tell.
        weight: How much it says.
        role: "needed" signs must hold for the explanation to be claimed; a "veto" forbids it where it is measured and
            does not hold; others count.

    Example:
        >>> Sign(reads=("train/reward",), look=lambda trace: Sighting(True, "it fell")).role
        'counts'
    """

    reads: tuple[str, ...]
    look: Callable[[Trace], Sighting | None]
    weight: float = 1.0
    role: Literal["needed", "veto", "counts"] = "counts"

    def missing(self, trace: Trace) -> tuple[str, ...]:
        """Return the signals that the run lacks, in words where any of several would do."""
        missing = [keys for entry in self.reads if trace.first_of(*(keys := entry.split("|"))) is None]
        return tuple(" or ".join(keys) for keys in missing)


class Edit(NamedTuple):
    """One line of the recipe to change: dotted key, new value, and why.

    Example:
        >>> Edit("trainer.learning_rate", 1e-4, "a third of what it was").key
        'trainer.learning_rate'
    """

    key: str
    value: object
    why: str


def _none(trace: Trace) -> Sequence[Edit]:
    return ()


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """A cause that a diagnosis knows, as data.

    Args:
        name: Its name in reports and JSON.
        title: The cause in one phrase.
        signs: What speaks for it.
        remedy: What to do, in a sentence.
        edits: The lines of the recipe to change, given what the run says; none where no setting repairs it.

    Example:
        >>> sign = Sign(reads=("train/reward",), look=lambda trace: Sighting(True, "it fell"))
        >>> Explanation(name="fall", title="it fell", signs=(sign,), remedy="stand up").name
        'fall'
    """

    name: str
    title: str
    signs: tuple[Sign, ...]
    remedy: str
    edits: Callable[[Trace], Sequence[Edit]] = field(default_factory=lambda: _none)


@dataclass(frozen=True, kw_only=True)
class Claim:
    """An explanation that fits a run.

    Args:
        name: Name of the explanation.
        title: The cause in one phrase.
        sure: Share of the signs, by weight, that hold; signs that could not be read count half.
        since: First step of the evidence.
        evidence: What speaks for it, with the numbers.
        against: What was looked at and speaks against it.
        unread: Signals that the run lacks and that would settle the question.
        remedy: What to do.
        edits: The lines of the recipe to change.

    Example:
        >>> claim = Claim(name="a", title="A", sure=0.9, since=3, evidence=("x",), against=(), unread=(), remedy="",
        ...               edits=())
        >>> claim.words
        'very likely'
    """

    name: str
    title: str
    sure: float
    since: int
    evidence: tuple[str, ...]
    against: tuple[str, ...]
    unread: tuple[str, ...]
    remedy: str
    edits: tuple[Edit, ...]

    @property
    def words(self) -> str:
        """How sure, in words."""
        return "very likely" if self.sure >= 0.8 else "likely" if self.sure >= 0.6 else "possible"

    def __str__(self) -> str:
        signs = [*self.evidence, *(f"against: {line}" for line in self.against)]
        return f"{self.words} ({self.sure:.0%}) {self.title}: {'; '.join(signs)}. {self.remedy}"


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """What is wrong with a run, and why.

    Args:
        state: "healthy", "warning" or "collapsed".
        harm: What became worse, with the step at which it did; empty in a run without harm.
        claims: The causes that fit, the most likely first.
        timeline: What happened, in order: causes, alarms and harm.
        unexamined: Explanations that could not be looked at → the signals that they lack.

    Example:
        >>> Diagnosis(state="healthy", harm=(), claims=(), timeline=(), unexamined={}).exit_code
        0
    """

    state: RunState
    harm: tuple[Sighting, ...]
    claims: tuple[Claim, ...]
    timeline: tuple[tuple[int, str], ...]
    unexamined: Mapping[str, tuple[str, ...]]

    @property
    def exit_code(self) -> int:
        """0 for a healthy run, 1 for a warning, 2 for a collapse."""
        return ("healthy", "warning", "collapsed").index(self.state)
