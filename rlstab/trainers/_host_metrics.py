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
    EntropyBonus,
    EntropyTarget,
    Metric,
    Objective,
    ObjectiveLoss,
    Sum,
    Total,
)
from rlstab.trainers._log import Series

__all__ = ["HostNames", "by_term", "measured"]


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

    first, *others = result.terms.values()
    alone = not others and type(first.weight) is float and first.weight == 1
    metrics: dict[str, Metric] = {"objective/loss": share(first.loss if alone else result.loss.detach())}
    for name, report in result.terms.items():
        metrics[f"objective/{name}/loss"] = share(report.loss)
        for key, metric in report.metrics.items():
            metrics[f"objective/{name}/{key}"] = metric
    metrics["policy/entropy"] = Sum(batch.total("entropy"), batch.tokens)
    return metrics


def by_term(objective: Objective, values: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """The values of each term, without the term's name."""
    found: dict[str, dict[str, float]] = {name: {} for name in objective.terms}
    for key, value in values.items():
        place, name, metric = [*key.split("/", 2), "", ""][:3]
        if place == "objective" and metric:
            found[name][metric] = value
    return found


class HostNames:
    """Which of an objective's numbers the host logs as well, and under which name."""

    def __init__(self, objective: Objective) -> None:
        self._renamed = {"entropy": "policy/entropy", "aux_loss": "train/aux_loss"} | {
            host: f"objective/{name}/{metric}"
            for name, term in objective.terms.items()
            for kind, names in OF_TERM.items()
            if isinstance(term, kind)
            for host, metric in names.items()
        }
        self._bonuses = [name for name, term in objective.terms.items() if isinstance(term, EntropyBonus)]
        self._policy = [name for name in objective.terms if self._bonuses and name not in self._bonuses]

    def values(
        self, objective: Objective, measured: Mapping[str, Series], accumulation: Mapping[int, float]
    ) -> dict[str, list[float]]:
        """The values of the micro-batches under the host's names.

        Args:
            objective: as it is now; its coefficients may have been turned.
            measured: the metrics of the micro-batches.
            accumulation: how many micro-batches each step has.
        """
        named = {host: measured[key].values for host, key in self._renamed.items() if key in measured}
        if self._policy:
            named["policy_loss"] = self._policy_loss(objective, measured, accumulation)
        return named

    def _policy_loss(
        self, objective: Objective, measured: Mapping[str, Series], accumulation: Mapping[int, float]
    ) -> list[float]:
        """The loss without the entropy bonus, as the host logs it where there is one: not divided by accumulation."""
        shares = []
        for name in self._policy:
            term, losses = objective.terms[name], measured[f"objective/{name}/loss"]
            weight = float(term.coefficient)
            undivided = [accumulation[step] if term.mean.over == "micro_batch" else 1.0 for step in losses.steps]
            shares.append([weight * loss * factor for loss, factor in zip(losses.values, undivided, strict=True)])
        return [sum(of_terms) for of_terms in zip(*shares, strict=True)]

    def entropy_coefficients(self, objective: Objective) -> list[float]:
        """The coefficients of the entropy bonuses as the host logs them: a controller's level, applied or not."""
        bonuses = [objective.terms[name] for name in self._bonuses]
        return [
            term.coef.level if isinstance(term.coef, EntropyTarget) else float(term.coefficient) for term in bonuses
        ]
