"""The blocks of Python in README and guide run as they stand, in turn, where a user has a model and a task already."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from rlstab.batch import LogProbs, TokenBatch
from rlstab.losses import ClippedSurrogate, Objective, run_parts
from rlstab.recipes import TinyModel
from rlstab.tasks import SortDigits
from rlstab.trainers import DistillationConfig, GRPOConfig, StableDistillationTrainer, StableGRPOTrainer

ROOT = Path(__file__).resolve().parents[2]


def blocks(name: str) -> list[str]:
    """The blocks of Python of a document, each placed at its own line so that a traceback names it."""
    text = (ROOT / name).read_text()
    found = re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return ["\n" * (text[: match.start(1)].count("\n")) + match[1] for match in found]


def run(name: str, namespace: dict[str, Any]) -> dict[str, Any]:
    """Run all blocks of a document in one namespace."""
    for block in blocks(name):
        exec(compile(block, ROOT / name, "exec"), namespace)
    return namespace


@pytest.fixture
def given(tmp_path: Path) -> dict[str, Any]:
    """What a user passes to the host: model, reward, args, prompts, tokenizer."""
    task = SortDigits(digits=2)
    model, tokenizer = TinyModel(hidden=16, heads=2, layers=1).load(task, seed=0)
    args = GRPOConfig(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=8,
        max_completion_length=3,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        disable_tqdm=True,
        report_to=[],
    )
    return {"model": model, "reward": task.reward, "args": args, "prompts": task.prompts(16), "tokenizer": tokenizer}


def a_batch() -> TokenBatch:
    logp = torch.tensor([[-0.5, -1.0, -3.0], [-0.2, -0.1, 0.0]])
    return TokenBatch(
        mask=torch.tensor([[1, 1, 1], [1, 1, 0]]),
        advantages=torch.tensor([1.0, -1.0]),
        logps={"policy": logp.clone().requires_grad_(), "old": logp},
        vocab={"entropy": torch.tensor([[0.2, 0.8, 0.5], [0.1, 0.9, 0.0]])},
    )


def test_the_readme_trains(given: dict[str, Any]) -> None:
    names = run("README.md", given)
    trainer = names["trainer"]
    assert isinstance(trainer, StableGRPOTrainer)
    assert trainer.state.global_step == 2
    assert LogProbs("sampler") in trainer.objective.requires


@pytest.mark.parametrize("name", ["README.md", "docs/guide/writing_a_term.md"])
def test_the_term_of_ones_own_is_a_hinge_on_the_entropy(name: str, given: dict[str, Any]) -> None:
    term = run(name, given)["EntropyFloor"](floor=0.5)
    batch = a_batch()
    loss = term.loss(batch)
    assert loss.values[0].tolist() == pytest.approx([0.3, 0.0, 0.0])
    assert loss.metrics["below"].value() == pytest.approx(2 / 5)
    assert (loss.values <= term.floor).all()


def test_the_part_of_the_guide_reaches_its_term() -> None:
    names = run("docs/guide/writing_a_term.md", {})
    assert set(names["objective"].terms) == {"policy", "floor"}
    objective = Objective(policy=ClippedSurrogate(), raised=names["SurpriseWeighted"]())
    batch = a_batch()
    batch = run_parts(objective.requires, batch)
    loss, terms = objective(batch)
    # Surprise of the first row (0.5 + 1 + 3) / 3 = 1.5; its log-probs are -0.5, -1, -3; five tokens in all.
    assert terms["raised"].loss == pytest.approx(1.5 * 4.5 / 5)
    loss.backward()
    assert torch.isfinite(loss)


def test_the_guide_to_exact_divergences_builds_a_student(given: dict[str, Any], tmp_path: Path) -> None:
    args = DistillationConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True, report_to=[])
    models = {"student": given["model"], "teacher": given["model"]}
    names = run("docs/guide/exact_divergences.md", {**given, **models, "args": args})
    assert set(names["objective"].terms) == {"near", "cover"}
    assert isinstance(names["trainer"], StableDistillationTrainer)


def test_readme_guide_and_example_show_one_term() -> None:
    shown = [block for name in ("README.md", "docs/guide/writing_a_term.md") for block in blocks(name)]
    shown = [block for block in shown if "class EntropyFloor" in block]
    example = (ROOT / "examples/compose_a_loss.py").read_text()
    assert len(shown) == 2
    for block in shown:
        body = block.partition("    floor: float\n")[2]
        assert body
        assert body in example
