"""From the host's dictionaries to token batches: what is zero outside the loss, and who sees to it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from equality import CASES, build

from rlstab.trainers import _batches


def micro_batch(name: str, folder: Path) -> tuple[Any, dict[str, Any]]:
    """The trainer of a case, and the first micro-batch that its loss would see."""
    trainer = build(CASES[name], folder, host=False)
    trainer.model.train()
    return trainer, trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))


@pytest.mark.parametrize("name", ["dapo", "truncated-masked", "temperature", "moe", "peft", "dapo-token_truncate"])
def test_the_host_scores_padding_as_zero(name: str, tmp_path: Path) -> None:
    trainer, inputs = micro_batch(name, tmp_path)
    outside = ~_batches.completion_masks(inputs)[1]
    assert outside.any()
    logps, entropies, _ = trainer._get_per_token_logps_and_entropies(
        trainer.model, **_batches.model_inputs(inputs), compute_entropy=True
    )
    assert logps[outside].count_nonzero() == entropies[outside].count_nonzero() == 0
    assert logps[~outside].all()


@pytest.mark.parametrize("name", ["dapo-kl", "tool-mask", "dapo-token_truncate", "truncated-masked"])
def test_what_travels_with_a_generation_is_zero_outside_the_loss(name: str, tmp_path: Path) -> None:
    _, inputs = micro_batch(name, tmp_path)
    outside = ~_batches.completion_masks(inputs)[1]
    carried = [inputs[key] for key in _batches.carried(tuple(inputs)).logps]
    assert carried
    assert outside.any()
    assert all(logps[outside].count_nonzero() == 0 for logps in carried)


@pytest.mark.parametrize("name", ["dapo-kl", "tool-mask", "truncated-masked"])
def test_what_is_made_once_for_a_generation_is_what_each_part_of_it_would_make(name: str, tmp_path: Path) -> None:
    _, inputs = micro_batch(name, tmp_path)
    made = {_batches.MASK, _batches.LOSS_MASK, _batches.WEIGHT, _batches.WHOLE_IDS, _batches.WHOLE_MASK}
    assert made <= inputs.keys()
    bare = {key: value for key, value in inputs.items() if key not in made}
    for ours, anew in zip(_batches.completion_masks(inputs), _batches.completion_masks(bare), strict=True):
        assert torch.equal(ours, anew)
    for key, value in _batches.model_inputs(bare).items():
        torch.testing.assert_close(_batches.model_inputs(inputs)[key], value, rtol=0, atol=0)
    assert torch.equal(_batches.token_batch(inputs).token_weight, _batches.token_batch(bare).token_weight)
    assert not inputs[_batches.LOSS_MASK].all()


def test_tokens_of_tools_are_scored_and_leave_no_trace(tmp_path: Path) -> None:
    trainer, inputs = micro_batch("tool-mask", tmp_path)
    mask, loss_mask = _batches.completion_masks(inputs)
    tools = mask & ~loss_mask
    logps = trainer._get_per_token_logps_and_entropies(trainer.model, **_batches.model_inputs(inputs))[0]
    assert logps[tools].all()
    cleaned = _batches.token_batch(inputs, logps={"policy": logps})
    assert torch.equal(cleaned.logp("policy"), torch.where(loss_mask, logps, 0.0))


@pytest.mark.parametrize(
    ("name", "complete"),
    [
        ("dapo", {"old"}),
        ("dapo-kl", {"old", "initial"}),
        ("dapo-token_truncate", {"old"}),  # its sampler leaves a token of each sequence without a score
    ],
)
def test_what_travels_complete_is_known_to_be(name: str, complete: set[str], tmp_path: Path) -> None:
    _, inputs = micro_batch(name, tmp_path)
    batch = _batches.token_batch(inputs)
    assert batch.complete == complete
    assert all(batch.logp(source).isfinite().all() for source in complete)
    assert all(not batch.logp(source).isfinite().all() for source in set(batch.logps) - complete)
