"""What is done with a tile of logits, as Triton kernels: each reads its logits once, whatever is asked of them.

The functions are those of `_streamed_torch`, and divergences without a kernel are left to it. Where rounding matters
the kernels use the expressions of `_streamed_forms`. Under Triton's interpreter (`TRITON_INTERPRET=1`) they run on
a CPU.
"""
# ruff: noqa: N803 (upper case: what a kernel is compiled for)
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, import-not-found, unused-ignore"

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlstab.losses import _streamed_torch
from rlstab.losses._streamed_forms import (
    NEAR_ZERO,
    Form,
    Mixture,
    Pair,
    Power,
    Softened,
    SquaredMixture,
    Symmetric,
)
from rlstab.losses._streamed_torch import Normal, Normalizer, Rates, Slope

BLOCK = 1024

# How a kernel knows a form.
REVERSE, FORWARD, POWER, MIXTURE, SOFTENED, SYMMETRIC, SQUARED_MIXTURE = (tl.constexpr(code) for code in range(7))
Code = tuple[int, float, float]
"""Which form, its parameter and its scale."""


def code_of(form: Form) -> Code | None:
    """What a kernel is told of a form; None for those that have no kernel."""
    match form:
        case Power(alpha=0.0, scale=scale):
            return REVERSE.value, 0.0, scale
        case Power(alpha=1.0, scale=scale):
            return FORWARD.value, 1.0, scale
        case Power(alpha=alpha, scale=scale):
            return POWER.value, alpha, scale
        case Mixture(beta=beta, scale=scale):
            return MIXTURE.value, beta, scale
        case Softened():
            return SOFTENED.value, 0.0, 1.0
        case Symmetric():
            return SYMMETRIC.value, 0.0, 1.0
        case SquaredMixture():
            return SQUARED_MIXTURE.value, 0.0, 1.0
        case _:
            return None


# -------------------------------------------------------------------- functions of numbers


@triton.jit
def _expm1(x):
    """For x <= 0."""
    series = 1 + x / 6 * (1 + x / 7 * (1 + x / 8 * (1 + x / 9)))
    series = x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * series))))
    return tl.where(x > -0.5, series, tl.exp(x) - 1)


@triton.jit
def _log1p(x):
    s = x / (2 + x)
    s2 = s * s
    series = 2 * s * (1 + s2 * (1 / 3 + s2 * (1 / 5 + s2 * (1 / 7 + s2 * (1 / 9 + s2 / 11)))))
    return tl.where(tl.abs(x) < 0.3, series, tl.log(1 + x))


@triton.jit
def _bounded(x):
    return tl.minimum(tl.maximum(x, -1.8446743e19), 1.8446743e19)


@triton.jit
def _power_slope(lp, a, sign, ALPHA: tl.constexpr):
    exponent = ALPHA * a
    factor = -sign * _expm1(-tl.abs(exponent)) / (ALPHA if ALPHA > 0 else -ALPHA)
    return tl.exp(lp + tl.maximum(-exponent, 0.0)) * factor


@triton.jit
def _summand(KIND: tl.constexpr, PARAMETER: tl.constexpr, SCALE: tl.constexpr, lp, lq):
    """What an entry adds to the divergence and to the sum of slopes; see `_streamed_forms`."""
    a = lp - lq
    t = _expm1(-tl.abs(a))
    sign = tl.where(a > 0, 1.0, -1.0)
    gap = -tl.exp(tl.maximum(lp, lq)) * sign * t
    p = tl.exp(lp)
    q = tl.exp(lq)
    if KIND == REVERSE:
        slope = SCALE * p * a
        value = slope - SCALE * gap
    elif KIND == FORWARD:
        slope = SCALE * gap
        value = slope - SCALE * q * a
    elif KIND == POWER:
        slope = _power_slope(lp, a, sign, PARAMETER)
        value = SCALE / (1 - PARAMETER) * (slope - gap)
        slope = _bounded(SCALE * slope)
    elif KIND == MIXTURE:
        s = -sign * t
        over = -_log1p(-PARAMETER * tl.maximum(s, 0.0) + (1 - PARAMETER) * tl.minimum(s, 0.0))
        slope = (1 - PARAMETER) * SCALE * p * (over + tl.minimum(a, 0.0))
        value = slope + PARAMETER * SCALE * q * (over - tl.maximum(a, 0.0))
    elif KIND == SOFTENED:
        grown = tl.maximum(a, 0.0) + _log1p(t / 2)
        slope = p * grown
        value = (p + q) * grown - gap
    elif KIND == SYMMETRIC:
        slope = p * a + gap
        value = gap * a
    else:
        slope = _mixed_slope(p, a)
        value = -gap * sign * t / (t + 2) / 2
    return value, slope


@triton.jit
def _mixed_slope(p, a):
    share = 1 / (1 + tl.exp(tl.minimum(a, 80.0)))
    return p * (0.5 - 2 * share * share)


