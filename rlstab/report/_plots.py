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
from rlstab.record import Run, RunFolder, Series, numbers
from rlstab.report._buckets import PLACE, buckets_of
from rlstab.report._style import LIGHT, Label, Palette, frame, label_ends
from rlstab.schema import signal

Values = NDArray[np.float64]

_LONG = 300
_FEW = 40
_ROUNDING = 1e-9
_LARGEST = 1e200
"""Beyond it the limits of an axis overflow."""


class Plot(NamedTuple):
    """A kind of plot: file name, what it shows, metrics of which it needs any, why all may be absent, how to draw.

    Nothing is said of the absence of a plot whose data are absent with those of another.
    """

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


def write_plots(folder: RunFolder, run: Run | None = None) -> list[Path]:
    """Write the plots of a run into its folder, as PNG.

    Written are `reward.png`, `kl_drift.png`, `mismatch.png`, `mismatch_by_probability.png` and `entropy.png`, each only
    if the run has its data.

    Args:
        folder: The run.
        run: What was read of it, where that was done already.

    Returns:
        The files that were written.

    Raises:
        RecordError: A file cannot be read or written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as place:
        ...     folder = RunFolder.create(f"{place}/run", config_text="seed: 0")
        ...     folder.append_metrics(1, {"train/reward": 0.25})
        ...     [file.name for file in write_plots(folder)]
        ['reward.png']
    """
    run = run or Run.of(folder)
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


def _series(run: Run, key: str) -> Series:
    """Return a metric; what is too large to be drawn stands as infinite."""
    steps, values = run.metrics.series(key)
    return Series(steps, np.where(np.abs(values) > _LARGEST, np.copysign(np.inf, values), values))


