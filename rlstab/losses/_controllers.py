"""Coefficients that change while training: small state machines, saved with the checkpoint."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rlstab.errors import ConfigError
from rlstab.losses._checks import check_number


@dataclass(kw_only=True, eq=False)
class Controller(ABC):
    """A coefficient that follows the run.

    `value` is a 0-dim tensor on the CPU, written in place: reading it never waits for a device, and a compiled
    objective is not compiled anew when it changes.

    >>> @dataclass(kw_only=True, eq=False)
    ... class Halving(Controller):
    ...     def __post_init__(self) -> None:
    ...         self._set(1.0)
    ...
    ...     def observe(self, step: int, metrics: Mapping[str, float]) -> None:
    ...         self._set(float(self.value) / 2)
    >>> beta = Halving()
    >>> beta.observe(1, {}); float(beta.value)
    0.5
    """

    _value: Tensor = field(init=False, repr=False, default_factory=lambda: torch.zeros((), dtype=torch.float64))

    @property
    def value(self) -> Tensor:
        """The coefficient of the coming optimizer step."""
        return self._value

    def _set(self, value: float) -> None:
        self._value.fill_(value)

    @abstractmethod
    def observe(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take note of optimizer step `step` (1 is the first) and of the reduced metrics of the controlled term."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint has to hold."""
        return {"value": float(self._value)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        self._set(state["value"])


@dataclass(kw_only=True, eq=False)
class Linear(Controller):
    """From `start` to `end` in equal steps over `steps` optimizer steps, constant afterwards.

    >>> beta = Linear(start=1.0, end=0.0, steps=4)
    >>> beta.observe(1, {})
    >>> float(beta.value)
    0.75
    """

    start: float
    end: float
    steps: int

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError(f"Linear.steps: expected at least 1, got {self.steps}")
        check_number("Linear.start", self.start)
        check_number("Linear.end", self.end)
        self._set(self.start)

    def observe(self, step: int, metrics: Mapping[str, float]) -> None:
        """Move along the line: after step `k` the coefficient is that of `k` finished steps."""
        self._set(self.start + (self.end - self.start) * min(step / self.steps, 1.0))


@dataclass(kw_only=True, eq=False)
class EntropyTarget(Controller):
    r"""Raise the coefficient by `delta` while the entropy is at or below `target`, else lower it; act only below.

    After each step with mean entropy $H$: $c \leftarrow \operatorname{clip}(c + \delta)$ if $H \le$ `target`, else
    $\operatorname{clip}(c - \delta)$, within [`min`, `max`], starting from `start`; the coefficient applied in the next
    step is $c$ if $H \le$ `target`, else 0. The first step, of which no entropy is known yet, applies 0. Reads the
    metric `entropy` of the controlled term.

    Raises:
        ConfigError: if `start` is out of bounds, or the term has no such metric.

    Reference: Skywork Open Reasoner 1 technical report, https://arxiv.org/abs/2505.22312 (adaptive entropy control).

    >>> c = EntropyTarget(target=0.2, start=0.01, delta=0.005)
    >>> c.observe(1, {"entropy": 0.1}); round(float(c.value), 6)
    0.015
    >>> c.observe(2, {"entropy": 0.5}); float(c.value)
    0.0
    """

    target: float
    start: float = 0.01
    delta: float = 0.005
    min: float = 0.0
    max: float = 1.0

    def __post_init__(self) -> None:
        if not self.min <= self.start <= self.max:
            raise ConfigError(f"EntropyTarget.start: expected a value in [{self.min}, {self.max}], got {self.start}")
        self._level = self.start

    @property
    def level(self) -> float:
        """The coefficient that is applied while the entropy is low."""
        return self._level

    def observe(self, step: int, metrics: Mapping[str, float]) -> None:
        """Move the level against the entropy of the step."""
        if "entropy" not in metrics:
            raise ConfigError(
                f"EntropyTarget: its term reports no metric 'entropy' (it has {sorted(metrics)}): "
                "use it as the coefficient of EntropyBonus"
            )
        low = metrics["entropy"] <= self.target
        self._level = min(self._level + self.delta, self.max) if low else max(self._level - self.delta, self.min)
        self._set(self._level if low else 0.0)

    def state_dict(self) -> dict[str, Any]:
        """Level and applied value."""
        return {"value": float(self._value), "level": self._level}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        super().load_state_dict(state)
        self._level = state["level"]
