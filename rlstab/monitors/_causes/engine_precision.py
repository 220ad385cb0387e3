"""The engine computes with other numbers than the trainer: another dtype, quantised weights, another kernel."""

from rlstab.monitors._causes import _mismatch
from rlstab.monitors._causes._common import slower
from rlstab.monitors._diagnosis_data import Edit, Explanation, Sighting, Sign, Trace

K3 = _mismatch.K3


def _same_prompt(trace: Trace) -> Sighting:
    return _mismatch.opposite(_mismatch.another_prompt(trace))


def _rare(trace: Trace) -> Sighting:
    share = trace.start("mismatch/f2")
    return Sighting(share < 0.3, f"{share:.1%} of the tokens differ by more than a factor of 2")


def _same_experts(trace: Trace) -> Sighting:
    share = trace.part("routes/own_flip_share", 0.1, 1.0)
    return Sighting(share < 0.1, f"{share:.1%} of the (token, layer) pairs have other experts on both sides")


def _edits(trace: Trace) -> list[Edit]:
    if trace.setting("engine.init_args.dtype") is not None:
        return [Edit("engine.init_args.dtype", None, "sample in the trainer's precision")]
    return slower(trace, 4)


EXPLANATION = Explanation(
    name="engine_precision",
    title="The engine computes in another precision than the trainer",
    signs=(
        Sign(reads=(K3,), look=lambda trace: _mismatch.differs(trace, _mismatch.LOOK), role="needed"),
        Sign(reads=(K3,), look=_mismatch.differed_at_first, role="needed"),
        Sign(reads=(K3,), look=_same_prompt, role="needed"),
        Sign(reads=("mismatch/k1", K3), look=_mismatch.whole_support, role="needed"),
        Sign(reads=("mismatch/f2",), look=_rare),
        Sign(reads=("routes/own_flip_share",), look=_same_experts, role="veto"),
    ),
    remedy=(
        "Give the engine the trainer's dtype (weights, KV cache and the LM head in the same precision) or leave "
        "quantisation out; lower the learning rate. Do not clip against the engine's log-probs: under a static "
        "mismatch that causes a collapse of its own."
    ),
    edits=_edits,
)
