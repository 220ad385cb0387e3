"""Leaves out an update that no finite loss stands behind."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from rlstab.losses import Objective

__all__ = ["drop_gradients", "infinite_terms", "skip_update"]

logger = logging.getLogger("rlstab")


def infinite_terms(objective: Objective, metrics: Mapping[str, Mapping[str, float]]) -> list[str]:
    """The terms that weigh in and were `+inf` at some token of the step.

    Args:
        objective: the loss.
        metrics: by term, its metrics over all ranks.
    """
    return [
        name
        for name, term in objective.terms.items()
        if metrics[name].get("overflow", 0.0) > 0 and float(term.coefficient) != 0
    ]


def skip_update(trainer: Any, terms: list[str]) -> bool:
    """Drop the gradients before the optimizer sees them, on every rank, and say why; returns whether it could."""
    step = trainer.state.global_step + 1
    if trainer.is_deepspeed_enabled:
        logger.warning("step %d: %s +inf, but DeepSpeed has made its update already", step, _are(terms))
        return False
    drop_gradients(trainer.model, scaled=trainer.accelerator.scaler is not None)
    logger.warning("step %d: its update is left out, because %s +inf at some tokens", step, _are(terms))
    return True


def drop_gradients(model: nn.Module, *, scaled: bool) -> None:
    """Take away the gradients, so that the optimizer moves nothing.

    Args:
        model: what is trained.
        scaled: there is a gradient scaler (fp16), which leaves the update out itself if it finds something infinite.
    """
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad = torch.full_like(parameter.grad, torch.inf) if scaled else None


def _are(terms: list[str]) -> str:
    return f"{', '.join(terms)} {'is' if len(terms) == 1 else 'are'}"
