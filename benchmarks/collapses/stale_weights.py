"""The weight sync does not reach the sampler: it samples with the first weights for ever."""

from collapses._mode import PLAIN, Fault, Mode


def never(learning_rate: float) -> Fault:
    return Fault(changes={**PLAIN, "trainer.learning_rate": learning_rate}, engine={"every": 10**6})


MODES = {"stale_weights": Mode(cause="stale_weights", faults=[never(5e-5), never(2.5e-4), never(3.5e-4), never(5e-4)])}
STUDIED_AGAIN = {"stale_weights_studied": Mode(cause="stale_weights", faults=[never(2e-4), never(4.5e-4)])}
