"""Single gradients of extraordinary size throw the policy back."""

import numpy as np

from rlstab.monitors._causes._common import AGREEMENT, lasting_fall, lasting_held_out_fall, slower, spikes
from rlstab.monitors._diagnosis_data import Edit, Explanation, Sighting, Sign, Trace

NORM, REWARD = "train/grad_norm", "train/reward"
TIMES = 10.0


def _stand_out(trace: Trace) -> Sighting:
    steps, sizes = spikes(trace)
    found = steps[sizes > TIMES]
    if not len(found):
        return Sighting(False, "no gradient norm is ten times what was usual before it")
    says = (
        f"{len(found)} gradient norms stand out, the first at step {found[0]}, up to {sizes.max():.2g} times the usual"
    )
    return Sighting(len(found) <= 0.2 * len(sizes), says, int(found[0]))


def _throw_back(trace: Trace) -> Sighting:
    """See the reward, or a held-out score, fall after the first spike, at once or for good.

    Under Adam a spike acts for some steps, and makes those that follow small: several wear a policy out.
    """
    steps, sizes = spikes(trace)
    first = int(steps[sizes > TIMES][0]) if np.any(sizes > TIMES) else trace.last_step
    falls = {"mean reward": lasting_fall(trace, REWARD), "held-out score": lasting_held_out_fall(trace)}
    for what, fall in falls.items():
        if fall is not None and fall.since > first:
            return Sighting(True, f"the {what} fell from {fall.best:.3g} to {fall.after:.3g}, at step {fall.since}")
    at, values = trace.finite(REWARD)
    before, after = values[(at > first - 10) & (at <= first)], values[(at > first) & (at <= first + 15)]
    if not len(before) or not len(after):
        return Sighting(False, "there is no reward after the first of them")
    says = (
        f"the mean reward went from {before.mean():.3g} in the 10 steps before the first to {after.mean():.3g} after it"
    )
    return Sighting(bool(after.mean() < before.mean() - 0.04 * values.max()), says)


def _groups_teach(trace: Trace) -> Sighting:
    """See that gradients are not zero for want of different rewards: every lesson would be a spike then."""
    share = trace.part("train/frac_reward_zero_std", 0.0, 0.5)
    return Sighting(share < 0.7, f"{share:.0%} of the groups have equal rewards")


def _unclipped(trace: Trace) -> Sighting | None:
    bound = trace.setting("trainer.max_grad_norm")
    if bound is None:
        bound = 1.0
    if not isinstance(bound, int | float):
        return None
    usual = trace.part(NORM, 0.0, 0.5)
    loose = bound <= 0 or bound > 10 * usual
    return Sighting(loose, f"max_grad_norm is {bound:g}, the usual norm {usual:.2g}")


def _edits(trace: Trace) -> list[Edit]:
    steps, norms = trace.finite(NORM)
    at, sizes = spikes(trace)
    usual = float(np.median(norms[steps < at[sizes > TIMES][0]]))
    if usual <= 0:
        return slower(trace, 2)
    return [Edit("trainer.max_grad_norm", float(f"{usual:.2g}"), "the usual norm before the first of them")]


EXPLANATION = Explanation(
    name="gradient_spike",
    title="Gradient spikes throw the policy back",
    signs=(
        Sign(reads=(NORM,), look=_stand_out, role="needed"),
        Sign(reads=(REWARD,), look=_throw_back, role="needed"),
        AGREEMENT,
        Sign(reads=("train/frac_reward_zero_std",), look=_groups_teach, role="veto"),
        Sign(reads=(NORM,), look=_unclipped, weight=0.5),
    ),
    remedy="Clip the gradient at its usual norm, or adaptively (ZClip); look at the batches of those steps.",
    edits=_edits,
)
