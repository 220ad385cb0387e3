"""The reference moves along with the policy, and so does not hold it."""

from rlstab.monitors._causes._common import AGREEMENT
from rlstab.monitors._diagnosis_data import Edit, Explanation, Sighting, Sign, Trace

START, MOVING = "drift/initial/kl", "drift/moving/kl|train/kl"
REWARD = "train/reward"


def _far(trace: Trace) -> Sighting:
    values = trace.finite(START).values
    since = trace.lasting(START, lambda far: far > 0.3, steps=2)
    return Sighting(since >= 0, f"the policy ends {values[-1]:.2g} nats/token from where it started", since)


def _near(trace: Trace) -> Sighting:
    key = trace.first_of(*MOVING.split("|")) or ""
    near, far = trace.end(key), trace.end(START)
    return Sighting(near < 0.5 * far, f"and only {near:.2g} from the reference that should hold it")


def _costs(trace: Trace) -> Sighting:
    key = trace.first_of("eval/pass@1", "eval/reward", REWARD) or ""
    best, last = (
        float(trace.finite(key).values.max()),
        trace.end(key) if key == REWARD else float(trace.finite(key).values[-1]),
    )
    return Sighting(last < best - 0.08 * abs(best), f"{key} fell from {best:.3g} to {last:.3g}")


def _edits(trace: Trace) -> list[Edit]:
    place, terms = trace.terms
    held = [
        Edit(f"{place}.{name}.init_args.reference", "initial", "a reference that stays")
        for name, term in terms.items()
        if isinstance(settings := term.get("init_args"), dict) and settings.get("reference") == "moving"
    ]
    return [*held, Edit("trainer.sync_ref_model", False, "nothing moves it any more")] if held else []


EXPLANATION = Explanation(
    name="reference_drift",
    title="The reference drifts along with the policy",
    signs=(
        Sign(reads=(START,), look=_far, role="needed"),
        Sign(reads=(MOVING, START), look=_near, role="needed"),
        Sign(reads=("eval/pass@1|eval/reward|train/reward",), look=_costs, role="needed"),
        AGREEMENT,
    ),
    remedy="Compare with the start (`reference: initial`), or move the reference more slowly and reset it on purpose.",
    edits=_edits,
)
