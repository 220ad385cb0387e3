"""From a recipe file and overrides to a `Recipe`, by way of jsonargparse."""

import os
import time
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import get_type_hints

from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

from rlstab.errors import RecipeError
from rlstab.losses import Controller, Objective, Part, presets
from rlstab.monitors import Action, Detector
from rlstab.recipes._bases import load_recipe
from rlstab.recipes._faults import argument_kinds, find_fault
from rlstab.recipes._recipe import Recipe
from rlstab.recipes._tree import Tree, flat, hint, set_value
from rlstab.tasks import EmbeddedTask, Reward
from rlstab.trainers import GRPOConfig, SFTConfig

__all__ = ["ReadRecipe", "read_recipe", "recipe_parser"]

OWNED = {
    "output_dir": "set `output`",
    "seed": "set `seed`",
    "data_seed": "set `seed`",
    "model_init_kwargs": "set the arguments of `model`",
    "trust_remote_code": "set it for `model`",
    "resume_from_checkpoint": "pass --resume",
    "disable_tqdm": "a recipe shows its own progress",
    "do_train": "a recipe always trains",
    "do_eval": "set `evaluation`",
    "do_predict": "set `evaluation`",
    "eval_strategy": "set `evaluation.every`",
    "eval_steps": "set `evaluation.every`",
    "eval_on_start": "a recipe always evaluates before training",
    "load_best_model_at_end": "set `trainer.save_total_limit`, and choose among checkpoints by the report",
}


@dataclass(frozen=True, kw_only=True)
class ReadRecipe:
    """A recipe, and the resolved configuration it was built from, as YAML that reads as the same recipe.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "recipe.yaml"
        >>> _ = file.write_text("{model: TinyModel, task: SortDigits, output: runs/a}")
        >>> read = read_recipe(file)
        >>> read.recipe.seed, "seed: 0" in read.text.splitlines()
        (0, True)
    """

    recipe: Recipe
    text: str


@cache
def recipe_parser(host: type[GRPOConfig] | type[SFTConfig] = GRPOConfig) -> ArgumentParser:
    """The parser of recipes: the fields of `Recipe`, with the host's trainer arguments under `trainer`.

    Args:
        host: the class of these; `SFTConfig` for supervised training.

    Example:
        >>> defaults = recipe_parser().get_defaults()
        >>> defaults.prompts, defaults.trainer.num_generations
        (4096, 8)
    """
    set_parsing_settings(
        subclasses_enabled=[Part, Objective, Controller, Reward, EmbeddedTask, Detector, Action],
        instantiate_subclass_spec_in_any=False,
    )
    parser = ArgumentParser(
        prog="rlstab train RECIPE.yaml",
        usage="%(prog)s [--KEY.PATH VALUE ...] [--resume]",
        description="Train as a recipe says. Every key of the recipe can be overridden, as in "
        "--trainer.learning_rate=1e-4 or --objective.terms.drift.coef=0.1.",
        exit_on_error=False,
    )
    parser.add_class_arguments(Recipe, skip={"trainer"})
    skipped = OWNED.keys() & {field.name for field in fields(host)}
    parser.add_class_arguments(host, "trainer", skip=skipped, instantiate=False)
    return parser


