"""A number is not finite: where it was born, and what it took along."""

import numpy as np

from rlstab.monitors._diagnosis_data import Edit, Explanation, Sighting, Sign, Trace

FORWARD = ("policy/entropy", "train/entropy", "mismatch/k3")
LOSSES = ("objective/loss", "train/loss")
GRADIENT = ("train/grad_norm",)


def _first_bad(trace: Trace) -> tuple[int, tuple[str, ...]]:
    """Return the first step at which a signal of the model, a loss or the gradient is not finite, and which are."""
    watched = [key for key in trace.curves if key in (*FORWARD, *LOSSES, *GRADIENT) or _is_term(key)]
    bad = {key: trace.curves[key].steps[~np.isfinite(trace.curves[key].values)] for key in watched}
    step = min((int(steps[0]) for steps in bad.values() if len(steps)), default=-1)
    return step, tuple(key for key, steps in bad.items() if len(steps) and steps[0] == step)


def _is_term(key: str) -> bool:
    return key.startswith("objective/") and key.endswith("/loss") and key.count("/") == 2


def _is_there(trace: Trace) -> Sighting:
    step, keys = _first_bad(trace)
    return Sighting(step >= 0, f"at step {step} these were not finite: {', '.join(keys)}", step)


def _born(trace: Trace) -> Sighting | None:
    """Say whether it came from the model's forward, from one term, or from the backward pass."""
    _, keys = _first_bad(trace)
    terms = [key.split("/")[1] for key in keys if _is_term(key)]
    if any(key in FORWARD for key in keys):
        return Sighting(True, "born in the forward pass of the model: its outputs were not finite before any loss")
    if terms:
        return Sighting(True, f"born in the loss of {', '.join(terms)}: the model's outputs were finite")
    if set(keys) & set(LOSSES):
        return Sighting(True, "born in the loss")
    return Sighting(True, "born in the backward pass: the loss of the same step was finite") if keys else None


def _where(trace: Trace) -> Sighting | None:
    """Take the module that a tracer named."""
    for event in trace.happenings:
        if event.kind == "not_finite" and "where" in event.fields:
            names = event.fields.get("names")
            which = ", ".join(map(str, names[:3])) if isinstance(names, list) else ""
            return Sighting(True, f"traced to the {event.fields['where']}: {which}")
    return None


def _edits(trace: Trace) -> list[Edit]:
    if trace.setting("trainer.fp16"):
        return [Edit("trainer.fp16", False, "its range ends at 65504"), Edit("trainer.bf16", True, "instead of fp16")]
    return []


EXPLANATION = Explanation(
    name="not_finite",
    title="A number became NaN or infinite",
    signs=(
        Sign(reads=(), look=_is_there, role="needed"),
        Sign(reads=(), look=_born, weight=0.5),
        Sign(reads=(), look=_where, weight=0.25),
    ),
    remedy=(
        "Go back to a checkpoint before that step and skip its batch. Born in the forward pass: look at the largest "
        "activations and at fp16. Born in a term: a log of 0 or a ratio that overflows. Born in the backward pass: a "
        "square root or norm at 0, or fp16's range."
    ),
    edits=_edits,
)
