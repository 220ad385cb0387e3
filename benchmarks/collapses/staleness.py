"""The sampler's weights are a constant number of updates old."""

from collapses._mode import PLAIN, Fault, Mode


def lagging(lag: int, learning_rate: float) -> Fault:
    return Fault(changes={**PLAIN, "trainer.learning_rate": learning_rate}, engine={"lag": lag})


STUDIED = {"staleness_studied": Mode(cause="staleness", faults=[lagging(10, 4.5e-4), lagging(6, 6e-4)])}
STUDIED_AGAIN = {"staleness_closer": Mode(cause="staleness", faults=[lagging(5, 7e-4), lagging(16, 3e-4)])}
MODES = {
    "staleness": Mode(
        cause="staleness", faults=[lagging(2, 1.5e-4), lagging(8, 4e-4), lagging(8, 5e-4), lagging(12, 4e-4)]
    )
}
