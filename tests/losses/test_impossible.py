"""Tokens to which a policy gives probability 0: left out where a loss cannot do without their log-prob, and counted."""

from typing import Any

import pytest
import torch
from torch import Tensor

from rlstab.batch import TokenBatch
from rlstab.losses import (
    CISPO,
    GMPO,
    SAPO,
    VESPO,
    AStarPO,
    ClippedSurrogate,
    GeometricRatio,
    GeometricRejection,
    GSPOTokenRatio,
    ImportanceSurrogate,
    KLCov,
    MaskedIS,
    Metric,
    PolicyGradient,
    ReinforcePP,
    SamplerWeight,
    SequenceRatio,
    Surrogate,
    TokenRatio,
    TruncatedIS,
    Veto,
)

INF, NAN = torch.inf, torch.nan
OF_RATIOS = [
    ClippedSurrogate(),
    ClippedSurrogate(low=0.1, high=0.1, dual=3.0),
    ClippedSurrogate(ratio=GSPOTokenRatio()),
    SAPO(),
    CISPO(),
    CISPO(min=0.8),
    VESPO(),
    ImportanceSurrogate(),
    ClippedSurrogate(ratio=GeometricRatio()),
    ClippedSurrogate(ratio=SequenceRatio()),
    GMPO(),
]
WEIGHTS = [
    TruncatedIS(max=2.0),
    TruncatedIS(max=2.0, level="sequence"),
    MaskedIS(min=0.5, max=2.0),
    MaskedIS(min=0.5, max=2.0, level="sequence"),
    GeometricRejection(low=0.5, high=2.0),
    Veto(),
]


def batch_of(logps: dict[str, list[float]], advantage: float = 1.0) -> TokenBatch:
    """One row of three tokens."""
    given = {name: torch.tensor([values], dtype=torch.float64) for name, values in logps.items()}
    given["policy"].requires_grad_()
    column = torch.tensor([advantage], dtype=torch.float64)
    columns = {"advantages": column, "rewards": column, "baseline": torch.zeros_like(column)}
    return TokenBatch(mask=torch.ones(1, 3), logps=given, **columns)  # type: ignore[arg-type]


def result(term: Any, batch: TokenBatch) -> tuple[Tensor, Tensor, dict[str, Metric]]:
    values, metrics = term.loss(batch)
    (slopes,) = torch.autograd.grad(values.sum(), [batch.logp("policy")])
    return values.detach(), slopes, dict(metrics)


def assert_left_out(surrogate: Surrogate, logps: dict[str, list[float]], metric: str, advantage: float = 1.0) -> None:
    """The second token has no loss and no gradient, is counted, and is to its sequence as if nothing had changed."""
    values, slopes, metrics = result(surrogate, batch_of(logps, advantage))
    unchanged = {name: [of[0], -1.0, of[2]] for name, of in logps.items()}
    expected, expected_slopes, _ = result(surrogate, batch_of(unchanged, advantage))
    expected_slopes[0, 1] = 0
    if expected.shape == expected_slopes.shape:
        expected[0, 1] = 0
    torch.testing.assert_close(values, expected)
    torch.testing.assert_close(slopes, expected_slopes)
    assert metrics[metric].value() == 1
    assert not [name for name, found in metrics.items() if not found.value().isfinite()]


@pytest.mark.parametrize("surrogate", [*OF_RATIOS, PolicyGradient(), AStarPO()], ids=repr)
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_what_policy_and_old_exclude_is_left_out(surrogate: Surrogate, advantage: float) -> None:
    logps = {"policy": [-1.0, -INF, -2.0], "old": [-1.1, -INF, -1.7], "initial": [-1.0, -1.0, -1.0]}
    assert_left_out(surrogate, logps, "impossible", advantage)


@pytest.mark.parametrize("surrogate", OF_RATIOS, ids=repr)
def test_what_the_old_policy_excludes_it_has_not_drawn(surrogate: Surrogate) -> None:
    assert_left_out(surrogate, {"policy": [-1.0, -0.1, -2.0], "old": [-1.1, -INF, -1.7]}, "impossible")


