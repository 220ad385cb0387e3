"""The reward is won without doing the task: a proxy that leaks, or one that pays for length."""

from collapses._harms import skill_lost
from collapses._mode import PLAIN, Fault, Mode
from collapses._rewards import Leaking, LongerIsBetter


def leaking(leak: float) -> Fault:
    changes = {**PLAIN, "task.class_path": "HackableSort", "task.init_args.leak": leak}
    return Fault(changes=changes, rewards=lambda task, seed: [Leaking(task)])


def paid_by_length(size: float, longest: int) -> Fault:
    changes = {**PLAIN, "trainer.max_completion_length": longest}
    return Fault(changes=changes, rewards=lambda task, seed: [task.reward, LongerIsBetter(size)])


SIGNS = {
    "hacking_signs": Mode(
        cause="reward_hacking",
        harms=[skill_lost],
        faults=[leaking(leak) for leak in (0.75, 0.95, 0.7, 0.82, 0.88, 0.65)],
    ),
}
MODES = {
    "hacking": Mode(
        cause="reward_hacking", harms=[skill_lost], faults=[leaking(leak) for leak in (0.6, 0.85, 0.9, 0.8)]
    ),
    "length": Mode(
        cause="reward_hacking",
        harms=[skill_lost],
        faults=[paid_by_length(0.3, 16), paid_by_length(3.0, 16), paid_by_length(4.0, 12), paid_by_length(5.0, 16)],
    ),
}