@triton.jit
def _slope(KIND: tl.constexpr, PARAMETER: tl.constexpr, SCALE: tl.constexpr, NEAR: tl.constexpr, lp, lq, p):
    """What an entry adds to the gradient; a plain difference will do."""
    a = lp - lq
    if KIND == REVERSE:
        slope = SCALE * p * a
    elif KIND == FORWARD:
        slope = SCALE * (p - tl.exp(lq))
    elif KIND == POWER:
        if PARAMETER < NEAR and PARAMETER > -NEAR:
            slope = SCALE * _power_slope(lp, a, tl.where(a > 0, 1.0, -1.0), PARAMETER)
        else:
            slope = _bounded(SCALE / PARAMETER * (p - tl.exp(lp - PARAMETER * a)))
    elif KIND == MIXTURE:
        over = -_log1p(PARAMETER * (tl.exp(tl.minimum(-a, 80.0)) - 1))
        slope = (1 - PARAMETER) * SCALE * p * over
    elif KIND == SOFTENED:
        slope = p * (tl.maximum(a, 0.0) + _log1p(_expm1(-tl.abs(a)) / 2))
    elif KIND == SYMMETRIC:
        slope = p * a + p - tl.exp(lq)
    else:
        slope = _mixed_slope(p, a)
    return slope


# -------------------------------------------------------------------- normalising


