"""A recipe becomes objects, its resolved text reads as the same recipe, and mistakes are told in one line."""

from pathlib import Path

import pytest

from rlstab.errors import RecipeError
from rlstab.losses import (
    ClippedSurrogate,
    EntropyTarget,
    GroupNorm,
    JensenShannon,
    Linear,
    Mean,
    Objective,
    ReverseKL,
    TruncatedIS,
    Veto,
    presets,
)
from rlstab.recipes import LoRA, Recipe, TinyModel, WarmUp, read_recipe
from rlstab.tasks import HubTask, SortDigits
from rlstab.trainers import Signals

TEXT = """
model: {class_path: TinyModel, init_args: {hidden: 32}}
task: SortDigits
objective:
  terms:
    policy:
      class_path: ClippedSurrogate
      init_args:
        high: 0.28
        weights: [{class_path: TruncatedIS, init_args: {max: 3.0}}, Veto]
        mean: {unit: sequence, over: generation}
    drift:
      class_path: ReverseKL
      init_args:
        coef: {class_path: Linear, init_args: {start: 0.1, end: 0.0, steps: 50}}
        mean: {unit: 512}
advantage: {class_path: GroupNorm, init_args: {ddof: 0}}
warmup: {steps: 7, learning_rate: 1e-3}
signals: {drift_every: 5}
trainer: {max_steps: 3, learning_rate: 5e-4, bf16: false, generation_kwargs: {top_k: 5}}
output: runs/a
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(TEXT)
    return path


def read(file: Path, *overrides: str) -> Recipe:
    pairs = [override.partition("=")[::2] for override in overrides]
    return read_recipe(file, pairs).recipe


def objective(recipe: Recipe) -> Objective:
    assert recipe.objective is not None
    return recipe.objective


def test_a_recipe_becomes_objects(file: Path) -> None:
    recipe = read(file)
    assert recipe.model == TinyModel(hidden=32)
    assert recipe.task == SortDigits()
    assert recipe.advantage == GroupNorm(ddof=0)
    assert recipe.warmup == WarmUp(steps=7, learning_rate=1e-3)
    assert recipe.signals == Signals(drift_every=5)
    assert recipe.output == Path("runs/a")
    terms = objective(recipe).terms
    assert list(terms) == ["policy", "drift"]
    assert terms["policy"] == ClippedSurrogate(
        high=0.28, weights=(TruncatedIS(max=3.0), Veto()), mean=Mean(unit="sequence", over="generation")
    )
    coef = terms["drift"].coef
    assert isinstance(coef, Linear)
    assert (coef.start, coef.end, coef.steps) == (0.1, 0.0, 50)
    assert repr(terms["drift"].mean) == repr(Mean(unit=512))
    given = {"max_steps": 3, "learning_rate": 5e-4, "bf16": False, "generation_kwargs": {"top_k": 5}}
    assert {key: recipe.trainer[key] for key in given} == given


def test_the_resolved_text_reads_as_the_same_recipe(file: Path, tmp_path: Path) -> None:
    first = read_recipe(file, [("objective.terms.policy.low", "0.1")])
    (tmp_path / "resolved.yaml").write_text(first.text)
    again = read_recipe(tmp_path / "resolved.yaml")
    assert again.text == first.text
    assert repr(again.recipe) == repr(first.recipe)
    assert "low: 0.1" in first.text
    assert "class_path: rlstab.losses.ReverseKL" in first.text


def test_overrides_of_the_objective(file: Path) -> None:
    terms = objective(
        read(
            file,
            "objective.terms.drift.coef=0.5",
            "objective.terms.policy.weights.0.max=4",
            "objective.terms.policy.mean.unit=token",
            "objective.terms.extra=JensenShannon",
            "objective.terms.extra.coef=1e-3",
            "objective.terms.entropy={class_path: EntropyBonus, init_args: {coef: {class_path: EntropyTarget, "
            "init_args: {target: 0.3}}}}",
        )
    ).terms
    assert terms["drift"].coef == 0.5
    assert repr(terms["policy"].mean) == repr(Mean(unit="token", over="generation"))
    assert isinstance(terms["policy"], ClippedSurrogate)
    assert terms["policy"].weights[0] == TruncatedIS(max=4.0)
    assert terms["extra"] == JensenShannon(coef=1e-3)
    assert isinstance(terms["entropy"].coef, EntropyTarget)


def test_an_override_reaches_into_a_controller(file: Path) -> None:
    coef = objective(read(file, "objective.terms.drift.coef.start=0.9")).terms["drift"].coef
    assert isinstance(coef, Linear)
    assert (coef.start, coef.steps) == (0.9, 50)


def test_a_term_that_is_null_is_dropped(file: Path, tmp_path: Path) -> None:
    found = read_recipe(file, [("objective.terms.drift", "null")])
    assert list(objective(found.recipe).terms) == ["policy"]
    (tmp_path / "resolved.yaml").write_text(found.text)
    again = read(tmp_path / "resolved.yaml", "objective.terms.extra=JensenShannon", "objective.terms.policy=null")
    assert list(objective(again).terms) == ["extra"]


def test_a_block_that_is_null_is_empty(file: Path) -> None:
    assert read(file, "trainer=null").trainer["max_steps"] == -1


@pytest.mark.parametrize("name", ["dapo", "rlstab.losses.presets.dapo"])
def test_a_preset_stands_for_an_objective(file: Path, tmp_path: Path, name: str) -> None:
    found = read_recipe(file, [("objective", name), ("objective.high", "0.4")])
    assert repr(objective(found.recipe)) == repr(presets.dapo(high=0.4))
    (tmp_path / "resolved.yaml").write_text(found.text)
    assert repr(read(tmp_path / "resolved.yaml")) == repr(found.recipe)


def test_parts_of_ones_own(file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "my_parts.py").write_text(
        "from dataclasses import dataclass\n"
        "from rlstab.losses import ReverseKL\n"
        "@dataclass(frozen=True, kw_only=True)\n"
        "class MyKL(ReverseKL):\n"
        "    scale: float = 1.0\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    terms = objective(
        read(file, "objective.terms.drift={class_path: my_parts.MyKL}", "objective.terms.drift.scale=2")
    ).terms
    assert isinstance(terms["drift"], ReverseKL)
    assert terms["drift"].__dict__["scale"] == 2.0


def test_null_leaves_the_loss_to_the_trainer(file: Path) -> None:
    recipe = read(file, "objective=null", "advantage=null", "warmup=null", "signals=null", "trainer.loss_type=grpo")
    assert (recipe.objective, recipe.advantage, recipe.warmup, recipe.signals) == (None, None, None, None)
    assert recipe.trainer["loss_type"] == "grpo"


def test_an_adapter(file: Path) -> None:
    assert read(file, "adapter={rank: 4}").adapter == LoRA(rank=4)


def test_a_recipe_without_an_output_gets_a_new_folder(file: Path) -> None:
    output = read(file, "output=null").output
    assert output is not None
    assert output.parent == Path("runs")
    assert output.name.startswith("recipe-")


def test_what_is_resumed_must_be_named(file: Path) -> None:
    with pytest.raises(RecipeError, match=r"^output: null does not say which run to resume; pass --output RUN"):
        read_recipe(file, [("output", "null")], resume=True)


def test_processes_do_not_choose_folders_of_their_own(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RecipeError, match=r"^output: null gives each process a folder of its own; pass --output"):
        read_recipe(file, [("output", "null")])


# Override -> what the message begins with, and what else it says.
MISTAKES = {
    # names that do not exist
    "trainr.max_steps=3": ("trainr: a recipe has no such key", "did you mean 'trainer'?", "max_steps"),
    "sed=1": ("sed: a recipe has no such key (value 1)", "did you mean 'seed'?"),
    "trainer.learnin_rate=1": (
        "trainer.learnin_rate: GRPOConfig has no argument 'learnin_rate' (value 1)",
        "did you mean 'learning_rate'?",
    ),
    "trainer.5=1": ("trainer.5: GRPOConfig has no argument '5' (value 1)",),
    "warmup.stps=1": ("warmup.stps: WarmUp has no argument 'stps' (value 1)", "did you mean 'steps'?", "noise"),
    "model.hiden=8": ("model.hiden: TinyModel has no argument 'hiden' (value 8)", "did you mean 'hidden'?"),
    "objective.terms.drift.coeff=0.5": (
        "objective.terms.drift.coeff: ReverseKL has no argument 'coeff' (value 0.5)",
        "did you mean 'coef'?",
        "reference",
    ),
    "objective.terms.policy.weights.0.mx=1": (
        "objective.terms.policy.weights.0.mx: TruncatedIS has no argument 'mx' (value 1)",
        "did you mean 'max'?",
    ),
    "objective.terms.drift.coef.stepss=1": (
        "objective.terms.drift.coef.stepss: Linear has no argument 'stepss'",
        "did you mean 'steps'?",
    ),
    "objective.terms.drft.coef=0.5": (
        "objective.terms.drft: expected class_path",
        "got {'coef': 0.5}",
        "did you mean objective.terms.drift?",
    ),
    "objective.policy=ClippedSurrogate": ("objective.policy: Objective has no argument 'policy'", "There are: terms"),
    "objective.terms.extra=ForwadKL": (
        "objective.terms.extra: no Term is called 'ForwadKL'",
        "did you mean 'ForwardKL'?",
        "ClippedSurrogate",
        "JensenShannon",
    ),
    "objective.terms.extra=TruncatedIS": ("objective.terms.extra: no Term is called 'TruncatedIS'",),
    "objective=gropo": (
        "objective: no Objective is called 'gropo'",
        "did you mean 'grpo'?",
        "dapo",
    ),
    "model=tinymodel": ("model: no ModelSource is called 'tinymodel'", "did you mean 'TinyModel'?", "PretrainedModel"),
    "advantage=GrupNorm": ("advantage: no Advantage is called 'GrupNorm'", "did you mean 'GroupNorm'?"),
    "task=nowhere.Task": ("task: class_path 'nowhere.Task' cannot be imported", "No module named 'nowhere'"),
    "task=rlstab.tasks.SortDigit": ("task: module rlstab.tasks has no 'SortDigit'", "did you mean 'SortDigits'?"),
    "task=rlstab.losses.Linear": ("task: rlstab.losses.Linear is no Task", "SortDigits"),
    # values of another type
    "seed=1.5": ("seed: expected an integer, got 1.5",),
    "seed=abc": ("seed: expected an integer, got 'abc'",),
    "trainer=5": ("trainer: expected a mapping of GRPOConfig's arguments, got 5",),
    "trainer.learning_rate=fast": ("trainer.learning_rate: expected a number, got 'fast'",),
    "trainer.bf16=maybe": ("trainer.bf16: expected true or false or null, got 'maybe'",),
    "objective.terms.policy.low=abc": ("objective.terms.policy.low: expected a number, got 'abc'",),
    "objective.terms.drift.coef=abc": ("objective.terms.drift.coef: expected a number or one of", "Linear", "'abc'"),
    "objective.terms.policy.mean.unit=tokn": (
        "objective.terms.policy.mean.unit: expected one of 'token', 'sequence' or an integer, got 'tokn'",
    ),
    "objective.terms.policy.mean=token": (
        "objective.terms.policy.mean: expected a mapping of unit, over, got 'token'",
    ),
    "objective.terms.policy.weights=3": ("objective.terms.policy.weights: expected a list, got 3",),
    "objective.terms.policy.weights=[Vetoo]": (
        "objective.terms.policy.weights.0: no Weight is called 'Vetoo'",
        "did you mean 'Veto'?",
    ),
    "evaluation.ks=8": ("evaluation.ks: expected a list, got 8",),
    "model.class_path=3": ("model: expected the name of a class as class_path, got 3",),
    # things in the wrong place, or missing
    "task={class_path: SortDigits, digits: 3}": ("task: 'digits' stands beside class_path: move it under init_args",),
    "objective.terms.drift.coef={class_path: Linear, init_args: {start: 1}}": (
        "objective.terms.drift.coef.end: Linear needs it, expected a number",
    ),
    "model={hidden: 3}": (
        "model: expected class_path, one of ",
        "PretrainedModel, TinyModel, WarmedUp; got {'hidden': 3}",
    ),
    "model=null": ("model: a recipe needs it, with a class_path and its init_args",),
    "trainer.output_dir=x": ("trainer.output_dir: not here (value 'x'); set `output`",),
    "trainer.seed=3": ("trainer.seed: not here (value 3); set `seed`",),
    # values that parts refuse
    "objective.terms.drift.coef.steps=0": ("objective.terms.drift.coef: Linear.steps: expected at least 1, got 0",),
    "objective.terms={}": ("objective: an objective needs at least one term",),
    "objective.terms.second=ClippedSurrogate": ("objective: terms 'policy' and 'second' are both policy surrogates",),
    "warmup.noise=2": ("warmup: WarmUp: noise 2.0; expected a probability",),
    "task.digits=99": ("task: SortDigits: digits 99; expected between 2 and 12",),
    "adapter.rank=0": ("adapter: LoRA.rank: expected at least 1, got 0",),
    "evaluation.ks=[1, 16]": ("evaluation: HeldOut.ks: expected each from 1 to samples (8), got (1, 16)",),
    "signals.drift_every=0": ("signals.drift_every: expected at least 1, got 0",),
    "prompts=0": ("prompts: expected at least 1, got 0",),
    "threads=0": ("threads: expected at least 1, or null, got 0",),
}


@pytest.mark.parametrize("override", MISTAKES)
def test_a_mistake_is_told_in_one_line(file: Path, override: str) -> None:
    with pytest.raises(RecipeError) as caught:
        read(file, override)
    message = str(caught.value)
    start, *others = MISTAKES[override]
    assert message.startswith(start)
    assert [text for text in others if text not in message] == []
    assert "\n" not in message


@pytest.mark.parametrize("key", ["model", "task"])
def test_what_a_recipe_needs(file: Path, key: str) -> None:
    text = "\n".join(line for line in TEXT.splitlines() if not line.startswith(f"{key}:"))
    file.write_text(text)
    with pytest.raises(RecipeError, match=rf"^{key}: a recipe needs it, with a class_path and its init_args$"):
        read(file)


def test_text_that_would_be_lost_is_refused(file: Path) -> None:
    """Where null is an option, the parser reads text as YAML, to which `#` begins a comment."""
    hub = "task={class_path: HubTask, init_args: {dataset: d, scorer: ExactAnswer, answer_pattern: '%s'}}"
    with pytest.raises(RecipeError, match=r"^task\.init_args\.answer_pattern: '#### \(\.\+\)' would be read as null"):
        read(file, hub % "#### (.+)", "warmup=null")
    task = read(file, hub % r"\#{4} (.+)", "warmup=null").task
    assert isinstance(task, HubTask)
    assert task.answer_pattern == r"\#{4} (.+)"


def test_a_warm_up_needs_demonstrations(file: Path) -> None:
    hub = "task={class_path: HubTask, init_args: {dataset: d, scorer: ExactAnswer}}"
    with pytest.raises(RecipeError, match=r"^warmup: HubTask has no demonstrations to warm up on"):
        read(file, hub)
