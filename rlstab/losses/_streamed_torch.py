"""What is done with a tile of logits, in plain torch: what the passes call for every device without kernels."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from rlstab.losses._streamed_forms import Form, Pair
from rlstab.losses._streamed_head import is_impossible, log_probs, slices


class Normalizer:
    """Running sums over the vocabulary from which everything about one distribution per token follows; see `add`.

    Args:
        ids: the entries whose log-probs may be wanted, the label first.
        dtype: of the sums.
        statistics: those of `streamed_statistics` that are wanted.
    """

    def __init__(self, ids: Int[Tensor, "R M"], dtype: torch.dtype, statistics: Collection[str] = ()) -> None:
        def full(value: float, *shape: int) -> Tensor:
            return torch.full((len(ids), *shape), value, dtype=dtype, device=ids.device)

        self.ids = ids
        self.high = full(torch.finfo(dtype).min)
        self.sum = full(0.0)
        self.moment = full(0.0) if "entropy" in statistics else None
        self.squares = full(0.0) if "sum_squares" in statistics else None
        self.chosen = full(0.0, ids.shape[1]) if {"logp", "candidates"} & {*statistics} else None
        self.best = torch.zeros_like(ids[:, 0]) if "top1" in statistics else None

    @property
    def log_sum(self) -> Float[Tensor, "R"]:
        """The log of the softmax's denominator, above `high`."""
        return self.sum.log()

    def statistics(self) -> dict[str, Shaped[Tensor, "*K R"]]:
        """What was wanted."""
        found = {"log_z": self.high + self.log_sum}
        if self.chosen is not None:
            logp = log_probs(self.chosen, self.high, self.log_sum)
            logp = logp.masked_fill(is_impossible(logp), -torch.inf).T
            found |= {"logp": logp[0], "candidates": logp[1:]}
        if self.moment is not None:
            found["entropy"] = self.log_sum - self.moment / self.sum
        if self.squares is not None:
            found["sum_squares"] = self.squares / self.sum**2
        if self.best is not None:
            found["top1"] = self.best == self.ids[:, 0]
        return found


def add(normal: Normalizer, logits: Float[Tensor, "R C"], start: int) -> None:
    """Take in the entries of the vocabulary from `start` on."""
    if normal.best is not None:
        value, place = logits.max(-1)
        normal.best = torch.where(value > normal.high, place + start, normal.best)
    add_chosen(normal, logits, start)
    high = torch.maximum(normal.high, logits.amax(-1))
    shift = normal.high - high
    decay = shift.exp()
    shifted = logits - high.unsqueeze(-1)
    weight = shifted.exp()
    if normal.moment is not None:  # of logits above `high`, of which there is less to round
        normal.moment = (normal.moment + shift * normal.sum) * decay + torch.linalg.vecdot(weight, shifted)
    if normal.squares is not None:
        normal.squares = normal.squares * decay**2 + torch.linalg.vecdot(weight, weight)
    normal.sum = normal.sum * decay + weight.sum(-1)
    normal.high = high


def add_chosen(normal: Normalizer, logits: Float[Tensor, "R C"], start: int) -> None:
    """Keep the logits of the ids."""
    if normal.chosen is not None:
        place, inside = place_of(normal.ids, start, logits.shape[-1])
        normal.chosen = torch.where(inside, logits.gather(-1, place), normal.chosen)


class Normal(NamedTuple):
    """Logits and what normalises them."""

    logits: Float[Tensor, "R C"]
    high: Float[Tensor, "R"]
    log_sum: Float[Tensor, "R"]

    def log_probs(self, columns: slice = slice(None)) -> Float[Tensor, "R C"]:
        """Of some of the entries."""
        return log_probs(self.logits[:, columns], self.high, self.log_sum)


def sums(ours: Normal, theirs: Normal, forms: Sequence[Form], columns: int) -> list[Float[Tensor, "K R"]]:
    """The sums of each form over the vocabulary, so many columns at a time."""
    totals: list[Tensor] = []
    for part in slices(ours.logits.shape[-1], columns):
        pair = Pair(ours.log_probs(part), theirs.log_probs(part))
        found = [form.sums(pair) for form in forms]
        totals = [form.merge(*both) for form, *both in zip(forms, totals, found, strict=True)] if totals else found
    return totals


class Rates(NamedTuple):
    """The gradient of a loss in the statistics, as factors of what its gradient in a tile of logits is made of."""

    p: Float[Tensor, "R"]
    """Of the policy itself: what keeps the sum over the vocabulary at 0."""
    p_logp: Float[Tensor, "R"] | None
    p_squared: Float[Tensor, "R"] | None
    chosen: Float[Tensor, "R M"] | None
    """Of the logits of the ids."""

    def of(self, rows: slice) -> Rates:
        """Those of some tokens."""
        return Rates(*(None if rate is None else rate[rows] for rate in self))  # type: ignore[arg-type]


class Slope(NamedTuple):
    """A divergence in the gradient: its form, the factor of its slope, and its sums."""

    form: Form
    rate: Float[Tensor, "R"]
    sums: Float[Tensor, "K R"]


def gradient(ours: Normal, rates: Rates, references: Sequence[tuple[Normal, Sequence[Slope]]]) -> Float[Tensor, "R C"]:
    """The gradient in a tile of logits, but for that of the ids."""
    logp = ours.log_probs()
    p = logp.exp()
    total = rates.p.unsqueeze(-1)
    if rates.p_logp is not None:
        total = (logp * rates.p_logp.unsqueeze(-1)).add_(total)
    if rates.p_squared is not None:
        total = (p * rates.p_squared.unsqueeze(-1)).add_(total)
    total = p * total
    for theirs, slopes in references:
        pair = Pair(logp, theirs.log_probs())
        pair.p = p
        add_slopes(total, pair, slopes)
    return total


def add_slopes(total: Float[Tensor, "R C"], pair: Pair, slopes: Sequence[Slope]) -> None:
    """Add what divergences contribute."""
    for form, rate, of_form in slopes:
        total.addcmul_(rate.unsqueeze(-1), form.slope(pair, of_form))


def place_of(ids: Int[Tensor, "R M"], start: int, width: int) -> tuple[Int[Tensor, "R M"], Bool[Tensor, "R M"]]:
    """The columns of these entries in a tile that begins at `start`, and whether they lie inside."""
    local = ids - start
    return local.clamp(0, width - 1), (local >= 0) & (local < width)
