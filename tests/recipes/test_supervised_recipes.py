"""Recipes of supervised training: the drop-in trains on demonstrations, is watched, evaluated and resumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from rich.console import Console
from safetensors.torch import load_file

from rlstab.cli import main
from rlstab.errors import RecipeError
from rlstab.losses import presets
from rlstab.recipes import Outcome, ReadRecipe, Recipe, Supervised, TinyModel, plan_recipe, read_recipe, run_recipe
from rlstab.recipes._supervised import demonstrations_of
from rlstab.tasks import ExactAnswer, HubTask
from rlstab.trainers import latest_checkpoint

METHODS = Path(__file__).resolve().parents[2] / "configs" / "methods"
QUIET = Console(quiet=True)
SMALL: dict[str, Any] = {
    "model.hidden": 16,
    "model.layers": 1,
    "model.heads": 2,
    "task.digits": 3,
    "warmup": None,
    "prompts": 32,
    "evaluation": {"prompts": 2, "samples": 1, "ks": [1]},
    "trainer.max_steps": 2,
    "trainer.per_device_train_batch_size": 8,
}


def train(output: Path, recipe: str = "trsft.yaml", *, resume: bool = False, **changes: Any) -> Outcome:
    overrides = {**SMALL, **{key.replace("__", "."): value for key, value in changes.items()}, "output": str(output)}
    read = read_recipe(METHODS / recipe, [(key, json.dumps(value)) for key, value in overrides.items()])
    return run_recipe(read, resume=resume, console=QUIET)


@pytest.mark.parametrize("recipe", ["asft.yaml", "dft.yaml", "iw_sft.yaml", "psft.yaml", "sft.yaml", "trsft.yaml"])
def test_two_steps(recipe: str, tmp_path: Path, without_report: None) -> None:
    folder = train(tmp_path / "run", recipe).folder
    objective = vars(presets)[recipe.removesuffix(".yaml")]()
    rows = folder.metrics().rows
    assert [row.step for row in rows] == [1, 2]
    for row in rows:
        assert {f"objective/{name}/loss" for name in objective.terms} | {"step/loss"} <= row.values.keys()
    assert [event.fields["phase"] for event in folder.events().of("evaluation")] == ["before", "after"]


def test_a_stopped_run_ends_where_a_whole_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a report at the end, on conversations, with an adapter, snapshots and an evaluation on the way."""
    settings: dict[str, Any] = {
        "model__chat": True,
        "task": {"class_path": "Dialogue", "init_args": {"task": "SortDigits", "attempts": 2}},
        "objective": "psft",
        "adapter": {"rank": 2},
        "supervised__snapshot_every": 3,
        "evaluation__every": 2,
        "trainer__save_strategy": "steps",
        "trainer__save_steps": 2,
    }
    with monkeypatch.context() as patched:
        patched.setattr("rlstab.recipes._run._conclude", lambda *_: None)
        whole = train(tmp_path / "whole", **settings, trainer__max_steps=4)
        train(tmp_path / "parts", **settings)
    parts = train(tmp_path / "parts", resume=True, **settings, trainer__max_steps=4)
    rows = parts.folder.metrics().rows
    assert [row.step for row in rows] == [1, 2, 3, 4]
    assert ["eval/pass@1" in row.values for row in rows] == [False, True, False, True]
    expected = [row.values["step/loss"] for row in whole.folder.metrics().rows]
    assert [row.values["step/loss"] for row in rows] == expected
    ends = [latest_checkpoint(run.folder.checkpoints) for run in (whole, parts)]
    for end in ends:  # the rules have seen the exams on the way
        assert end is not None
        state = json.loads((end / "trainer_state.json").read_text())["stateful_callbacks"]["Watch"]["watch"]["monitor"]
        seen = {rule.split("'")[1] for rule, was in zip(state["rules"], state["seen"], strict=True) if was}
        assert {"eval/pass@1", "eval/reward", "step/loss"} <= seen
    weights = [load_file(end / "adapter_model.safetensors") for end in ends if end is not None]
    assert len(weights) == 2
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert parts.folder.report.is_file()


def test_demonstrations_of_others_come_from_a_column(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"problem": f"{n} + 1?", "answer": f"{n + 1}"} for n in range(40)]
    rows = [{**row, "solution": f"It is {row['answer']}." if n % 4 else None} for n, row in enumerate(rows)]
    for split in ("train", "test"):
        Dataset.from_list(rows).to_parquet(tmp_path / f"{split}.parquet")
    task = HubTask(dataset=str(tmp_path), question="problem", keep=("solution",), scorer=ExactAnswer())
    supervised = Supervised(column="solution")
    recipe = Recipe(model=TinyModel(), task=task, supervised=supervised, prompts=40)
    data = demonstrations_of(recipe, supervised)
    assert len(data) == 30
    assert data[0]["prompt"][-1]["role"] == "user"
    assert [message["role"] for message in data[0]["completion"]] == ["assistant"]
    number = int(data[0]["prompt"][-1]["content"].split()[0])
    assert data[0]["completion"][0]["content"] == f"It is {number + 1}."
    with pytest.raises(
        RecipeError, match=r"supervised.column: the task's data has no column 'demonstration'.*HubTask.ke"
    ):
        demonstrations_of(recipe, Supervised())
    with pytest.raises(RecipeError, match=r"evaluation.max_new_tokens: nothing else says how long"):
        plan_recipe(ReadRecipe(recipe=recipe, text=""))


def test_the_plan_is_of_demonstrations() -> None:
    plan = plan_recipe(read_recipe(METHODS / "psft.yaml", [("output", "runs/a")]))
    assert plan.lines["task"] == "SortDigits: 12800 demonstrations to train on, 200 x 8 completions held out"
    assert plan.lines["objective"] == "imitation (PSFT)"
    assert plan.lines["references"] == "old"
    assert plan.lines["steps"] == "200 updates of 64 rows (64 x 1 on 1 process)"
    assert "rewards" not in plan.lines
    assert plan.memory is not None
    assert plan.memory.sampling == 0.0


MISTAKES = {
    "--engine=Transformers": "engine: not beside supervised, which samples no completions; set engine: null",
    "--supervised.nois=0.1": "supervised.nois: Supervised has no argument 'nois' (value 0.1); did you mean 'noise'?",
    "--trainer.num_generations=8": "trainer.num_generations: SFTConfig has no argument 'num_generations' (value 8)",
    "--objective=grpo": "terms act on rows that supervised training does not have: {'policy': 'rollout', ",
    "--supervised=null": "terms act on rows that this trainer does not have: {'imitation': 'demonstration'}",
}


@pytest.mark.parametrize("word", MISTAKES)
def test_what_does_not_fit_is_one_line(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(METHODS / "trsft.yaml"), "--dry-run", word]) == 2
    shown = capsys.readouterr()
    assert MISTAKES[word] in shown.err
    assert shown.err.count("\n") == 1
