"""What micro-batches measured, over all ranks, brought from the device with one wait and one collective."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby, islice
from typing import Any

import torch
from torch import Tensor

from rlstab.losses import Hist, Max, Metric, Min, Sum

__all__ = ["MetricLog", "Series", "joined", "merged"]

Parts = tuple[float, ...]
"""A metric that has left the device: the numbers that it is made of."""


@dataclass(frozen=True)
class Series:
    """One metric of successive micro-batches, each known by the step that it belongs to."""

    kind: type[Metric]
    steps: list[int] = field(default_factory=list)
    parts: list[Parts] = field(default_factory=list)

    @cached_property
    def values(self) -> list[float]:
        """The value of each micro-batch, once all are here; NaN where nothing was counted."""
        if self.kind is Sum:
            return [num / den if den else math.nan for num, den in self.parts]
        if self.kind is Hist:
            return [_value(Hist, counts) for counts in self.parts]
        return [number for (number,) in self.parts]

    @property
    def by_step(self) -> dict[int, float]:
        """The value of each step: that of its micro-batches together."""
        of_micro_batches = dict(zip(self.steps, self.values, strict=True))
        if len(of_micro_batches) == len(self.steps):
            return of_micro_batches
        of_steps = groupby(zip(self.steps, self.parts, strict=True), key=lambda entry: entry[0])
        return {step: _value(self.kind, merged(self.kind, [parts for _, parts in of])) for step, of in of_steps}


def merged(kind: type[Metric], several: Sequence[Parts]) -> Parts:
    """The metric of several micro-batches or ranks together; NaN if one extreme is."""
    if kind is not Max and kind is not Min:
        return tuple(map(sum, zip(*several, strict=True)))
    extremes = [parts[0] for parts in several]
    extreme = max(extremes) if kind is Max else min(extremes)
    return (math.nan if any(map(math.isnan, extremes)) else extreme,)


def joined(several: Sequence[Mapping[str, Series]]) -> dict[str, float]:
    """The values of all that was collected together, by key."""
    kinds = {key: series.kind for measured in several for key, series in measured.items()}
    parts = {key: [one for measured in several if key in measured for one in measured[key].parts] for key in kinds}
    return {key: _value(kind, merged(kind, parts[key])) for key, kind in kinds.items()}


def _value(kind: type[Metric], parts: Parts) -> float:
    if kind is Sum:
        num, den = parts
        return num / den if den else math.nan
    if kind is Hist:
        return (parts[0] + parts[-1]) / sum(parts) if sum(parts) else math.nan
    return parts[0]


class MetricLog:
    """Keeps the metrics of micro-batches on the device until they are asked for. Every rank must add the same keys.

    What lies in the memory of the processor is read at once: keeping many small tensors costs more than reading them.
    """

    def __init__(self, accelerator: Any) -> None:
        self._accelerator = accelerator
        self._at_once = accelerator.num_processes == 1
        self._series: dict[str, Series] = {}
        self._unread: list[tuple[Series, tuple[Tensor, ...]]] = []

    def add(self, step: int, metrics: Mapping[str, Metric]) -> None:
        """Take the metrics of a micro-batch, or others of its step."""
        for key, metric in metrics.items():
            series = self._series.get(key)
            if series is None:
                series = self._series[key] = Series(type(metric))
            series.steps.append(step)
            tensors = metric.tensors
            if self._at_once and tensors[0].is_cpu:
                series.parts.append(tuple([tensor.item() for tensor in tensors]))
            else:
                self._unread.append((series, tensors))

    def collect(self) -> dict[str, Series]:
        """What was added since the last call, by key."""
        found, unread, self._series, self._unread = self._series, self._unread, {}, []
        if unread:
            numbers = self._read([tensor for _, tensors in unread for tensor in tensors])
            for series, tensors in unread:
                several = [tuple(islice(rank, len(tensors))) for rank in numbers]
                series.parts.append(several[0] if len(several) == 1 else merged(series.kind, several))
        return found

    @torch.no_grad()
    def _read(self, tensors: list[Tensor]) -> list[Iterator[float]]:
        """The numbers of each rank, in order."""
        row = torch.stack([tensor.float() for tensor in tensors])
        if self._accelerator.num_processes == 1:
            return [iter(row.tolist())]
        return [iter(rank) for rank in self._accelerator.gather(row.unsqueeze(0)).tolist()]
