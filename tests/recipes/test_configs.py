"""Every recipe of configs/ trains for two steps."""

import json
from pathlib import Path

import pytest
from rich.console import Console

from rlstab.models import tiny_causal_lm, tiny_tokenizer
from rlstab.recipes import HeldOut, PretrainedModel, Recipe, read_recipe, run_recipe
from rlstab.record import RunFolder
from rlstab.tasks import HubTask
from rlstab.tasks import _scorers as scorers

CONFIGS = Path(__file__).resolve().parents[2] / "configs"

TEMPLATE = (
    "{% for message in messages %}{{ message['role'][0] }}:{{ message['content'] }};{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)
CHARACTERS = "".join(map(chr, range(32, 127)))


def two_steps(recipe: str, output: Path, **changes: object) -> RunFolder:
    """Train a recipe for two steps, smaller than it is where `changes` say so."""
    changes |= {"output": str(output), "trainer.max_steps": 2, "trainer.bf16": False}
    overrides = [(key.replace("__", "."), json.dumps(value)) for key, value in changes.items()]
    outcome = run_recipe(read_recipe(CONFIGS / recipe, overrides), console=Console(quiet=True))
    assert not outcome.interrupted
    return outcome.folder


def assert_trained(folder: RunFolder) -> None:
    rows = folder.metrics().rows
    assert [row.step for row in rows] == [1, 2]
    for row in rows:
        assert {"train/reward", "objective/policy/loss", "objective/drift/loss"} <= row.values.keys()
    assert "drift/initial/kl" in rows[0].values
    phases = [event.fields["phase"] for event in folder.events().of("evaluation")]
    assert phases == ["before", "after"]
    assert folder.report.is_file()


def test_quickstart(tmp_path: Path) -> None:
    folder = two_steps(
        "quickstart.yaml",
        tmp_path / "run",
        warmup__steps=2,
        trainer__per_device_train_batch_size=16,
        evaluation__prompts=4,
        prompts=64,
    )
    assert_trained(folder)
    assert "mismatch/k3" in folder.metrics().rows[0].values


@pytest.fixture
def stand_in(tmp_path: Path) -> Path:
    """A tiny chat model and a data set in the form of GSM8K, in a folder."""
    tokenizer = tiny_tokenizer(CHARACTERS, chat_template=TEMPLATE)
    tiny_causal_lm(tokenizer, hidden=16, layers=1, heads=2, max_positions=512).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "data").mkdir()
    for split in ("train", "test"):
        rows = [{"question": f"{n} + {n}?", "answer": f"Twice.\n#### {2 * n}"} for n in range(40)]
        (tmp_path / "data" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


QWEN = "qwen3_0.6b_math_lora_vllm.yaml"


@pytest.mark.parametrize("scorer", ["MathAnswer", "ExactAnswer"])
def test_qwen3_on_a_stand_in(stand_in: Path, scorer: str) -> None:
    """The loading code with a model and a data set from this machine; vLLM and what needs its log-probs are off."""
    if scorer == "MathAnswer":
        pytest.importorskip("math_verify", reason="needs math-verify, of the extra `tasks`")
    folder = two_steps(
        QWEN,
        stand_in / "run",
        model__name=str(stand_in / "model"),
        model__dtype="float32",
        task__dataset=str(stand_in / "data"),
        task__config=None,
        task__scorer=scorer,
        objective__terms__policy__weights=[],
        prompts=40,
        trainer__use_vllm=False,
        trainer__max_completion_length=8,
        trainer__gradient_accumulation_steps=2,
        trainer__steps_per_generation=4,
        trainer__dataloader_pin_memory=False,
        evaluation__prompts=3,
        evaluation__every=None,
    )
    assert_trained(folder)
    assert (folder.checkpoints / "checkpoint-2" / "adapter_model.safetensors").is_file()


def test_qwen3_as_it_is() -> None:
    """The recipe as a user starts it: nothing is loaded, but all of it is read."""
    pytest.importorskip("math_verify", reason="needs math-verify, of the extra `tasks`")
    recipe = read_recipe(CONFIGS / QWEN).recipe
    assert isinstance(recipe, Recipe)
    assert isinstance(recipe.task, HubTask)
    assert recipe.model == PretrainedModel(name="Qwen/Qwen3-0.6B", dtype="bfloat16")
    assert recipe.task.scorer == scorers.MathAnswer()
    assert recipe.trainer["use_vllm"] is True
    assert recipe.evaluation == HeldOut(prompts=200, samples=4, ks=(1, 4), every=100, batch_size=64)
    answer = "She has 3 * 4 = <<3*4=12>>12 eggs.\n#### 12"
    assert recipe.task._answer(answer) == "12"
