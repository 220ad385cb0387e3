"""The law that trades entropy for reward, fitted while a run goes on."""

import math
from dataclasses import dataclass, field
from typing import Any

from rlstab.errors import ConfigError


@dataclass(kw_only=True, eq=False)
class EntropyLaw:
    r"""$R = -a e^H + b$ fitted to the entropies and rewards of a run, by least squares over all steps seen.

    RL without an entropy intervention spends entropy on reward along this curve; its ceiling, where the entropy is
    gone, is $b - a$. Kept as running moments: a step costs nothing, and a checkpoint holds six numbers.

    Args:
        least: how many steps must have been seen before there is a fit.

    Raises:
        ConfigError: if `least` is below 3.

    Reference: The Entropy Mechanism of Reinforcement Learning for Reasoning Language Models,
    https://arxiv.org/abs/2505.22617

    >>> law = EntropyLaw(least=3)
    >>> for entropy in (0.0, math.log(2), math.log(3)):
    ...     law.observe(entropy, 1.0 - 0.25 * math.exp(entropy))
    >>> round(law.a, 6), round(law.b, 6), round(law.ceiling, 6), round(law.residual(0.0, 0.8), 6)
    (0.25, 1.0, 0.75, 0.05)
    """

    least: int = 20
    _steps: int = field(init=False, default=0)
    _mean: tuple[float, float] = field(init=False, default=(0.0, 0.0))
    _moments: tuple[float, float, float] = field(init=False, default=(0.0, 0.0, 0.0))

    def __post_init__(self) -> None:
        if self.least < 3:
            raise ConfigError(f"EntropyLaw.least: expected at least 3 steps for two coefficients, got {self.least}")

    def observe(self, entropy: float, reward: float) -> None:
        """Take note of a step: mean entropy in nats, and mean reward. What is not finite is passed over."""
        if not (math.isfinite(entropy) and math.isfinite(reward)):
            return
        self._steps += 1
        x, y = math.exp(entropy), reward
        dx, dy = x - self._mean[0], y - self._mean[1]
        self._mean = (self._mean[0] + dx / self._steps, self._mean[1] + dy / self._steps)
        xx, xy, yy = self._moments
        late_x, late_y = x - self._mean[0], y - self._mean[1]
        self._moments = (xx + dx * late_x, xy + dx * late_y, yy + dy * late_y)

    @property
    def fitted(self) -> bool:
        """Whether enough steps of differing entropy have been seen."""
        return self._steps >= self.least and self._moments[0] > 0

    @property
    def a(self) -> float:
        """How much reward a unit of $e^H$ buys; NaN without a fit."""
        return -self._moments[1] / self._moments[0] if self.fitted else math.nan

    @property
    def b(self) -> float:
        """The intercept; NaN without a fit."""
        return self._mean[1] + self.a * self._mean[0]

    @property
    def ceiling(self) -> float:
        """The reward that the law expects where no entropy is left, $b - a$; NaN without a fit."""
        return self.b - self.a

    @property
    def explained(self) -> float:
        """The share of the reward's variance that the law explains, from 0 to 1; NaN without a fit."""
        xx, xy, yy = self._moments
        return xy * xy / (xx * yy) if self.fitted and yy > 0 else math.nan

    def residual(self, entropy: float, reward: float) -> float:
        """How far the reward of a step lies above the law."""
        return reward - (self.b - self.a * math.exp(entropy))

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint has to hold."""
        return {"steps": self._steps, "mean": list(self._mean), "moments": list(self._moments)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self._steps = state["steps"]
        self._mean = (state["mean"][0], state["mean"][1])
        self._moments = (state["moments"][0], state["moments"][1], state["moments"][2])
