"""The passes over the vocabulary that `streamed_statistics` consists of, in plain torch."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Protocol

import torch
from torch import Tensor

from rlstab.losses import _streamed_torch
from rlstab.losses._streamed_forms import Form
from rlstab.losses._streamed_head import Dtypes, Head, Projection, Tiling, product, slices, tiling
from rlstab.losses._streamed_torch import Normal, Normalizer, Rates, Slope, place_of

Named = dict[str, Tensor]
"""Tensors with the tokens in their last dimension."""

POLICY = ""  # beside the names of references


@dataclass(frozen=True)
class Entry:
    """A divergence that was asked for."""

    key: str
    source: str
    form: Form
    careful: Form
    """The form for distributions in which tokens are impossible."""


@dataclass(frozen=True)
class Plan:
    """What to compute, and with which heads."""

    head: Head
    heads: Mapping[str, Head]
    """Those of the references, by source."""
    statistics: tuple[str, ...]
    entries: tuple[Entry, ...]
    dtypes: Dtypes

    @property
    def names(self) -> tuple[str, ...]:
        """Of everything that was asked for."""
        return *self.statistics, *(entry.key for entry in self.entries)


def gather(stack: ExitStack, plan: Plan) -> None:
    """Have the weights of all heads whole until the stack unwinds; one that is shared is gathered once."""
    for head in {id(head.weight): head for head in (plan.head, *plan.heads.values())}.values():
        if head.gather is not None:
            stack.enter_context(head.gather(head.weight, head.bias))


class Tiles(Protocol):
    """What is done with tiles; a module has these functions."""

    def add(self, normal: Normalizer, logits: Tensor, start: int) -> None:
        """See `_streamed_torch.add`."""

    def sums(self, ours: Normal, theirs: Normal, forms: Sequence[Form], columns: int) -> list[Tensor]:
        """See `_streamed_torch.sums`."""

    def gradient(self, ours: Normal, rates: Rates, references: Sequence[tuple[Normal, Sequence[Slope]]]) -> Tensor:
        """See `_streamed_torch.gradient`."""


def _tiles(device: torch.device, dtypes: Dtypes) -> Tiles:
    """Kernels on CUDA, and wherever Triton's interpreter is on; for float32 only, and where there is Triton."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if (device.type != "cuda" and not interpreted) or dtypes.sums != torch.float32 or find_spec("triton") is None:
        return _streamed_torch
    from rlstab.losses import _streamed_triton

    return _streamed_triton


class Models:
    """The policy and the references at work.

    Args:
        plan: what to compute.
        ids: the entries whose log-probs may be wanted, the label first.
        tensors: weight and bias of the policy's head and its hidden states; the same of each reference.
    """

    def __init__(self, plan: Plan, ids: Tensor, tensors: Sequence[Tensor]) -> None:
        heads = {POLICY: plan.head, **plan.heads}
        threes = zip(*(iter(tensors),) * 3, strict=True)
        self.plan = plan
        self.ids = ids
        self.all = {
            name: Projection(hidden, head, weight, bias, plan.dtypes)
            for (name, head), (weight, bias, hidden) in zip(heads.items(), threes, strict=True)
        }
        self.policy = self.all[POLICY]
        self.tiles = _tiles(ids.device, plan.dtypes)
        self.vocabulary = self.policy.vocabulary

    def tiling(self, *, whole_rows: bool) -> Tiling:
        """See `tiling`."""
        return tiling(len(self.ids), self.vocabulary, self.ids.device, whole_rows=whole_rows)

    def empty(self, *shape: int) -> Tensor:
        """A tensor of the dtype of sums."""
        return torch.empty(shape, dtype=self.plan.dtypes.sums, device=self.ids.device)

    def weights(self, columns: slice) -> Named:
        """A tile of each model's weight; where heads are shared, one and the same."""
        tiles: dict[int, Tensor] = {}
        for model in self.all.values():
            if id(model.head.weight) not in tiles:
                tiles[id(model.head.weight)] = model.weight(columns)
        return {name: tiles[id(model.head.weight)] for name, model in self.all.items()}

    def forms(self, source: str) -> dict[str, Form]:
        """How to sum the divergences from this reference, by key."""
        careful = self.policy.excludes or self.all[source].excludes
        entries = (entry for entry in self.plan.entries if entry.source == source)
        return {entry.key: entry.careful if careful else entry.form for entry in entries}


# -------------------------------------------------------------------- forward


def forward(models: Models) -> tuple[Named, Named]:
    """What was asked for, and what the gradient needs."""
    tile = models.tiling(whole_rows=bool(models.plan.entries))
    width = models.vocabulary if models.plan.entries else tile.columns
    buffers = {name: models.empty(tile.rows, width) for name in models.all}
    stripes = [_stripe(models, rows, tile, buffers) for rows in slices(len(models.ids), tile.rows)]
    stripes = stripes or [_stripe(models, slice(0, 0), tile, buffers)]
    values, saved = zip(*stripes, strict=True)
    return _joined(values), _joined(saved)


def _joined(parts: Sequence[Named]) -> Named:
    return {name: torch.cat([part[name] for part in parts], dim=-1) for name in parts[0]}


