"""Every recipe of configs/recipes: its embedded twin trains for two steps, and it loads what it names itself."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from rich.console import Console

from rlstab.models import tiny_causal_lm, tiny_moe, tiny_tokenizer
from rlstab.recipes import ReadRecipe, read_recipe, run_recipe
from rlstab.recipes._arguments import check_recipe, trainer_arguments
from rlstab.tasks import HubTask, _scorers

RECIPES = Path(__file__).resolve().parents[2] / "configs" / "recipes"
TWINS = sorted(path.name.removesuffix(".tiny.yaml") for path in RECIPES.parent.glob("recipes/*.tiny.yaml"))

#: Smaller than they are: what a twin says of the method is left as it stands.
SMALL = {
    "model.hidden": 16,
    "model.layers": 1,
    "model.heads": 2,
    "task.digits": 3,
    "warmup": None,
    "prompts": 64,
    "evaluation.prompts": 1,
    "evaluation.samples": 1,
    "evaluation.ks": [1],
    "signals": None,
    "trainer.max_steps": 2,
    "trainer.per_device_train_batch_size": 32,
    "trainer.max_completion_length": 4,
}
FURTHER: Mapping[str, dict[str, Any]] = {
    "dph_rl": {
        "task": {"class_path": "SortDigits", "init_args": {"digits": 2}},
        "model.hidden": 64,
        "warmup": {"steps": 60, "batch_size": 64, "noise": 0.3},
        "buffer.per_step": 4,
    },
    "kdrl": {"teachers.teacher.model.hidden": 16, "teachers.teacher.warmup.steps": 2},
    "sasr": {"demonstrations.per_step": 4},
    "ufo": {
        "model.hidden": 32,
        "task.task.digits": 2,
        "task.attempts": 1,
        "warmup": {"steps": 50, "batch_size": 16, "learning_rate": 1e-2, "noise": 0.3},
        "trainer.per_device_train_batch_size": 16,
        "trainer.max_completion_length": 72,
    },
    "warm_up": {"trainer.per_device_train_batch_size": 20},
}


def read(name: str, output: Path, changes: Mapping[str, Any]) -> ReadRecipe:
    overrides = [(key, json.dumps(value)) for key, value in changes.items()]
    return read_recipe(RECIPES / name, [*overrides, ("output", str(output))])


def test_every_recipe_has_a_twin() -> None:
    recipes = (
        {path.stem for path in RECIPES.parent.glob("recipes/*.yaml")} - {"tiny"} - {f"{name}.tiny" for name in TWINS}
    )
    assert recipes == set(TWINS)
    assert len(recipes) >= 22


@pytest.mark.parametrize("name", TWINS)
def test_two_steps_of_the_twin(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for part in ("_conclude", "_Run._evaluate"):  # plots, report and evaluation have their own tests
        monkeypatch.setattr(f"rlstab.recipes._run.{part}", lambda *_: None)
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")  # environments are the host's experiment
    changes = {key: value for key, value in SMALL.items() if (name, key) != ("ufo", "task.digits")}
    twin = read(f"{name}.tiny.yaml", tmp_path / "run", changes | FURTHER.get(name, {}))
    outcome = run_recipe(twin, console=Console(quiet=True))
    rows = outcome.folder.metrics().rows
    assert [row.step for row in rows] == [1, 2]
    assert twin.recipe.objective is not None
    assert {f"objective/{term}/loss" for term in twin.recipe.objective.terms} <= rows[0].values.keys()
    called = [row.values.get("tools/call_frequency", 0.0) for row in rows]
    assert all(called) == (twin.recipe.environment is not None)


TEMPLATE = (
    "{% for message in messages %}{{ message['role'][0] }}:{{ message['content'] }};{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)
MATHS = {"problem": "1 + {n}?", "answer": "{m}", "solution": "One more than {n} is \\boxed{{{m}}}."}
#: The columns of the data sets that recipes name, as they are on the Hub, with what a row looks like.
COLUMNS: Mapping[str, dict[str, str]] = {
    "agentica-org/DeepScaleR-Preview-Dataset": MATHS,
    "data/preferences": {"question": "Which is even? 1: {n}. 2: {m}.", "answer": "1"},
    "open-r1/DAPO-Math-17k-Processed": {"prompt": "1 + {n}?", "solution": "{m}", "ability": "MATH", "data_source": "x"},
    "open-r1/OpenR1-Math-220k": MATHS | {"problem_type": "Algebra", "source": "x", "uuid": "{n}"},
    "openai/gsm8k": {"question": "1 + {n}?", "answer": "One more.\n#### {m}"},
    "sentence-transformers/parallel-sentences-europarl": {"english": "Number {n}.", "non_english": "Nummer {n}."},
}


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny chat model, and each data set as parquet files named after its splits."""
    folder = tmp_path_factory.mktemp("stand_ins")
    tokenizer = tiny_tokenizer("".join(map(chr, range(32, 127))), chat_template=TEMPLATE)
    sizes: dict[str, Any] = {"hidden": 16, "layers": 1, "heads": 2}
    models = {"model": tiny_causal_lm(tokenizer, **sizes), "mixture": tiny_moe(tokenizer, **sizes, experts=4)}
    for name, model in models.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    for name, columns in COLUMNS.items():
        (folder / name).mkdir(parents=True)
        for split in ("train", "test"):
            rows = [{column: text.format(n=n, m=n + 1) for column, text in columns.items()} for n in range(200)]
            Dataset.from_list(rows).to_parquet(folder / name / f"{split}.parquet")
    return folder


def test_recipes_load_what_they_name(stand_ins: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the download: tokenizer, model and data set in their formats, and the checks before a run."""
    monkeypatch.setattr(_scorers, "find_spec", lambda name: True)  # nothing is compared, so math-verify may be absent
    monkeypatch.chdir(stand_ins)
    for name in TWINS:
        changes = {"model.name": "mixture" if name in ("r3", "rspo") else "model", "task.config": None, "prompts": 8}
        real = read(f"{name}.yaml", stand_ins / "run", changes).recipe
        assert isinstance(real.task, HubTask)
        checked = check_recipe(real, trainer_arguments(real, stand_ins / "run", anywhere=True))
        assert checked.references <= {"initial", "anchor", "teacher"}
        row = real.task.prompts(real.prompts, seed=real.seed)[0]
        assert [message["role"] for message in row["prompt"]] == ["system", "user"]
        assert set(real.task.keep) <= row.keys()
        assert "#" not in row["answer"]
        model, tokenizer = real.model.load(real.task, seed=0)
        text = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=False)
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        assert model(ids).logits.shape[:2] == ids.shape
