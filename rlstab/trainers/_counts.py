"""What the means over a micro-batch of rollouts divide by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlstab.batch import Count
from rlstab.trainers._batches import completion_masks

__all__ = ["micro_batch_counts"]


def micro_batch_counts(trainer: Any, inputs: Mapping[str, Any]) -> dict[str, Count]:
    """Tokens and rows of the scopes that the trainer's terms average over, per rank."""
    rows, accumulation = inputs["completion_ids"].size(0), trainer._accumulation()
    training, scopes = trainer.model.training, trainer._scopes
    counts: dict[str, Count] = {}
    if "generation" in scopes or not training:
        windows = trainer.args.steps_per_generation if training else 1
        shares = trainer.accelerator.num_processes * windows / accumulation
        tokens = inputs["num_items_in_batch"]
        counts["generation"] = Count(tokens if shares == 1 else tokens / shares, rows * accumulation)
    if "micro_batch" in scopes and accumulation != 1:  # else the batch is the whole scope
        _, loss_mask = completion_masks(inputs)
        counts["micro_batch"] = Count(loss_mask.sum() * accumulation, rows * accumulation)
    if not training:
        counts["step"] = counts["generation"]
    elif trainer._step_count is not None:
        counts["step"] = trainer._step_count
    return counts
