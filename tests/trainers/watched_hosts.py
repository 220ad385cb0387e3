"""Small trainers of every kind that the watch is tried on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import Dataset
from equality import HostWithOtherSampler, config, digits_reward, prompts
from small_runs import TOKENIZER, tiny_policy, trainer_of
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments
from trl import (
    DistillationConfig,
    DistillationTrainer,
    DPOConfig,
    DPOTrainer,
    GRPOTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)

TEXTS = [f"{i * 7919 % 1000}={i}" for i in range(32)]


def settings(output: Path, **changes: Any) -> dict[str, Any]:
    """What all configurations share."""
    shared = {
        "output_dir": str(output),
        "per_device_train_batch_size": 8,
        "learning_rate": 5e-3,
        "max_steps": 3,
        "logging_steps": 1,
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "seed": 3,
    }
    return {**shared, **changes}


def host(kind: str, output: Path, *, sampler: bool = False, model: Any = None, **changes: Any) -> Any:
    """A trainer of the named kind, on weights made anew; `sampler` lets another policy sample for it."""
    policy = model if model is not None else tiny_policy()
    shared: dict[str, Any] = {"processing_class": TOKENIZER}
    match kind:
        case "Trainer":
            rows = [TOKENIZER(text, padding="max_length", max_length=8, truncation=True) for text in TEXTS]
            return Trainer(
                policy,
                TrainingArguments(**settings(output, **changes)),
                train_dataset=Dataset.from_list([dict(row) for row in rows]),
                data_collator=DataCollatorForLanguageModeling(TOKENIZER, mlm=False),
            )
        case "SFT":
            args = SFTConfig(**settings(output, **changes))
            return SFTTrainer(policy, args, train_dataset=Dataset.from_dict({"text": TEXTS}), **shared)
        case "DPO":
            pairs = {"prompt": TEXTS, "chosen": ["1+"] * len(TEXTS), "rejected": ["2-"] * len(TEXTS)}
            args = DPOConfig(**settings(output, **changes))
            return DPOTrainer(policy, tiny_policy(2), args, train_dataset=Dataset.from_dict(pairs), **shared)
        case "Distillation":
            args = DistillationConfig(**settings(output, max_completion_length=8, **changes))
            return DistillationTrainer(policy, tiny_policy(2), args, train_dataset=prompts(), **shared)
        case "RLOO":
            args = RLOOConfig(**settings(output, max_completion_length=8, num_generations=4, beta=0.0, **changes))
            return RLOOTrainer(policy, digits_reward, args, train_dataset=prompts(), **shared)
        case "GRPO":
            args = config(output, **settings(output, **changes))
            trainer_class = HostWithOtherSampler if sampler else GRPOTrainer
            trainer = trainer_class(policy, digits_reward, args, train_dataset=prompts(), **shared)
            trainer.use_vllm = sampler
            return trainer
    return trainer_of(output, model=policy, sampler=sampler, settings=settings(output, **changes))
