"""Trainer and sampler see different prompts: another chat template, a token lost or added, another truncation."""

from rlstab.monitors._causes import _mismatch
from rlstab.monitors._diagnosis_data import Explanation, Sighting, Sign, Trace

K3 = _mismatch.K3


def _huge_at_first(trace: Trace) -> Sighting:
    began = _mismatch.first(trace)
    step = int(trace.finite(K3).steps[0])
    return Sighting(began >= 1.0, f"k3 was {began:.2g} nats/token at the first step: no rounding does that", step)


def _most_tokens(trace: Trace) -> Sighting:
    share = trace.start("mismatch/f2")
    return Sighting(share >= 0.3, f"{share:.0%} of the tokens differ by more than a factor of 2")


def _policy_is_better(trace: Trace) -> Sighting:
    sampled, own = trace.start("train/reward"), trace.start("eval/reward")
    return Sighting(own > sampled + 0.1, f"the policy scores {own:.2g} on its own, its sampler {sampled:.2g}")


EXPLANATION = Explanation(
    name="template",
    title="Trainer and sampler see different prompts",
    signs=(
        Sign(reads=(K3,), look=_huge_at_first, role="needed"),
        Sign(reads=("mismatch/f2",), look=_most_tokens, weight=2.0),
        Sign(reads=("eval/reward", "train/reward"), look=_policy_is_better, weight=0.5),
    ),
    remedy=(
        "Compare the token ids of one prompt on both sides: chat template, special tokens at the start, truncation, "
        "system prompt. No setting of the loss repairs this."
    ),
)
