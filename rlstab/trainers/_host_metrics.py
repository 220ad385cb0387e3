"""The host's own loss metrics under the host's names, from the metrics of the parts that stand in for it."""

from __future__ import annotations

from typing import NamedTuple

import torch

from rlstab.batch import TokenBatch
from rlstab.losses import (
    CISPO,
    KL,
    VESPO,
    ClippedSurrogate,
    Controller,
    EntropyBonus,
    EntropyTarget,
    Metric,
    Objective,
    ObjectiveLoss,
    Sum,
    token_mean,
)

__all__ = ["HostKey", "host_keys", "host_metrics"]


class HostKey(NamedTuple):
    """Where a host metric comes from."""

    host: str
    term: str
    metric: str


OF_TERM: dict[type, dict[str, str]] = {
    ClippedSurrogate: {
        "clip_ratio/low_mean": "clip_low",
        "clip_ratio/high_mean": "clip_high",
        "clip_ratio/region_mean": "clip_region",
        "clip_ratio/low_min": "clip_low_min",
        "clip_ratio/high_max": "clip_high_max",
    },
    CISPO: {"cispo_clip_ratio": "clip_high"},
    VESPO: {"vespo/phi_seq_mean": "phi"},
    KL: {"kl": "kl"},
}


def host_keys(objective: Objective) -> list[HostKey]:
    """The host metrics that the terms of an objective can supply."""
    return [
        HostKey(host, name, metric)
        for name, term in objective.terms.items()
        for kind, names in OF_TERM.items()
        if isinstance(term, kind)
        for host, metric in names.items()
    ]


def host_metrics(keys: list[HostKey], result: ObjectiveLoss, batch: TokenBatch) -> dict[str, Metric]:
    """The metrics of one micro-batch under the host's names."""
    metrics = {key.host: result.terms[key.term].metrics[key.metric] for key in keys}
    return metrics | {"entropy": token_mean(batch.statistic("entropy"), batch.loss_mask)}


def policy_loss(objective: Objective, result: ObjectiveLoss, accumulation: float) -> dict[str, Metric]:
    """The loss without the entropy bonus, as the host logs it where there is one: not divided by accumulation."""
    if not any(isinstance(term, EntropyBonus) for term in objective.terms.values()):
        return {}
    values = [
        result.terms[name].weight * result.terms[name].loss * (accumulation if term.mean.over == "micro_batch" else 1.0)
        for name, term in objective.terms.items()
        if not isinstance(term, EntropyBonus)
    ]
    total = torch.stack(values).sum()
    return {"policy_loss": Sum(total, torch.ones_like(total))}


def entropy_coefficients(objective: Objective) -> list[float]:
    """The coefficients of the entropy bonuses as the host logs them: a controller's level, applied or not."""
    coefficients = [term.coef for term in objective.terms.values() if isinstance(term, EntropyBonus)]
    return [
        c.level if isinstance(c, EntropyTarget) else float(c.value if isinstance(c, Controller) else c)
        for c in coefficients
    ]
