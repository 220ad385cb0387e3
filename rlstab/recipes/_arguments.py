"""The host's arguments for a recipe, and all that can be refused before anything is loaded."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlstab.errors import ConfigError, RlstabError
from rlstab.recipes._beside import supply_of
from rlstab.recipes._engines import VLLM, Transformers
from rlstab.recipes._gradients import Updates
from rlstab.recipes._recipe import Recipe
from rlstab.recipes._supervised import longest_completion
from rlstab.routing import is_mixture
from rlstab.tasks import Reward
from rlstab.trainers import GRPOConfig, SFTConfig, check_composition, check_supervised

__all__ = ["Checked", "check_groups", "check_recipe", "host_arguments", "host_errors", "trainer_arguments"]


@dataclass(frozen=True, kw_only=True)
class Checked:
    """What is known of a recipe whose parts fit.

    Args:
        updates: what a run does between backward and update.
        references: the sources that the policy is compared with.
    """

    updates: Updates
    references: frozenset[str]


def check_recipe(recipe: Recipe, args: GRPOConfig | SFTConfig) -> Checked:
    """Refuse what a run of the recipe would refuse.

    Args:
        recipe: the recipe.
        args: the host's arguments for it.

    Raises:
        ConfigError: for parts that refuse each other, or that read what the trainer does not supply.
    """
    updates = Updates.of(recipe.gradients, recipe.optimizer, args)
    longest_completion(recipe, args)
    if isinstance(args, SFTConfig):
        return Checked(updates=updates, references=frozenset(check_supervised(recipe.objective, args)))
    check_groups(
        recipe.named_rewards,
        rows=args.per_device_train_batch_size * args.steps_per_generation,
        group=args.num_generations,
        processes=args.world_size,
    )
    _check_replay(recipe)
    references = check_composition(
        recipe.objective,
        recipe.advantage,
        args,
        peft=recipe.adapter is not None,
        returns_log_probs=recipe.engine is not None or args.use_vllm,
        supply=supply_of(recipe),
    )
    return Checked(updates=updates, references=frozenset(references))


def _check_replay(recipe: Recipe) -> None:
    if recipe.replay is None:
        return
    outline = recipe.model.outline(recipe.task)
    if outline is not None and not is_mixture(outline):
        raise ConfigError(
            f"replay: {recipe.replay} replays the routes of a mixture of experts, this model is dense; set replay: null"
        )
    match recipe.replay, recipe.engine:
        case "R3", None | Transformers(routes=False) | VLLM(routes=False):
            raise ConfigError(
                "replay: R3 takes the routes of an engine, and this recipe's returns none; set engine: {class_path: "
                "Transformers, init_args: {routes: true}}, or VLLM with routes: true"
            )


def check_groups(rewards: Mapping[str, Reward], *, rows: int, group: int, processes: int) -> None:
    """Refuse parts that compare the completions of a prompt where these may be spread over processes.

    Args:
        rewards: the parts by name.
        rows: completions that one process scores at a time.
        group: completions of one prompt.
        processes: number of processes.

    Raises:
        ConfigError: if a process has only some of a prompt's completions, and a part needs all.
    """
    comparing = [name for name, part in rewards.items() if not part.separable]
    if comparing and processes > 1 and rows % group:
        raise ConfigError(
            f"rewards.{comparing[0]} compares the {group} completions of a prompt, but each of {processes} processes "
            f"has {rows} rows of a generation; make trainer.per_device_train_batch_size * "
            "trainer.steps_per_generation a multiple of trainer.num_generations"
        )


def trainer_arguments(recipe: Recipe, output: Path, *, anywhere: bool = False) -> GRPOConfig:
    """The host's arguments for a recipe.

    Args:
        recipe: the recipe.
        output: the run folder.
        anywhere: accept a precision that this machine's devices lack, to plan a run on another one.
    """
    weights = {} if recipe.rewards is None else {"reward_weights": [part.weight for part in recipe.rewards.values()]}
    with host_errors():
        return GRPOConfig(**{**_arguments(recipe, output, anywhere), **weights})


def host_arguments(recipe: Recipe, output: Path, *, anywhere: bool = False) -> GRPOConfig | SFTConfig:
    """The arguments of the host that trains a recipe; see `trainer_arguments`."""
    if recipe.supervised is None:
        return trainer_arguments(recipe, output, anywhere=anywhere)
    with host_errors():
        return SFTConfig(**_arguments(recipe, output, anywhere))


def _arguments(recipe: Recipe, output: Path, anywhere: bool) -> dict[str, Any]:
    own = {"output_dir": str(output / "checkpoints"), "seed": recipe.seed, "disable_tqdm": True}
    return {**recipe.trainer, **own} | ({"use_cpu": True} if anywhere else {})


@contextmanager
def host_errors() -> Iterator[None]:
    """What the host refuses at construction is a mistake in the recipe's trainer block: say so in one line."""
    try:
        yield
    except RlstabError:
        raise
    except (ValueError, ImportError) as error:
        raise ConfigError(f"trainer: {' '.join(str(error).split())}") from error
