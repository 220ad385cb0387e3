"""Which runs there are: four sets that thresholds may be chosen on, the one that they are judged on, and guarded ones.

The final set differs from the tuning set in seed, task, depth of the model and strength of the fault, and from the
studied one, which looks closer at modes that are hard to tell apart, and those of signs and of openings, which look for
early ones, in seed, model and strength. It is made in rounds, each with every mode and with controls, so that what is
there after any round is balanced.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from collapses import (
    dead_reward,
    engine_mismatch,
    gradient_spike,
    healthy,
    learning_rate,
    lost_variety,
    not_finite,
    reference_drift,
    reward_hacking,
    router_noise,
    stale_weights,
    staleness,
    useless_data,
)
from collapses._mode import Mode
from collapses._run import Setting

JUDGED: dict[str, Mode] = {
    **healthy.MODES,
    **staleness.MODES,
    **stale_weights.MODES,
    **engine_mismatch.MODES,
    **router_noise.MODES,
    **learning_rate.MODES,
    **gradient_spike.MODES,
    **lost_variety.MODES,
    **reward_hacking.MODES,
    **useless_data.MODES,
    **not_finite.MODES,
    **dead_reward.MODES,
    **reference_drift.MODES,
}
STUDIED: dict[str, Mode] = {
    **learning_rate.STUDIED,
    **gradient_spike.STUDIED,
    **engine_mismatch.STUDIED,
    **lost_variety.STUDIED,
    **staleness.STUDIED,
}
"""Modes that are hard to tell apart, at further strengths."""
STUDIED_AGAIN: dict[str, Mode] = {
    **engine_mismatch.STUDIED_AGAIN,
    **learning_rate.STUDIED_AGAIN,
    **stale_weights.STUDIED_AGAIN,
    **staleness.STUDIED_AGAIN,
}
"""What was studied after that, each mode beginning with another model."""
SIGNS: dict[str, Mode] = {
    **healthy.SIGNS,
    **lost_variety.SIGNS,
    **reward_hacking.SIGNS,
    **reference_drift.SIGNS,
    **router_noise.SIGNS,
}
"""Modes whose early signs were looked for, and controls."""
OPENING_STEPS = 120
"""Steps of a run that shows how a mode begins."""
OPENING: dict[str, Mode] = {
    name.removesuffix("_signs").removesuffix("_studied") + "_opening": replace(
        mode,
        faults=[replace(fault, changes={**fault.changes, "trainer.max_steps": OPENING_STEPS}) for fault in mode.faults],
    )
    for name, mode in (
        *healthy.OPENING.items(),
        *((name, mode) for name, mode in SIGNS.items() if not mode.control and name != "diversity_signs"),
        *gradient_spike.STUDIED.items(),
        *stale_weights.STUDIED_AGAIN.items(),
        *engine_mismatch.STUDIED_AGAIN.items(),
        *learning_rate.STUDIED_AGAIN.items(),
    )
}
MODES = {**JUDGED, **STUDIED, **STUDIED_AGAIN, **learning_rate.SMALL, **SIGNS, **OPENING}
ROUNDS, CONTROLS, FIRST_SEED = 17, 5, 100
JUDGED_BEFORE = 7
"""Rounds that had been judged when the rules were chosen for the last time."""
FIRST_UNSEEN = FIRST_SEED + JUDGED_BEFORE
"""Seed of the first round that had not."""
WARNED_OF = (
    *("staleness", "learning_rate", "gradient_spike", "stale_weights", "engine_precision"),
    *("entropy", "hacking", "length", "saturated", "router"),
)
"""The modes of early warnings."""
DIAGNOSED = ("nan_backward", "nan_forward", "dead_reward", "reference_drift")
"""Further modes, for the diagnosis."""
NOW_AND_THEN = ("too_hard", "truncated_sampling", "template", "diversity")
"""And those of which few are made."""


def _tuning() -> Iterator[Setting]:
    for strength in (1, 0):
        for name, mode in JUDGED.items():
            task = "countdown" if name == "diversity" else "sort5"
            if strength < len(mode.faults):
                yield Setting(mode=name, strength=strength, task=task, hidden=64, layers=2, seed=strength)


def _studied() -> Iterator[Setting]:
    """Every strength of the modes that are hard to tell apart, in turn, with controls between them."""
    kinds = ["healthy", "healthy_short_lag", "healthy_two_updates", "healthy_moving", "healthy_recipe"]
    for strength, control in enumerate(kinds):
        names = [*(name for name, mode in STUDIED.items() if strength < len(mode.faults)), control]
        for turn, name in enumerate(names, start=strength):
            task, hidden, layers = (("sort4", 48, 2), ("sort3", 64, 2), ("sort5", 64, 1))[turn % 3]
            at = 0 if name == control else strength
            yield Setting(mode=name, strength=at, task=task, hidden=hidden, layers=layers, seed=10 + strength)


def _studied_again() -> Iterator[Setting]:
    models = (("sort4", 48, 1), ("sort3", 64, 1), ("sort5", 64, 1), ("sort4", 48, 2), ("sort3", 48, 2))
    for turn, (name, mode) in enumerate(STUDIED_AGAIN.items()):
        for strength in range(len(mode.faults)):
            task, hidden, layers = models[(turn + strength) % len(models)]
            yield Setting(mode=name, strength=strength, task=task, hidden=hidden, layers=layers, seed=20 + strength)
    small = (("sort4", 48), ("sort3", 64), ("sort4", 80), ("sort3", 32), ("sort5", 48))
    for strength, (task, hidden) in enumerate(small):
        yield Setting(
            mode="learning_rate_small", strength=strength, task=task, hidden=hidden, layers=1, seed=30 + strength
        )


def _signs() -> Iterator[Setting]:
    """Every strength of the modes with few early signs, and as many controls, on all tasks."""
    models = (
        ("sort4", 48, 1),
        ("sort3", 64, 1),
        ("sort5", 56, 1),
        ("sort4", 80, 1),
        ("sort3", 40, 1),
        ("sort4", 56, 2),
    )
    for strength in range(8):
        for turn, (name, mode) in enumerate(SIGNS.items()):
            for seed in (40, 50) if mode.control else (40,):
                task, hidden, layers = models[(2 * turn + strength + seed // 10) % len(models)]
                if name == "diversity_signs":
                    task, hidden, layers = "countdown", 64, 2
                if strength < len(mode.faults):
                    yield Setting(
                        mode=name, strength=strength, task=task, hidden=hidden, layers=layers, seed=seed + strength
                    )


def _opening() -> Iterator[Setting]:
    """The beginnings of what was looked at before, of other policies, with as many controls."""
    models = (
        ("sort5", 56, 1),
        ("sort3", 40, 1),
        ("sort4", 80, 1),
        ("sort3", 64, 1),
        ("sort4", 56, 2),
        ("sort4", 48, 1),
    )
    for round_ in range(4):
        for strength in range(16):
            for turn, (name, mode) in enumerate(OPENING.items()):
                task, hidden, layers = models[(turn + strength + 2 * round_) % len(models)]
                if strength < len(mode.faults):
                    seed = 60 + 10 * round_ + strength % 10
                    yield Setting(mode=name, strength=strength, task=task, hidden=hidden, layers=layers, seed=seed)


def _final() -> Iterator[Setting]:
    kinds = list(healthy.MODES)
    for round_ in range(ROUNDS):
        controls = [kinds[at % len(kinds)] for at in range(CONTROLS * round_, CONTROLS * (round_ + 1))]
        rare = NOW_AND_THEN if round_ % 7 in (2, 5) else ()
        further = DIAGNOSED if round_ > 0 else ()
        for place, name in enumerate((*WARNED_OF, *controls, *further, *rare)):
            if name in not_finite.MODES and round_ >= JUDGED_BEFORE:
                continue  # one is like the other
            yield _chosen(name, round_, round_ + place, survivable=False)
        for name in WARNED_OF[2 * (round_ % 7) :][:2]:
            yield _chosen(name, round_, round_, survivable=True)


def _chosen(name: str, round_: int, turn: int, *, survivable: bool) -> Setting:
    """A run of a mode: a fault that was not tuned on, or the weakest one."""
    faults, seed = MODES[name].faults, FIRST_SEED + round_
    strength = 0 if survivable or len(faults) == 1 else 2 + turn % (len(faults) - 2)
    if name == "diversity":
        return Setting(mode=name, strength=strength, task="countdown", hidden=48, layers=2, seed=seed)
    task, hidden = ("sort3", 48) if turn % 3 == 2 else ("sort4", 64)
    return Setting(mode=name, strength=strength, task=task, hidden=hidden, layers=1, seed=seed)


def _guarded() -> Iterator[Setting]:
    """The first run of each mode of early warnings, and the first two unseen ones, once more, with the guard on.

    The last of the three was made after the guard's rules were chosen, which the first two had shown to be too late.
    """
    for first in (FIRST_SEED, FIRST_UNSEEN, FIRST_UNSEEN + 1):
        modes = set(WARNED_OF)
        for setting in _final():
            if setting.mode in modes and setting.strength > 0 and setting.seed >= first:
                modes.remove(setting.mode)
                yield replace(setting, guarded=True)


SETS = {
    "tuning": tuple(_tuning()),
    "studied": (*_studied(), *_studied_again()),
    "signs": tuple(_signs()),
    "opening": tuple(_opening()),
    "final": tuple(_final()),
    "guarded": tuple(_guarded()),
}
