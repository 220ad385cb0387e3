"""Metrics on their way from micro-batches and ranks to numbers."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from rlstab.losses import Hist, Max, Metric, Min, Sum, Total
from rlstab.trainers._log import MetricLog, Numbers, merged


class Ranks:
    """An accelerator whose second rank measured twice what this one did."""

    def __init__(self, num_processes: int) -> None:
        self.num_processes = num_processes

    def gather(self, numbers: Tensor) -> Tensor:
        return torch.cat([numbers, 2 * numbers])


def metrics(x: float) -> dict[str, Metric]:
    edges = (0.0, 1.0)
    values = torch.tensor([-x, 0.5, x])
    return {
        "sum": Sum(torch.tensor(x), torch.tensor(2)),
        "total": Total(torch.tensor(x, requires_grad=True)),
        "max": Max(torch.tensor(x)),
        "min": Min(torch.tensor(x)),
        "hist": Hist.of(values, torch.ones(3, dtype=torch.bool), edges),
    }


def values(numbers: dict[str, Numbers]) -> dict[str, float]:
    return {key: n.value for key, n in numbers.items()}


def log_of(accelerator: Any, *xs: float) -> MetricLog:
    log = MetricLog(accelerator)
    for x in xs:
        log.add(metrics(x))
    return log


def test_each_micro_batch_keeps_its_own_values() -> None:
    log = log_of(Ranks(1), 3.0, 5.0)
    first, second = log.collect()
    assert values(first) == pytest.approx({"sum": 1.5, "total": 3.0, "max": 3.0, "min": 3.0, "hist": 2 / 3})
    assert values(second)["max"] == 5.0
    assert log.collect() == []


def test_a_step_merges_its_micro_batches() -> None:
    whole = values(merged(log_of(Ranks(1), 3.0, 5.0).collect()))
    assert whole == pytest.approx({"sum": 2.0, "total": 8.0, "max": 5.0, "min": 3.0, "hist": 2 / 3})


def test_ranks_merge_like_micro_batches() -> None:
    (numbers,) = log_of(Ranks(2), 3.0).collect()
    assert values(numbers) == pytest.approx({"sum": 9 / 6, "total": 9.0, "max": 6.0, "min": 3.0, "hist": 2 / 3})


@pytest.mark.parametrize("kind", [Max, Min])
def test_an_unknown_extreme_stays_unknown(kind: type[Metric]) -> None:
    known, unknown = Numbers(kind, (1.0,)), Numbers(kind, (math.nan,))
    assert math.isnan(known.merge(unknown).value)
    assert math.isnan(unknown.merge(known).value)


def test_nothing_counted_has_no_value() -> None:
    assert math.isnan(Numbers(Sum, (0.0, 0.0)).value)
    assert math.isnan(Numbers(Hist, (0.0, 0.0, 0.0)).value)
