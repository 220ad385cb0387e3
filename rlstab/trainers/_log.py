"""What one optimizer step measured: metrics of all micro-batches, reduced over ranks with one wait for the device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rlstab.losses import Hist, Max, Metric, Min, Sum, Total


class StepLog:
    """Collects metrics by key and gives their values, over micro-batches and ranks, when asked.

    Every rank must add the same keys: the reduction stacks them in one tensor per kind.
    """

    def __init__(self, accelerator: Any) -> None:
        self._accelerator = accelerator
        self._metrics: dict[str, Metric] = {}

    def add(self, metrics: Mapping[str, Metric], prefix: str = "") -> None:
        """Merge metrics into those of the step."""
        for name, metric in metrics.items():
            key = prefix + name
            self._metrics[key] = self._metrics[key].merge(metric) if key in self._metrics else metric

    def collect(self) -> dict[str, float]:
        """The values of the step; the log is empty afterwards."""
        metrics, self._metrics = self._metrics, {}
        return reduce_metrics(metrics, self._accelerator)


def reduce_metrics(metrics: Mapping[str, Metric], accelerator: Any) -> dict[str, float]:
    """Values of `metrics` over all ranks: one collective per kind, one transfer from the device in all."""
    if not metrics:
        return {}
    added = [t for m in metrics.values() for t in _summands(m)]
    largest = [m.num if isinstance(m, Max) else -m.num for m in metrics.values() if isinstance(m, Max | Min)]
    sums = _stack(added, accelerator.device)
    tops = _stack(largest, accelerator.device)
    if accelerator.num_processes > 1:
        sums = accelerator.reduce(sums, reduction="sum") if added else sums
        tops = accelerator.gather(tops.unsqueeze(0)).amax(0) if largest else tops
    numbers = torch.cat([sums, tops]).tolist()
    added_numbers, top_numbers = iter(numbers[: len(added)]), iter(numbers[len(added) :])
    values: dict[str, float] = {}
    for key, metric in metrics.items():
        if isinstance(metric, Max | Min):
            top = next(top_numbers)
            values[key] = top if isinstance(metric, Max) else -top
        elif isinstance(metric, Sum):
            num, den = next(added_numbers), next(added_numbers)
            values[key] = num / den if den else float("nan")
        elif isinstance(metric, Hist):
            bins = [next(added_numbers) for _ in range(len(metric.edges) + 1)]
            values[key] = (bins[0] + bins[-1]) / sum(bins) if sum(bins) else float("nan")
        else:
            values[key] = next(added_numbers)
    return values


def _summands(metric: Metric) -> list[Tensor]:
    if isinstance(metric, Sum):
        return [metric.num, metric.den]
    if isinstance(metric, Total):
        return [metric.num]
    return list(metric.counts) if isinstance(metric, Hist) else []


def _stack(values: list[Tensor], device: torch.device) -> Tensor:
    if not values:
        return torch.zeros(0, device=device)
    return torch.stack([value.detach().to(device, torch.float32).reshape(()) for value in values])
