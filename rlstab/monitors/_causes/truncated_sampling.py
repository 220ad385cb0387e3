"""The sampler draws from fewer tokens than the policy has (top-p, top-k, min-p)."""

import numpy as np

from rlstab.monitors._causes import _mismatch
from rlstab.monitors._diagnosis_data import Edit, Explanation, Sighting, Sign, Trace

K1, K3 = "mismatch/k1", _mismatch.K3
NEUTRAL = {"top_p": 1.0, "top_k": 0, "min_p": None}


def _mass_is_missing(trace: Trace) -> Sighting:
    missing, size = _mismatch.missing_mass(trace), _mismatch.level(trace)
    says = f"mean ratio of trainer to sampler {1 - missing:.3f}: {missing:.1%} of the policy's mass is never sampled"
    return Sighting(missing > max(0.01, size), says, int(trace.finite(K3).steps[0]))


def _at_every_step(trace: Trace) -> Sighting:
    positive = float(np.mean(trace.finite(K1).values > 0))
    return Sighting(
        positive > 0.9, f"the sampler's log-probs are higher than the trainer's in {positive:.0%} of the steps"
    )


def _bounded(trace: Trace) -> Sighting:
    largest = float(trace.finite("mismatch/max_abs").values.max())
    missing = _mismatch.missing_mass(trace)
    return Sighting(
        largest < max(1.0, 10 * missing),
        f"no token differs by more than {largest:.2g} nats, as where a tail is cut off",
    )


def _edits(trace: Trace) -> list[Edit]:
    set_here = {name: trace.setting(f"trainer.{name}") for name in NEUTRAL}
    return [
        Edit(f"trainer.{name}", NEUTRAL[name], "sample from the whole policy")
        for name, value in set_here.items()
        if value is not None and value != NEUTRAL[name]
    ]


EXPLANATION = Explanation(
    name="truncated_sampling",
    title="The sampler cuts off part of the policy",
    signs=(
        Sign(reads=(K1, K3), look=_mass_is_missing, role="needed"),
        Sign(reads=(K1,), look=_at_every_step, role="needed"),
        Sign(reads=("mismatch/max_abs",), look=_bounded),
    ),
    remedy=(
        "Sample with top_p = 1, top_k and min_p off. Importance weights cannot make up for tokens that are never "
        "drawn: nothing pushes them down."
    ),
    edits=_edits,
)
