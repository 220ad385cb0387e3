"""The host's own loss metrics under the host's names, from the metrics of the parts that stand in for it."""

from __future__ import annotations

from typing import NamedTuple

from rlstab.batch import TokenBatch
from rlstab.losses import CISPO, KL, VESPO, ClippedSurrogate, Max, Metric, Min, Objective, ObjectiveLoss
from rlstab.losses._metrics import token_mean

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
