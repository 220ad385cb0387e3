"""The host's own loss metrics under the host's names, from the metrics of the parts that stand in for it."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

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
    Total,
)

__all__ = ["by_term", "entropy_coefficients", "host_keys", "host_values", "measured"]


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


def measured(result: ObjectiveLoss, batch: TokenBatch, ranks: int) -> dict[str, Metric]:
    """What the loss of one micro-batch leaves for the log, by key; the losses of all ranks add up to their mean."""

    def share(loss: Tensor) -> Total:
        return Total(loss if ranks == 1 else loss / ranks)

    metrics: dict[str, Metric] = {"objective/loss": share(result.loss.detach())}
    for name, report in result.terms.items():
        metrics[f"objective/{name}/loss"] = share(report.loss)
        metrics |= {f"objective/{name}/{key}": metric for key, metric in report.metrics.items()}
    metrics["policy/entropy"] = Sum(batch.statistic("entropy").detach().sum(), batch.tokens)
    return metrics


def by_term(objective: Objective, values: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """The values of each term, without the term's name."""
    found: dict[str, dict[str, float]] = {name: {} for name in objective.terms}
    for key, value in values.items():
        place, name, metric = [*key.split("/", 2), "", ""][:3]
        if place == "objective" and metric:
            found[name][metric] = value
    return found


def host_keys(objective: Objective) -> dict[str, str]:
    """Where the host's metrics come from, as far as the terms of an objective supply them."""
    return {"entropy": "policy/entropy", "aux_loss": "train/aux_loss"} | {
        host: f"objective/{name}/{metric}"
        for name, term in objective.terms.items()
        for kind, names in OF_TERM.items()
        if isinstance(term, kind)
        for host, metric in names.items()
    }


def host_values(
    objective: Objective, keys: Mapping[str, str], values: Mapping[str, float], accumulation: float
) -> dict[str, float]:
    """The values of one micro-batch under the host's names."""
    named = {host: values[key] for host, key in keys.items() if key in values}
    if any(isinstance(term, EntropyBonus) for term in objective.terms.values()):
        named["policy_loss"] = _policy_loss(objective, values, accumulation)
    return named


def _policy_loss(objective: Objective, values: Mapping[str, float], accumulation: float) -> float:
    """The loss without the entropy bonus, as the host logs it where there is one: not divided by accumulation."""
    return sum(
        float(term.coefficient)
        * values[f"objective/{name}/loss"]
        * (accumulation if term.mean.over == "micro_batch" else 1.0)
        for name, term in objective.terms.items()
        if not isinstance(term, EntropyBonus)
    )


def entropy_coefficients(objective: Objective) -> list[float]:
    """The coefficients of the entropy bonuses as the host logs them: a controller's level, applied or not."""
    coefficients = [term.coef for term in objective.terms.values() if isinstance(term, EntropyBonus)]
    return [
        c.level if isinstance(c, EntropyTarget) else float(c.value if isinstance(c, Controller) else c)
        for c in coefficients
    ]
