"""The policy finds fewer different answers, though its best one got better."""

from rlstab.monitors._causes._common import AGREEMENT, ENTROPY, chosen, lasting_fall
from rlstab.monitors._diagnosis_data import Edit, Explanation, Sighting, Sign, Trace

ONE, REWARD = "eval/pass@1", "train/reward"


def _widest(trace: Trace) -> str | None:
    """Return pass@k for the largest k that was measured."""
    keys = [key for key in trace.curves if key.startswith("eval/pass@") and key.removeprefix("eval/pass@").isdigit()]
    widest = max(keys, key=lambda key: int(key.removeprefix("eval/pass@")), default=ONE)
    return None if widest == ONE else widest


def _narrower(trace: Trace) -> Sighting | None:
    key = _widest(trace)
    if key is None or trace.first_of(key) is None:
        return None
    steps, values = trace.finite(key)
    errors = trace.finite(f"{key}_se").values
    error = float(2 * (errors[0] ** 2 + errors[-1] ** 2) ** 0.5) if len(errors) == len(values) else 0.0
    lost = float(values[0] - values[-1])
    below = steps[values < values[0] - max(error, 0.05)]
    return Sighting(
        lost > max(error, 0.05),
        f"{key} fell from {values[0]:.3g} to {values[-1]:.3g}",
        int(below[0]) if len(below) else None,
    )


def _not_worse(trace: Trace) -> Sighting:
    values = trace.finite(ONE).values
    held = values[-1] > values[0] - 0.02 and values[-1] > values.max() - 0.1
    return Sighting(bool(held), f"while pass@1 went from {values[0]:.3g} to {values[-1]:.3g}")


def _reward_holds(trace: Trace) -> Sighting:
    """See that the policy keeps what it found: one that loses it has another trouble."""
    fall = lasting_fall(trace, REWARD)
    if fall is None:
        return Sighting(True, f"the reward ends at {trace.end(REWARD):.3g} and never fell for good")
    return Sighting(False, f"the reward fell from {fall.best:.3g} to {fall.after:.3g}")


def _less_entropy(trace: Trace) -> Sighting:
    key = chosen(trace, ENTROPY)
    start, end = trace.start(key), trace.end(key)
    return Sighting(end < 0.6 * start, f"entropy fell from {start:.2g} to {end:.2g} nats/token")


def _edits(trace: Trace) -> list[Edit]:
    place, terms = trace.terms
    if not terms:
        return []
    keep = {"class_path": "ReverseKL", "init_args": {"coef": 0.1, "reference": "initial"}}
    return [Edit(f"{place}.drift", keep, "stay near the start, which still had the other answers")]


EXPLANATION = Explanation(
    name="diversity_collapse",
    title="The policy finds fewer different answers",
    signs=(
        Sign(reads=(ONE,), look=_narrower, role="needed"),
        Sign(reads=(ONE,), look=_not_worse, role="needed"),
        Sign(reads=(REWARD,), look=_reward_holds, role="veto"),
        AGREEMENT,
        Sign(reads=(ENTROPY,), look=_less_entropy),
    ),
    remedy=(
        "Hold the policy near its start (a KL to `initial`, or rehearsal of its correct answers), and use more prompts."
    ),
    edits=_edits,
)
