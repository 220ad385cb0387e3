"""From the signals of a run to its cause: every explanation is tried, the most likely and earliest is named first."""

from __future__ import annotations

import pkgutil
from collections.abc import Sequence
from functools import cache
from importlib import import_module

import numpy as np

from rlstab.monitors import _causes
from rlstab.monitors._diagnosis_data import Claim, Diagnosis, Explanation, Happening, RunState, Sighting, Sign, Trace
from rlstab.monitors._diagnosis_harm import harm_of

LEAST = 0.5
"""Share of the evidence that an explanation must have to be claimed."""


@cache
def explanations() -> tuple[Explanation, ...]:
    """Return every cause that a diagnosis knows, in the order of their names.

    Each is one file of `rlstab/monitors/_causes`; adding a cause is adding a file with an `EXPLANATION`.

    Example:
        >>> "staleness" in [explanation.name for explanation in explanations()]
        True
    """
    names = sorted(entry.name for entry in pkgutil.iter_modules(_causes.__path__) if not entry.name.startswith("_"))
    modules = [import_module(f"{_causes.__name__}.{name}") for name in names]
    return tuple(explanation for module in modules for explanation in (vars(module)["EXPLANATION"],))


ROUTINE = frozenset({"evaluation", "weight_sync"})
"""Events that every healthy run is full of."""


def diagnose(trace: Trace) -> Diagnosis:
    """Say what is wrong with a run, and why.

    An explanation is claimed where all signs that it needs hold and at least half of its evidence, by weight, is there.
    Claims are ordered by how sure they are, in words, and then by which evidence came first: later troubles are mostly
    consequences.

    Args:
        trace: What the run left.

    Returns:
        The state of the run, the causes with their evidence, and what happened in which order.

    Example:
        >>> import numpy as np
        >>> from rlstab.monitors import Curve
        >>> loss = np.r_[np.zeros(10), np.nan]
        >>> diagnosis = diagnose(Trace(curves={"train/loss": Curve(np.arange(11), loss)}))
        >>> diagnosis.state, diagnosis.claims[0].name, diagnosis.claims[0].since
        ('collapsed', 'not_finite', 10)
    """
    claims: list[Claim] = []
    unexamined: dict[str, tuple[str, ...]] = {}
    with np.errstate(all="ignore"):  # a log may hold numbers of any size
        harm = harm_of(trace)
        for explanation in explanations():
            tried = _try(explanation, trace)
            if isinstance(tried, Claim):
                claims.append(tried)
            elif tried:
                unexamined[explanation.name] = tried
    claims.sort(key=lambda claim: (_RANKS[claim.words], claim.since, -claim.sure))
    return Diagnosis(
        state=_state(harm, claims),
        harm=harm,
        claims=tuple(claims),
        timeline=_timeline(trace.happenings, harm, claims),
        unexamined=unexamined,
    )


_RANKS = {"very likely": 0, "likely": 1, "possible": 2}


def _state(harm: Sequence[Sighting], claims: Sequence[Claim]) -> RunState:
    if harm:
        return "collapsed"
    return "warning" if claims else "healthy"


def _try(explanation: Explanation, trace: Trace) -> Claim | tuple[str, ...]:
    """Return the claim; else the signals without which the explanation cannot be looked at, if that is the reason."""
    seen = [(sign, sign.look(trace) if not sign.missing(trace) else None) for sign in explanation.signs]
    needed = [(sign, sight) for sign, sight in seen if sign.role == "needed"]
    if any(sight is not None and not sight.holds for sign, sight in seen if sign.role != "counts"):
        return ()
    if any(sight is None for _, sight in needed):
        return tuple(dict.fromkeys(key for sign, sight in needed if sight is None for key in sign.missing(trace)))
    held = [(sign, sight) for sign, sight in seen if sight is not None and sight.holds]
    against = [(sign, sight) for sign, sight in seen if sight is not None and not sight.holds]
    unread = [sign for sign, sight in seen if sight is None]
    sure = _weight(held) / (_weight(held) + _weight(against) + 0.5 * sum(sign.weight for sign in unread))
    if sure < LEAST:
        return ()
    return Claim(
        name=explanation.name,
        title=explanation.title,
        sure=sure,
        since=_since(needed),
        evidence=tuple(sight.says for _, sight in held),
        against=tuple(sight.says for _, sight in against),
        unread=tuple(dict.fromkeys(key for sign in unread for key in sign.missing(trace))),
        remedy=explanation.remedy,
        edits=tuple(edit for edit in explanation.edits(trace) if trace.setting(edit.key) != edit.value),
    )


def _weight(pairs: Sequence[tuple[Sign, Sighting]]) -> float:
    return sum(sign.weight for sign, _ in pairs)


def _since(needed: Sequence[tuple[Sign, Sighting | None]]) -> int:
    steps = [sight.since for _, sight in needed if sight is not None and sight.since is not None]
    return max(min(steps, default=0), 0)


def _timeline(
    happenings: Sequence[Happening], harm: Sequence[Sighting], claims: Sequence[Claim]
) -> tuple[tuple[int, str], ...]:
    rows = [(claim.since, f"{claim.title}: {claim.evidence[0]}") for claim in claims]
    rows += [(sight.since or 0, sight.says) for sight in harm]
    told = [event for event in happenings if event.step is not None and event.kind not in ROUTINE]
    rows += [(event.step or 0, _said(event)) for event in told]
    return tuple(sorted(rows, key=lambda row: row[0]))


def _said(event: Happening) -> str:
    match event.fields:
        case {"message": str(message)}:
            return f"{event.kind}: {message.removeprefix(f'step {event.step}: ')}"
        case {"keys": list(keys)}:
            return f"{event.kind}: {', '.join(map(str, keys))}"
    return event.kind