@pytest.mark.parametrize("surrogate", [CISPO(), CISPO(min=0.8), PolicyGradient(), AStarPO()], ids=repr)
def test_a_log_prob_of_minus_infinity_is_no_loss(surrogate: Surrogate) -> None:
    """Times an advantage it would be infinite, or a number without meaning."""
    logps = {"policy": [-1.0, -INF, -2.0], "old": [-1.1, -1.0, -1.7], "initial": [-1.0, -1.0, -1.0]}
    assert_left_out(surrogate, logps, "impossible")


@pytest.mark.parametrize("surrogate", [ClippedSurrogate(), SAPO(), ImportanceSurrogate()], ids=repr)
def test_a_ratio_of_zero_is_a_ratio(surrogate: Surrogate) -> None:
    values, slopes, metrics = result(surrogate, batch_of({"policy": [-1.0, -INF, -2.0], "old": [-1.1, -1.0, -1.7]}))
    near = result(surrogate, batch_of({"policy": [-1.0, -700.0, -2.0], "old": [-1.1, -1.0, -1.7]}))
    torch.testing.assert_close((values, slopes), near[:2])
    assert metrics["impossible"].value() == 0


def test_the_mean_log_prob_is_that_of_the_tokens_that_are_left() -> None:
    metrics = PolicyGradient().loss(batch_of({"policy": [-1.0, -INF, -2.0]})).metrics
    assert metrics["logp"].value() == -1.5


@pytest.mark.parametrize("nothing", [NAN, -INF])
@pytest.mark.parametrize("policy", [-1.0, -INF])
@pytest.mark.parametrize("surrogate", [ClippedSurrogate(), SAPO(), CISPO(), ImportanceSurrogate()], ids=repr)
def test_what_the_sampler_has_no_score_for_is_unscored(surrogate: Surrogate, policy: float, nothing: float) -> None:
    against_sampler = surrogate.replace(ratio=TokenRatio(against="sampler"))
    logps = {"policy": [-1.0, policy, -2.0], "sampler": [-1.1, nothing, -1.7]}
    assert_left_out(against_sampler, logps, "unscored")


@pytest.mark.parametrize("weight", WEIGHTS, ids=repr)
@pytest.mark.parametrize("old", [-1.0, -INF])
@pytest.mark.parametrize("unscored", ["drop", "keep"])
def test_an_engine_cannot_have_drawn_what_it_excludes(weight: SamplerWeight, old: float, unscored: str) -> None:
    part = weight.replace(unscored=unscored)
    found, expected = (
        part.factor(
            batch_of({"policy": [-1.0, -1.0, -1.0], "old": [-1.0, old, -1.2], "sampler": [-1.3, nothing, -1.0]})
        )
        for nothing in (-INF, NAN)
    )
    torch.testing.assert_close(found.values, expected.values)
    assert found.values.isfinite().all()
    assert found.metrics["unscored"].value() == 1
    assert all(metric.value().isfinite() for metric in found.metrics.values())


def test_the_penalty_of_kl_cov_passes_over_it() -> None:
    term = KLCov(fraction=1.0)
    batch = batch_of({"policy": [-1.0, -1.0, -INF], "old": [-1.5, -INF, -INF]})
    batch = batch.replace(parts={term.selection.key: torch.ones(1, 3, dtype=torch.bool)})
    values, slopes, _ = result(term, batch)
    assert values.tolist() == [[0.5, 0.0, 0.0]]
    assert slopes.tolist() == [[1.0, 0.0, 0.0]]


def test_the_penalty_of_reinforce_pp_passes_over_it() -> None:
    part = ReinforcePP(kl_coef=0.1)
    spoiled = batch_of({"policy": [0.0] * 3, "old": [-1.0, -INF, -INF], "initial": [-2.0, -INF, -1.0]})
    same = batch_of({"policy": [0.0] * 3, "old": [-1.0, -1.0, -1.0], "initial": [-2.0, -1.0, -1.0]})
    torch.testing.assert_close(part.compute(spoiled), part.compute(same))
