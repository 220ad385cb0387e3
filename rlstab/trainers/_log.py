"""What micro-batches measured, reduced over ranks and brought to the host's memory with one wait for the device."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlstab.losses import Hist, Max, Metric, Min, Sum, Total

__all__ = ["MetricLog", "Numbers", "merged"]


@dataclass(frozen=True)
class Numbers:
    """A metric that has left the device: what it is made of, and how that merges."""

    kind: type[Metric]
    parts: tuple[float, ...]

    def merge(self, other: Numbers) -> Numbers:
        """The metric of both together; NaN if either extreme is."""
        if self.kind not in (Max, Min):
            return Numbers(self.kind, tuple(a + b for a, b in zip(self.parts, other.parts, strict=True)))
        extremes = (*self.parts, *other.parts)
        unknown = any(math.isnan(x) for x in extremes)
        extreme = max(extremes) if self.kind is Max else min(extremes)
        return Numbers(self.kind, (math.nan if unknown else extreme,))

    @property
    def value(self) -> float:
        """The number to report; NaN where nothing was counted."""
        if self.kind is Sum:
            num, den = self.parts
            return num / den if den else math.nan
        if self.kind is Hist:
            return (self.parts[0] + self.parts[-1]) / sum(self.parts) if sum(self.parts) else math.nan
        return self.parts[0]


class MetricLog:
    """Keeps the metrics of micro-batches on the device until they are asked for.

    Every rank must add the same keys: the reduction stacks them in one tensor per kind.
    """

    def __init__(self, accelerator: Any) -> None:
        self._accelerator = accelerator
        self._micro_batches: list[Mapping[str, Metric]] = []

    def add(self, metrics: Mapping[str, Metric]) -> None:
        """Take the metrics of a micro-batch."""
        self._micro_batches.append(metrics)

    def collect(self) -> list[dict[str, Numbers]]:
        """The metrics of each micro-batch over all ranks; the log is empty afterwards."""
        micro_batches, self._micro_batches = self._micro_batches, []
        numbers = self._reduced([metric for metrics in micro_batches for metric in metrics.values()])
        return [{key: next(numbers) for key in metrics} for metrics in micro_batches]

    @torch.no_grad()
    def _reduced(self, metrics: Sequence[Metric]) -> Iterator[Numbers]:
        added = [part for metric in metrics for part in _summands(metric)]
        largest = [m.num if isinstance(m, Max) else -m.num for m in metrics if isinstance(m, Max | Min)]
        if not metrics:
            return iter(())
        numbers = torch.stack([*added, *largest]).float()
        if self._accelerator.num_processes > 1:
            sums, tops = numbers[: len(added)], numbers[len(added) :]
            sums = self._accelerator.reduce(sums, reduction="sum") if added else sums
            tops = self._accelerator.gather(tops.unsqueeze(0)).amax(0) if largest else tops
            numbers = torch.cat([sums, tops])
        values = numbers.tolist()
        return _assembled(metrics, iter(values[: len(added)]), iter(values[len(added) :]))


def merged(micro_batches: Sequence[Mapping[str, Numbers]]) -> dict[str, float]:
    """The values of all micro-batches together."""
    whole: dict[str, Numbers] = {}
    for metrics in micro_batches:
        for key, numbers in metrics.items():
            whole[key] = whole[key].merge(numbers) if key in whole else numbers
    return {key: numbers.value for key, numbers in whole.items()}


def _assembled(metrics: Sequence[Metric], sums: Iterator[float], tops: Iterator[float]) -> Iterator[Numbers]:
    for metric in metrics:
        if isinstance(metric, Max | Min):
            top = next(tops)
            yield Numbers(type(metric), (top if isinstance(metric, Max) else -top,))
        else:
            yield Numbers(type(metric), tuple(itertools.islice(sums, len(_summands(metric)))))


def _summands(metric: Metric) -> tuple[Tensor, ...]:
    if isinstance(metric, Sum):
        return metric.num, metric.den
    if isinstance(metric, Total):
        return (metric.num,)
    return metric.counts.unbind() if isinstance(metric, Hist) else ()
