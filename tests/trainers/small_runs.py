"""Trainers of a tiny model, run folders, and what two runs must have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from equality import ALPHABET, OursWithOtherSampler, config, digits_reward, prompts
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlstab.batch import TokenBatch
from rlstab.losses import ClippedSurrogate, GroupNorm, Loss, Objective, Term
from rlstab.models import tiny_causal_lm, tiny_tokenizer
from rlstab.record import RunFolder
from rlstab.trainers import StableGRPOTrainer

TOKENIZER = tiny_tokenizer(ALPHABET)
TIMES = ("time", "runtime", "per_second", "total_flos", "train_loss")


def tiny_policy(seed: int = 1) -> PreTrainedModel:
    """Weights that the seed decides; there is no path they came from."""
    return tiny_causal_lm(TOKENIZER, seed=seed, hidden=32, layers=2, heads=2)


def lora() -> LoraConfig:
    """An adapter that does not start at zero, so that it matters whether it is on."""
    return LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)


def tiny_adapted(seed: int = 1) -> Any:
    """A policy that is passed with its adapter."""
    torch.manual_seed(seed)
    return get_peft_model(tiny_policy(seed), lora())


def trainer_of(
    output: Path,
    objective: Objective | Term | None = None,
    *,
    model: nn.Module | None = None,
    data: Dataset | None = None,
    sampler: bool = False,
    settings: Mapping[str, Any] | None = None,
    reward: Callable[..., list[Any]] = digits_reward,
    **extra: Any,
) -> Any:
    """A trainer of the tiny policy; `sampler=True` lets another policy sample, whose log-probs come back."""
    trainer_class = OursWithOtherSampler if sampler else StableGRPOTrainer
    trainer = trainer_class(
        model if model is not None else tiny_policy(),
        reward,
        config(output, **(settings or {})),
        objective=objective,
        train_dataset=data if data is not None else prompts(),
        processing_class=TOKENIZER,
        **extra,
    )
    if sampler:
        trainer.use_vllm = True
    return trainer


def run_folder(path: Path) -> RunFolder:
    """A new run folder."""
    return RunFolder.create(path, config_text="seed: 3")


def weights(trainer: Any) -> dict[str, Tensor]:
    """A copy of the trainable weights."""
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def assert_same_weights(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    """Bit for bit."""
    assert ours.keys() == theirs.keys()
    assert not [name for name in ours if not torch.equal(ours[name], theirs[name])]


def without_times(row: Mapping[str, Any]) -> dict[str, str]:
    """The numbers of a log line or metrics row that do not depend on the clock; as text, so that NaN equals NaN."""
    return {key: repr(value) for key, value in row.items() if not key.endswith(TIMES)}


@dataclass(frozen=True, kw_only=True)
class Watched(ClippedSurrogate):
    """A clipped surrogate that keeps every batch it is shown."""

    seen: list[TokenBatch] = field(default_factory=list, repr=False, compare=False)

    def loss(self, batch: TokenBatch) -> Loss:
        """The loss, unchanged."""
        self.seen.append(batch)
        return super().loss(batch)


@dataclass(frozen=True, kw_only=True)
class WatchedAdvantage(GroupNorm):
    """GRPO's advantage, which keeps every generation it is shown."""

    seen: list[TokenBatch] = field(default_factory=list, repr=False, compare=False)

    def compute(self, batch: TokenBatch) -> Tensor:
        """The advantages, unchanged."""
        self.seen.append(batch)
        return super().compute(batch)


def texts(batch: TokenBatch) -> list[str]:
    """The completions of a batch, as a reward function sees them."""
    ids = [row[kept].tolist() for row, kept in zip(batch.column("token_ids"), batch.mask, strict=True)]
    return TOKENIZER.batch_decode(ids, skip_special_tokens=True)


def joined(batches: list[TokenBatch], column: str) -> Tensor:
    """One column of several micro-batches."""
    return torch.cat([batch.column(column) for batch in batches])
