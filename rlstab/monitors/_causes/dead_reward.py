"""A reward function returns one number for everything."""

import numpy as np

from rlstab.monitors._causes._common import AGREEMENT, ENTROPY
from rlstab.monitors._diagnosis_data import Explanation, Sighting, Sign, Trace

REWARD, SPREAD, NORM = "train/reward", "train/reward_std", "train/grad_norm"
CONSTANT = 8
"""Steps in a row that must be constant."""


def _dies(trace: Trace) -> Sighting:
    """See a spread that was there and is exactly zero from one step on."""
    steps, spreads = trace.finite(SPREAD)
    alive = np.flatnonzero(spreads > 1e-9)
    last = int(alive[-1]) if len(alive) else -1
    died = 0 <= last < len(steps) - CONSTANT
    at = int(steps[last + 1]) if died else None
    return Sighting(died, f"from step {at} on every completion had the same reward, {trace.end(REWARD):.3g}", at)


def _at_once(trace: Trace) -> Sighting:
    steps, values = trace.finite(REWARD)
    end = trace.finite(SPREAD)
    last = steps <= end.steps[np.flatnonzero(end.values > 1e-9)[-1]] if np.any(end.values > 1e-9) else steps < 0
    before = values[last]
    usual, latest = (float(np.median(before[-width:])) if len(before) else np.nan for width in (15, 3))
    gone = abs(latest - trace.end(REWARD)) > 0.5 * abs(usual - trace.end(REWARD)) > 0
    return Sighting(bool(gone), f"the steps just before still had {latest:.3g}, usual was {usual:.3g}")


def _policy_is_well(trace: Trace) -> Sighting:
    values = trace.finite("eval/reward").values
    return Sighting(
        values[-1] > 0.6 * values.max(), f"the held-out reward ends at {values[-1]:.3g}, its best {values.max():.3g}"
    )


def _policy_stays(trace: Trace) -> Sighting | None:
    """See that the policy writes as before: where it broke, its entropy or the length of its completions tell."""
    died = _dies(trace).since
    if died is None:
        return None
    seen = []
    for key in filter(None, (trace.first_of(*ENTROPY.split("|")), trace.first_of("completions/mean_length"))):
        steps, values = trace.finite(key)
        before, after = values[(steps < died) & (steps >= died - 10)], values[(steps >= died) & (steps < died + 10)]
        if len(before) and len(after):
            stays = bool(0.75 * before.mean() < after.mean() < 1.33 * before.mean())
            seen.append(Sighting(stays, f"{key} went from {before.mean():.3g} to {after.mean():.3g} then"))
    says = ", ".join(sight.says for sight in seen)
    return Sighting(all(sight.holds for sight in seen), says) if seen else None


def _no_gradient(trace: Trace) -> Sighting:
    before, after = trace.part(NORM, 0.0, 0.2), trace.end(NORM)
    return Sighting(after < 0.2 * before, f"the gradient norm fell from {before:.2g} to {after:.2g}")


EXPLANATION = Explanation(
    name="dead_reward",
    title="A reward function has died",
    signs=(
        Sign(reads=(SPREAD, REWARD), look=_dies, role="needed"),
        Sign(reads=(SPREAD, REWARD), look=_at_once, role="needed"),
        Sign(reads=("eval/reward",), look=_policy_is_well, role="veto"),
        AGREEMENT,
        Sign(reads=(SPREAD,), look=_policy_stays, role="veto"),
        Sign(reads=(NORM,), look=_no_gradient),
    ),
    remedy=(
        "Call the reward function on a recorded completion that was right before: a service that is down, a parser "
        "that gives up, or a caught exception returns the same number for everything."
    ),
)
