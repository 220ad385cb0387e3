"""Single gradients are many times larger than the others, and are not clipped."""

from functools import partial

from torch import Tensor

from collapses._mode import MIDDLE, PLAIN, Fault, Mode


def spiked(step: int, gradient: Tensor, *, times: float, every: int) -> Tensor:
    return gradient * times if step >= MIDDLE and step % every == 0 else gradient


def spikes(times: float, every: int, *, learning_rate: float = 5e-4, clip: float = 1e9) -> Fault:
    changes = {**PLAIN, "trainer.max_grad_norm": clip, "trainer.learning_rate": learning_rate}
    return Fault(changes=changes, gradient=partial(spiked, times=times, every=every), onset=MIDDLE)


MODES = {
    "gradient_spike": Mode(
        cause="gradient_spike",
        faults=[spikes(30, 20, clip=1.0, learning_rate=2.5e-4), spikes(100, 10), spikes(300, 15), spikes(60, 10)],
    )
}
STUDIED = {
    "gradient_spike_studied": Mode(
        cause="gradient_spike",
        faults=[spikes(200, 12), spikes(80, 20), spikes(150, 15, learning_rate=2.5e-4), spikes(500, 30), spikes(40, 8)],
    )
}
