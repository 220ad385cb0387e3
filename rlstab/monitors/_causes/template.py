"""Trainer and sampler see different prompts: another chat template, a token lost or added, another truncation."""

from rlstab.monitors._causes import _mismatch
from rlstab.monitors._diagnosis_data import Explanation, Sighting, Sign, Trace

K3 = _mismatch.K3


def _policy_is_better(trace: Trace) -> Sighting:
    sampled, own = trace.start("train/reward"), trace.start("eval/reward")
    return Sighting(own > sampled + 0.1, f"the policy scores {own:.2g} on its own, its sampler {sampled:.2g}")


EXPLANATION = Explanation(
    name="template",
    title="Trainer and sampler see different prompts",
    signs=(
        Sign(reads=(K3,), look=_mismatch.differed_at_first, role="needed"),
        Sign(reads=(K3,), look=_mismatch.another_prompt, role="needed"),
        Sign(reads=("eval/reward", "train/reward"), look=_policy_is_better, weight=0.5),
    ),
    remedy=(
        "Compare the token ids of one prompt on both sides: chat template, special tokens at the start, truncation, "
        "system prompt. No setting of the loss repairs this."
    ),
)
