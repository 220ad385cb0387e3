"""Several runs side by side: their curves in one chart, and what differs, step by step."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from html import escape
from typing import NamedTuple

import numpy as np

from rlstab.record import Run
from rlstab.report._chart import ROUNDING
from rlstab.report._curves import Curves, figure, line
from rlstab.report._sections import card, section
from rlstab.report._summary import amount
from rlstab.schema import signal

COMPARED = (
    ("train/reward", "Reward", False),
    ("eval/pass@1", "Held-out pass@1", False),
    ("policy/entropy", "Entropy", False),
    ("drift/initial/kl", "Drift from the start", False),
    ("mismatch/k3", "Trainer against sampler, k3", True),
    ("train/grad_norm", "Gradient norm", True),
)
BLOCKS = 10
"""Differences of neighbouring steps are not independent; the means of ten stretches of the run nearly are."""


class Difference(NamedTuple):
    """By how much a signal of one run differs from that of another over the steps that both have."""

    mean: float
    error: float
    steps: int


def paired(first: Run, other: Run, key: str) -> Difference | None:
    """Return the mean of other − first over common steps, with the standard error of the means of ten stretches."""
    ours, theirs = line(first, key, "").series, line(other, key, "").series
    common, at, at_other = np.intersect1d(ours.steps, theirs.steps, return_indices=True)
    with np.errstate(invalid="ignore"):
        differences = theirs.values[at_other] - ours.values[at]
    differences = np.where(np.abs(differences) < ROUNDING, 0.0, differences)
    differences = differences[np.isfinite(differences)]
    if len(differences) < 2:
        return None
    blocks = [float(block.mean()) for block in np.array_split(differences, min(BLOCKS, len(differences)))]
    return Difference(float(differences.mean()), float(np.std(blocks, ddof=1)) / math.sqrt(len(blocks)), len(common))


def comparison(runs: Sequence[Run]) -> str:
    """Return the section on how runs differ; nothing for a single one."""
    if len(runs) < 2:
        return ""
    names = _names(runs)
    figures = "".join(card(drawn) for key, title, log in COMPARED for drawn in _overlaid(runs, names, key, title, log))
    rows = "".join(_row(runs, key, title) for key, title, _ in COMPARED)
    heads = "".join(f'<th scope="col" class="number">{escape(name)}</th>' for name in names)
    note = (
        f'<p class="muted small">Means over the run; below the others, the paired difference from {escape(names[0])} '
        "over common steps ± one standard error, taken from ten stretches of the run.</p>"
    )
    table = f'<div class="scroll"><table><thead><tr><td></td>{heads}</tr></thead><tbody>{rows}</tbody></table></div>'
    return section("How the runs differ", card(table + note) + f'<div class="plots">{figures}</div>')


def _names(runs: Sequence[Run]) -> list[str]:
    """Return the names of the runs, numbered where two share one."""
    names = [run.name for run in runs]
    return [f"{name} ({index})" if names.count(name) > 1 else name for index, name in enumerate(names, start=1)]


def _overlaid(runs: Sequence[Run], names: Sequence[str], key: str, title: str, log: bool) -> Iterator[str]:
    lines = [line(run, key, name) for run, name in zip(runs, names, strict=True)]
    if any(len(found.series.steps) for found in lines):
        yield figure(Curves(title, signal(key).unit, (), log=log), lines, ())


def _row(runs: Sequence[Run], key: str, title: str) -> str:
    means = [line(run, key, "").series.values for run in runs]
    if not any(len(values) for values in means):
        return ""
    unit = signal(key).unit
    cells = []
    for run, values in zip(runs, means, strict=True):
        finite = values[np.isfinite(values)]
        shown = escape(amount(float(finite.mean()) if len(finite) else None, None, unit))
        difference = None if run is runs[0] else paired(runs[0], run, key)
        cells.append(f'<td class="number">{shown}{_difference(difference, key, unit)}</td>')
    return f'<tr><th scope="row">{escape(title)}</th>{"".join(cells)}</tr>'


def _difference(found: Difference | None, key: str, unit: str) -> str:
    if found is None:
        return ""
    clear = abs(found.mean) > 2 * found.error
    good = {"higher": found.mean > 0, "lower": found.mean < 0}.get(signal(key).direction)
    kind = "unclear" if not clear else "" if good is None else "better" if good else "worse"
    scale, form = (100, "+.1f") if unit == "fraction" else (1, "+.3g")
    error = f"{scale * found.error:{form[1:]}}"
    return f'<br><span class="small {kind}">{scale * found.mean:{form}} ± {error}</span>'
