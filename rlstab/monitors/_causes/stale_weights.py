"""The sampler does not take new weights at all."""

from rlstab.monitors._causes import _mismatch
from rlstab.monitors._diagnosis_data import Explanation, Sighting, Sign, Trace

K1, K3 = "mismatch/k1", _mismatch.K3


def _samples_stand_still(trace: Trace) -> Sighting:
    return _mismatch.opposite(_mismatch.sampled_reward_moves(trace))


def _as_far_as_the_start(trace: Trace) -> Sighting:
    far, start = trace.end(K1), trace.end("drift/initial/kl")
    says = f"at the end the policy was {far:.2g} nats/token from its sampler and {start:.2g} from its start"
    return Sighting(0.4 * start < far, says)


EXPLANATION = Explanation(
    name="stale_weights",
    title="The sampler's weights are not updated",
    signs=(
        Sign(reads=(K3,), look=lambda trace: _mismatch.differs(trace, 0.05), role="needed"),
        Sign(reads=(K3,), look=_mismatch.agreed_at_first, role="needed"),
        Sign(reads=(K1,), look=_mismatch.growth, role="needed"),
        Sign(reads=("train/reward",), look=_samples_stand_still),
        Sign(reads=(K1, "drift/initial/kl"), look=_as_far_as_the_start),
    ),
    remedy=(
        "Look whether the weight sync reaches the engine: the version of its weights must rise with every update. No "
        "setting of the loss repairs this."
    ),
)
