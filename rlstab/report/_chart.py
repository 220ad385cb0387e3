"""Charts as inline SVG: they take the page's colours, and tell their values under the pointer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rlstab.record import Series

WIDTH, HEIGHT = 640, 250
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 16, 30
POINTS = 600
"""Most points of a line: a longer one keeps the smallest and the largest value of each stretch."""
COLOURS = 6
ROUNDING = 1e-9
"""Below this a size is the rounding of two ways to compute the same number."""


class Line(NamedTuple):
    """One line of a chart: its name, its values, and whether they are single measurements with errors."""

    name: str
    series: Series
    errors: NDArray[np.float64] | None = None


class Mark(NamedTuple):
    """Something that happened at a step: a number that the timeline repeats, how bad it is, what it was."""

    step: int
    number: int
    kind: str
    says: str


class Scale(NamedTuple):
    """How values become heights: between two values, by their logarithm or not."""

    low: float
    high: float
    log: bool

    def height(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the vertical places of values; what is not finite has none."""
        low, high, shown = self.low, self.high, np.where(np.isfinite(values), values, np.nan)
        if self.log:
            low, high, shown = math.log10(low), math.log10(high), np.log10(np.maximum(shown, self.low))
        share = (shown - low) / (high - low)
        place: NDArray[np.float64] = TOP + (1 - np.clip(share, 0, 1)) * (HEIGHT - TOP - BOTTOM)
        return place

    def ticks(self) -> list[float]:
        """Return round values to label."""
        if self.log:
            first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
            return [10.0**power for power in range(first, last + 1, max(1, (last - first) // 5))]
        return _round_values(self.low, self.high, 5)


def chart(lines: Sequence[Line], marks: Sequence[Mark], *, title: str, log: bool = False, zero: bool = False) -> str:
    """Return a chart as an SVG element.

    Args:
        lines: What to draw; empty lines are left out.
        marks: What to mark on the axis of steps.
        title: What the chart shows, for those who do not see it.
        log: Logarithmic heights; values ≤ 0 stand at the bottom.
        zero: Let the heights begin at 0.
    """
    drawn = [line for line in lines if len(line.series.steps)]
    if log:
        drawn = [line._replace(series=Series(line.series.steps, _sizes(line.series.values))) for line in drawn]
    steps = np.concatenate([line.series.steps for line in drawn])
    first, last = int(steps.min()), max(int(steps.max()), int(steps.min()) + 1)
    axes = _Axes(first, last, _scale(np.concatenate([line.series.values for line in drawn]), log, zero))
    parts = [_grid(axes)]
    parts += [_line(_thinned(line), index % COLOURS, axes) for index, line in enumerate(drawn)]
    parts += [_mark(mark, axes) for mark in marks if first <= mark.step <= last]
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" tabindex="0" aria-label="{escape(title)}" '
        f'data-first="{first}" data-last="{last}">{"".join(parts)}'
        f'<line class="cursor" y1="{TOP}" y2="{HEIGHT - BOTTOM}" visibility="hidden"/></svg>'
    )


def legend(lines: Sequence[Line]) -> str:
    """Return the names of the lines with their colours and last values; the script writes the hovered values here."""
    items = []
    for index, line in enumerate(line for line in lines if len(line.series.steps)):
        items.append(
            f'<li class="c{index % COLOURS}"><span class="key"></span>{escape(line.name)} '
            f"<output>{escape(short(float(line.series.values[-1])))}</output></li>"
        )
    return f'<ul class="legend">{"".join(items)}<li class="at">step <output></output></li></ul>'


def short(value: float) -> str:
    """Return a number in few characters.

    >>> short(0.123456), short(123456.0), short(float("nan"))
    ('0.1235', '1.235e+05', 'nan')
    """
    return f"{value:.4g}"


def _sizes(values: NDArray[np.float64]) -> NDArray[np.float64]:
    sizes = np.abs(values)
    return np.where(sizes < ROUNDING, 0.0, sizes)


def _scale(values: NDArray[np.float64], log: bool, zero: bool) -> Scale:
    finite = values[np.isfinite(values)]
    if log:
        positive = np.clip(finite[finite > 0], 1e-12, 1e200)
        low = 10.0 ** math.floor(math.log10(positive.min())) if len(positive) else 1e-6
        high = 10.0 ** math.ceil(math.log10(positive.max()) + 1e-9) if len(positive) else 1.0
        return Scale(low, max(high, 10 * low), True)
    finite = np.clip(finite, -1e200, 1e200)
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
    low = min(low, 0.0) if zero else low
    room = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return Scale(low if zero and low == 0 else low - room, high + room, False)


def _round_values(low: float, high: float, count: int) -> list[float]:
    """Return about `count` round values between two.

    >>> _round_values(0.0, 1.0, 5)
    [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    """
    rough = (high - low) / count
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(index * step, 12) if step > 1e-9 else index * step for index in range(first, last + 1)]


class _Axes(NamedTuple):
    """The two axes of a chart."""

    first: int
    last: int
    scale: Scale

    def across(self, steps: NDArray[np.int64] | NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the horizontal places of steps."""
        place: NDArray[np.float64] = LEFT + (steps - self.first) / (self.last - self.first) * (WIDTH - LEFT - RIGHT)
        return place


def _grid(axes: _Axes) -> str:
    parts = []
    for value in axes.scale.ticks():
        y = float(axes.scale.height(np.array([value]))[0])
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text class="tick end" x="{LEFT - 6}" y="{y + 4:.1f}">{value:.3g}</text>'
        )
    for step in _round_values(axes.first, axes.last, 5):
        if step == int(step):
            x = float(axes.across(np.array([step]))[0])
            parts.append(f'<text class="tick middle" x="{x:.1f}" y="{HEIGHT - 8}">{int(step)}</text>')
    return "".join(parts)


def _thinned(line: Line) -> Line:
    """Return a line of few points, which keeps the extremes of every stretch."""
    steps, values = line.series
    if len(steps) <= POINTS or line.errors is not None:
        return line
    edges = np.linspace(0, len(steps), POINTS // 2 + 1).astype(int)
    low, high = np.where(np.isnan(values), np.inf, values), np.where(np.isnan(values), -np.inf, values)
    kept = {0, len(steps) - 1}
    for start, end in pairwise(edges):
        kept |= {start + int(np.argmin(low[start:end])), start + int(np.argmax(high[start:end]))}
    chosen = np.array(sorted(kept))
    return line._replace(series=Series(steps[chosen], values[chosen]))


def _line(line: Line, colour: int, axes: _Axes) -> str:
    """Draw a line, with its values beside it for the script; broken where there is no number."""
    steps, values = line.series
    x, y = axes.across(steps), axes.scale.height(values)
    if line.errors is None:
        shape = f'<path class="curve" d="{_path(x, y)}"/>' if len(steps) > 1 else ""
        dots = "" if len(steps) > 1 else _dots(x, y)
    else:
        top, bottom = (axes.scale.height(values + sign * 2 * line.errors) for sign in (1, -1))
        bars = zip(x, top, bottom, strict=True)
        shape = "".join(f'<path class="curve" d="M{a:.1f} {b:.1f}V{c:.1f}"/>' for a, b, c in bars if b == b)
        dots = _dots(x, y)
    said = " ".join(map(short, values.tolist()))
    return (
        f'<g class="line c{colour}" data-x="{" ".join(map(str, steps.tolist()))}" data-y="{said}">{shape}{dots}'
        f"{_not_finite(x, values)}</g>"
    )


def _path(x: NDArray[np.float64], y: NDArray[np.float64]) -> str:
    """Return the path through points; a gap where a height is missing."""
    words, pen = [], "M"
    for across, up in zip(x.tolist(), y.tolist(), strict=True):
        if up == up:
            words.append(f"{pen}{across:.1f} {up:.1f}")
        pen = "L" if up == up else "M"
    return "".join(words)


def _dots(x: NDArray[np.float64], y: NDArray[np.float64]) -> str:
    return "".join(f'<circle r="3.5" cx="{a:.1f}" cy="{b:.1f}"/>' for a, b in zip(x, y, strict=True) if b == b)


def _not_finite(x: NDArray[np.float64], values: NDArray[np.float64]) -> str:
    """Mark infinite values at the upper edge and those that are no number at the lower, a few of them."""
    bad = np.flatnonzero(~np.isfinite(values))[:: max(1, int(np.sum(~np.isfinite(values))) // 60)]
    place = [(float(x[at]), HEIGHT - BOTTOM if np.isnan(values[at]) else TOP, values[at]) for at in bad]
    return "".join(
        f'<text class="bad" x="{a:.1f}" y="{b}">×<title>{escape(str(v))}</title></text>' for a, b, v in place
    )


def _mark(mark: Mark, axes: _Axes) -> str:
    x = float(axes.across(np.array([mark.step]))[0])
    return (
        f'<g class="mark {mark.kind}"><line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
        f'<text class="middle" x="{x:.1f}" y="{TOP - 4}">{mark.number}</text>'
        f"<title>step {mark.step}: {escape(mark.says)}</title></g>"
    )