def _reward(run: Run, palette: Palette) -> Figure:
    figure, axes = frame(
        palette,
        title="Reward",
        subtitle="Mean reward of the sampled completions, and at evaluations on held-out prompts",
        unit=signal("train/reward").unit,
    )
    series = _series(run, "train/reward")
    labels = _curve(axes, palette, series, "training", palette.data[0], window=max(1, len(series.steps) // 20))
    steps, values, errors = _evaluations(run, "eval/reward")
    if len(steps):
        other = palette.data[1]
        axes.errorbar(steps, values, 2 * errors, fmt="o", color=other, markersize=6, capsize=3, zorder=4)
        name = "held-out ± 2 s.e." if np.any(errors > 0) else "held-out"
        labels.append(Label(text=name, y=float(values[-1]), color=other))
    return _finished(figure, axes, run, labels, palette)


def _drift(run: Run, palette: Palette) -> Figure:
    figure, axes = frame(
        palette,
        title="Drift",
        subtitle="How far the policy has moved: exact KL to a reference; band: ± 2 standard errors by prompt",
        unit=f"KL, {signal('drift/initial/kl').unit}",
    )
    labels: list[Label] = []
    shown = (("drift/initial/kl", "to the start"), ("drift/moving/kl", "to moving"))
    for (key, name), color in zip(shown, palette.data, strict=False):
        series, error = _series(run, key), _series(run, f"{key}_se")
        both, at, at_error = np.intersect1d(series.steps, error.steps, return_indices=True)
        middle, half = _finite(series.values[at]), 2 * _finite(error.values[at_error])
        axes.fill_between(both, np.maximum(middle - half, 0), middle + half, color=color, alpha=0.18, linewidth=0)
        labels += _curve(axes, palette, series, name, color, window=1)
    axes.set_ylim(bottom=0)
    return _finished(figure, axes, run, labels, palette)


def _mismatch(run: Run, palette: Palette) -> Figure:
    figure, axes = frame(
        palette,
        title="Trainer against sampler",
        subtitle="Δ = log-prob(trainer) − log-prob(sampler) of sampled tokens; k1, k3 estimate the KL",
        unit=signal("mismatch/k3").unit,
    )
    shown = (("mismatch/k1", "|k1|"), ("mismatch/k3", "k3"), ("mismatch/max_abs", "largest |Δ|"))
    series = [(name, _series(run, key)) for key, name in shown]
    series = [(name, Series(steps, _without_rounding(values))) for name, (steps, values) in series]
    sizes = np.concatenate([values for _, (_, values) in series])
    floor = _log_axis(axes, sizes[np.isfinite(sizes)])
    if len(sizes) and not np.any(sizes):
        axes.text(0.5, 0.5, "no difference at any step", transform=axes.transAxes, ha="center", color=palette.muted)
    labels: list[Label] = []
    for (name, sizes_of), color in zip(series, palette.data, strict=True):
        labels += _worst(axes, palette, sizes_of, name, color, floor=floor)
    return _finished(figure, axes, run, labels, palette)


def _by_probability(run: Run, palette: Palette) -> Figure:
    figure, axes = frame(
        palette,
        title="Trainer against sampler, by probability",
        subtitle="Other arithmetic or weights move likely tokens least; cut-off sampling moves all alike",
        unit="mean |Δ|, nats",
    )
    found = buckets_of(run)
    if not found:
        axes.text(0.5, 0.5, "no finite difference at any step", transform=axes.transAxes, ha="center")
        return figure
    late, early = (np.array(sizes) for sizes in zip(*((b.late, b.early) for b in found), strict=True))
    floor = _log_axis(axes, np.concatenate([early, late]))
    places = np.arange(len(found), dtype=np.float64)
    for values, name, color, shift in (
        (early, "first tenth of the steps", palette.data[0], -0.19),
        (late, "last tenth", palette.data[1], 0.19),
    ):
        axes.bar(places + shift, np.maximum(values, floor), width=0.34, color=color, label=name)
    axes.set_xticks(places, [f"{bucket.range}\n{bucket.share:.0%} of tokens" for bucket in found])
    axes.set_xlabel("probability that the sampler gave the token")
    axes.legend(frameon=False, labelcolor=palette.text)
    return figure


def _without_rounding(values: Values) -> Values:
    """Return sizes, with 0 for what is only the rounding of two ways to compute the same number."""
    sizes = np.abs(values)
    return np.where(sizes < _ROUNDING, 0.0, sizes)


def _worst(axes: Axes, palette: Palette, series: Series, name: str, color: str, *, floor: float) -> list[Label]:
    """Draw each step as a dot, and the largest value of the last steps as a line: rare disagreement shows."""
    count = len(series.steps)
    if count <= _FEW:
        return _curve(axes, palette, series, name, color, floor=floor)
    window = max(_FEW // 4, count // 20)
    values = np.maximum(_finite(series.values), floor)
    padded = np.concatenate([np.full(window - 1, floor), np.where(np.isfinite(values), values, floor)])
    worst = np.lib.stride_tricks.sliding_window_view(padded, window).max(-1)
    axes.plot(series.steps, values, ".", color=color, markersize=2.5, alpha=0.35)
    axes.plot(series.steps, worst, color=color, linewidth=1.8)
    axes.set_xlabel(f"optimizer step (line: largest of the last {window} values)")
    _non_finite(axes, series, color, palette)
    return [Label(text=name, y=float(worst[-1]), color=color)]


def _entropy(run: Run, palette: Palette) -> Figure:
    key = run.first_of("policy/entropy", "train/entropy") or "policy/entropy"
    series = _series(run, key)
    figure, axes = frame(
        palette,
        title="Entropy",
        subtitle="How undecided the policy is at the sampled tokens; near 0 it no longer explores",
        unit=f"entropy, {signal(key).unit}",
    )
    labels = _curve(axes, palette, series, "training", palette.data[0])
    axes.set_ylim(bottom=0)
    return _finished(figure, axes, run, labels, palette)


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
        "mismatch_by_probability",
        "disagreement of trainer and sampler by the probability of the token",
        (f"{PLACE}0.5-1/mean_abs",),
        "",
        _by_probability,
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


def _curve(
    axes: Axes,
    palette: Palette,
    series: Series,
    name: str,
    color: str,
    *,
    window: int | None = None,
    floor: float = -math.inf,
) -> list[Label]:
    """Draw one metric, and return the label for its end; none for a metric without finite values.

    A long series is drawn thin, with its moving mean over `window` steps thick; values below `floor` stand on it.
    """
    count = len(series.steps)
    if count == 0:
        return []
    width = (1 if count <= _LONG else count // 60) if window is None else window
    values = np.maximum(_finite(series.values), floor)
    mean = np.maximum(smooth(series.values, width), floor)
    if width > 1:
        axes.plot(series.steps, values, color=color, linewidth=0.8, alpha=0.4)
        axes.set_xlabel(f"optimizer step (thick: mean over {width} values)")
    marker = "o" if count <= _FEW else ""
    axes.plot(series.steps, mean, color=color, linewidth=1.8, marker=marker, markersize=4)
    _non_finite(axes, series, color, palette)
    ends = mean[np.isfinite(mean)]
    return [Label(text=name, y=float(ends[-1]), color=color)] if len(ends) else []


def _evaluations(run: Run, key: str) -> tuple[NDArray[np.int64], Values, Values]:
    """Return steps, values and standard errors of the evaluations that hold a key, from events and metrics."""
    error = f"{key}_se"
    found = {row.step: (row.values[key], row.values.get(error, 0.0)) for row in run.metrics.rows if key in row.values}
    for event in run.events.of("evaluation"):
        values = numbers(event.fields.get("values"))
        if event.step is not None and key in values:
            found[event.step] = (values[key], values.get(error, 0.0))
    steps = sorted(found)
    columns = np.array([found[step] for step in steps], dtype=np.float64).reshape(-1, 2)
    return np.array(steps, dtype=np.int64), columns[:, 0], columns[:, 1]


def _log_axis(axes: Axes, sizes: Values) -> float:
    """Make the y axis logarithmic and return its floor; where there are zeros, the lowest decade stands for them."""
    exponents = np.floor(np.log10(np.clip(sizes[sizes > 0], 1e-30, 1e200)))
    low, high = (10.0 ** exponents.min(), 10.0 ** exponents.max()) if len(exponents) else (1.0, 1.0)
    floor = low / 10 if np.any(sizes == 0) else low
    axes.set_yscale("log")
    axes.set_ylim(floor * 0.8, high * 10)
    axes.yaxis.set_major_locator(LogLocator(numticks=8))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: "0" if y <= floor * 1.01 < low else _power(y)))
    return float(floor)


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
