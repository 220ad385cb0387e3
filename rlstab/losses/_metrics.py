"""Metrics of a loss: detached tensors that reduce over micro-batches and ranks without a device sync."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Metric(ABC):
    """Something that merges with its like from another micro-batch or rank, and becomes one number at the end."""

    @abstractmethod
    def merge(self, other: Self) -> Self:
        """The metric of both parts together."""

    @abstractmethod
    def value(self) -> Tensor:
        """The number to report, as a 0-dim tensor."""


@dataclass(frozen=True)
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


@dataclass(frozen=True)
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


@dataclass(frozen=True)
class Max(Metric):
    """The largest value seen."""

    num: Tensor

    def merge(self, other: Self) -> Self:
        """The larger of both; NaN if either is."""
        return type(self)(torch.maximum(self.num, other.num))

    def value(self) -> Tensor:
        """The largest value."""
        return self.num


@dataclass(frozen=True)
class Min(Metric):
    """The smallest value seen."""

    num: Tensor

    def merge(self, other: Self) -> Self:
        """The smaller of both; NaN if either is."""
        return type(self)(torch.minimum(self.num, other.num))

    def value(self) -> Tensor:
        """The smallest value."""
        return self.num


@dataclass(frozen=True)
class Hist(Metric):
    """Counts between fixed edges: `len(edges) + 1` bins, the first and last of them open."""

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


def token_mean(values: Tensor, mask: Tensor) -> Sum:
    """The mean of `values` over tokens where `mask` holds, as a metric; `values` may be `[B, 1]`, one per row."""
    values = values.detach()
    if values.shape[-1] == 1:
        return Sum(values.sum(), torch.full_like(values[:, 0], 1.0).sum())
    return Sum((values * mask).sum(), mask.sum())


def masked_max(values: Tensor, mask: Tensor) -> Max:
    """The largest of `values` where `mask` holds, as a metric; -inf where nothing does."""
    return Max(torch.where(mask, values.detach(), -torch.inf).amax())


def masked_min(values: Tensor, mask: Tensor) -> Min:
    """The smallest of `values` where `mask` holds, as a metric; +inf where nothing does."""
    return Min(torch.where(mask, values.detach(), torch.inf).amin())


def mask_like(values: Tensor, mask: Tensor) -> Tensor:
    """`mask` for values per token; for one value per row (`[B, 1]`) the mask of the rows that have a token."""
    return mask if values.shape == mask.shape else mask.amax(-1, keepdim=True)
