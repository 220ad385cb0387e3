"""The plots of a run: reward, drift, mismatch of trainer and sampler, entropy."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from numpy.typing import NDArray

from rlstab.errors import RecordError
from rlstab.record import RunFolder, Series
from rlstab.report._run import Run, read
from rlstab.report._style import LIGHT, Label, Palette, frame, label_ends
from rlstab.schema import signal

Values = NDArray[np.float64]


class Plot(NamedTuple):
    """A kind of plot: file name, what it shows, metrics of which it needs any, why all may be absent, how to draw."""

    name: str
    shows: str
    keys: tuple[str, ...]
    absent: str
    draw: Callable[[Run, Palette], Figure]

    def possible(self, run: Run) -> bool:
        """Return whether the run has any of the data."""
        return run.first_of(*self.keys) is not None

    def why_missing(self, run: Run) -> str:
        """Return why it has none."""
        return run.why_missing(self.keys[0], self.absent)


def write_plots(folder: RunFolder) -> list[Path]:
    """Write the plots of a run into its folder, as PNG.

    Written are `reward.png`, `kl_drift.png`, `mismatch.png` and `entropy.png`, each only if the run has its data.

    Args:
        folder: The run.

    Returns:
        The files that were written.

    Raises:
        RecordError: A file cannot be read or written.
    """
    run = read(folder)
    written: list[Path] = []
    for plot in PLOTS:
        if plot.possible(run):
            file = folder.plots / f"{plot.name}.png"
            try:
                file.write_bytes(png(plot.draw(run, LIGHT)))
            except OSError as error:
                raise RecordError(f"cannot write {file}: {error.strerror}") from error
            written.append(file)
    return written


def png(figure: Figure) -> bytes:
    """Return a figure as the bytes of a PNG file."""
    target = io.BytesIO()
    figure.savefig(target, format="png")
    return target.getvalue()


def _reward(run: Run, palette: Palette) -> Figure:
    series = run.metrics.series("train/reward")
    window = max(1, len(series.steps) // 20)
    meaning = (
        f"Sampled completions in training; thick: mean over {window} steps" if window > 1 else "Sampled completions"
    )
    figure, axes = frame(palette, title="Reward", subtitle=meaning, unit="reward")
    color, other, _ = palette.data
    if window > 1:
        axes.plot(series.steps, _finite(series.values), color=color, linewidth=0.8, alpha=0.4)
    _line(axes, Series(series.steps, smooth(series.values, window)), color)
    labels = _end(Series(series.steps, smooth(series.values, window)), "training", color)
    steps, values, errors = _evaluations(run, "eval/reward")
    if len(steps):
        axes.errorbar(steps, values, 2 * errors, fmt="o", color=other, markersize=6, capsize=3, zorder=4)
        labels += _end(Series(steps, values), "held-out ± 2 s.e." if np.any(errors > 0) else "held-out", other)
    _non_finite(axes, series, color, palette)
    return _finished(figure, axes, run, labels, palette)


def _drift(run: Run, palette: Palette) -> Figure:
    figure, axes = frame(
        palette,
        title="Drift",
        subtitle="How far the policy has moved: exact KL to a reference; band: ± 2 standard errors by prompt",
        unit="KL, " + signal("drift/initial/kl").unit,
    )
    labels: list[Label] = []
    for (key, name), color in zip(
        (("drift/initial/kl", "to the start"), ("drift/moving/kl", "to moving")), palette.data, strict=False
    ):
        series = run.metrics.series(key)
        error = run.metrics.series(f"{key}_se")
        both, at, at_error = np.intersect1d(series.steps, error.steps, return_indices=True)
        middle, half = _finite(series.values[at]), 2 * _finite(error.values[at_error])
        axes.fill_between(both, np.maximum(middle - half, 0), middle + half, color=color, alpha=0.18, linewidth=0)
        _line(axes, series, color, marked=len(series.steps) <= 40)
        _non_finite(axes, series, color, palette)
        labels += _end(series, name, color)
    axes.set_ylim(bottom=0)
    return _finished(figure, axes, run, labels, palette)


def _mismatch(run: Run, palette: Palette) -> Figure:
    shown = (("mismatch/k1", "|k1|"), ("mismatch/k3", "k3"), ("mismatch/max_abs", "largest |Δ|"))
    series = [
        (Series(found.steps, np.abs(found.values)), name)
        for key, name in shown
        if len((found := run.metrics.series(key)).steps)
    ]
    figure, axes = frame(
        palette,
        title="Trainer against sampler",
        subtitle="Δ = log-prob(trainer) − log-prob(sampler) of sampled tokens; k1, k3 estimate the KL",
        unit="nats/token",
    )
    finite = np.concatenate([values.values[np.isfinite(values.values)] for values, _ in series])
    floor = _log_axis(axes, finite)
    if not np.any(finite > 0):
        axes.text(0.5, 0.5, "no difference at any step", transform=axes.transAxes, ha="center", color=palette.muted)
    labels: list[Label] = []
    for (values, name), color in zip(series, palette.data, strict=False):
        lifted = Series(values.steps, np.maximum(values.values, floor))
        _line(axes, lifted, color)
        _non_finite(axes, values, color, palette)
        labels += _end(lifted, name, color)
    return _finished(figure, axes, run, labels, palette)


def _entropy(run: Run, palette: Palette) -> Figure:
    key = run.first_of("policy/entropy", "train/entropy") or "policy/entropy"
    series = run.metrics.series(key)
    figure, axes = frame(
        palette,
        title="Entropy",
        subtitle="How undecided the policy is at the sampled tokens; near 0 it no longer explores",
        unit=f"entropy, {signal(key).unit}",
    )
    _line(axes, series, palette.data[0])
    _non_finite(axes, series, palette.data[0], palette)
    axes.set_ylim(bottom=0)
    return _finished(figure, axes, run, _end(series, "training", palette.data[0]), palette)


PLOTS = (
    Plot("reward", "reward over the steps", ("train/reward",), "the trainer logged no reward", _reward),
    Plot(
        "kl_drift",
        "KL of the policy to its references over the steps",
        ("drift/initial/kl", "drift/moving/kl"),
        "it is taken every 10 steps, and only where a reference is kept to compare with",
        _drift,
    ),
    Plot(
        "mismatch",
        "disagreement of trainer and sampler over the steps",
        ("mismatch/k3", "mismatch/k1", "mismatch/max_abs"),
        "the sampler returned no log-probs, so there was nothing to compare the trainer's with",
        _mismatch,
    ),
    Plot(
        "entropy",
        "entropy of the policy over the steps",
        ("policy/entropy", "train/entropy"),
        "it was not logged",
        _entropy,
    ),
)


def smooth(values: Values, window: int) -> Values:
    """Return the centred moving mean over `window` values, finite ones only; shorter at the ends.

    >>> smooth(np.array([0.0, 3.0, np.nan, 9.0]), 3).tolist()
    [1.5, 1.5, 6.0, 9.0]
    """
    finite = np.isfinite(values)
    kernel = np.ones(window)
    total = np.convolve(np.where(finite, values, 0.0), kernel, mode="full")
    count = np.convolve(finite.astype(float), kernel, mode="full")
    start = window // 2
    kept = slice(start, start + len(values))
    mean: Values = np.divide(total[kept], count[kept], out=np.full(len(values), np.nan), where=count[kept] > 0)
    return mean


def _finite(values: Values) -> Values:
    return np.where(np.isfinite(values), values, np.nan)


def _line(axes: Axes, series: Series, color: str, *, marked: bool = False) -> None:
    alone = len(series.steps) == 1
    marker = "o" if marked or alone else ""
    axes.plot(series.steps, _finite(series.values), color=color, linewidth=1.8, marker=marker, markersize=4)


def _end(series: Series, name: str, color: str) -> list[Label]:
    """Return the label of a line at its last finite value; none for a line without any."""
    finite = series.values[np.isfinite(series.values)]
    return [Label(text=name, y=float(finite[-1]), color=color)] if len(finite) else []


def _evaluations(run: Run, key: str) -> tuple[NDArray[np.int64], Values, Values]:
    """Return steps, values and standard errors of the evaluations that hold a key."""
    found = [
        (event.step, values[key], values.get(f"{key}_se", 0.0))
        for event in run.events.of("evaluation")
        if event.step is not None and isinstance(values := event.fields.get("values"), dict) and key in values
    ]
    steps, values, errors = (np.array(column) for column in zip(*found, strict=True)) if found else ([], [], [])
    return np.asarray(steps, dtype=np.int64), np.asarray(values, dtype=float), np.asarray(errors, dtype=float)


def _log_axis(axes: Axes, values: Values) -> float:
    """Make the y axis logarithmic and return its floor; where there are zeros, the lowest decade stands for them."""
    positive = values[values > 0]
    low, high = (
        (10.0 ** math.floor(math.log10(edge)) for edge in (positive.min(), positive.max())) if len(positive) else (1, 1)
    )
    floor = low / 10 if np.any(values == 0) else low
    axes.set_yscale("log")
    axes.set_ylim(floor * 0.8, high * 10)
    axes.yaxis.set_major_locator(LogLocator(numticks=8))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: "0" if y <= floor * 1.01 < low else _power(y)))
    return floor


def _power(value: float) -> str:
    exponent = round(math.log10(value))
    return f"{value:g}" if -1 <= exponent <= 2 else f"$10^{{{exponent}}}$"


def _non_finite(axes: Axes, series: Series, color: str, palette: Palette) -> None:
    """Mark steps whose value is infinite at the upper edge, and those that are no number at the lower."""
    for found, height, marker, name in (
        (np.isinf(series.values), 0.985, "^", "infinite"),
        (np.isnan(series.values), 0.015, "x", "not a number"),
    ):
        steps = series.steps[found]
        if len(steps):
            where = axes.get_xaxis_transform()
            axes.plot(steps, np.full(len(steps), height), marker, color=color, transform=where, clip_on=False)
            axes.annotate(
                f" {name}",
                (float(steps[-1]), height),
                xycoords=where,
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=9,
                color=palette.muted,
            )


def _finished(figure: Figure, axes: Axes, run: Run, labels: list[Label], palette: Palette) -> Figure:
    """Mark the resumes and write the labels, once the limits are known."""
    for event in run.events.of("resume"):
        if event.step is not None:
            axes.axvline(event.step, color=palette.muted, linewidth=0.8, linestyle=(0, (2, 3)), zorder=1)
            axes.annotate(
                "resumed",
                (event.step, 0),
                xycoords=axes.get_xaxis_transform(),
                xytext=(3, 3),
                textcoords="offset points",
                fontsize=9,
                color=palette.muted,
            )
    axes.set_xlim(left=-0.02 * axes.get_xlim()[1])
    label_ends(axes, labels)
    return figure
