"""The recipes of routing train for two steps, and their routes are seen."""

import json
from pathlib import Path

import pytest
from rich.console import Console

from rlstab.recipes import read_recipe, run_recipe

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "methods"

# Smaller than it is: what the recipe says of the method is left as it stands.
SMALL = {
    "model.init_args.hidden": 16,
    "model.init_args.heads": 2,
    "task.init_args.digits": 3,
    "warmup": None,
    "prompts": 16,
    "evaluation.prompts": 1,
    "evaluation.samples": 1,
    "evaluation.ks": [1],
    "trainer.max_steps": 2,
    "trainer.learning_rate": 0.05,
    "trainer.per_device_train_batch_size": 16,
}
SEEN = {
    "r2.yaml": {"routes/flip_share", "routes/own_flip_share", "routes/load_entropy"},
    "r3.yaml": {"routes/flip_share", "routes/own_flip_share", "routes/k3_agreeing", "mismatch/k3"},
    "rspo.yaml": {"routes/shift", "routes/shift_p10", "routes/flip_share"},
}


@pytest.mark.parametrize("recipe", SEEN)
def test_two_steps(recipe: str, tmp_path: Path) -> None:
    overrides = [(key, json.dumps(value)) for key, value in SMALL.items()]
    read = read_recipe(CONFIGS / recipe, [*overrides, ("output", json.dumps(str(tmp_path / "run")))])
    outcome = run_recipe(read, console=Console(quiet=True))
    first, second = (row.values for row in outcome.folder.metrics().rows)
    assert SEEN[recipe] <= second.keys()
    if read.recipe.replay is not None:
        assert first["routes/flip_share"] == second["routes/flip_share"] == 0
        assert second["routes/own_flip_share"] > 0
    else:
        assert first["routes/shift"] == 1.0
        assert second["routes/shift"] < 1.0
