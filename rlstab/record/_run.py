"""Everything that is known of one run, read once: whoever wrote it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import yaml

from rlstab.record._names import is_known
from rlstab.record._rows import Events, Metrics, Rollouts

if TYPE_CHECKING:
    from rlstab.record._folder import RunFolder


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run as it was read: what reports and diagnoses work on.

    Args:
        name: What to call it.
        source: What it was read from: "run folder", "trainer_state.json", "TensorBoard", ...
        config: The configuration as text, "" where none was found.
        metrics: Numbers by step, under the keys of `rlstab.schema` where they have one.
        events: What happened.
        rollouts: Sampled completions.

    Example:
        >>> from rlstab.record import MetricsRow
        >>> rows = (MetricsRow(1, 0.0, {"train/reward": 0.5}), MetricsRow(2, 0.0, {"train/entropy": 1.0}))
        >>> run = Run(name="a", metrics=Metrics(rows=rows, torn=0))
        >>> run.last_step, run.first_of("policy/entropy", "train/entropy")
        (2, 'train/entropy')
    """

    name: str
    source: str = "run folder"
    config: str = ""
    metrics: Metrics
    events: Events = field(default=Events(rows=(), torn=0))
    rollouts: Rollouts = field(default=Rollouts(rows=(), torn=0))

    @classmethod
    def of(cls, folder: RunFolder) -> Run:
        """Read a run folder.

        Raises:
            RecordError: A file of the folder cannot be read.
        """
        return cls(
            name=folder.path.resolve().name,
            config=folder.config_text(),
            metrics=folder.metrics(),
            events=folder.events(),
            rollouts=folder.rollouts(),
        )

    @property
    def last_step(self) -> int | None:
        """Last step with metrics, None before the first."""
        return self.metrics.rows[-1].step if self.metrics.rows else None

    @property
    def known_signals(self) -> list[str]:
        """Keys with values that `rlstab.schema` lists: what a diagnosis can read."""
        return [key for key in self.metrics.keys() if is_known(key)]  # noqa: SIM118

    @property
    def settings(self) -> Mapping[str, object]:
        """The configuration as nested mappings; empty where there is none, or none that can be read."""
        try:
            found = yaml.safe_load(self.config)
        except (yaml.YAMLError, RecursionError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    @property
    def times(self) -> list[float]:
        """When metrics and events were recorded, ascending, in seconds since the epoch; unknown times are left out."""
        moments = [row.time for row in self.metrics.rows] + [event.time for event in self.events.rows]
        return sorted(moment for moment in moments if moment > 0)

    def has(self, key: str) -> bool:
        """Return whether a metric was ever logged."""
        return len(self.metrics.series(key).steps) > 0

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
        keys = [key for key in self.metrics.keys() if key.startswith("eval/")]  # noqa: SIM118
        steps = sorted({int(step) for key in keys for step in self.metrics.series(key).steps})
        ends = {steps[0], steps[-1]} if steps else set()
        evaluated = [
            {key: value for key, value in row.values.items() if key.startswith("eval/")}
            for row in self.metrics.rows
            if row.step in ends
        ]
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
    """Return the numbers of a mapping by key; nothing for what is no mapping.

    Args:
        values: What an event or a completion holds under some name, whoever wrote it.

    Example:
        >>> numbers({"exact": 0.5, "format": None}), numbers("0.5")
        ({'exact': 0.5}, {})
    """
    if not isinstance(values, dict):
        return {}
    return {str(key): value for key, value in values.items() if isinstance(value, int | float)}
