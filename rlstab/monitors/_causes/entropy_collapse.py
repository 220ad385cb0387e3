"""The policy has stopped to explore before it was done."""

from rlstab.monitors._causes._common import AGREEMENT, ENTROPY, HELD_OUT, chosen
from rlstab.monitors._diagnosis_data import Edit, Explanation, Sighting, Sign, Trace

REWARD, ZERO = "train/reward", "train/frac_reward_zero_std"


def _gone(trace: Trace) -> Sighting:
    key = chosen(trace, ENTROPY)
    start, end = trace.start(key), trace.end(key)
    since = trace.lasting(key, lambda values: values < 0.2 * start)
    return Sighting(end < 0.2 * start, f"entropy fell from {start:.2g} to {end:.2g} nats/token", since)


def _overfits(trace: Trace) -> Sighting:
    key = chosen(trace, HELD_OUT)
    best, last = float(trace.finite(key).values.max()), float(trace.finite(key).values[-1])
    return Sighting(last < best - 0.08, f"{key} fell from {best:.3g} to {last:.3g}")


def _apart(trace: Trace) -> Sighting:
    """See that the training prompts are solved better than others: a loss that they share is none of exploration."""
    key = chosen(trace, HELD_OUT)
    trained, held_out = trace.end(REWARD), float(trace.finite(key).values[-1])
    return Sighting(trained > held_out + 0.05, f"reward {trained:.3g} on its prompts, {held_out:.3g} on others")


def _no_signal(trace: Trace) -> Sighting:
    share = trace.end(ZERO)
    return Sighting(share > 0.5, f"{share:.0%} of the groups have equal rewards and teach nothing")


def _few_prompts(trace: Trace) -> Sighting | None:
    prompts = trace.setting("prompts")
    if not isinstance(prompts, int):
        return None
    return Sighting(prompts < 256, f"the run trains on {prompts} prompts again and again")


def _edits(trace: Trace) -> list[Edit]:
    prompts, updates = trace.setting("prompts"), trace.setting("trainer.steps_per_generation")
    more = isinstance(prompts, int) and prompts < 1024
    edits = [Edit("prompts", 4096, "more prompts, so that none is learned by heart")] if more else []
    place, terms = trace.terms
    if terms and isinstance(updates, int) and updates > 1:
        keep = {"class_path": "KLCov", "init_args": {"coef": 1.0, "fraction": 0.02}}
        edits.append(Edit(f"{place}.exploration", keep, "holds back the tokens that use up the entropy"))
    return edits


EXPLANATION = Explanation(
    name="entropy_collapse",
    title="The policy has stopped to explore",
    signs=(
        Sign(reads=(ENTROPY,), look=_gone, role="needed"),
        Sign(reads=(HELD_OUT,), look=_overfits, role="needed"),
        AGREEMENT,
        Sign(reads=(HELD_OUT, REWARD), look=_apart, role="veto"),
        Sign(reads=(ZERO,), look=_no_signal),
        Sign(reads=(REWARD,), look=_few_prompts, weight=0.5),
    ),
    remedy=(
        "Train on more prompts, stop earlier, or keep entropy (KL-Cov, a higher upper clip, an entropy target). "
        "Falling entropy alone is no fault: it falls in every run that learns."
    ),
    edits=_edits,
)
