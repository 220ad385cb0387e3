"""Metrics of a loss: detached tensors that reduce over micro-batches and ranks without a device sync."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from rlstab.batch import TokenBatch


@dataclass(slots=True)
class Metric(ABC):
    """Something that merges with its like from another micro-batch or rank, and becomes one number at the end.

    An extreme of nothing, such as that of a micro-batch without loss tokens, is neutral: merging it changes nothing.

    >>> import torch
    >>> metrics = [Max(torch.tensor(2.0)), Max(torch.tensor(-torch.inf)), Max(torch.tensor(3.0))]
    >>> metrics[0].merge(metrics[1]).merge(metrics[2]).value(), metrics[1].value()
    (tensor(3.), tensor(nan))
    """

    @abstractmethod
    def merge(self, other: Self) -> Self:
        """The metric of both parts together."""

    @abstractmethod
    def value(self) -> Tensor:
        """The number to report, as a 0-dim tensor."""

    @property
    @abstractmethod
    def tensors(self) -> tuple[Tensor, ...]:
        """What it is made of, each 0-dim."""


@dataclass(slots=True)
class Sum(Metric):
    """A weighted mean kept as numerator and denominator: exact over any split.

    >>> import torch
    >>> Sum(torch.tensor(1.0), torch.tensor(2.0)).merge(Sum(torch.tensor(2.0), torch.tensor(4.0))).value()
    tensor(0.5000)
    """

    num: Tensor
    den: Tensor

    def merge(self, other: Self) -> Self:
        """Numerators and denominators add."""
        return type(self)(self.num + other.num, self.den + other.den)

    def value(self) -> Tensor:
        """`num / den`; NaN where nothing was counted."""
        return self.num / self.den

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Numerator and denominator."""
        return self.num, self.den


@dataclass(slots=True)
class Total(Metric):
    """A count that adds up.

    >>> import torch
    >>> Total(torch.tensor(1.0)).merge(Total(torch.tensor(2.0))).value()
    tensor(3.)
    """

    num: Tensor

    def merge(self, other: Self) -> Self:
        """Counts add."""
        return type(self)(self.num + other.num)

    def value(self) -> Tensor:
        """The total."""
        return self.num

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The total alone."""
        return (self.num,)


@dataclass(slots=True)
class Max(Metric):
    """The largest value seen; `-inf` stands for none.

    >>> import torch
    >>> Max(torch.tensor(1.0)).merge(Max(torch.tensor(2.0))).value()
    tensor(2.)
    """

    num: Tensor

    def merge(self, other: Self) -> Self:
        """The larger of both; NaN if either is."""
        return type(self)(torch.maximum(self.num, other.num))

    def value(self) -> Tensor:
        """The largest value; NaN where there was none."""
        return torch.where(self.num == -torch.inf, torch.nan, self.num)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The largest value alone."""
        return (self.num,)


@dataclass(slots=True)
class Min(Metric):
    """The smallest value seen; `inf` stands for none.

    >>> import torch
    >>> Min(torch.tensor(1.0)).merge(Min(torch.tensor(2.0))).value()
    tensor(1.)
    """

    num: Tensor

    def merge(self, other: Self) -> Self:
        """The smaller of both; NaN if either is."""
        return type(self)(torch.minimum(self.num, other.num))

    def value(self) -> Tensor:
        """The smallest value; NaN where there was none."""
        return torch.where(self.num == torch.inf, torch.nan, self.num)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The smallest value alone."""
        return (self.num,)


@dataclass(slots=True)
class Hist(Metric):
    """Counts between fixed edges: `len(edges) + 1` bins, the first and last of them open.

    >>> import torch
    >>> Hist(torch.tensor([1.0, 6.0, 1.0]), edges=(0.0, 1.0)).value()
    tensor(0.2500)
    """

    counts: Tensor
    edges: tuple[float, ...]

    @classmethod
    def of(cls, values: Tensor, mask: Tensor, edges: tuple[float, ...]) -> Self:
        """Histogram of `values` where `mask` holds.

        >>> import torch
        >>> Hist.of(torch.tensor([-1.0, 0.5, 9.0]), torch.tensor([True, True, True]), (0.0, 1.0)).counts
        tensor([1., 1., 1.])
        """
        bins = torch.bucketize(values, torch.tensor(edges, device=values.device, dtype=values.dtype), right=True)
        counts = torch.zeros(len(edges) + 1, device=values.device)
        return cls(counts.index_add(0, bins.flatten(), mask.flatten().to(counts.dtype)), edges)

    def merge(self, other: Self) -> Self:
        """Counts add."""
        return type(self)(self.counts + other.counts, self.edges)

    def value(self) -> Tensor:
        """The share of values in the two open bins: a single number that grows when the tails do."""
        return (self.counts[0] + self.counts[-1]) / self.counts.sum()

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The counts."""
        return self.counts.unbind()


def token_mean(values: Tensor, mask: Tensor | TokenBatch) -> Sum:
    """The mean of `values` over the tokens where `mask` holds, as a metric.

    Args:
        values: a number per token, `[B, T]`, or one per row, `[B, 1]`, which is then averaged over all rows.
        mask: the tokens, `[B, T]`, bool or 1 and 0; or a batch, for the tokens of its loss.

    >>> import torch
    >>> mask = torch.tensor([[True, True], [True, False]])
    >>> token_mean(torch.tensor([[1.0, 2.0], [6.0, 9.0]]), mask).value()
    tensor(3.)
    """
    values = values.detach()
    if values.shape != mask.shape:
        return Sum(values.sum(), values.new_full((), values.shape[0]))
    if isinstance(mask, TokenBatch):
        return Sum((values * mask.token_weight).sum(), mask.tokens)
    return Sum((values * mask).sum(), mask.sum())


def overflow(values: Tensor, total: Tensor, batch: TokenBatch) -> Total:
    """At how many tokens a value is `+inf`; a finite total, where it can be read, answers that at once.

    >>> values = torch.tensor([[1.0, torch.inf]])
    >>> overflow(values, values.sum(), TokenBatch(mask=torch.ones(1, 2))).value()
    tensor(1)
    """
    if batch.readable and math.isfinite(total.item()):
        return Total(batch.nothing)
    return Total(values.isposinf().count_nonzero())


def masked_max(values: Tensor, mask: Tensor) -> Max:
    """The largest of `values` where `mask` holds, as a metric."""
    return Max(torch.where(mask, values.detach(), -torch.inf).amax())


def masked_min(values: Tensor, mask: Tensor) -> Min:
    """The smallest of `values` where `mask` holds, as a metric."""
    return Min(torch.where(mask, values.detach(), torch.inf).amin())


def mask_like(values: Tensor, mask: Tensor) -> Tensor:
    """`mask` for values per token; for one value per row (`[B, 1]`) the mask of the rows that have a token."""
    return mask if values.shape == mask.shape else mask.amax(-1, keepdim=True)
