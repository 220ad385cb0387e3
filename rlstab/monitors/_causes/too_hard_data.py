"""The prompts are never solved, so that no group teaches anything."""

from rlstab.monitors._causes._common import AGREEMENT
from rlstab.monitors._diagnosis_data import Edit, Explanation, Sighting, Sign, Trace

ZERO, REWARD = "train/frac_reward_zero_std", "train/reward"


def _no_signal(trace: Trace) -> Sighting:
    share = trace.part(ZERO, 0.0, 0.25)
    return Sighting(share > 0.7, f"{share:.0%} of the groups have equal rewards, from the start on", 0)


def _unsolved(trace: Trace) -> Sighting:
    begin = trace.finite(REWARD).values
    begin = begin[: max(3, len(begin) // 20)]
    return Sighting(float(begin.max()) < 0.1, f"the mean reward of the first steps was at most {begin.max():.3g}")


def _held_out_too(trace: Trace) -> Sighting:
    held_out = float(trace.finite("eval/reward").values[0])
    return Sighting(held_out < 0.1, f"the held-out reward began at {held_out:.3g}")


def _never(trace: Trace) -> Sighting:
    most = float(trace.finite(REWARD).values.max())
    return Sighting(most < 0.2, f"the highest reward of a step was {most:.3g}")


def _edits(trace: Trace) -> list[Edit]:
    steps, digits = trace.setting("warmup.steps"), trace.setting("task.init_args.digits")
    if isinstance(steps, int) and steps < 300:
        return [Edit("warmup.steps", 300, "a start that solves some of the prompts")]
    return (
        [Edit("task.init_args.digits", digits - 2, "an easier task")] if isinstance(digits, int) and digits > 3 else []
    )


EXPLANATION = Explanation(
    name="too_hard_data",
    title="The prompts are too hard: no completion is ever right",
    signs=(
        Sign(reads=(ZERO,), look=_no_signal, role="needed"),
        Sign(reads=(REWARD,), look=_unsolved, role="needed"),
        Sign(reads=("eval/reward",), look=_held_out_too, role="veto"),
        AGREEMENT,
        Sign(reads=(REWARD,), look=_never),
    ),
    remedy="Use easier prompts, more completions per prompt, a better start, or a reward that is given in parts.",
    edits=_edits,
)
