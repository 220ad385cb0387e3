"""What the causes of a mismatch between trainer and sampler have in common."""

from __future__ import annotations

import numpy as np

from rlstab.monitors._diagnosis_data import Edit, Sighting, Sign, Trace

LOOK, DANGER = 5e-3, 2e-2
NONE = 1e-3
"""Values of k3, in nats/token: worth a look, able to destabilise training, and none to speak of."""

K3 = "mismatch/k3"
MOST = 0.55
"""Share of tokens that differ by more than a factor of 2 beyond which weights that are broken come into question."""


def differs(trace: Trace, bound: float) -> Sighting:
    """See k3 above a bound for three steps."""
    since = trace.lasting(K3, lambda values: values > bound)
    largest = float(trace.finite(K3).values.max())
    if since < 0:
        return Sighting(False, f"k3 was at most {largest:.2g} nats/token, trainer and sampler agree")
    return Sighting(True, f"k3 was above {bound:g} nats/token from step {since} on, at most {largest:.2g}", since)


def level(trace: Trace) -> float:
    """Return the middle of k3 over the run."""
    return trace.part(K3, 0.2, 1.0)


def first(trace: Trace) -> float:
    """Return k3 at the first step at which trainer and sampler can have the same weights, the first one."""
    return float(trace.finite(K3).values[0])


def agreed_at_first(trace: Trace) -> Sighting:
    """See whether trainer and sampler began as one, so that only their weights can differ."""
    began, later = first(trace), level(trace)
    holds = began < max(NONE, 0.1 * later)
    return Sighting(holds, f"k3 was {began:.2g} at the first step and {later:.2g} later")


def differed_at_first(trace: Trace) -> Sighting:
    """See whether trainer and sampler differed before any update."""
    began, later = first(trace), level(trace)
    holds = began > max(NONE, 0.1 * later)
    step = int(trace.finite(K3).steps[0])
    return Sighting(holds, f"k3 was {began:.2g} at the first step already, before any update ({later:.2g} later)", step)


def another_prompt(trace: Trace) -> Sighting:
    """See whether the sampler is as sure as ever, but of other tokens.

    Rounding moves likely tokens least; a model that sees another prompt disagrees where it is sure, and agrees again
    where the completion tells what comes next. Where it does not, only its sureness is left to look at: broken weights
    hesitate. Without the disagreement by probability only its size is left to look at.
    """
    began, share = first(trace), trace.start("mismatch/f2")
    likely, unlikely = (trace.start(f"mismatch/bucket/{bucket}/mean_abs") for bucket in ("0.5-1", "0.01-0.1"))
    says = f"at the first step k3 was {began:.2g} nats/token"
    if not np.isnan(share):
        says += f", {share:.0%} of the tokens differed by more than a factor of 2"
    if np.isnan(likely) or np.isnan(unlikely):
        return Sighting(began >= 1.0 and not share > MOST, says)
    says += f", likely ones by {likely:.2g} nats and unlikely ones by {unlikely:.2g}"
    differs_so = began > max(0.1, missing_mass(trace)) and likely > 0.9 * unlikely
    if not differs_so or not share > MOST:
        return Sighting(differs_so, says)
    sureness = sure(trace)
    return Sighting(sureness.holds, f"{says}; {sureness.says}")


def sure(trace: Trace) -> Sighting:
    """See that the sampler rarely hesitates between tokens: those of middling probability are the rarest."""
    between, unlikely = (trace.start(f"mismatch/bucket/{bucket}/share") for bucket in ("0.1-0.5", "0.01-0.1"))
    says = (
        f"{between:.0%} of them had a probability of 0.1 to 0.5 at the sampler, and {unlikely:.0%} one of 0.01 to 0.1"
    )
    return Sighting(between < 0.75 * unlikely, says)


def growth(trace: Trace) -> Sighting:
    """See whether k1 goes on growing; a constant lag would level off, or grow with the steps of a policy it follows."""
    early, late = trace.part("mismatch/k1", 0.2, 0.4), trace.part("mismatch/k1", 0.67, 1.0)
    says = f"k1 was {early:.2g} in the second fifth of the run and {late:.2g} in its last third"
    grows, behind = late > 2.2 * early > 0, follows(trace)
    return Sighting(grows and not behind, f"{says}, yet the sampler follows" if grows and behind else says)


def follows(trace: Trace) -> bool:
    """Whether what is sampled changes, and is nearer to the policy than the start is."""
    if trace.first_of("train/reward") is None or trace.first_of("drift/initial/kl") is None:
        return False
    return sampled_reward_moves(trace).holds and trace.end("mismatch/k1") < 0.4 * trace.end("drift/initial/kl")


def missing_mass(trace: Trace) -> float:
    """Return the share of the trainer's policy at tokens that the sampler never draws.

    Under the sampler's distribution mean(ρ) = 1 − k1 + k3, and it is 1 where every token can be drawn.
    """
    k1, k3 = trace.finite("mismatch/k1"), trace.finite(K3)
    _, at, at3 = np.intersect1d(k1.steps, k3.steps, return_indices=True)
    return float(np.median(k1.values[at] - k3.values[at3])) if len(at) else float("nan")


def whole_support(trace: Trace) -> Sighting:
    """See whether the sampler draws from all tokens that the trainer gives probability."""
    missing, size = missing_mass(trace), level(trace)
    return Sighting(
        abs(missing) < max(0.5 * size, 1e-3),
        f"mean ratio of trainer to sampler {1 - missing:.3f}, 1 for a full support",
    )


def sampled_reward_moves(trace: Trace) -> Sighting:
    """See whether what is sampled changes at all while the policy trains."""
    values = trace.finite("train/reward").values
    third = max(1, len(values) // 3)
    before, after = values[:third], values[-third:]
    change = abs(float(after.mean() - before.mean()))
    error = float(np.hypot(before.std() / np.sqrt(len(before)), after.std() / np.sqrt(len(after))))
    says = f"the reward of the samples went from {before.mean():.3g} to {after.mean():.3g}"
    return Sighting(change > max(4 * error, 0.05 * abs(float(before.mean()))), says)


def opposite(sight: Sighting) -> Sighting:
    """Return a sighting for the explanation that wants the contrary."""
    return Sighting(not sight.holds, sight.says, sight.since)


def clip_by_behaviour(trace: Trace) -> list[Edit]:
    """Clip against the policy that sampled: what helps against lag, and harms under a static mismatch."""
    place, terms = trace.terms
    names = [name for name, term in terms.items() if "Surrogate" in str(term.get("class_path"))]
    against = {"class_path": "TokenRatio", "init_args": {"against": "sampler"}}
    return [
        edit
        for name in names[:1]
        for edit in (
            Edit(f"{place}.{name}.init_args.ratio", against, "clip against the policy that sampled"),
            Edit(f"{place}.{name}.init_args.weights", [], "that ratio holds the mismatch already"),
        )
    ]


SUPPORT = Sign(reads=("mismatch/k1", K3), look=whole_support, weight=0.5)
