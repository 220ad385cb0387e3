"""The reward rises, and what it stands for does not."""

import numpy as np

from rlstab.monitors._causes._common import AGREEMENT, first_fall
from rlstab.monitors._diagnosis_data import Explanation, Sighting, Sign, Trace

REWARD, LENGTH, CUT = "train/reward", "completions/mean_length", "completions/clipped_ratio"
HELD_OUT = "eval/pass@1|eval/reward"


def _rises(trace: Trace) -> Sighting:
    start, end = trace.start(REWARD), trace.end(REWARD)
    spread = trace.start("train/reward_std") if trace.first_of("train/reward_std") else abs(start)
    return Sighting(end > start + 0.2 * spread, f"the reward rose from {start:.3g} to {end:.3g}")


def _functions(trace: Trace) -> dict[str, tuple[float, float]]:
    names = [key.split("/")[1] for key in trace.curves if key.startswith("rewards/") and key.endswith("/mean")]
    means = {name: f"rewards/{name}/mean" for name in names}
    return {name: (trace.start(key), trace.end(key)) for name, key in means.items()}


def _meaning_falls(trace: Trace) -> Sighting:
    """See a held-out score, or one of several reward functions, fall for good while the reward rises."""
    key = trace.first_of(*HELD_OUT.split("|"))
    if key is not None:
        values = trace.finite(key).values
        if values[-1] < 0.75 * values.max():
            low = trace.finite(key).steps[(values < 0.75 * values.max()) & (np.arange(len(values)) > np.argmax(values))]
            since = int(low[0]) if len(low) else None
            return Sighting(True, f"{key} fell from {values.max():.3g} to {values[-1]:.3g}", since)
    ends = _functions(trace)
    for name, (start, end) in ends.items():
        if len(ends) > 1 and (since := first_fall(trace, f"rewards/{name}/mean", 0.6)) >= 0:
            return Sighting(True, f"the reward function {name} went from {start:.3g} to {end:.3g}", since)
    return Sighting(False, "no held-out score and no reward function fell")


def _length_drifts(trace: Trace) -> Sighting:
    start, end = trace.start(LENGTH), trace.end(LENGTH)
    return Sighting(not 0.67 < end / max(start, 1e-9) < 1.5, f"completions went from {start:.3g} to {end:.3g} tokens")


def _cut_off(trace: Trace) -> Sighting:
    end = trace.end(CUT)
    return Sighting(end > trace.start(CUT) + 0.2, f"{end:.0%} of the completions are cut at the length limit")


def _one_function_wins(trace: Trace) -> Sighting | None:
    ends = _functions(trace)
    if len(ends) < 2:
        return None
    best = max(ends, key=lambda name: ends[name][1] - ends[name][0])
    start, end = ends[best]
    return Sighting(end > start, f"the reward function {best} rose from {start:.3g} to {end:.3g}")


EXPLANATION = Explanation(
    name="reward_hacking",
    title="The reward is won without doing the task",
    signs=(
        Sign(reads=(REWARD,), look=_rises, role="needed"),
        Sign(reads=(REWARD,), look=_meaning_falls, role="needed"),
        AGREEMENT,
        Sign(reads=(LENGTH,), look=_length_drifts),
        Sign(reads=(CUT,), look=_cut_off, weight=0.5),
        Sign(reads=(REWARD,), look=_one_function_wins),
    ),
    remedy=(
        "Look at the completions with the highest rewards. Bound or drop the part of the reward that is won this way, "
        "penalise length where it drifts, and judge by a held-out score. More training makes it worse."
    ),
)
