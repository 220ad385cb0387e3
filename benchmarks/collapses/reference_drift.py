"""The reward says nothing, and the reference that should hold the policy follows it."""

from collapses._harms import skill_lost
from collapses._mode import Fault, Mode
from collapses._rewards import Coin
from collapses.healthy import moving_reference


def wandering(learning_rate: float) -> Fault:
    changes = {**moving_reference, "trainer.learning_rate": learning_rate}
    return Fault(changes=changes, rewards=lambda task, seed: [Coin(seed)])


SIGNS = {
    "reference_drift_signs": Mode(
        cause="reference_drift",
        harms=[skill_lost],
        faults=[wandering(rate) for rate in (7e-4, 9e-4, 1e-3, 6.5e-4, 7.5e-4)],
    )
}
MODES = {
    "reference_drift": Mode(
        cause="reference_drift", harms=[skill_lost], faults=[wandering(6e-4), wandering(5e-4), wandering(8e-4)]
    )
}