def read_recipe(
    path: str | os.PathLike[str], overrides: Sequence[tuple[str, str]] = (), *, resume: bool = False
) -> ReadRecipe:
    """Read a recipe.

    Args:
        path: YAML file.
        overrides: dotted keys and values in YAML, applied in turn.
        resume: whether the recipe is read to go on with a run, which it must name then; else an output that is not
            given becomes a new folder below `runs/`, named after the file and the time.

    Returns:
        The recipe and its resolved configuration.

    Raises:
        RecipeError: something in it does not exist or does not fit: one line that names it, its value, what would fit
            and the nearest match.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "recipe.yaml"
        >>> _ = file.write_text("{model: TinyModel, task: SortDigits, objective: dapo}")
        >>> recipe = read_recipe(file, [("task.digits", "4"), ("seed", "3")]).recipe
        >>> recipe.task.digits, recipe.seed, recipe.objective.terms.keys()
        (4, 3, dict_keys(['policy']))
    """
    tree = load_recipe(Path(path))
    for key, text in overrides:
        set_value(tree, key, text)
    _complete_objective(tree)
    if tree.get("output") is None:
        tree["output"] = _new_output(Path(path), resume)
    if tree.get("trainer") is None:
        tree["trainer"] = {}
    host = GRPOConfig if tree.get("supervised") is None else SFTConfig
    if not isinstance(tree["trainer"], dict):
        raise RecipeError(f"trainer: expected a mapping of {host.__name__}'s arguments, got {tree['trainer']!r}")
    parser = recipe_parser(host)
    try:
        parsed = parser.parse_object(deepcopy(tree))
        built = parser.instantiate(parsed)
        recipe = Recipe(**{**vars(built), "trainer": vars(parsed.trainer)})
    except (ArgumentError, ValueError) as error:
        raise RecipeError(f"{_fault(tree, host) or ' '.join(str(error).split())}") from error
    _refuse_lost_text(tree, parsed.as_dict())
    return ReadRecipe(recipe=recipe, text=parser.dump(parsed))


def _refuse_lost_text(tree: Tree, parsed: Tree) -> None:
    """Refuse text that the parser takes for null, since it reads strings as YAML where null is an option."""
    read = flat(parsed)
    for key, value in flat(tree).items():
        if isinstance(value, str) and read.get(key, value) is None:
            raise RecipeError(
                f"{key}: {value!r} would be read as null; expected text that is no comment or null in YAML: in a "
                r"pattern, write \# for a # at the start"
            )


def _new_output(path: Path, resume: bool) -> str:
    if resume:
        raise RecipeError(
            "output: null does not say which run to resume; pass --output RUN, or RUN/config.yaml as recipe"
        )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RecipeError("output: null gives each process a folder of its own; pass --output RUN")
    return f"runs/{path.stem}-{time.strftime('%Y%m%d-%H%M%S')}"


def _complete_objective(tree: Tree) -> None:
    """Let the bare name of a preset stand for its import path, and drop the terms that are null."""
    spec = tree.get("objective")
    if isinstance(spec, str):
        spec = tree["objective"] = {"class_path": spec}
    match spec:
        case {"class_path": str(name)} if name in presets.__all__:
            tree["objective"]["class_path"] = f"{presets.__name__}.{name}"
        case {"terms": dict() as terms} | {"init_args": {"terms": dict() as terms}}:
            for name in [name for name, term in terms.items() if term is None]:
                del terms[name]


def _fault(tree: Tree, host: type[GRPOConfig] | type[SFTConfig]) -> str | None:
    """A message on the first thing in a recipe that does not fit."""
    kinds = argument_kinds(Recipe)
    for key, value in tree.items():
        if key not in kinds:
            return f"{key}: a recipe has no such key (value {value!r}); {hint(key, kinds)}"
    for key in ("model", "task"):
        if tree.get(key) is None:
            return f"{key}: a recipe needs it, with a class_path and its init_args"
    if fault := _trainer_fault(tree["trainer"], host):
        return fault
    found = (find_fault(key, value, kinds[key]) for key, value in tree.items() if key != "trainer")
    return next(filter(None, found), None)


def _trainer_fault(block: Tree, host: type[GRPOConfig] | type[SFTConfig]) -> str | None:
    kinds = get_type_hints(host)
    own = [key for key in kinds if key not in OWNED]
    for key, value in block.items():
        if key in OWNED:
            return f"trainer.{key}: not here (value {value!r}); {OWNED[key]}"
        if key not in kinds:
            near = hint(key, own, listed_by="rlstab train --list-keys")
            return f"trainer.{key}: {host.__name__} has no argument {key!r} (value {value!r}); {near}"
    return next(
        filter(None, (find_fault(f"trainer.{key}", item, kinds[key], build=False) for key, item in block.items())), None
    )
