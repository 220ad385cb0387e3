"""Detached factors of a surrogate: importance corrections and masks."""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from rlstab.batch import TokenBatch
from rlstab.losses._metrics import Metric
from rlstab.losses._parts import Part


class Factor(NamedTuple):
    """What a weight multiplies a loss with (`[B, T]` or `[B, 1]`, detached), and its metrics."""

    values: Tensor
    metrics: Mapping[str, Metric]


@dataclass(frozen=True, kw_only=True)
class Weight(Part):
    """A factor of the surrogate that carries no gradient. The denominator of the mean stays what it was."""

    @abstractmethod
    def factor(self, batch: TokenBatch) -> Factor:
        """The factor and its metrics."""


@dataclass(frozen=True, kw_only=True)
class SamplerCorrection(Weight):
    """A weight that corrects for tokens drawn by another policy (the engine) than the ratio's denominator."""
