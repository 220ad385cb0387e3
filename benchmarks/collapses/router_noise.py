"""The engine's routers choose other experts than the trainer's."""

from functools import partial

from collapses._engine import noisy_routers
from collapses._harms import reward_lost, sampler_worse, skill_lost
from collapses._mode import PLAIN, Fault, Mode


def noisy(size: float, learning_rate: float = 2.5e-4) -> Fault:
    changes = {**PLAIN, "model.init_args.experts": 8, "trainer.learning_rate": learning_rate}
    return Fault(changes=changes, engine={"routes": True, "change": partial(noisy_routers, size=size)})


SIGNS = {
    "router_signs": Mode(
        cause="router_drift",
        harms=[reward_lost, skill_lost, sampler_worse],
        faults=[noisy(2.0, 5e-4), noisy(2.5), noisy(3.5, 6e-4), noisy(5.0, 3.5e-4), noisy(2.0, 7e-4), noisy(6.0, 4e-4)],
    )
}
MODES = {
    "router": Mode(
        cause="router_drift",
        harms=[reward_lost, skill_lost, sampler_worse],
        faults=[noisy(0.1), noisy(1.0), noisy(1.5), noisy(1.0, 5e-4), noisy(3.0, 5e-4), noisy(4.0)],
    )
}
