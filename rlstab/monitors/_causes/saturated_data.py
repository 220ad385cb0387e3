"""The prompts are solved before training begins."""

from rlstab.monitors._causes._common import AGREEMENT
from rlstab.monitors._diagnosis_data import Edit, Explanation, Sighting, Sign, Trace

ZERO, REWARD = "train/frac_reward_zero_std", "train/reward"


def _no_signal(trace: Trace) -> Sighting:
    share = trace.part(ZERO, 0.0, 0.25)
    return Sighting(share > 0.7, f"{share:.0%} of the groups have equal rewards, from the start on", 0)


def _solved(trace: Trace) -> Sighting:
    start, most = trace.part(REWARD, 0.0, 0.1), float(trace.finite(REWARD).values.max())
    return Sighting(start > 0.8 * most > 0, f"the reward began at {start:.3g}, its highest was {most:.3g}")


def _held_out_too(trace: Trace) -> Sighting:
    trained, held_out = trace.part(REWARD, 0.0, 0.1), trace.finite("eval/reward").values[0]
    return Sighting(held_out > 0.7 * trained, f"the held-out reward began at {held_out:.3g}")


def _edits(trace: Trace) -> list[Edit]:
    digits, limit = trace.setting("task.init_args.digits"), trace.setting("trainer.max_completion_length")
    if not isinstance(digits, int):
        return []
    harder = [Edit("task.init_args.digits", digits + 2, "a harder task")]
    room = Edit("trainer.max_completion_length", limit + 2, "room for its answers") if isinstance(limit, int) else None
    return [*harder, room] if room else harder


EXPLANATION = Explanation(
    name="saturated_data",
    title="The prompts are too easy: nothing is left to learn",
    signs=(
        Sign(reads=(ZERO,), look=_no_signal, role="needed"),
        Sign(reads=(REWARD,), look=_solved, role="needed"),
        Sign(reads=("eval/reward",), look=_held_out_too, role="veto"),
        AGREEMENT,
    ),
    remedy="Use harder prompts, or leave out those that are always solved.",
    edits=_edits,
)
