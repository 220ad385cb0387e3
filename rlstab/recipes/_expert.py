"""Demonstrations of an expert in a recipe: rows beside the rollouts, and what rollouts begin with."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from datasets import Dataset

from rlstab.batch import Requirement
from rlstab.errors import RecipeError
from rlstab.tasks import EmbeddedTask
from rlstab.trainers import Demonstrations, Supply

if TYPE_CHECKING:
    from rlstab.recipes._recipe import Recipe

__all__ = ["ExpertRows", "expert_rows", "roles_of_experts", "with_demonstrations"]


@dataclass(frozen=True, kw_only=True)
class ExpertRows:
    """Demonstrations for the training prompts, as rows beside the rollouts: for terms with `rows: demonstration`.

    Embedded tasks solve their own prompts. The demonstrations of others are in a column of their data, such as one that
    `HubTask.keep` names.

    Args:
        per_step: rows of an optimizer step.
        column: the column that holds them; embedded tasks make it.
        noise: share of an embedded task's demonstrations with one wrong digit.

    Raises:
        RecipeError: for a number out of range.

    Example:
        >>> ExpertRows(per_step=32).column
        'demonstration'
    """

    per_step: int = 64
    column: str = "demonstration"
    noise: float = 0.0

    def __post_init__(self) -> None:
        if self.per_step < 1 or not 0 <= self.noise <= 1:
            raise RecipeError(
                f"demonstrations: expected per_step of at least 1 and noise from 0 to 1, got {self.per_step} and "
                f"{self.noise}"
            )


def roles_of_experts(recipe: "Recipe") -> dict[str, frozenset[Requirement]]:
    """What the demonstrations of a recipe bring along, by their role."""
    beside = {"demonstration": frozenset[Requirement]()} if recipe.demonstrations is not None else {}
    return dict(Supply.of([], None, None, recipe.guidance).rows) | beside


def with_demonstrations(recipe: "Recipe", data: Dataset) -> Dataset:
    """The training prompts with the column of demonstrations that guidance and rows read.

    Raises:
        RecipeError: if the data has no such column and the task cannot solve its own prompts.
    """
    noise = 0.0 if recipe.demonstrations is None else recipe.demonstrations.noise
    wanted = [] if recipe.demonstrations is None else [recipe.demonstrations.column]
    if recipe.guidance is not None:
        wanted += [recipe.guidance.column(turn) for turn in range(recipe.guidance.turns)]
    for column in dict.fromkeys(wanted):
        if column in data.column_names:
            continue
        if not isinstance(recipe.task, EmbeddedTask):
            raise RecipeError(
                f"task: its data has no column {column!r} of demonstrations, there are {data.column_names}; name it in "
                "HubTask.keep, and in guidance.demonstration or demonstrations.column"
            )
        solutions = recipe.task.solutions(len(data), seed=recipe.seed, noise=noise)
        data = data.add_column(column, solutions)
    return data


def expert_rows(recipe: "Recipe", data: Dataset) -> list[Demonstrations]:
    """The rows beside the rollouts that a recipe asks for."""
    source = recipe.demonstrations
    if source is None:
        return []
    return [Demonstrations(data, column=source.column, per_step=source.per_step, seed=recipe.seed)]
