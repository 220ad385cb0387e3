"""Trainer and sampler choose different experts for the same token."""

from rlstab.monitors._causes import _mismatch
from rlstab.monitors._causes._common import chosen
from rlstab.monitors._diagnosis_data import Edit, Explanation, Sighting, Sign, Trace

K3 = _mismatch.K3
FLIPS = "routes/flip_share|routes/own_flip_share"
SOME = 0.02
"""Share of flipped (token, layer) pairs from which on routes are a matter: bf16 alone gives a few in a thousand."""


def _flips(trace: Trace) -> Sighting:
    key = chosen(trace, FLIPS)
    since = trace.lasting(key, lambda share: share > SOME)
    return Sighting(since >= 0, f"{trace.part(key, 0.1, 1.0):.1%} of the (token, layer) pairs run other experts", since)


def _where_routes_flip(trace: Trace) -> Sighting:
    flipped, agreeing = trace.part("routes/k3_flipped", 0.1, 1.0), trace.part("routes/k3_agreeing", 0.1, 1.0)
    says = f"k3 is {flipped:.2g} on tokens whose routes flip and {agreeing:.2g} on those whose routes agree"
    return Sighting(flipped > 3 * agreeing, says)


def _not_replayed(trace: Trace) -> Sighting:
    replay = trace.setting("replay")
    return Sighting(replay is None, f"replay is {replay or 'off'}")


def _edits(trace: Trace) -> list[Edit]:
    if trace.setting("engine") is None or trace.setting("replay") is not None:
        return []
    return [
        Edit("replay", "R3", "the trainer takes the experts that the engine took"),
        Edit("engine.init_args.routes", True, "the engine returns them"),
    ]


EXPLANATION = Explanation(
    name="router_drift",
    title="Trainer and sampler choose different experts",
    signs=(
        Sign(reads=(K3,), look=lambda trace: _mismatch.differs(trace, _mismatch.LOOK), role="needed"),
        Sign(reads=(FLIPS,), look=_flips, role="needed"),
        Sign(reads=("routes/k3_flipped", "routes/k3_agreeing"), look=_where_routes_flip),
        Sign(reads=(FLIPS,), look=_not_replayed, weight=0.5),
    ),
    remedy=(
        "Replay the engine's routes in the trainer (R3); where only the trainer's own updates move the routers, R2 or "
        "RSPO."
    ),
    edits=_edits,
)