@triton.jit
def _add_kernel(
    logits,
    stride,
    high_at,
    sum_at,
    moment_at,
    squares_at,
    best_at,
    start,
    columns,
    MOMENT: tl.constexpr,
    SQUARES: tl.constexpr,
    BEST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    high = tl.load(high_at + row)
    total = tl.load(sum_at + row)
    moment = tl.load(moment_at + row)
    squares = tl.load(squares_at + row)
    best = tl.load(best_at + row)
    for first in range(0, columns, BLOCK):
        column = first + tl.arange(0, BLOCK)
        inside = column < columns
        z = tl.load(logits + row * stride + column, mask=inside, other=-float("inf"))
        top = tl.max(z, axis=0)
        if BEST:
            place = tl.min(tl.where(z == top, column, columns), axis=0)
            best = tl.where(top > high, start + place, best)
        shift = high - tl.maximum(high, top)
        decay = tl.exp(shift)
        high = tl.maximum(high, top)
        shifted = z - high
        weight = tl.exp(shifted)
        if MOMENT:
            moment = (moment + shift * total) * decay + tl.sum(tl.where(inside, weight * shifted, 0.0), axis=0)
        if SQUARES:
            squares = squares * decay * decay + tl.sum(weight * weight, axis=0)
        total = total * decay + tl.sum(weight, axis=0)
    tl.store(high_at + row, high)
    tl.store(sum_at + row, total)
    if MOMENT:
        tl.store(moment_at + row, moment)
    if SQUARES:
        tl.store(squares_at + row, squares)
    if BEST:
        tl.store(best_at + row, best)


def add(normal: Normalizer, logits: Tensor, start: int) -> None:
    """See `_streamed_torch.add`."""
    _streamed_torch.add_chosen(normal, logits, start)
    if len(logits):
        _add_kernel[(len(logits),)](
            logits,
            logits.stride(0),
            normal.high,
            normal.sum,
            normal.sum if normal.moment is None else normal.moment,
            normal.sum if normal.squares is None else normal.squares,
            normal.sum if normal.best is None else normal.best,
            start,
            logits.shape[1],
            MOMENT=normal.moment is not None,
            SQUARES=normal.squares is not None,
            BEST=normal.best is not None,
            BLOCK=BLOCK,
        )


# -------------------------------------------------------------------- divergences


@triton.jit
def _sums_kernel(
    logits,
    stride,
    high_at,
    log_sum_at,
    ref_logits,
    ref_stride,
    ref_high_at,
    ref_log_sum_at,
    sums_at,
    columns,
    KINDS: tl.constexpr,
    PARAMETERS: tl.constexpr,
    SCALES: tl.constexpr,
    COUNT: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    high = tl.load(high_at + row)
    log_sum = tl.load(log_sum_at + row)
    ref_high = tl.load(ref_high_at + row)
    ref_log_sum = tl.load(ref_log_sum_at + row)
    slot = tl.arange(0, SLOTS)
    sums = tl.zeros((SLOTS,), tl.float32)
    for first in range(0, columns, BLOCK):
        column = first + tl.arange(0, BLOCK)
        inside = column < columns
        lp = tl.load(logits + row * stride + column, mask=inside, other=0.0) - high - log_sum
        lq = tl.load(ref_logits + row * ref_stride + column, mask=inside, other=0.0) - ref_high - ref_log_sum
        for i in tl.static_range(COUNT):
            value, slope = _summand(KINDS[i], PARAMETERS[i], SCALES[i], lp, lq)
            sums += tl.where(slot == 2 * i, tl.sum(tl.where(inside, value, 0.0), axis=0), 0.0)
            sums += tl.where(slot == 2 * i + 1, tl.sum(tl.where(inside, slope, 0.0), axis=0), 0.0)
    tl.store(sums_at + row * SLOTS + slot, sums)


def sums(ours: Normal, theirs: Normal, forms: Sequence[Form], columns: int) -> list[Tensor]:
    """See `_streamed_torch.sums`."""
    codes = [code_of(form) for form in forms]
    known = [code for code in codes if code is not None]
    others = [form for form, code in zip(forms, codes, strict=True) if code is None]
    of_others = iter(_streamed_torch.sums(ours, theirs, others, columns) if others else [])
    of_known = iter(_known_sums(ours, theirs, known) if known else [])
    return [next(of_others if code is None else of_known) for code in codes]


def _known_sums(ours: Normal, theirs: Normal, codes: Sequence[Code]) -> list[Tensor]:
    rows, columns = ours.logits.shape
    slots = triton.next_power_of_2(2 * len(codes))
    found = torch.zeros(rows, slots, dtype=torch.float32, device=ours.logits.device)
    if rows:
        _sums_kernel[(rows,)](
            *_pointers(ours),
            *_pointers(theirs),
            found,
            columns,
            **_constants(codes),
            SLOTS=slots,
            BLOCK=BLOCK,
        )
    return [found[:, 2 * i : 2 * i + 2].T for i in range(len(codes))]


def _pointers(normal: Normal) -> tuple[Tensor, int, Tensor, Tensor]:
    return normal.logits, normal.logits.stride(0), normal.high, normal.log_sum


def _constants(codes: Sequence[Code]) -> dict[str, object]:
    kinds, parameters, scales = zip(*codes, strict=True) if codes else ((), (), ())
    return {"KINDS": kinds, "PARAMETERS": parameters, "SCALES": scales, "COUNT": len(codes)}


# -------------------------------------------------------------------- gradient


@triton.jit
def _gradient_kernel(
    logits,
    stride,
    high_at,
    log_sum_at,
    ref_logits,
    ref_stride,
    ref_high_at,
    ref_log_sum_at,
    p_at,
    p_logp_at,
    p_squared_at,
    rates_at,
    out,
    out_stride,
    columns,
    FIRST: tl.constexpr,
    P_LOGP: tl.constexpr,
    P_SQUARED: tl.constexpr,
    NEAR: tl.constexpr,
    KINDS: tl.constexpr,
    PARAMETERS: tl.constexpr,
    SCALES: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    lp = tl.load(logits + row * stride + column, mask=inside, other=0.0)
    lp = lp - tl.load(high_at + row) - tl.load(log_sum_at + row)
    p = tl.exp(lp)
    if FIRST:
        factor = tl.load(p_at + row)
        if P_LOGP:
            factor += tl.load(p_logp_at + row) * lp
        if P_SQUARED:
            factor += tl.load(p_squared_at + row) * p
        total = p * factor
    else:
        total = tl.load(out + row * out_stride + column, mask=inside, other=0.0)
    if COUNT > 0:
        lq = tl.load(ref_logits + row * ref_stride + column, mask=inside, other=0.0)
        lq = lq - tl.load(ref_high_at + row) - tl.load(ref_log_sum_at + row)
        for i in tl.static_range(COUNT):
            rate = tl.load(rates_at + row * COUNT + i)
            total += rate * _slope(KINDS[i], PARAMETERS[i], SCALES[i], NEAR, lp, lq, p)
    tl.store(out + row * out_stride + column, total, mask=inside)


def gradient(ours: Normal, rates: Rates, references: Sequence[tuple[Normal, Sequence[Slope]]]) -> Tensor:
    """See `_streamed_torch.gradient`."""
    out = torch.empty_like(ours.logits)
    first = True
    for theirs, slopes in references or [(ours, [])]:
        known = [(code, slope.rate) for slope in slopes if (code := code_of(slope.form)) is not None]
        if first or known:
            _launch_gradient(ours, theirs, rates, known, out, first=first)
        first = False
        others = [slope for slope in slopes if code_of(slope.form) is None]
        if others:
            _streamed_torch.add_slopes(out, Pair(ours.log_probs(), theirs.log_probs()), others)
    return out


def _launch_gradient(
    ours: Normal, theirs: Normal, rates: Rates, known: Sequence[tuple[Code, Tensor]], out: Tensor, *, first: bool
) -> None:
    rows, columns = out.shape
    of_slopes = torch.stack([rate for _, rate in known], dim=-1) if known else rates.p
    _gradient_kernel[(rows, triton.cdiv(columns, BLOCK))](
        *_pointers(ours),
        *_pointers(theirs),
        rates.p,
        rates.p if rates.p_logp is None else rates.p_logp,
        rates.p if rates.p_squared is None else rates.p_squared,
        of_slopes,
        out,
        out.stride(0),
        columns,
        FIRST=first,
        P_LOGP=rates.p_logp is not None,
        P_SQUARED=rates.p_squared is not None,
        NEAR=NEAR_ZERO,
        **_constants([code for code, _ in known]),
        BLOCK=BLOCK,
    )
