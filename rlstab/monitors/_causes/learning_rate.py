"""The updates are too large."""

import numpy as np

from rlstab.monitors._causes._common import (
    AGREEMENT,
    DRIFT,
    ENTROPY,
    EVEN_GRADIENT,
    chosen,
    lasting_fall,
    lasting_held_out_fall,
    no_unusual_gradient,
    slower,
)
from rlstab.monitors._diagnosis_data import Explanation, Sighting, Sign, Trace
from rlstab.monitors._diagnosis_harm import moving_mean

REWARD, SPREAD = "train/reward", "train/reward_std"
NEAR = 0.1
"""Nats/token from the start that a policy which learns does not go before the reward shows it."""
USED_UP = 0.6
"""Share of its entropy that a policy which learns does not fall to before the reward shows it."""

HASTY = 0.24
"""Nats/token from the start to which a policy that learns does not go within the first third."""
WIDTH = 15
"""Steps over which a dip of the reward is averaged."""


def _falls(trace: Trace) -> Sighting:
    """See the reward fall for good, or the held-out score while that of training does not rise; or a hasty dip."""
    fall, what = lasting_fall(trace, REWARD), "reward"
    if fall is None and trace.end(REWARD) <= trace.finite(REWARD).values[0]:
        fall, what = lasting_held_out_fall(trace), "held-out score"
    if fall is None:
        return _dips(trace)
    says = f"the {what} fell from {fall.best:.3g} to {fall.after:.3g}, for good, at step {fall.since}"
    return Sighting(True, says, fall.since)


def _dips(trace: Trace) -> Sighting:
    """See the reward lose more than noise explains, without a gradient to blame, in a policy that went far at once."""
    steps, rewards = trace.finite(REWARD)
    key = trace.first_of(*DRIFT.split("|"))
    if key is None or len(rewards) < 3 * WIDTH or _early(trace, key) < HASTY or not _even(trace):
        return Sighting(False, "the reward did not fall for good")
    means = moving_mean(rewards, WIDTH)
    best = np.maximum.accumulate(means)
    at = int(np.argmax(best - means))
    loss, error = float(best[at] - means[at]), float(np.std(np.diff(rewards))) / np.sqrt(WIDTH)
    says = f"the reward dipped from {best[at]:.3g} to {means[at]:.3g}"
    return Sighting(loss > max(0.15 * float(best[at]), 3 * error), says, int(steps[at + WIDTH - 1]))


def _even(trace: Trace) -> bool:
    return trace.first_of("train/grad_norm") is None or no_unusual_gradient(trace).holds


def _early(trace: Trace, key: str) -> float:
    """Return how far the policy was from its start within the first third."""
    values = trace.finite(key).values
    return float(values[: max(3, len(values) // 3)].max())


def _policy_too(trace: Trace) -> Sighting | None:
    """See that the policy itself became worse, and not what it was shown: held-out prompts tell."""
    fall, (steps, values) = lasting_fall(trace, REWARD), trace.finite("eval/reward")
    if fall is None or not np.any(steps >= fall.since):
        return None
    best, after = float(values.max()), float(values[steps >= fall.since].mean())
    return Sighting(after < 0.95 * best, f"so did the held-out reward, from {best:.3g} to {after:.3g}")


def _far(trace: Trace) -> Sighting:
    early = _early(trace, chosen(trace, DRIFT))
    return Sighting(early > HASTY, f"within the first third the policy was {early:.2g} nats/token from its start")


def _gain(trace: Trace, step: int) -> float:
    """Return what the reward around a step was above that of the first ones, in standard deviations of completions."""
    steps, rewards = trace.finite(REWARD)
    around = rewards[np.abs(steps - step) <= 8]
    spread = float(trace.finite(SPREAD).values[:10].max())
    return (float(around.mean()) - float(rewards[:5].mean())) / spread if len(around) and spread > 0 else float("nan")


def _far_for_nothing(trace: Trace) -> Sighting | None:
    """See what the reward had gained when the policy was no longer near its start."""
    steps, far = trace.finite(chosen(trace, DRIFT))
    left = np.flatnonzero(far > NEAR)
    gain = _gain(trace, int(steps[left[0]])) if len(left) else np.nan
    if np.isnan(gain):
        return None
    moved = float(far[left[0]])
    says = f"the first {moved:.2g} nats/token from the start brought {gain:.2g} standard deviations of reward"
    return Sighting(gain < 0.35 * np.sqrt(moved), says, int(steps[left[0]]))


def _sure_for_nothing(trace: Trace) -> Sighting | None:
    """See what the reward had gained when two fifths of the entropy were used up; or entropy that rises instead.

    A reward that recovers from its dips has gained, which says nothing of the rate.
    """
    key = chosen(trace, ENTROPY)
    start, most = trace.start(key), float(trace.finite(key).values.max())
    rises = trace.lasting(key, lambda entropy: entropy > 1.4 * start)
    if rises >= 0:
        return Sighting(True, f"entropy rose from {start:.2g} to {most:.2g} nats/token", rises)
    low = trace.lasting(key, lambda entropy: entropy < USED_UP * start)
    gain = _gain(trace, low) if low >= 0 else np.nan
    if np.isnan(gain) or (gain >= 0.25 and lasting_fall(trace, REWARD) is None):
        return None
    says = f"when entropy was down to {USED_UP:.0%}, the reward had gained {gain:.2g} standard deviations"
    return Sighting(gain < 0.25, says, low)


def _restless(trace: Trace) -> Sighting | None:
    """See the distance from the start jump: what grows steadily in a run that learns."""
    values = trace.finite(chosen(trace, DRIFT)).values
    if len(values) < 5:
        return None
    jump = float(np.mean(np.abs(np.diff(values))))
    return Sighting(jump > 0.08, f"between two measurements the distance from the start changes by {jump:.2g} nats")


EXPLANATION = Explanation(
    name="learning_rate",
    title="The learning rate is too high",
    signs=(
        Sign(reads=(REWARD,), look=_falls, role="needed"),
        AGREEMENT,
        Sign(reads=("eval/reward",), look=_policy_too, role="veto"),
        Sign(reads=(DRIFT, SPREAD), look=_far_for_nothing),
        Sign(reads=(ENTROPY, SPREAD), look=_sure_for_nothing, weight=2.0),
        Sign(reads=(DRIFT,), look=_far),
        Sign(reads=(DRIFT,), look=_restless),
        EVEN_GRADIENT,
    ),
    remedy="Lower the learning rate, and warm it up. Clipping the gradient does not rescue it under Adam.",
    edits=lambda trace: slower(trace, 4),
)
