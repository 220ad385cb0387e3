"""The sampler is a constant number of updates behind."""

from rlstab.monitors._causes import _mismatch
from rlstab.monitors._diagnosis_data import Edit, Explanation, Sighting, Sign, Trace

K1, K3 = "mismatch/k1", _mismatch.K3


def _levels_off(trace: Trace) -> Sighting:
    return _mismatch.opposite(_mismatch.growth(trace))


def _edits(trace: Trace) -> list[Edit]:
    generations = trace.setting("trainer.steps_per_generation")
    fresh = [Edit("trainer.steps_per_generation", 1, "sample anew for every update")] if generations != 1 else []
    return [*_mismatch.clip_by_behaviour(trace), *fresh]


EXPLANATION = Explanation(
    name="staleness",
    title="The sampler lags behind the trainer",
    signs=(
        Sign(reads=(K3,), look=lambda trace: _mismatch.differs(trace, 0.05), role="needed"),
        Sign(reads=(K3,), look=_mismatch.agreed_at_first, role="needed"),
        Sign(reads=(K1,), look=_levels_off, role="needed"),
        Sign(reads=("train/reward",), look=_mismatch.sampled_reward_moves, weight=0.5),
        _mismatch.SUPPORT,
    ),
    remedy=(
        "Sync the sampler's weights more often or allow fewer updates per generation; clip against the log-probs of "
        "the policy that sampled. Weights that truncate or mask only delay the fall, and clipping like this harms "
        "where the mismatch is static."
    ),
    edits=_edits,
)
