"""What the readers of a run folder return: typed rows, and how many torn lines they skipped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Series(NamedTuple):
    """One metric over the run: `steps` and `values` of equal length, steps ascending.

    Example:
        >>> reward = Series(steps=np.array([1, 2]), values=np.array([0.5, 0.75]))
        >>> dict(zip(reward.steps.tolist(), reward.values.tolist()))
        {1: 0.5, 2: 0.75}
    """

    steps: NDArray[np.int64]
    values: NDArray[np.float64]


@dataclass(frozen=True)
class MetricsRow:
    """All metrics of one step; `time` in seconds since the epoch.

    Example:
        >>> MetricsRow(step=1, time=0.0, values={"train/reward": 0.5}).values["train/reward"]
        0.5
    """

    step: int
    time: float
    values: Mapping[str, float]


@dataclass(frozen=True)
class Event:
    """Something that happened once; `step` is None where it belongs to no step.

    Example:
        >>> Event(kind="evaluation", step=0, time=0.0, fields={"phase": "before"}).fields["phase"]
        'before'
    """

    kind: str
    step: int | None
    time: float
    fields: Mapping[str, object]


@dataclass(frozen=True)
class Rollout:
    """One recorded completion: whatever its writer put into the row (`prompt`, `completion`, `reward`, ...).

    Example:
        >>> Rollout(step=3, fields={"prompt": "31=", "completion": "13", "reward": 1.0}).fields["completion"]
        '13'
    """

    step: int
    fields: Mapping[str, object]


@dataclass(frozen=True)
class Metrics:
    """The metrics of a run, one row per step in ascending order.

    Args:
        rows: The rows.
        torn: Lines of the file that could not be read and were skipped.

    Example:
        >>> metrics = Metrics(rows=(MetricsRow(1, 0.0, {"train/reward": 0.5}), MetricsRow(2, 1.0, {})), torn=0)
        >>> metrics.series("train/reward").steps.tolist()
        [1]
    """

    rows: tuple[MetricsRow, ...]
    torn: int

    def keys(self) -> tuple[str, ...]:
        """Return every key that occurs, in the order of first occurrence."""
        return tuple(self._columns)

    def series(self, key: str) -> Series:
        """Return one metric over the steps at which it was logged; empty where it never was."""
        return self._columns.get(key, Series(np.array([], dtype=np.int64), np.array([], dtype=np.float64)))

    @cached_property
    def _columns(self) -> dict[str, Series]:
        """Every metric by key, from one pass over the rows."""
        found: dict[str, tuple[list[int], list[float]]] = {}
        for row in self.rows:
            for key, value in row.values.items():
                steps, values = found.setdefault(key, ([], []))
                steps.append(row.step)
                values.append(value)
        return {
            key: Series(np.array(steps, dtype=np.int64), np.array(values, dtype=np.float64))
            for key, (steps, values) in found.items()
        }


@dataclass(frozen=True)
class Events:
    """The events of a run in the order in which they happened; `torn` counts unreadable lines.

    Example:
        >>> events = Events(rows=(Event("resume", 7, 0.0, {}), Event("finished", None, 1.0, {})), torn=0)
        >>> [event.step for event in events.of("resume")]
        [7]
    """

    rows: tuple[Event, ...]
    torn: int

    def of(self, kind: str) -> tuple[Event, ...]:
        """Return the events of one kind."""
        return tuple(event for event in self.rows if event.kind == kind)


@dataclass(frozen=True)
class Rollouts:
    """The recorded completions of a run, steps ascending; `torn` counts unreadable lines.

    Example:
        >>> rollouts = Rollouts(rows=(Rollout(1, {"reward": 0.0}), Rollout(1, {"reward": 1.0})), torn=0)
        >>> [row.fields["reward"] for row in rollouts.rows]
        [0.0, 1.0]
    """

    rows: tuple[Rollout, ...]
    torn: int
