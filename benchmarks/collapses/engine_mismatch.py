"""The engine computes another distribution than the trainer believes: precision, a cut-off tail, another prompt."""

from functools import partial

from collapses._engine import quantised
from collapses._harms import reward_lost, sampler_worse, skill_lost
from collapses._mode import PLAIN, Fault, Mode


def coarse(bits: int, learning_rate: float) -> Fault:
    changes = {**PLAIN, "trainer.learning_rate": learning_rate}
    return Fault(changes=changes, engine={"change": partial(quantised, bits=bits)})


def coarser(*faults: Fault) -> Mode:
    return Mode(cause="engine_precision", harms=[reward_lost, skill_lost, sampler_worse], faults=faults)


def prefixed(*prefixes: tuple[str, ...]) -> Mode:
    return Mode(cause="template", faults=[Fault(changes=PLAIN, engine={"prefix": prefix}) for prefix in prefixes])


STUDIED = {
    "engine_precision_studied": coarser(coarse(2, 3e-4), coarse(3, 7e-4), coarse(2, 8e-4), coarse(4, 1e-3)),
}
STUDIED_AGAIN = {"template_studied": prefixed(("=",), ("=", "0"), ("7",), ("3", "="))}
MODES = {
    "engine_precision": coarser(
        coarse(5, 2e-4), coarse(3, 8e-4), coarse(3, 6e-4), coarse(3, 1e-3), coarse(3, 1.5e-3), coarse(2, 5e-4)
    ),
    "truncated_sampling": Mode(
        cause="truncated_sampling",
        faults=[Fault(changes=PLAIN, engine={"top_p": top_p}) for top_p in (0.9, 0.7, 0.6)],
    ),
    "template": prefixed(("=",), ("=", "0"), ("0", "=")),
}
