"""How good the policy of a run is, so that of all snapshots the best one is kept."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean

__all__ = ["Standing", "best_of"]

SCORES = ("eval/pass@1", "eval/reward", "train/reward")
"""What tells a better policy from a worse one, the most telling first."""


class Standing:
    """Means of the scores that a run has shown since they were last asked for."""

    def __init__(self) -> None:
        self._values: dict[str, list[float]] = {}

    def observe(self, values: Mapping[str, float]) -> None:
        """Take the numbers of a step or of an evaluation, by schema key."""
        for key in SCORES:
            if math.isfinite(values.get(key, math.nan)):
                self._values.setdefault(key, []).append(values[key])

    @property
    def evaluated(self) -> bool:
        """Whether any of them is of an evaluation."""
        return any(key.startswith("eval/") for key in self._values)

    def take(self) -> dict[str, float]:
        """The mean of each score, which are then forgotten.

        >>> standing = Standing()
        >>> standing.observe({"train/reward": 0.5, "policy/entropy": 1.0})
        >>> standing.take(), standing.take()
        ({'train/reward': 0.5}, {})
        """
        values, self._values = self._values, {}
        return {key: fmean(of_key) for key, of_key in values.items()}

    def state_dict(self) -> dict[str, list[float]]:
        """What a checkpoint has to hold."""
        return {key: list(values) for key, values in self._values.items()}

    def load_state_dict(self, state: Mapping[str, Sequence[float]]) -> None:
        """Go on from a checkpoint."""
        self._values = {key: list(values) for key, values in state.items()}


def best_of(scores: Sequence[Mapping[str, float]]) -> int | None:
    """The place of the best policy by the most telling score that any has; None if none has one.

    >>> best_of([{"train/reward": 0.9}, {"train/reward": 0.5, "eval/reward": 0.4}, {"eval/reward": 0.3}])
    1
    """
    for key in SCORES:
        places = [place for place, of_one in enumerate(scores) if key in of_one]
        if places:
            return max(places, key=lambda place: scores[place][key])
    return None
