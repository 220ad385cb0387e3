"""How plots look: two palettes that colour-blind readers can tell apart, and one clean frame for all figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

_FONT = 10.5
_GAP = 0.072
"""Least distance of two labels, as a share of the height of the axes."""


@dataclass(frozen=True, kw_only=True)
class Palette:
    """Colours of a figure: ground, text, and data colours in the order of use (after Okabe and Ito)."""

    ground: str
    text: str
    muted: str
    grid: str
    data: tuple[str, str, str]


LIGHT = Palette(
    ground="#ffffff", text="#1b1f24", muted="#5c6570", grid="#e4e7eb", data=("#0069a8", "#c44e00", "#00795a")
)
DARK = Palette(
    ground="#171b21", text="#e8ecf1", muted="#9aa5b1", grid="#2b323b", data=("#62b6f0", "#f0984a", "#35c79a")
)


@dataclass(frozen=True, kw_only=True)
class Label:
    """A name to be written beside the end of its line, at height `y` in data units."""

    text: str
    y: float
    color: str


def frame(palette: Palette, *, title: str, subtitle: str, unit: str) -> tuple[Figure, Axes]:
    """Return an empty figure with its title, a line that says what is shown, and the axis of steps."""
    figure = Figure(figsize=(7.2, 4.0), dpi=160, layout="constrained", facecolor=palette.ground)
    axes = figure.add_subplot(facecolor=palette.ground)
    axes.set_title(title, loc="left", fontsize=13, fontweight="bold", color=palette.text, pad=24)
    axes.text(0, 1.035, subtitle, transform=axes.transAxes, fontsize=_FONT - 0.5, color=palette.muted)
    axes.set_xlabel("optimizer step", fontsize=_FONT, color=palette.muted)
    axes.set_ylabel(unit, fontsize=_FONT, color=palette.muted)
    axes.grid(axis="y", color=palette.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=palette.muted, labelsize=_FONT - 0.5, length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(palette.muted)
    axes.margins(x=0.02)
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10]))
    return figure, axes


def label_ends(axes: Axes, labels: Sequence[Label]) -> None:
    """Write each label to the right of the axes at the height of its line, moved apart where they would overlap."""
    to_axes = axes.transData + axes.transAxes.inverted()
    x = axes.get_xlim()[1]
    ordered = sorted(labels, key=lambda label: label.y)
    heights = spread([float(to_axes.transform((x, label.y))[1]) for label in ordered], _GAP)
    for label, height in zip(ordered, heights, strict=True):
        axes.annotate(
            label.text,
            xy=(1, height),
            xycoords="axes fraction",
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontsize=_FONT,
            color=label.color,
            annotation_clip=False,
        )


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Return ascending heights moved as little as needed to lie at least `gap` apart, overlapping ones symmetrically.

    >>> [round(height, 2) for height in spread([0.1, 0.5, 0.52], 0.1)]
    [0.1, 0.46, 0.56]
    """
    groups: list[list[float]] = []
    for height in heights:
        groups.append([height])
        while len(groups) > 1 and _top(groups[-2], gap) + gap > _bottom(groups[-1], gap):
            last = groups.pop()
            groups[-1] = groups[-1] + last
    return [_bottom(group, gap) + gap * index for group in groups for index in range(len(group))]


def _bottom(group: Sequence[float], gap: float) -> float:
    return float(np.mean(group)) - gap * (len(group) - 1) / 2


def _top(group: Sequence[float], gap: float) -> float:
    return _bottom(group, gap) + gap * (len(group) - 1)
