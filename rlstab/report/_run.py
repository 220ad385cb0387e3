"""One reading of a run folder, and the questions that every part of a report asks of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rlstab.errors import SchemaError
from rlstab.record import Events, Metrics, Rollouts, RunFolder
from rlstab.schema import Signal, signal


@dataclass(frozen=True)
class Run:
    """Everything a run folder holds, read once."""

    name: str
    config: str
    metrics: Metrics
    events: Events
    rollouts: Rollouts

    @property
    def last_step(self) -> int | None:
        """Last step with metrics, None before the first."""
        return self.metrics.rows[-1].step if self.metrics.rows else None

    @property
    def times(self) -> list[float]:
        """When metrics and events were recorded, ascending, in seconds since the epoch."""
        return sorted([row.time for row in self.metrics.rows] + [event.time for event in self.events.rows])

    def has(self, key: str) -> bool:
        """Return whether a metric was ever logged."""
        return any(key in row.values for row in self.metrics.rows)

    def first_of(self, *keys: str) -> str | None:
        """Return the first of the keys that was logged."""
        return next((key for key in keys if self.has(key)), None)

    def evaluation(self, phase: str) -> Mapping[str, float]:
        """Return the values of the evaluation before (the first one) or after (the last one) training.

        Runs without evaluation events fall back to the `eval/` metrics of their first and last evaluated steps.
        """
        events = self.events.of("evaluation")
        if events:
            found = [numbers(event.fields.get("values")) for event in events if event.fields.get("phase") == phase]
            return (found[0] if phase == "before" else found[-1]) if found else {}
        rows = [
            {key: value for key, value in row.values.items() if key.startswith("eval/")} for row in self.metrics.rows
        ]
        evaluated = [row for row in rows if row]
        if not evaluated or (phase == "after" and len(evaluated) == 1):
            return {}
        return evaluated[0 if phase == "before" else -1]

    def why_missing(self, key: str, otherwise: str) -> str:
        """Return why a metric is absent: what the run noted itself, else `otherwise`."""
        noted = [
            str(event.fields["reason"])
            for event in self.events.of("signal_skipped")
            if "reason" in event.fields and str(event.fields.get("signal")) in (key, key.rpartition("/")[0])
        ]
        if noted:
            return noted[-1]
        if self.last_step is None:
            return "no step of training was logged"
        return otherwise


def numbers(values: object) -> dict[str, float]:
    """Return the numbers of a mapping by key; nothing for what is no mapping."""
    if not isinstance(values, dict):
        return {}
    return {str(key): value for key, value in values.items() if isinstance(value, int | float)}


def read(folder: RunFolder) -> Run:
    """Read a run folder.

    Raises:
        RecordError: A file of the folder cannot be read.
    """
    path = folder.path.resolve()
    return Run(path.name, folder.config_text(), folder.metrics(), folder.events(), folder.rollouts())


def known(key: str) -> Signal | None:
    """Return the signal of a metric key, None for one that the schema does not know."""
    try:
        return signal(key)
    except SchemaError:
        return None
