"""Logits of a language-model head, tile by tile, and how large the tiles are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlstab.errors import ShapeError
from rlstab.losses._checks import check_positive

IMPOSSIBLE = -1e30  # a logit of -inf, made finite so that its product with the probability 0 is 0


@dataclass(frozen=True, kw_only=True, eq=False)
class Head:
    r"""The last layer of a language model and what becomes of its output before the softmax.

    $$z = \frac{c}{\tau} \tanh \frac{s (W h + b)}{c}, \qquad \text{without soft-cap } z = \frac{s}{\tau} (W h + b)$$

    Args:
        weight: $W$, `[V, D]`.
        bias: $b$, `[V]`, or None. An entry of `-inf` excludes its token.
        temperature: $\tau$.
        soft_cap: $c$ (Gemma), or None.
        logit_scale: $s$ (Cohere; Granite divides, so that its scale is one over `logits_scaling`).
        gather: `gather(weight, bias)` gives a context inside which the two are whole, for weights that are sharded
            over processes (DeepSpeed ZeRO-3); entered once forward and once backward. None: they are whole.

    Raises:
        ConfigError: if temperature, soft-cap or scale is not positive.
        ShapeError: if the bias does not fit the weight.

    >>> Head(weight=torch.zeros(5, 3), temperature=0.7).temperature
    0.7
    """

    weight: Float[Tensor, "V D"]
    bias: Float[Tensor, "V"] | None = None
    temperature: float = 1.0
    soft_cap: float | None = None
    logit_scale: float = 1.0
    gather: Callable[[Tensor, Tensor | None], AbstractContextManager[object]] | None = None

    def __post_init__(self) -> None:
        check_positive("Head.temperature", self.temperature)
        check_positive("Head.logit_scale", self.logit_scale)
        if self.soft_cap is not None:
            check_positive("Head.soft_cap", self.soft_cap)
        if self.bias is not None and self.bias.shape != self.weight.shape[:1]:
            raise ShapeError(
                f"Head.bias: expected one entry per row of the weight {list(self.weight.shape)}, "
                f"got {list(self.bias.shape)}"
            )


class Limits(NamedTuple):
    """How large to work: most tokens of a tile, elements of a tile, and elements of a stripe of whole rows."""

    rows: int
    tile: int
    stripe: int


CPU = Limits(256, 2**17, 2**24)  # a tile fits the caches of one thread
OTHER = Limits(4096, 2**23, 2**26)  # keeps a GPU busy


class Tiling(NamedTuple):
    """How many tokens are worked on at a time, and how many entries of the vocabulary."""

    rows: int
    columns: int


def tiling(tokens: int, vocabulary: int, device: torch.device, *, whole_rows: bool) -> Tiling:
    """The tiles of a pass; with `whole_rows`, those of stripes that are kept meanwhile.

    Neither tiles nor stripes grow with the number of tokens, or hold more than half of the logits.
    """
    limits, threads = (CPU, torch.get_num_threads()) if device.type == "cpu" else (OTHER, 1)
    most = max(1, limits.stripe // vocabulary) if whole_rows else limits.rows
    rows = min(most, max(1, (tokens + 1) // 2))
    return Tiling(rows, min(vocabulary, max(1, limits.tile * threads // rows)))


def slices(size: int, step: int) -> Iterator[slice]:
    """Consecutive slices that cover `range(size)`."""
    return (slice(start, min(start + step, size)) for start in range(0, size, step))


def product(into: Tensor, left: Tensor, right: Tensor, *, beta: float = 1.0, alpha: float = 1.0) -> None:
    """`into = beta * into + alpha * left @ right`, summed in the dtype of `into` whatever that of the factors."""
    if left.dtype == into.dtype:
        torch.addmm(into, left, right, beta=beta, alpha=alpha, out=into)
    else:
        torch.addmm(into, left, right, out_dtype=into.dtype, beta=beta, alpha=alpha, out=into)


class Dtypes(NamedTuple):
    """What hidden states and weights are multiplied in, and what everything is summed in."""

    factors: torch.dtype
    sums: torch.dtype


def dtypes(hidden: Tensor, weight: Tensor) -> Dtypes:
    """Half precision, or what autocast says, is multiplied as such on CUDA (summed in float32) and raised elsewhere."""
    device = hidden.device.type
    given = torch.promote_types(hidden.dtype, weight.dtype)
    sums = torch.float64 if given == torch.float64 else torch.float32
    factors = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else given
    return Dtypes(factors if device == "cuda" and factors.itemsize == 2 else sums, sums)


class Projection:
    """Hidden states and a head that turns them into logits."""

    def __init__(
        self, hidden: Float[Tensor, "N D"], head: Head, weight: Tensor, bias: Tensor | None, dtypes: Dtypes
    ) -> None:
        self.dtypes = dtypes
        self.hidden = hidden.to(dtypes.factors)
        self.head = head
        self._weight = weight
        self._bias = bias
        self.slope = head.logit_scale / head.temperature  # dz / d(W h), up to the soft-cap's derivative
        self.excludes = bias is not None and head.soft_cap is None and bool((bias == -torch.inf).any())

    @property
    def vocabulary(self) -> int:
        """V."""
        return self._weight.shape[0]

    def weight(self, columns: slice) -> Float[Tensor, "C D"]:
        """Rows of the weight, ready to be multiplied."""
        return self._weight[columns].to(self.dtypes.factors)

    def logits(self, rows: slice, weight: Float[Tensor, "C D"], columns: slice, out: Float[Tensor, "R C"]) -> None:
        """Write the logits of these tokens and entries into `out`."""
        cap = self.head.soft_cap
        scale = self.slope if cap is None else self.head.logit_scale / cap
        product(out, self.hidden[rows], weight.t(), beta=0.0, alpha=scale)
        if self._bias is not None:
            out.add_(self._bias[columns].to(self.dtypes.sums), alpha=scale)
        if cap is not None:
            out.tanh_().mul_(cap / self.head.temperature)
        if self.excludes:
            out.clamp_(min=IMPOSSIBLE)

    def cap_slope(self, logits: Float[Tensor, "R C"]) -> Float[Tensor, "R C"] | None:
        """The derivative of the soft-cap, `1 - tanh²`, at these logits; None where there is no soft-cap."""
        if self.head.soft_cap is None:
            return None
        return 1 - (logits * (self.head.temperature / self.head.soft_cap)).square_()


def is_impossible(logp: Float[Tensor, "*shape"]) -> Bool[Tensor, "*shape"]:
    """Whether a finite log-prob stands for `-inf`."""
    return logp < IMPOSSIBLE / 2


def log_probs(
    logits: Float[Tensor, "R C"], high: Float[Tensor, "R"], log_sum: Float[Tensor, "R"]
) -> Float[Tensor, "R C"]:
    """Normalised in two steps, because the sum of both would be rounded like the largest logit."""
    return (logits - high.unsqueeze(-1)).sub_(log_sum.unsqueeze(-1))