def _stripe(models: Models, rows: slice, tile: Tiling, buffers: Named) -> tuple[Named, Named]:
    """The two results for some of the tokens, whose logits the buffers hold meanwhile if there are divergences."""
    plan = models.plan
    ids = models.ids[rows]
    buffers = {name: buffer[: len(ids)] for name, buffer in buffers.items()}
    normal = {name: Normalizer(ids, plan.dtypes.sums) for name in plan.heads}
    normal[POLICY] = Normalizer(ids, plan.dtypes.sums, plan.statistics)
    for columns in slices(models.vocabulary, tile.columns):
        weights = models.weights(columns)
        place = columns if plan.entries else slice(0, columns.stop - columns.start)
        for name, model in models.all.items():
            logits = buffers[name][:, place]
            model.logits(rows, weights[name], columns, out=logits)
            models.tiles.add(normal[name], logits, columns.start)
    found = normal[POLICY].statistics()
    saved = {f"high of {name}": one.high for name, one in normal.items()}
    saved |= {f"log sum of {name}": one.log_sum for name, one in normal.items()}
    saved |= {name: found[name] for name in ("entropy", "sum_squares") if name in found}
    values = {name: found[name] for name in plan.statistics}
    ours = _normal(buffers[POLICY], saved, POLICY)
    for source in plan.heads:
        theirs = _normal(buffers[source], saved, source)
        forms = models.forms(source)
        totals = models.tiles.sums(ours, theirs, list(forms.values()), tile.columns)
        saved |= dict(zip(forms, totals, strict=True))
    values |= {entry.key: entry.form.value(saved[entry.key]) for entry in plan.entries}
    return values, saved


def _normal(logits: Tensor, saved: Named, name: str, rows: slice = slice(None)) -> Normal:
    return Normal(logits, saved[f"high of {name}"][rows], saved[f"log sum of {name}"][rows])


# -------------------------------------------------------------------- backward


def backward(models: Models, saved: Named, given: Mapping[str, Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    """Gradients in the policy's weight, bias and hidden states, as far as they are needed."""
    policy, dtypes = models.policy, models.plan.dtypes
    needs_weight, needs_bias, needs_hidden = needs
    weight = torch.zeros_like(policy.head.weight) if needs_weight else None
    bias = models.empty(models.vocabulary).zero_() if needs_bias else None
    hidden = models.empty(*policy.hidden.shape).zero_() if needs_hidden else None
    rate = {name: gradient.to(dtypes.sums) * policy.slope for name, gradient in given.items()}
    rates = _rates(models, saved, rate)
    tile = models.tiling(whole_rows=False)
    for columns in slices(models.vocabulary, tile.columns):
        weights = models.weights(columns)
        of_weight = None if weight is None else _summed(weight[columns], dtypes.sums)
        for rows in slices(len(models.ids), tile.rows):
            gradient = _gradient(models, rows, columns, weights, saved, rate, rates.of(rows))
            factor = gradient.to(dtypes.factors)
            if hidden is not None:
                product(hidden[rows], factor, weights[POLICY])
            if of_weight is not None:
                product(of_weight, factor.t(), policy.hidden[rows])
            if bias is not None:
                bias[columns] += gradient.sum(0)
        if weight is not None and of_weight is not None and weight.dtype != dtypes.sums:
            weight[columns] = of_weight
    return [weight, bias, hidden]


def _summed(part: Tensor, dtype: torch.dtype) -> Tensor:
    """Where to sum what `part` will hold: in itself, or beside it if its dtype is too short."""
    return part if part.dtype == dtype else torch.zeros_like(part, dtype=dtype)


def _rates(models: Models, saved: Named, rate: Named) -> Rates:
    plan = models.plan
    p = models.empty(len(models.ids)).zero_()
    chosen = None
    if "logp" in rate or "candidates" in rate:
        chosen = torch.zeros_like(models.ids, dtype=plan.dtypes.sums)
        chosen[:, 0] = rate.get("logp", 0.0)
        chosen[:, 1:] = rate["candidates"].T if "candidates" in rate else 0.0
        p -= chosen.sum(-1)
    if "log_z" in rate:
        p += rate["log_z"]
    if "entropy" in rate:
        p -= rate["entropy"] * saved["entropy"]
    if "sum_squares" in rate:
        p -= 2 * rate["sum_squares"] * saved["sum_squares"]
    for entry in plan.entries:
        if entry.key in rate:
            p -= rate[entry.key] * entry.form.mean_slope(saved[entry.key])
    p_logp = -rate["entropy"] if "entropy" in rate else None
    return Rates(p, p_logp, 2 * rate["sum_squares"] if "sum_squares" in rate else None, chosen)


def _gradient(
    models: Models, rows: slice, columns: slice, weights: Named, saved: Named, rate: Named, rates: Rates
) -> Tensor:
    """The gradient in `W h + b` for a tile."""

    def normal(name: str) -> Normal:
        logits = models.empty(rows.stop - rows.start, columns.stop - columns.start)
        models.all[name].logits(rows, weights[name], columns, out=logits)
        return _normal(logits, saved, name, rows)

    def slopes(source: str) -> list[Slope]:
        forms = models.forms(source).items()
        return [Slope(form, rate[key][rows], saved[key][:, rows]) for key, form in forms if key in rate]

    ours = normal(POLICY)
    references = [(normal(source), found) for source in models.plan.heads if (found := slopes(source))]
    gradient = models.tiles.gradient(ours, rates, references)
    if rates.chosen is not None:
        place, inside = place_of(models.ids[rows], columns.start, gradient.shape[1])
        gradient.scatter_add_(-1, place, rates.chosen * inside)
    cap_slope = models.policy.cap_slope(ours.logits)
    return gradient if cap_slope is None else gradient.mul_(cap_slope)
