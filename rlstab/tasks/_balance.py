"""Weights of several tasks that let them converge together."""

from collections.abc import Mapping, Sequence
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from rlstab.errors import ConfigError

__all__ = ["ConvergenceBalance"]

Floats = NDArray[np.float64]

FLOOR = 0.1  # of the equal weight


@final
class ConvergenceBalance:
    r"""CoBa's weights: more for tasks that converge slowly, less for one that begins to diverge.

    From the slopes $\alpha_i$ of the validation losses of $K$ tasks (each relative to its first, over the last $N$
    observations) come a relative and an absolute convergence score, and a divergence factor that mixes them:

    - $\mathrm{RCS}_i = \operatorname{softmax}_i(K \alpha_i / \sum_j |\alpha_j|)$, high for the slow;
    - $\mathrm{ACS}_i = \operatorname{softmax}_i(-n\,\alpha_i(t) / \sum_s |\alpha_i(s)|)$ over the last $n \le N$
      slopes, low for a task that turns upwards;
    - $\mathrm{DF} = t\,\operatorname{softmax}_s(-\tau\, t\, \alpha_{\max}(s) / \sum_s |\alpha_{\max}(s)|)$ at the last
      of all $t$ slopes $\alpha_{\max}$ of the worst task's loss, above 1 while that falls faster than it did;
    - $w = \operatorname{softmax}(K(\mathrm{DF}\cdot\mathrm{RCS} + (1 - \mathrm{DF})\,\mathrm{ACS}))$, kept above a
      tenth of the equal weight.

    This follows the authors' code, which has the last softmax and the floor; the paper takes the mixture itself. A loss
    can be any validation figure above 0 that training lowers, such as 1 - pass@1.

    Args:
        tasks: their names.
        warmup: observations before the weights leave $1/K$; at least 2.
        window: $N$, observations that a slope is fitted to.
        tau: $\tau$, how sharply the divergence factor reacts.

    Raises:
        ConfigError: if there are fewer than two tasks, or an argument is outside its range.

    Example:
        >>> balance = ConvergenceBalance(["fast", "slow"], warmup=3)
        >>> for step in range(4):
        ...     balance.observe({"fast": 1.0 - 0.2 * step, "slow": 1.0 - 0.05 * step})
        >>> {task: round(weight, 2) for task, weight in balance.weights().items()}
        {'fast': 0.25, 'slow': 0.75}

    Reference: CoBa: Convergence Balancer for Multitask Finetuning of Large Language Models,
        https://arxiv.org/abs/2410.06741; code at https://github.com/codefuse-ai/MFTCoder.
    """

    def __init__(self, tasks: Sequence[str], *, warmup: int = 100, window: int = 200, tau: float = 5.0) -> None:
        checks = {
            "tasks": (list(tasks), len(set(tasks)) == len(tasks) >= 2, "two different names or more"),
            "warmup": (warmup, warmup >= 2, "at least 2"),
            "window": (window, window >= 2, "at least 2"),
            "tau": (tau, tau > 0, "a number above 0"),
        }
        for key, (value, holds, expected) in checks.items():
            if not holds:
                raise ConfigError(f"ConvergenceBalance: {key} {value!r}; expected {expected}")
        self._tasks = tuple(tasks)
        self._warmup, self._window, self._tau = warmup, window, tau
        self._losses: list[list[float]] = []
        self._slopes: list[list[float]] = []
        self._worst_slopes: list[float] = []

    def observe(self, losses: Mapping[str, float]) -> None:
        """Take the validation loss of every task.

        Args:
            losses: task to a finite number above 0.

        Raises:
            ConfigError: if a task is missing or unknown, or a loss is not above 0.
        """
        if losses.keys() != set(self._tasks):
            raise ConfigError(f"ConvergenceBalance: losses of {sorted(losses)}; expected {sorted(self._tasks)}")
        row = [float(losses[task]) for task in self._tasks]
        if not all(0 < loss < float("inf") for loss in row):
            raise ConfigError(f"ConvergenceBalance: losses {dict(losses)}; expected finite numbers above 0")
        self._losses.append(row)
        if len(self._losses) >= self._warmup:
            ratios = self._ratios()
            self._slopes.append(_slopes(ratios).tolist())
            self._worst_slopes.append(float(_slopes(ratios.max(axis=1, keepdims=True))[0]))

    def weights(self) -> dict[str, float]:
        """The weight of each task, together 1."""
        count = len(self._tasks)
        if not self._slopes:
            return dict.fromkeys(self._tasks, 1 / count)
        now, recent = np.array(self._slopes[-1]), np.array(self._slopes[-self._window :])
        relative = _softmax(count * _share(now))
        absolute = _softmax(-len(recent) * _share(recent)[-1])
        worst = np.array(self._worst_slopes)
        divergence = len(worst) * _softmax(-self._tau * len(worst) * _share(worst))[-1]
        weights = _softmax(count * (divergence * relative + (1 - divergence) * absolute))
        floor = FLOOR / count
        if weights.min() < floor:
            weights = weights * (1 - floor * count) + floor
        return dict(zip(self._tasks, weights.tolist(), strict=True))

    def state_dict(self) -> dict[str, Any]:
        """What later weights depend on."""
        return {
            "losses": [list(row) for row in self._losses],
            "slopes": [list(row) for row in self._slopes],
            "worst_slopes": list(self._worst_slopes),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state."""
        self._losses = [list(row) for row in state["losses"]]
        self._slopes = [list(row) for row in state["slopes"]]
        self._worst_slopes = list(state["worst_slopes"])

    def _ratios(self) -> Floats:
        """The last losses of each task, relative to its first one: observations by tasks."""
        ratios: Floats = np.array(self._losses[-self._window :]) / np.array(self._losses[0])
        return ratios


def _slopes(values: Floats) -> Floats:
    """The slope of the least-squares line through each column."""
    steps = np.arange(len(values)) - (len(values) - 1) / 2
    slopes: Floats = (steps @ values) / (steps @ steps)
    return slopes


def _share(slopes: Floats) -> Floats:
    """Slopes relative to the sum of their absolute values along the first axis, 0 where all are."""
    total = np.abs(slopes).sum(axis=0)
    shares: Floats = np.divide(slopes, total, out=np.zeros_like(slopes), where=total > 0)
    return shares


def _softmax(logits: Floats) -> Floats:
    powers = np.exp(logits - logits.max())
    weights: Floats = powers / powers.sum()
    return weights
