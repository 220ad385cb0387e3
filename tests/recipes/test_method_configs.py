"""Every recipe of configs/methods trains for two steps: the objective is that of its preset."""

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from small_recipes import read_small

from rlstab.losses import presets
from rlstab.recipes import run_recipe

pytestmark = pytest.mark.usefixtures("without_report")

# Recipes of another name than their preset, and those that call it with arguments.
PRESETS = {"rpg_moving.yaml": "rpg"}
ARGUMENTS: dict[str, dict[str, Any]] = {"rpg_moving.yaml": {"reference": "anchor"}}
FURTHER = {
    "kdrl.yaml": {
        "teachers.teacher.init_args.model.init_args.hidden": 16,
        "teachers.teacher.init_args.warmup.steps": 2,
    }
}


@pytest.mark.parametrize(
    "recipe",
    [
        "alphanet.yaml",
        "bypass.yaml",
        "cispo.yaml",
        "clip_cov.yaml",
        "dapo.yaml",
        "dppo_tv.yaml",
        "dr_grpo.yaml",
        "gfpo.yaml",
        "gmpo.yaml",
        "gpg.yaml",
        "grpo.yaml",
        "grpo_d.yaml",
        "gspo.yaml",
        "gtpo.yaml",
        "icepop.yaml",
        "intellect2.yaml",
        "kdrl.yaml",
        "kl_cov.yaml",
        "prorl.yaml",
        "regularised.yaml",
        "reinforce_pp.yaml",
        "rloo.yaml",
        "rpg.yaml",
        "rpg_moving.yaml",
        "sapo.yaml",
        "stable_reinforce.yaml",
        "trajectory_kl.yaml",
        "vespo.yaml",
    ],
)
def test_two_steps(recipe: str, tmp_path: Path) -> None:
    read = read_small(recipe, tmp_path / "run", **FURTHER.get(recipe, {}))
    made = read.recipe.objective
    assert made is not None
    preset = vars(presets)[PRESETS.get(recipe, recipe.removesuffix(".yaml"))]
    assert made.terms.keys() == preset(**ARGUMENTS.get(recipe, {})).terms.keys()
    assert made.advantage is not None
    outcome = run_recipe(read, console=Console(quiet=True))
    assert not outcome.interrupted
    rows = outcome.folder.metrics().rows
    assert [row.step for row in rows] == [1, 2]
    for row in rows:
        assert {f"objective/{name}/loss" for name in made.terms} <= row.values.keys()
