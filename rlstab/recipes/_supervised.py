"""Supervised training in a recipe: demonstrations in place of rollouts."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from datasets import Dataset
from transformers import set_seed

from rlstab.errors import RecipeError
from rlstab.tasks import EmbeddedTask
from rlstab.trainers import GRPOConfig, ProgressCallback, SFTConfig, Signals, TrustRegionSFTTrainer

if TYPE_CHECKING:
    from rlstab.recipes._models import LoadedModel
    from rlstab.recipes._recipe import Recipe

__all__ = [
    "LoggedProgress",
    "Supervised",
    "demonstrations_of",
    "longest_completion",
    "refuse_rollouts",
    "supervised_trainer",
]

OF_ROLLOUTS = (
    "rewards",
    "environment",
    "advantage",
    "engine",
    "replay",
    "buffer",
    "demonstrations",
    "guidance",
    "teachers",
    "reset",
    "resample",
)


@dataclass(frozen=True, kw_only=True)
class Supervised:
    """Train on an expert's completions alone, by `rlstab.trainers.TrustRegionSFTTrainer`.

    The `trainer` block then holds arguments of the host's `SFTConfig`, the objective acts on rows of role
    `demonstration`, as `presets.trsft()` does, and `prompts` counts demonstrations.

    Args:
        column: the column of the data that holds them, such as one that `HubTask.keep` names; embedded tasks make
            their own. A row without one is left out.
        noise: share of an embedded task's demonstrations with one wrong digit.
        snapshot_every: optimizer steps that the source `old` is kept for.

    Raises:
        RecipeError: for a number out of range.

    Example:
        >>> Supervised(noise=0.3).column
        'demonstration'
    """

    column: str = "demonstration"
    noise: float = 0.0
    snapshot_every: int = 8

    def __post_init__(self) -> None:
        if not 0 <= self.noise <= 1:
            raise RecipeError(f"supervised.noise: expected a share from 0 to 1, got {self.noise}")
        if self.snapshot_every < 1:
            raise RecipeError(f"supervised.snapshot_every: expected at least 1, got {self.snapshot_every}")


def refuse_rollouts(recipe: "Recipe") -> None:
    """Refuse what acts on rollouts beside supervised training, which has none.

    Raises:
        RecipeError: for the first such key.
    """
    if recipe.supervised is None:
        return
    for key in OF_ROLLOUTS:
        if vars(recipe)[key]:
            raise RecipeError(f"{key}: not beside supervised, which samples no completions; set {key}: null")
    if recipe.signals not in (None, Signals()):
        raise RecipeError("signals: they are of rollouts, and supervised training is watched as it is; leave them out")


def longest_completion(recipe: "Recipe", args: GRPOConfig | SFTConfig) -> int:
    """The most tokens that an evaluation samples of a completion.

    Raises:
        RecipeError: if nothing says so.
    """
    if recipe.evaluation.max_new_tokens is not None:
        return recipe.evaluation.max_new_tokens
    if isinstance(args, GRPOConfig):
        return int(args.max_completion_length)
    if isinstance(recipe.task, EmbeddedTask):
        return recipe.task.completion_length + 1
    raise RecipeError(
        "evaluation.max_new_tokens: nothing else says how long a completion may be where none is sampled in training; "
        "expected a number of tokens, got null"
    )


def demonstrations_of(recipe: "Recipe", supervised: Supervised) -> Dataset:
    """Columns `prompt` and `completion`, both texts or both conversations.

    Raises:
        RecipeError: if the data has no such column, or nothing in it.
    """
    task = recipe.task
    if isinstance(task, EmbeddedTask):
        rows = task.demonstrations(recipe.prompts, seed=recipe.seed, noise=supervised.noise)
        prompts, texts = rows["prompt"], rows["completion"]
    else:
        rows = task.prompts(recipe.prompts, split="train", seed=recipe.seed)
        if supervised.column not in rows.column_names:
            raise RecipeError(
                f"supervised.column: the task's data has no column {supervised.column!r}, there are "
                f"{rows.column_names}; name it in HubTask.keep"
            )
        rows = rows.filter(lambda row: bool(row[supervised.column]))
        prompts, texts = rows["prompt"], rows[supervised.column]
    if not len(rows):
        raise RecipeError(f"supervised.column: no row has anything in {supervised.column!r}")
    return Dataset.from_dict({"prompt": list(prompts), "completion": list(map(_completion, prompts, texts))})


def _completion(prompt: Any, text: Any) -> Any:
    """An expert's words as a message where the prompt is a conversation."""
    return [{"role": "assistant", "content": text}] if isinstance(prompt, list) and isinstance(text, str) else text


class LoggedProgress(ProgressCallback):
    """The live progress of a trainer whose numbers come when the host logs."""

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Show the loss."""
        if state.is_world_process_zero and "loss" in kwargs["logs"]:
            self.on_row(state.global_step, {"train/loss": kwargs["logs"]["loss"]})


def supervised_trainer(
    recipe: "Recipe",
    supervised: Supervised,
    args: SFTConfig,
    start: "Callable[[], LoadedModel]",
    callbacks: list[Any],
) -> TrustRegionSFTTrainer:
    """The trainer of a recipe on demonstrations alone."""
    data = demonstrations_of(recipe, supervised)
    model, tokenizer = start()
    set_seed(recipe.seed)
    return TrustRegionSFTTrainer(
        model,
        args,
        objective=recipe.objective,
        snapshot_every=supervised.snapshot_every,
        train_dataset=data,
        processing_class=tokenizer,
        callbacks=callbacks,
        peft_config=None if recipe.adapter is None else recipe.adapter.config(),
    )
