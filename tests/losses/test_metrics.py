import pickle
from collections.abc import Callable
from functools import reduce

import pytest
import torch
from torch import Tensor

from rlstab.losses import Hist, Max, Metric, Min, Sum, Total, token_mean


def values() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(12, 5, generator=generator), torch.rand(12, 5, generator=generator) < 0.7


EDGES = (-1.0, 0.0, 1.0)


def metric_of(kind: type[Metric], values: Tensor, mask: Tensor) -> Metric:
    if kind is Sum:
        return Sum((values * mask).sum(), mask.sum())
    if kind is Total:
        return Total(mask.sum())
    if kind is Hist:
        return Hist.of(values, mask, EDGES)
    if kind is Max:
        return Max(torch.where(mask, values, -torch.inf).max())
    return Min(torch.where(mask, values, torch.inf).min())


EXPECTED: dict[type[Metric], Callable[[Tensor], Tensor]] = {
    Sum: lambda v: v.mean(),
    Total: lambda v: torch.tensor(v.numel()),
    Max: lambda v: v.max(),
    Min: lambda v: v.min(),
    Hist: lambda v: ((v < EDGES[0]) | (v >= EDGES[-1])).float().mean(),
}


@pytest.mark.parametrize("kind", list(EXPECTED))
@pytest.mark.parametrize("sizes", [[12], [6, 6], [1] * 12, [10, 2]])
def test_any_split_merges_to_the_whole(kind: type[Metric], sizes: list[int]) -> None:
    numbers, mask = values()
    parts = [metric_of(kind, v, m) for v, m in zip(numbers.split(sizes), mask.split(sizes), strict=True)]
    merged = reduce(lambda a, b: a.merge(b), parts)
    assert type(merged) is kind
    torch.testing.assert_close(merged.value(), EXPECTED[kind](numbers[mask]))


def test_what_was_never_counted_is_no_number() -> None:
    assert Sum(torch.tensor(0.0), torch.tensor(0.0)).value().isnan()
    assert Total(torch.tensor(0.0)).value() == 0


@pytest.mark.parametrize("kind", [Max, Min])
def test_nan_does_not_hide(kind: Callable[[Tensor], Metric]) -> None:
    nan, one = kind(torch.tensor(torch.nan)), kind(torch.tensor(1.0))
    assert nan.merge(one).value().isnan()
    assert one.merge(nan).value().isnan()


@pytest.mark.parametrize(("kind", "nothing"), [(Max, -torch.inf), (Min, torch.inf)])
def test_an_extreme_of_nothing_is_neutral_and_no_number(kind: Callable[[Tensor], Metric], nothing: float) -> None:
    empty, one = kind(torch.tensor(nothing)), kind(torch.tensor(1.0))
    assert empty.merge(one).value() == one.merge(empty).value() == 1
    assert empty.merge(empty).value().isnan()


class TestTokenMean:
    def test_of_tokens(self) -> None:
        mask = torch.tensor([[True, True], [True, False]])
        assert token_mean(torch.tensor([[1.0, 2.0], [6.0, 9.0]]), mask).value() == 3

    def test_of_rows(self) -> None:
        assert token_mean(torch.tensor([[1.0], [3.0]]), torch.ones(2, 5)).value() == 2

    @pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
    def test_a_batch_of_one_position_has_tokens_and_a_mask(self, dtype: torch.dtype) -> None:
        mask = torch.tensor([[1], [0], [1]]).to(dtype)
        assert token_mean(torch.tensor([[1.0], [99.0], [3.0]]), mask).value() == 2


def test_hist_counts_by_hand() -> None:
    numbers = torch.tensor([-5.0, -1.0, -0.5, 0.0, 0.5, 1.0, 7.0, 3.0])
    mask = torch.tensor([1, 1, 1, 1, 1, 1, 1, 0]).bool()
    assert Hist.of(numbers, mask, EDGES).counts.tolist() == [1, 2, 2, 2]
    assert Hist.of(numbers.double(), mask, EDGES).counts.sum() == mask.sum()


@pytest.mark.parametrize("kind", list(EXPECTED))
def test_metrics_travel_between_processes(kind: type[Metric]) -> None:
    metric = metric_of(kind, *values())
    torch.testing.assert_close(pickle.loads(pickle.dumps(metric)).value(), metric.value())
