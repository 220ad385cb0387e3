"""How far the trainer's log-probs are from those of the sampler that drew the tokens."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

COLUMNS = (
    "tokens",
    "unscored",
    "k1",
    "k3",
    "max_abs",
    "weight",
    "weight_squared",
    "outside",
    "log_weight",
    "sequences",
)


def clustered_mean(
    values: Float[Tensor, "N *T"], mask: Bool[Tensor, "N *T"], group: Int[Tensor, "N"]
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    r"""The mean of `values` where `mask` holds, and its standard error with rows of one group as one cluster.

    With $n$ values and mean $m$: $\mathrm{se} = \sqrt{\sum_g (\sum_{i \in g} (x_i - m))^2} / n$. Tokens and completions
    of one prompt are not independent; prompts are. Both are NaN where nothing is counted.

    Args:
        values: numbers per row, or per row and position.
        mask: which of them count.
        group: id of the prompt that a row answers.

    Returns:
        Mean and standard error, in the unit of `values`.

    >>> mean, se = clustered_mean(torch.tensor([1.0, 3.0]), torch.tensor([True, True]), torch.tensor([0, 1]))
    >>> float(mean), round(float(se), 4)
    (2.0, 0.7071)
    """
    kept = mask.to(values.dtype)
    count = kept.sum()
    mean = (torch.where(mask, values, 0.0)).sum() / count
    residual = torch.where(mask, values - mean, 0.0).reshape(len(group), -1).sum(-1)
    return mean, _cluster_error(residual, count, group)


def _cluster_error(
    residual: Float[Tensor, "N"], count: Float[Tensor, ""], group: Int[Tensor, "N"]
) -> Float[Tensor, ""]:
    index = group.unique(return_inverse=True)[1]
    per_group = torch.zeros_like(residual).index_add(0, index, residual)
    return per_group.square().sum().sqrt() / count


def mismatch_rows(
    trainer: Float[Tensor, "B T"], sampler: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]
) -> Float[Tensor, "B 10"]:
    r"""Sums per row from which `mismatch_values` makes its estimates, over any number of micro-batches and ranks.

    Args:
        trainer: log-probs of the sampled tokens under the policy in training, in nats.
        sampler: log-probs under the engine that sampled them; NaN where it could not score a token.
        mask: tokens that count.

    Returns:
        One row of sums per sequence, detached.
    """
    trainer, sampler = trainer.detach(), sampler.detach()
    scored = mask & ~sampler.isnan()
    delta = torch.where(scored, trainer - sampler, 0.0)
    ratio = torch.where(scored, delta.exp(), 0.0)
    columns = {
        "tokens": scored.sum(-1),
        "unscored": (mask & ~scored).sum(-1),
        "k1": -delta.sum(-1),
        "k3": (torch.expm1(delta) - delta).sum(-1),
        "max_abs": delta.abs().amax(-1),
        "weight": ratio.sum(-1),
        "weight_squared": ratio.square().sum(-1),
        "outside": (delta.abs() > math.log(2.0)).sum(-1),
        "log_weight": delta.sum(-1),
        "sequences": scored.any(-1),
    }
    return torch.stack([columns[name].to(delta.dtype) for name in COLUMNS], dim=-1)


def mismatch_values(rows: Float[Tensor, "N 10"], group: Int[Tensor, "N"]) -> dict[str, Float[Tensor, ""]]:
    r"""Trainer against sampler, with $\Delta = \log\pi_\text{trainer} - \log\pi_\text{sampler}$ and $\rho = e^\Delta$.

    | key | value |
    |---|---|
    | `k1` | mean $-\Delta$: unbiased for KL(sampler‖trainer) |
    | `k3` | mean $\rho - 1 - \Delta$: the same, never negative |
    | `max_abs` | max $\lvert\Delta\rvert$ |
    | `ess_token` | $(\sum\rho)^2 / (n \sum\rho^2)$ over tokens |
    | `ess_sequence` | the same over sequences with $w = e^{\sum_t \Delta_t}$ |
    | `f2` | share of tokens with $\rho$ outside [1/2, 2] |
    | `unscored` | tokens without a sampler log-prob, left out of the rest |

    `k1_se`, `k3_se` and `f2_se` are standard errors clustered by prompt.

    Args:
        rows: from `mismatch_rows`, of all micro-batches and ranks.
        group: prompt ids of the rows.

    >>> logp = torch.tensor([[-1.0, -2.0]])
    >>> rows = mismatch_rows(logp, logp, torch.tensor([[True, True]]))
    >>> float(mismatch_values(rows, torch.tensor([0]))["ess_token"])
    1.0
    """
    column = dict(zip(COLUMNS, rows.unbind(-1), strict=True))
    tokens = column["tokens"].sum()
    values = {"max_abs": column["max_abs"].amax(), "unscored": column["unscored"].sum()}
    for key, name in {"k1": "k1", "k3": "k3", "f2": "outside"}.items():
        mean = column[name].sum() / tokens
        values[key] = mean
        values[f"{key}_se"] = _cluster_error(column[name] - mean * column["tokens"], tokens, group)
    values["ess_token"] = column["weight"].sum().square() / (tokens * column["weight_squared"].sum())
    log_weight = column["log_weight"].masked_fill(column["sequences"] == 0, -torch.inf)
    log_ess = 2 * log_weight.logsumexp(0) - (2 * log_weight).logsumexp(0) - column["sequences"].sum().log()
    values["ess_sequence"] = log_ess.exp()
    return values
