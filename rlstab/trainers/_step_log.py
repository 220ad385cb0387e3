"""What optimizer steps measured: on the device until something acts on it, then to controllers, host and recorder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from rlstab.losses import Max, Metric
from rlstab.trainers._host_metrics import HostNames, by_term
from rlstab.trainers._log import MetricLog, Series
from rlstab.trainers._signals import BUCKETS, is_empty
from rlstab.trainers._skip import leave_out_infinite

__all__ = ["StepLog"]

OF_POLICY = {
    "clip_low": "policy/clip_fraction_low",
    "clip_high": "policy/clip_fraction_high",
    "ratio_max": "policy/ratio_max",
}
MOST_UNREAD = 64
Columns = Mapping[str, Mapping[int, float]]
"""Numbers by key, then by optimizer step."""


class StepObserver(Protocol):
    """Something that acts on what a step measured before the next one."""

    def observe(self, step: int, metrics: Mapping[str, Mapping[str, float]]) -> None:
        """Take the step's number and its metrics by term."""


class StepLog:
    """Reads a step's metrics as it closes if anything acts on them, else with those of later steps, when the host logs.

    Reading waits for the device. Controllers, several ranks, a run folder and a `StepReader` ask for each step.

    Args:
        trainer: a trainer with an objective and a recorder.
        acting: what, beside controllers, is told each step and its metrics by term before the optimizer moves.
        skip_overflow: whether a step in which a term was `+inf` leaves out its update.
    """

    def __init__(self, trainer: Any, acting: Sequence[StepObserver], *, skip_overflow: bool) -> None:
        self._trainer = trainer
        self._skip_overflow = skip_overflow
        self._host_names = HostNames(trainer.objective)
        self._on_device = MetricLog(trainer.accelerator)
        self._overflow: list[Tensor] = []
        self._numbers: dict[int, dict[str, float]] = {}
        self._accumulation: dict[int, float] = {}
        names = list(trainer.objective.terms)
        self._of_policy = {f"objective/{name}/{metric}": key for name in names for metric, key in OF_POLICY.items()}
        self._overflows = [f"objective/{name}/overflow" for name in names]
        self._acting: list[StepObserver] = [*acting, *([trainer.objective] if trainer.objective.controllers else [])]

    def add(self, metrics: Mapping[str, Metric]) -> None:
        """Take the metrics of a micro-batch of the coming step."""
        self._on_device.add(self._trainer.state.global_step + 1, metrics)
        self._overflow += [metrics[key].value() for key in self._overflows if key in metrics]

    def evaluated(self, metrics: Mapping[str, Metric]) -> None:
        """Take the metrics of a batch of an evaluation, which has no steps and is read at once."""
        log = MetricLog(self._trainer.accelerator)
        log.add(0, metrics)
        of_batch = log.collect()
        self._extend("eval", self._host_names.values(self._trainer.objective, of_batch, {0: 1.0}))
        self._extend("eval", {key: one.values for key, one in of_batch.items() if key.startswith("objective/")})

    def close(self, joined: Mapping[str, Tensor], numbers: dict[str, float], accumulation: float) -> None:
        """End the step.

        Args:
            joined: what else it measured, on the device, joined over ranks already.
            numbers: what else it measured, as numbers.
            accumulation: how many micro-batches it had.
        """
        step = self._trainer.state.global_step + 1
        if joined:  # the same on each rank, and so is its maximum
            self._on_device.add(step, {key: Max(value) for key, value in joined.items()})
        self._numbers[step], self._accumulation[step] = numbers, accumulation
        at_once = self._acting or self._trainer.accelerator.num_processes > 1 or self._trainer._recorder.listened_to
        if at_once or self._overflowed() or len(self._numbers) == MOST_UNREAD:
            self.read()
        self._overflow = []

    def _overflowed(self) -> bool:
        """Whether a term was infinite on this rank in a step that would then leave out its update."""
        counts = self._overflow
        if not (self._skip_overflow and counts):
            return False
        return any(map(bool, counts)) if counts[0].is_cpu else bool(torch.stack(counts).any())  # one wait for a device

    def read(self) -> None:
        """Bring what is left from the device and hand it on."""
        if not self._numbers:
            return
        measured, numbers = self._on_device.collect(), self._numbers
        objective = self._trainer.objective
        self._extend("train", self._host_names.values(objective, measured, self._accumulation))
        columns = _by_step(measured)
        columns |= {key: columns[own] for own, key in self._of_policy.items() if own in columns}
        applied = {name: float(term.coefficient) for name, term in objective.terms.items()}
        counts = [columns[key] for key in self._overflows if key in columns]
        infinite = {step for of_steps in counts for step, count in of_steps.items() if count > 0}
        for step, of_step in numbers.items():
            for key, value in of_step.items():
                columns.setdefault(key, {})[step] = value
        for step in numbers if self._acting else sorted(infinite):
            self._act(step, columns)
        if coefficients := self._host_names.entropy_coefficients(objective):
            self._extend("train", {"entropy_coef": coefficients * len(numbers)})
        columns |= {f"objective/{name}/weight": dict.fromkeys(numbers, weight) for name, weight in applied.items()}
        self._trainer._recorder.close_steps(columns)
        self._numbers, self._accumulation = {}, {}

    def _act(self, step: int, columns: Columns) -> None:
        """Let controllers see the step, and leave out its update if its loss is infinite."""
        values = {key: of_steps[step] for key, of_steps in columns.items() if step in of_steps}
        metrics = by_term(self._trainer.objective, values)
        if infinite := leave_out_infinite(self._trainer, metrics, skip=self._skip_overflow):
            self._trainer._recorder.event("step_skipped", terms=infinite, reason="+inf")
        for observer in self._acting:
            observer.observe(step, metrics)

    def _extend(self, mode: str, values: Mapping[str, Iterable[float]]) -> None:
        for key, several in values.items():
            self._trainer._metrics[mode][key].extend(several)


def _by_step(measured: Mapping[str, Series]) -> dict[str, dict[int, float]]:
    """Numbers by key and step; a bucket that was empty at every step has none."""
    found = {key: series.by_step for key, series in measured.items()}
    for key in [key for key in found if key.startswith(BUCKETS)]:
        known = {step: value for step, value in found.pop(key).items() if not is_empty(key, value)}
        if known:
            found[key] = known
    return found
