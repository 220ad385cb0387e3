"""The host's own vLLM in the trainer's process: on a CPU it works, and training by it equals the host's."""

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from equality import ALPHABET, config, digits_reward, gradient_distance, prompts, run
from test_equality import differing
from trl import GRPOTrainer

from rlstab.models import tiny_causal_lm, tiny_moe, tiny_tokenizer
from rlstab.trainers import StableGRPOTrainer
from rlstab.trainers._colocate import colocated_vllm

pytestmark = pytest.mark.vllm


@pytest.fixture(autouse=True)
def small_cache(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A cache that fits a test; the process group of vLLM ends with it."""
    monkeypatch.setattr("rlstab.rollouts._vllm_host.GIBIBYTE", 1 << 26)
    yield
    from vllm.distributed import cleanup_dist_env_and_memory

    gc.collect()  # an engine that ends later would take the groups of the next one down
    cleanup_dist_env_and_memory()


def saved(path: Path, *, moe: bool) -> str:
    tokenizer = tiny_tokenizer(ALPHABET)
    model = tiny_moe(tokenizer, heads=2) if moe else tiny_causal_lm(tokenizer, heads=2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def trainer_of(kind: Any, folder: Path, model: str, **extra: Any) -> Any:
    args = config(
        folder,
        use_vllm=True,
        vllm_mode="colocate",
        vllm_max_model_length=64,
        max_steps=4,
        num_iterations=2,
        model_init_kwargs={"dtype": "float32"},
    )
    tokenizer = tiny_tokenizer(ALPHABET)
    with colocated_vllm(args):  # without it, the host cannot sync its vLLM on a CPU
        return kind(model, digits_reward, args, train_dataset=prompts(), processing_class=tokenizer, **extra)


def largest_difference(logs: list[dict[str, float]]) -> float:
    """Between trainer and sampler, over the steps that sampled."""
    key = "sampling/sampling_logp_difference/max"
    values = [row[key] for row in logs if key in row]
    assert len(values) > 1
    return max(values)


def test_training_equals_the_hosts(tmp_path: Path) -> None:
    model = saved(tmp_path / "model", moe=False)
    theirs = run(trainer_of(GRPOTrainer, tmp_path, model))
    ours = run(trainer_of(StableGRPOTrainer, tmp_path, model, signals=None))
    assert ours.losses == pytest.approx(theirs.losses, rel=1e-6, abs=1e-6)
    assert max(gradient_distance(a, b) for a, b in zip(ours.gradients, theirs.gradients, strict=True)) <= 1e-6
    for mine, host in zip(ours.logs, theirs.logs, strict=True):
        assert not differing(mine, host)
    assert 0 < largest_difference(theirs.logs) < 1e-5


def test_experts_and_a_tied_head_are_never_stale(tmp_path: Path) -> None:
    trainer = trainer_of(StableGRPOTrainer, tmp_path, saved(tmp_path / "model", moe=True))
    threads = torch.get_num_threads()
    logs = run(trainer).logs
    assert 0 < largest_difference(logs) < 1e-5
    assert torch.get_num_threads() == threads
