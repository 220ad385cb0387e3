"""What micro-batches measured, over all ranks, brought from the device with one wait and one collective."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate, islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlstab.losses import Hist, Max, Metric, Min, Sum, Total

__all__ = ["MetricLog", "Numbers", "merged"]


class Numbers(NamedTuple):
    """A metric that has left the device: what it is made of, and how that merges."""

    kind: type[Metric]
    parts: tuple[float, ...]

    def merge(self, other: Numbers) -> Numbers:
        """The metric of both together; NaN if either extreme is."""
        if self.kind not in (Max, Min):
            return Numbers(self.kind, tuple(a + b for a, b in zip(self.parts, other.parts, strict=True)))
        extremes = self.parts + other.parts
        extreme = max(extremes) if self.kind is Max else min(extremes)
        return Numbers(self.kind, (math.nan if any(map(math.isnan, extremes)) else extreme,))

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
    """Keeps the metrics of micro-batches on the device until they are asked for. Every rank must add the same keys."""

    def __init__(self, accelerator: Any) -> None:
        self._accelerator = accelerator
        self._micro_batches: list[Mapping[str, Metric]] = []

    def add(self, metrics: Mapping[str, Metric]) -> None:
        """Take the metrics of a micro-batch."""
        self._micro_batches.append(metrics)

    def collect(self) -> list[dict[str, Numbers]]:
        """The metrics of each micro-batch over all ranks; the log is empty afterwards."""
        micro_batches, self._micro_batches = self._micro_batches, []
        entries = [
            (place, key, type(metric), _parts(metric))
            for place, metrics in enumerate(micro_batches)
            for key, metric in metrics.items()
        ]
        if not entries:
            return []
        tensors = [part for *_, parts in entries for part in parts]
        if self._accelerator.num_processes > 1:  # what is shared, and the dtypes, may differ from rank to rank
            columns: Sequence[int] = range(len(tensors))
            with torch.no_grad():
                numbers = self._accelerator.gather(torch.stack(tensors).float().unsqueeze(0))
        else:
            columns, numbers = _side_by_side(tensors)
        of_ranks = []
        for row in numbers.tolist():
            column = iter(columns)
            named: list[dict[str, Numbers]] = [{} for _ in micro_batches]
            for place, key, kind, parts in entries:
                named[place][key] = Numbers(kind, tuple([row[i] for i in islice(column, len(parts))]))
            of_ranks.append(named)
        return [merged(same) for same in zip(*of_ranks, strict=True)]


def merged(several: Sequence[dict[str, Numbers]]) -> dict[str, Numbers]:
    """The metrics of several micro-batches or ranks together."""
    if len(several) == 1:
        return several[0]
    whole: dict[str, Numbers] = {}
    for metrics in several:
        for key, numbers in metrics.items():
            whole[key] = whole[key].merge(numbers) if key in whole else numbers
    return whole


@torch.no_grad()
def _side_by_side(tensors: Sequence[Tensor]) -> tuple[list[int], Tensor]:
    """The columns at which 0-dim tensors stand in a row, `[1, columns]`: each once, dtype by dtype, which is faster."""
    groups: dict[torch.dtype, list[Tensor]] = {}
    places: dict[int, tuple[torch.dtype, int]] = {}
    for tensor in tensors:
        if id(tensor) not in places:
            group = groups.setdefault(tensor.dtype, [])
            places[id(tensor)] = tensor.dtype, len(group)
            group.append(tensor)
    starts = dict(zip(groups, accumulate((len(group) for group in groups.values()), initial=0), strict=False))
    row = torch.cat([torch.stack(group).float() for group in groups.values()])
    return [starts[dtype] + place for dtype, place in map(places.__getitem__, map(id, tensors))], row.unsqueeze(0)


def _parts(metric: Metric) -> tuple[Tensor, ...]:
    """The tensors that make a metric, each 0-dim."""
    if type(metric) is Sum:  # not isinstance, which takes long for an abstract base: these are final
        return metric.num, metric.den
    if type(metric) is Hist:
        return metric.counts.unbind()
    assert type(metric) is Total or type(metric) is Max or type(metric) is Min
    return (metric.num,)
