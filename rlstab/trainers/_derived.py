"""Signals that follow from others: laws that a run is held against, and trends towards a bound."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from rlstab.losses import EntropyLaw
from rlstab.monitors import Crossing, HeldOutGap, RewardKLLaw, Surprise

__all__ = ["BOUNDS", "Bound", "Derived"]

ENTROPY, REWARD, SPREAD, KL = "policy/entropy", "train/reward", "train/reward_std", "drift/initial/kl"
HELD_OUT = "eval/reward"


class Bound(NamedTuple):
    """What a signal must not cross, and from where it comes.

    Args:
        value: the bound.
        rising: whether the signal comes from below.
        every_step: whether its trend is looked at at every step, and not only when one looks into the model.
    """

    value: float
    rising: bool = True
    every_step: bool = False

    def crossing(self) -> Crossing:
        """The trend towards it; what comes with every step has more noise in the same number of values."""
        window, least = (40, 15) if self.every_step else (20, 8)
        return Crossing(bound=self.value, rising=self.rising, window=window, least=least)


BOUNDS = {
    "attention/logit_max": Bound(1e4),
    "activation/rms": Bound(1e4),
    ENTROPY: Bound(0.02, rising=False, every_step=True),
}
"""Attention logits diverge about there; fp16 ends at 65504, which the largest of many activations meets before their
root mean square does; at an entropy of 0.02 nats the likeliest token has about 0.997 of the probability."""


class Derived:
    """What the numbers of a run say together; plain arithmetic on the host, the same on all ranks."""

    def __init__(self) -> None:
        self._law = EntropyLaw()
        self._price = RewardKLLaw()
        self._gap = HeldOutGap()
        self._surprise = Surprise()
        self._crossings = {key: bound.crossing() for key, bound in BOUNDS.items()}
        self._rewards: list[float] = []
        self._leading: set[str] = set()

    def update(self, step: int, values: Mapping[str, float], *, turn: bool) -> dict[str, float]:
        """Take the numbers of a step.

        Args:
            step: which one.
            values: by schema key.
            turn: whether it is one of the steps at which trends are looked at.

        Returns:
            What follows from them, by schema key; what is not known yet is absent.
        """
        if REWARD in values and SPREAD in values:
            self._gap.observe(values[REWARD], values[SPREAD])
        found = self._of_entropy(values) | self._of_distance(values) | self._of_start(values)
        for key, crossing in self._crossings.items():
            if key in values and (turn or BOUNDS[key].every_step):
                found |= self._forecast(key, crossing.observe(step, values[key]))
        return found

    def _forecast(self, key: str, left: float | None) -> dict[str, float]:
        """What a trend foretells; infinity, once, where it no longer leads to the bound."""
        led = key in self._leading
        (self._leading.discard if left is None else self._leading.add)(key)
        return {} if left is None and not led else {f"forecast/{key}": math.inf if left is None else left}

    def examined(self, values: Mapping[str, float]) -> dict[str, float]:
        """Take the numbers of an evaluation; what follows from them and the steps before."""
        gap = self._gap.examine(values[HELD_OUT]) if HELD_OUT in values else None
        return {} if gap is None else {"eval/reward_gap": gap}

    def _of_entropy(self, values: Mapping[str, float]) -> dict[str, float]:
        if ENTROPY not in values or REWARD not in values:
            return {}
        self._law.observe(values[ENTROPY], values[REWARD])
        if not self._law.fitted:
            return {}
        headroom = self._law.ceiling - values[REWARD]
        return {
            "law/ceiling": self._law.ceiling,
            "law/headroom": headroom,
            "law/explained": self._law.explained,
            "law/residual": self._law.residual(values[ENTROPY], values[REWARD]),
        }

    def _of_distance(self, values: Mapping[str, float]) -> dict[str, float]:
        """The reward of a measurement is the mean since the one before: that of one step is noise."""
        if REWARD in values and math.isfinite(values[REWARD]):
            self._rewards.append(values[REWARD])
        if KL not in values or not self._rewards:
            return {}
        reward, self._rewards = sum(self._rewards) / len(self._rewards), []
        self._price.observe(values[KL], reward)
        slope = self._price.slope
        return {} if math.isnan(slope) else {"law/reward_per_sqrt_kl": slope}

    def _of_start(self, values: Mapping[str, float]) -> dict[str, float]:
        self._surprise.observe(values.get(ENTROPY, math.nan), kl=values.get(KL, math.nan))
        surprise = self._surprise.value
        return {} if ENTROPY not in values or math.isnan(surprise) else {"drift/initial/surprise": surprise}

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint has to hold."""
        return {
            "law": self._law.state_dict(),
            "price": self._price.state_dict(),
            "gap": self._gap.state_dict(),
            "surprise": self._surprise.state_dict(),
            "crossings": {key: crossing.state_dict() for key, crossing in self._crossings.items()},
            "rewards": list(self._rewards),
            "leading": sorted(self._leading),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        self._law.load_state_dict(state["law"])
        self._price.load_state_dict(state["price"])
        self._gap.load_state_dict(state["gap"])
        self._surprise.load_state_dict(state["surprise"])
        for key, crossing in self._crossings.items():
            crossing.load_state_dict(state["crossings"][key])
        self._rewards, self._leading = list(state["rewards"]), set(state["leading"])
