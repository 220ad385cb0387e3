"""Questions that several causes ask."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from rlstab.monitors._diagnosis_data import Edit, Sighting, Sign, Trace
from rlstab.monitors._diagnosis_harm import moving_mean

ENTROPY = "policy/entropy|train/entropy"
DRIFT = "drift/initial/kl|train/kl"
HELD_OUT = "eval/pass@1|eval/reward"
MISMATCH = 0.05
"""k3 in nats/token from which on the mismatch itself is a cause that would have to be ruled out first."""


def chosen(trace: Trace, entry: str) -> str:
    """Return the signal that a run has of those in one entry of a sign."""
    key = trace.first_of(*entry.split("|"))
    assert key is not None, entry
    return key


def learning_rate(trace: Trace) -> float | None:
    """Return the learning rate of the recipe, else the largest that was logged."""
    setting = trace.setting("trainer.learning_rate")
    if isinstance(setting, int | float):
        return float(setting)
    values = trace.finite("train/learning_rate").values
    return float(values.max()) if len(values) else None


def slower(trace: Trace, factor: float) -> list[Edit]:
    """Lower the learning rate by a factor."""
    rate = learning_rate(trace)
    if rate is None:
        return []
    return [Edit("trainer.learning_rate", float(f"{rate / factor:.3g}"), f"a {_part(factor)} of what it was")]


def _part(factor: float) -> str:
    return {2: "half", 3: "third", 4: "quarter"}.get(round(factor), f"{factor:g}th")


def no_mismatch(trace: Trace) -> Sighting:
    """See that trainer and sampler agree, so that this cannot be the cause."""
    largest = trace.part("mismatch/k3", 0.1, 1.0)
    return Sighting(largest < MISMATCH, f"trainer and sampler: k3 {largest:.2g} nats/token")


def no_unusual_gradient(trace: Trace) -> Sighting:
    """See that no gradient stands out."""
    largest = float(spikes(trace)[1].max(initial=0.0))
    return Sighting(largest < 10, f"the largest gradient norm is {max(largest, 1):.2g} times what was usual before it")


def spikes(trace: Trace) -> tuple[np.ndarray, np.ndarray]:
    """Return steps, and gradient norms as multiples of what was usual; the first 10 have none.

    Usual is the median of the 20 steps before, and at least the upper quartile of the run: where most groups teach
    nothing the former is near zero, and every lesson would stand out.
    """
    steps, norms = trace.finite("train/grad_norm")
    if len(norms) <= 10:
        return np.array([], dtype=int), np.array([])
    begin = [float(np.median(norms[:at])) for at in range(10, min(20, len(norms)))]
    later = np.lib.stride_tricks.sliding_window_view(norms, 20)[:-1] if len(norms) > 20 else np.empty((0, 20))
    lessons = norms[norms > 0]
    least = float(np.quantile(lessons, 0.75)) if len(lessons) else 1.0
    return steps[10:], norms[10:] / np.maximum(np.r_[begin, np.median(later, axis=-1)], least)


def first_fall(trace: Trace, key: str, share: float) -> int:
    """Return the step from which on a signal is mostly below a share of its highest value so far, to its end; or -1.

    Medians of three values are looked at; mostly is four of five.
    """
    steps, values = trace.finite(key)
    if len(values) < 5:
        return -1
    smooth = np.median(np.lib.stride_tricks.sliding_window_view(values, 3), axis=-1)
    below = smooth < share * np.maximum.accumulate(smooth)
    rest = np.cumsum(below[::-1])[::-1] / np.arange(len(below), 0, -1)
    found = np.flatnonzero(below & (rest >= 0.8))
    return int(steps[int(found[0]) + 1]) if len(found) and below[-1] else -1


class Fall(NamedTuple):
    """A loss that lasts: the step at which it had happened, the best mean before, and the mean of all that follows."""

    since: int
    best: float
    after: float


def lasting_fall(trace: Trace, key: str, *, width: int = 15, share: float = 0.9) -> Fall | None:
    """Return the first loss of a tenth of the best mean of `width` values that noise does not explain and that lasts.

    The noise is taken from differences of neighbours, and three standard errors must be exceeded; to last means that
    all that follows, `width` values or more, is on average below the same bound.
    """
    steps, values = trace.finite(key)
    if len(values) < 3 * width:
        return None
    means = moving_mean(values, width)
    best = np.maximum.accumulate(means)
    error = float(np.std(np.diff(values))) / np.sqrt(width)
    bound = best - np.maximum((1 - share) * np.abs(best), 3 * error)
    following = np.cumsum(values[::-1])[::-1] / np.arange(len(values), 0, -1)
    rest = following[width - 1 :]
    found = np.flatnonzero((means < bound) & (rest < bound + 0.3 * (best - bound)))
    found = found[found < len(means) - width]
    if not len(found):
        return None
    at = int(found[0])
    return Fall(int(steps[at + width - 1]), float(best[at]), float(rest[at]))


def lasting_held_out_fall(trace: Trace, *, share: float = 0.9) -> Fall | None:
    """Return the loss of a tenth of the best held-out score, by two standard errors, at this and all later evaluations.

    What only the last evaluation shows is not known to last.
    """
    key = trace.first_of(*HELD_OUT.split("|"))
    if key is None:
        return None
    steps, values = trace.finite(key)
    errors = trace.finite(f"{key}_se").values if trace.first_of(f"{key}_se") else np.zeros(len(values))
    if len(errors) != len(values):
        return None
    at_best = np.maximum.accumulate(np.arange(len(values)) * (values == np.maximum.accumulate(values)))
    best = values[at_best]
    noise = 2 * np.hypot(errors, errors[at_best])
    kept = np.flatnonzero(values >= best - np.maximum((1 - share) * np.abs(best), noise))
    first = int(kept.max(initial=-1)) + 1
    return (
        Fall(int(steps[first]), float(best[first]), float(values[first:].mean())) if first < len(values) - 1 else None
    )


AGREEMENT = Sign(reads=("mismatch/k3",), look=no_mismatch, role="veto")
EVEN_GRADIENT = Sign(reads=("train/grad_norm",), look=no_unusual_gradient, weight=0.5)
