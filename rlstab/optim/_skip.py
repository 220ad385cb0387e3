"""Steps that are left out: gradients that are not finite, or spikes of another order of magnitude."""

import math
from collections import deque
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from rlstab.errors import ConfigError
from rlstab.optim._gradients import Decision, GradientStabiliser


@dataclass(kw_only=True, eq=False)
class SkipSpikes(GradientStabiliser):
    """Leave out a step whose gradient is not finite, or `factor` times as large as the median of those before.

    A step that is left out is not remembered. After `patience` of them in a row a finite one is taken and the memory is
    begun anew: what has lasted so long is no spike but another regime. Gradients that are not finite are left out
    however many there are; the run's guard has to see that.

    Stabilises: single batches that would undo many steps.

    Proof: `tests/optim/test_skip.py`.

    Args:
        factor: how many times the median is a spike; None leaves out only what is not finite.
        window: how many norms are remembered.
        least: how many must be known before there are spikes.
        patience: how many spikes in a row are left out.

    Raises:
        ConfigError: for numbers out of range.

    Example:
        >>> skip = SkipSpikes(factor=10.0, least=3)
        >>> [skip.decide(norm).skip for norm in (1.0, 1.1, 0.9, 50.0, 1.0, float("nan"))]
        [False, False, False, True, False, True]
    """

    factor: float | None = 10.0
    window: int = 100
    least: int = 20
    patience: int = 5
    _norms: deque[float] = field(init=False)
    _row: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        if self.factor is not None and not 1 < self.factor < math.inf:
            raise ConfigError(f"SkipSpikes.factor: expected a number > 1, or None, got {self.factor!r}")
        if not 1 <= self.least <= self.window:
            raise ConfigError(f"SkipSpikes.least: expected 1 to window={self.window} norms, got {self.least!r}")
        if self.patience < 1:
            raise ConfigError(f"SkipSpikes.patience: expected at least 1, got {self.patience!r}")
        self._norms = deque(maxlen=self.window)

    def decide(self, norm: float) -> Decision:
        """Leave the step out, or remember its norm."""
        if not math.isfinite(norm):
            return Decision(norm=norm, skip=True, reason=f"gradient norm {norm}")
        known = self.factor is not None and len(self._norms) >= self.least
        usual = median(self._norms) if known else math.inf
        if self.factor is not None and norm > self.factor * usual:
            self._row += 1
            if self._row <= self.patience:
                return Decision(norm=norm, skip=True, reason=f"norm {norm:.3g} > {self.factor:g} x median {usual:.3g}")
            self._norms.clear()
        self._row = 0
        self._norms.append(norm)
        return Decision(norm=norm)

    def state_dict(self) -> dict[str, Any]:
        """The norms remembered, and how many steps in a row were left out."""
        return {"norms": list(self._norms), "row": self._row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self._norms, self._row = deque(state["norms"], maxlen=self.window), state["row"]
