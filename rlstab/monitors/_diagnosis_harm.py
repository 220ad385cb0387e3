"""Whether a run was harmed, whatever the cause: its reward or its held-out score fell, or its numbers are gone."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from rlstab.monitors._diagnosis_data import Sighting, Trace

WINDOW = 10
LOST = 0.4
"""Share of its peak that the mean reward must lose, for good, to count as a collapse."""
HELD_OUT = ("eval/pass@1", "eval/reward")
NUMBERS = ("train/loss", "objective/loss", "train/grad_norm", "policy/entropy", "train/entropy")


def harm_of(trace: Trace) -> tuple[Sighting, ...]:
    """Return what became worse, in the order in which it did."""
    found = [*_without_numbers(trace), *_lost_reward(trace), *_lost_skill(trace)]
    return tuple(sorted(found, key=lambda sight: sight.since or 0))


def _without_numbers(trace: Trace) -> Iterator[Sighting]:
    """Find signals that end in values that are not finite: a single bad step that was survived is no collapse."""
    for key in NUMBERS:
        curve = trace.curves.get(key)
        if curve is not None and len(curve.values) and not np.isfinite(curve.values[-1]):
            last = int(np.max(np.flatnonzero(np.isfinite(curve.values)), initial=-1))
            yield Sighting(True, f"{key} is not finite at the end of the run", int(curve.steps[last + 1]))
            return


def _lost_reward(trace: Trace) -> Iterator[Sighting]:
    steps, values = trace.finite("train/reward")
    if len(values) < 2 * WINDOW:
        return
    smooth = moving_mean(values, WINDOW)
    ends = steps[WINDOW - 1 :]
    peak = np.maximum.accumulate(smooth)
    at = int(np.argmax(smooth))
    noise = float(np.std(values[at : at + WINDOW])) / np.sqrt(WINDOW)
    fallen = (smooth < peak - np.maximum(LOST * np.abs(peak), 3 * noise)) & (peak > smooth)
    if fallen[-1]:
        first = int(np.flatnonzero(~fallen)[-1]) + 1
        says = (
            f"the mean reward of {WINDOW} steps fell from {peak[-1]:.3g} (its peak, step "
            f"{int(ends[int(np.argmax(smooth))])}) to {smooth[-1]:.3g}"
        )
        yield Sighting(True, says, int(ends[first]))


def _lost_skill(trace: Trace) -> Iterator[Sighting]:
    """Find a held-out score that ends a quarter below its best, and beyond two standard errors."""
    key = trace.first_of(*HELD_OUT)
    if key is None:
        return
    steps, values = trace.finite(key)
    if len(values) < 2:
        return
    errors = trace.finite(f"{key}_se").values
    error = float(np.hypot(errors[int(np.argmax(values))], errors[-1])) if len(errors) == len(values) else 0.0
    best = float(values.max())
    if best - values[-1] > max(0.25 * abs(best), 2 * error):
        below = np.flatnonzero(values < best - max(0.25 * abs(best), 2 * error))
        first = below[below > int(np.argmax(values))][0]
        yield Sighting(True, f"{key} fell from {best:.3g} to {values[-1]:.3g}", int(steps[first]))


def moving_mean(values: NDArray[np.float64], width: int) -> NDArray[np.float64]:
    """Return the mean of every `width` neighbouring values.

    >>> moving_mean(np.array([0.0, 2.0, 4.0]), 2).tolist()
    [1.0, 3.0]
    """
    means: NDArray[np.float64] = np.lib.stride_tricks.sliding_window_view(values, width).mean(axis=-1)
    return means
