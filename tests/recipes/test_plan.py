"""What a run will do and need, before anything is loaded, and what a dry run leaves undone."""

import json
from pathlib import Path
from typing import Any

import pytest

from rlstab.cli import main
from rlstab.errors import ConfigError
from rlstab.losses import JensenShannon, presets
from rlstab.recipes import (
    Device,
    LoRA,
    Memory,
    ModelSize,
    Overlapped,
    PretrainedModel,
    RayPool,
    ReadRecipe,
    Recipe,
    Sharding,
    TinyModel,
    plan_recipe,
)
from rlstab.recipes import Transformers as Engine
from rlstab.recipes import _plan as plans
from rlstab.recipes._memory import sampling_memory, training_memory
from rlstab.tasks import SortDigits
from rlstab.trainers import GRPOConfig

QWEN = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
}


def planned(**keys: Any) -> plans.Plan:
    trainer = {"bf16": False, "max_steps": 5, "per_device_train_batch_size": 8, "num_generations": 4}
    given: dict[str, Any] = {"model": TinyModel(), "task": SortDigits(), "trainer": trainer}
    return plan_recipe(ReadRecipe(recipe=Recipe(**given | keys), text=""))


def test_sizes_without_weights(tmp_path: Path) -> None:
    """Qwen3-0.6B, from its configuration alone: the number of parameters that the model card states, 0.6 B."""
    (tmp_path / "config.json").write_text(json.dumps(QWEN))
    outline = PretrainedModel(name=str(tmp_path)).outline(SortDigits())
    assert outline is not None
    size = ModelSize.of(outline)
    assert size == ModelSize(
        parameters=596_049_920, trained=596_049_920, bytes_each=2, layers=28, hidden=1024, cached=2 * 8 * 128
    )
    adapted = ModelSize.of(outline, LoRA(rank=32))
    assert adapted.trained == 28 * 32 * (1024 + 2048 + 2 * (1024 + 1024) + 2048 + 1024 + 3 * (1024 + 3072))
    assert adapted.parameters == size.parameters + adapted.trained
    assert PretrainedModel(name="no/such-model").outline(SortDigits()) is None


def test_memory_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    size = ModelSize(parameters=1000, trained=100, bytes_each=4, layers=3, hidden=8, cached=16)
    args = GRPOConfig(
        "runs/a",
        bf16=False,
        per_device_train_batch_size=2,
        num_generations=2,
        max_completion_length=44,
        optim="adamw_torch",
        gradient_checkpointing=False,
    )
    tokens = 2 * (44 + 256)
    assert training_memory(size, args, Sharding(), references=4000) == {
        "weights": 4000,
        "gradients": 400,
        "optimizer": 800,
        "references": 4000,
        "activations": 17 * 4 * 8 * 3 * tokens,
    }
    args.gradient_checkpointing, args.optim = True, "adamw_8bit"
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    assert Sharding.of_launch() == Sharding(weights=1, gradients=4, optimizer=4)
    shared = training_memory(size, args, Sharding.of_launch(), references=4000)
    assert shared == {
        "weights": 4000,
        "gradients": 100,
        "optimizer": 50,
        "references": 4000,
        "activations": 4 * 8 * (3 + 17) * tokens,
    }
    assert sampling_memory(size, args, slots=5, copied="bfloat16") == 1000 * 2 + 5 * 300 * 16 * 3 * 2
    memory = Memory(**shared, sampling=1e9)
    assert memory.total == 4000 + 50 + 4000 + 1e9  # sampling and training take turns


def test_what_is_kept_and_what_samples() -> None:
    drift = presets.dapo() + 0.1 * JensenShannon(reference="initial")
    plan = planned(objective=drift, engine=Engine(dtype="bfloat16"))
    assert plan.lines["references"] == "initial"
    assert plan.lines["sampled by"] == "Transformers"
    assert plan.lines["steps"] == (
        "5 updates of 8 rows (8 x 1 on 1 process); 8 completions of 2 prompts at a time, for 1 updates"
    )
    assert plan.memory is not None
    assert plan.memory.references == plan.memory.weights == 83_520 * 4
    adapted = planned(objective=drift, adapter=LoRA(rank=2), engine=Engine()).memory
    assert adapted is not None
    assert adapted.references == 0  # the adapter is switched off instead
    assert adapted.optimizer == 2 * 4 * 4352
    assert planned(model=PretrainedModel(name="no/such-model")).memory is None
    elsewhere = planned(engine=Overlapped(engine=RayPool()))
    assert elsewhere.lines["sampled by"] == "Overlapped of RayPool"
    shared, copied = planned(engine=Engine()).memory, planned(engine=Overlapped(engine=Engine(copy=True))).memory
    assert elsewhere.memory is not None
    assert shared is not None
    assert copied is not None
    assert (elsewhere.memory.sampling, copied.sampling - shared.sampling) == (0, 83_520 * 4)


def test_what_does_not_fit_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert planned().notes == ()
    monkeypatch.setattr(Device, "here", classmethod(lambda cls: cls(name="toy", memory=1000)))
    (note,) = planned().notes
    assert note.startswith("memory: about ")
    assert "toy has" in note
    assert "trainer.per_device_train_batch_size" in note


def test_a_dry_run_checks_everything_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "model: {class_path: PretrainedModel, init_args: {name: no/such}}\ntask: SortDigits\nobjective: dapo"
    )
    assert main(["train", str(recipe), "--dry-run", "--trainer.max_steps=3"]) == 0
    text = capsys.readouterr().out
    assert "class_path: rlstab.losses.presets.dapo" in text
    assert "not on this machine, so its size is not known" in text
    assert list(tmp_path.iterdir()) == [recipe]
    assert main(["train", str(recipe), "--dry-run", "--trainer.beta=0.1"]) == 2
    assert "args.beta=0.1 has no effect beside objective=" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="sampler's log-probs"):
        planned(objective=presets.icepop())
    with pytest.raises(ConfigError, match="this model is dense; set replay: null"):
        planned(replay="R2")
    with pytest.raises(ConfigError, match="this recipe's returns none; set engine:"):
        planned(replay="R3", model=TinyModel(experts=4), engine=Engine())
    assert planned(replay="R3", model=TinyModel(experts=4), engine=Engine(routes=True)).lines["references"] == "none"


def test_a_function_that_does_not_exist(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("{model: TinyModel, task: SortDigits, trainer: {bf16: false}}")
    reward = "{mine: {class_path: FunctionReward, init_args: {function: my_rewards.short}}}"
    assert main(["train", str(recipe), "--dry-run", f"--rewards={reward}"]) == 2
    expected = "rewards.mine.function: expected the import path of a function, as module.function; 'my_rewards.short'"
    assert expected in capsys.readouterr().err
