"""The learning rate is too high."""

from collapses._mode import PLAIN, Fault, Mode


def rates(*values: float) -> Mode:
    return Mode(
        cause="learning_rate",
        faults=[Fault(changes={**PLAIN, "trainer.learning_rate": rate}) for rate in values],
    )


MODES = {"learning_rate": rates(4e-4, 1.2e-3, 1e-3, 2e-3)}
STUDIED = {"learning_rate_studied": rates(8e-4, 1.5e-3, 3e-3, 6e-4, 2.5e-3)}
STUDIED_AGAIN = {"learning_rate_closer": rates(7e-4, 9e-4, 1.1e-3, 1.3e-3)}
SMALL = {"learning_rate_small": rates(1.4e-3, 1.7e-3, 1.2e-3, 1.2e-3, 1.6e-3)}
