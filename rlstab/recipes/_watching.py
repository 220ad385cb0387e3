"""How a run of a recipe is watched."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rlstab.errors import RecipeError
from rlstab.monitors import Notify, Rule
from rlstab.record import RunFolder
from rlstab.trainers import Guard, Watch, watch

__all__ = ["Watching"]


@dataclass(frozen=True, kw_only=True)
class Watching:
    """How a run is watched: which rules raise alarms, and whether they act. See `rlstab.watch`.

    Args:
        rules: what is looked for; None for `rlstab.monitors.default_rules()`, which act under a guard and only note
            without.
        guard: keep snapshots of the healthy policy to go back to; None keeps none.
        every: optimizer steps between measurements that cost something.
        budget: false alarms per 1000 steps that all rules together may give.

    Raises:
        ConfigError: for a number out of range, or a rule that goes back without a guard.
        RecipeError: for the address of a webhook.

    Example:
        >>> Watching(guard=Guard(every=10)).every
        10
    """

    rules: Sequence[Rule] | None = None
    guard: Guard | None = None
    every: int = 10
    budget: float = 1.0

    def __post_init__(self) -> None:
        for rule in self.rules or ():
            if isinstance(rule.action, Notify) and rule.action.webhook:
                raise RecipeError(
                    "watch.rules: the address of a webhook would stand in the run folder; set webhook_variable to the "
                    "environment variable that holds it"
                )
        Watch(self.rules, guard=self.guard, every=self.every, budget=self.budget)  # refuses what cannot be watched

    def attach(self, trainer: Any, run: RunFolder | None) -> Watch:
        """Watch a trainer, on all its processes."""
        return watch(trainer, self.rules, guard=self.guard, run=run, every=self.every, budget=self.budget)
