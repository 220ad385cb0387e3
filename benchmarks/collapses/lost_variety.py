"""Few prompts are learned by heart: entropy goes, and with it the variety of what is found."""

from collapses._harms import skill_lost, variety_lost
from collapses._mode import PLAIN, Fault, Mode


def few(prompts: int, learning_rate: float) -> Fault:
    return Fault(changes={**PLAIN, "prompts": prompts, "trainer.learning_rate": learning_rate})


STUDIED = {
    "entropy_studied": Mode(
        cause="entropy_collapse", harms=[skill_lost, variety_lost], faults=[few(10, 6e-4), few(5, 7e-4), few(16, 4e-4)]
    )
}
SIGNS = {
    "entropy_signs": Mode(
        cause="entropy_collapse",
        harms=[skill_lost, variety_lost],
        faults=[few(7, 9e-4), few(3, 7e-4), few(5, 1e-3), few(2, 6e-4), few(10, 9e-4), few(4, 9e-4)],
    ),
    "diversity_signs": Mode(cause="diversity_collapse", harms=[variety_lost], faults=[few(24, 3e-4), few(16, 4e-4)]),
}
MODES = {
    "entropy": Mode(
        cause="entropy_collapse",
        harms=[skill_lost, variety_lost],
        faults=[few(256, 1.5e-4), few(8, 5e-4), few(12, 5e-4), few(8, 7e-4), few(4, 6e-4), few(6, 8e-4)],
    ),
    "diversity": Mode(
        cause="diversity_collapse",
        harms=[variety_lost],
        faults=[few(512, 1e-4), few(32, 2e-4), few(64, 2e-4), few(48, 3e-4)],
    ),
}
