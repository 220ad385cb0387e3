"""How a run of a recipe is watched."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rlstab.errors import RecipeError
from rlstab.monitors import Notify, RollBack, Rule
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
        RecipeError: for a number out of range, a rule that goes back without a guard, or the address of a webhook.

    Example:
        >>> Watching(guard=Guard(every=10)).every
        10
    """

    rules: Sequence[Rule] | None = None
    guard: Guard | None = None
    every: int = 10
    budget: float = 1.0

    def __post_init__(self) -> None:
        if self.every < 1:
            raise RecipeError(f"watch.every: expected at least 1, got {self.every}")
        if not self.budget > 0:
            raise RecipeError(f"watch.budget: expected a number above 0, got {self.budget}")
        for rule in self.rules or ():
            if isinstance(rule.action, Notify) and rule.action.webhook:
                raise RecipeError(
                    "watch.rules: the address of a webhook would stand in the run folder; set webhook_variable to the "
                    "environment variable that holds it"
                )
            if self.guard is None and isinstance(rule.action, RollBack):
                raise RecipeError(
                    f"watch.rules: that of {rule.signal} goes back, which needs a guard; set watch.guard: {{}}"
                )

    def attach(self, trainer: Any, run: RunFolder | None) -> Watch:
        """Watch a trainer, on all its processes."""
        return watch(trainer, self.rules, guard=self.guard, run=run, every=self.every, budget=self.budget)
