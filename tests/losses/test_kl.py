"""KL penalties where exponentials leave the range of the dtype, and what they count."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from rlstab.batch import TokenBatch
from rlstab.losses import KL, GeometricRatio, Objective, PreClippedRatio, Ratio, TokenRatio, warn_overflow

NAN, INF = torch.nan, torch.inf
LARGEST = torch.finfo(torch.float32).max
WEIGHTED = [("k1", "differentiable"), *itertools.product(["k2", "k3"], ["detached", "differentiable"])]
ALLOWED = [*WEIGHTED, ("k2", "none"), ("k3", "none")]
LOG_PROBS = [-1e-3, -1.0, -30.0, -86.0, -120.0, -200.0, -340.0]


def batch_of(policy: Any, *, dtype: torch.dtype = torch.float32, mask: Any = None, **others: Any) -> TokenBatch:
    logp = torch.tensor([policy], dtype=dtype).requires_grad_()
    logps = {"policy": logp} | {name: torch.tensor([values], dtype=dtype) for name, values in others.items()}
    return TokenBatch(mask=torch.ones_like(logp) if mask is None else torch.tensor([mask]), logps=logps)


def by(source: str, values: list[float]) -> dict[str, Any]:
    return {source: values}


def values_and_slopes(term: KL, batch: TokenBatch) -> tuple[Tensor, Tensor]:
    values = term.loss(batch).values
    (slopes,) = torch.autograd.grad(values.sum(), [batch.logp("policy")])
    return values.detach()[0], slopes[0]


def metrics(term: KL, batch: TokenBatch) -> dict[str, float]:
    return {name: float(metric.value()) for name, metric in term.loss(batch).metrics.items()}


def exactly(estimator: str, a: float, b: float) -> tuple[float, float, float]:
    """Weighted value, slope at fixed weight and joint slope, their exponents added by hand."""
    if estimator == "k1":
        return math.exp(b) * a, math.exp(b), math.exp(b) * (1 + a)
    if estimator == "k2":
        return math.exp(b) * a * a / 2, math.exp(b) * a, math.exp(b) * (a + a * a / 2)
    value = math.exp(b) * (math.expm1(-a) + a) if abs(a) < 1 else math.exp(b - a) + math.exp(b) * (a - 1)
    return value, math.exp(b) - math.exp(b - a), math.exp(b) * a


CASES = [
    (policy, old, ref)
    for policy, old, ref in itertools.product(LOG_PROBS, LOG_PROBS, LOG_PROBS)
    if policy - old < 40 and ref - old < 85  # the weight is not held, and the value fits float32
]


@pytest.mark.parametrize(("estimator", "weight"), WEIGHTED)
def test_weighted_estimates_are_exact_wherever_they_fit_the_dtype(estimator: Any, weight: Any) -> None:
    policy, old, ref = (list(column) for column in zip(*CASES, strict=True))
    values, slopes = values_and_slopes(KL(estimator=estimator, weight=weight), batch_of(policy, old=old, initial=ref))
    found = [exactly(estimator, p - r, p - o) for p, o, r in CASES]
    expected = torch.tensor(found)[:, [0, 2 if weight == "differentiable" else 1]]
    torch.testing.assert_close(torch.stack([values, slopes], dim=-1), expected, rtol=1e-4, atol=1e-6)


def test_a_token_that_the_policy_gave_up_keeps_its_value() -> None:
    """At π = e^-200 and old = ref = e^-1 the weight underflows and e^-a overflows; their product is 1."""
    values, slopes = values_and_slopes(KL(weight="differentiable"), batch_of([-200.0], old=[-1.0], initial=[-1.0]))
    assert values.tolist() == [1.0]
    assert slopes.tolist() == [0.0]


@pytest.mark.parametrize("policy", [-90.0, -1e4, -INF])
def test_a_plain_k3_beyond_the_dtype_is_infinite_with_a_finite_slope_and_counted(policy: float) -> None:
    batch = batch_of([policy, -1.5], initial=[-1.0, -1.0])
    term = KL()
    values, slopes = values_and_slopes(term, batch)
    assert values[0] == INF
    assert slopes[0] == (0.0 if policy == -INF else -LARGEST)
    assert values[1] == pytest.approx(math.exp(0.5) - 1.5, rel=1e-5)
    assert metrics(term, batch)["overflow"] == 1
    with pytest.warns(RuntimeWarning, match="'drift'.*held at the largest number"):
        warn_overflow("drift", metrics(term, batch))


def test_nothing_is_counted_in_the_ordinary_range() -> None:
    batch = batch_of([-1.0, -2.0], old=[-1.1, -2.2], initial=[-3.0, -1.0])
    assert metrics(KL(), batch)["overflow"] == 0
    weighted = metrics(KL(weight="differentiable"), batch)
    assert weighted["overflow"] == weighted["impossible"] == 0


def test_a_small_k3_keeps_its_digits() -> None:
    values, _ = values_and_slopes(KL(), batch_of([-1.0], initial=[-1.0 - 2**-10]))
    assert float(values) == pytest.approx(2**-21 - 2**-30 / 6, rel=1e-4)


@pytest.mark.parametrize(("estimator", "weight"), ALLOWED)
@pytest.mark.parametrize("ratio", [TokenRatio(), GeometricRatio(), PreClippedRatio(min=0.5, max=2.0)], ids=repr)
def test_slopes_are_those_of_the_formula(estimator: Any, weight: Any, ratio: Ratio) -> None:
    """In the ordinary range autograd of the formula says the same."""
    generator = torch.Generator().manual_seed(0)

    def noise() -> list[float]:
        return (-2 * torch.rand(6, generator=generator, dtype=torch.float64)).tolist()

    batch = batch_of(noise(), dtype=torch.float64, mask=[True] * 5 + [False], old=noise(), initial=noise())
    found = values_and_slopes(KL(estimator=estimator, weight=weight, ratio=ratio), batch)
    a = batch.logp("policy") - batch.logp("initial")
    formula = {"k1": a, "k2": a.square() / 2, "k3": (-a).exp() - 1 + a}[estimator]
    w = ratio.log_ratio(batch).exp()
    formula = formula * {"none": torch.ones(()), "detached": w.detach(), "differentiable": w}[weight]
    (slopes,) = torch.autograd.grad(formula.sum(), [batch.logp("policy")])
    torch.testing.assert_close(found, (formula.detach()[0], slopes[0]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("source", ["old", "sampler"])
@pytest.mark.parametrize("weight", ["detached", "differentiable"])
def test_a_token_without_a_weight_is_left_out_and_counted(weight: Any, source: str) -> None:
    term = KL(weight=weight, ratio=TokenRatio(against=source))
    nothing = [-INF, NAN] if source == "sampler" else [-INF, -INF]
    batch = batch_of([-INF, -1.0, -1.0], initial=[-1.0, -2.0, -2.0], **by(source, [*nothing, -1.5]))
    values, slopes = values_and_slopes(term, batch)
    alone = values_and_slopes(term, batch_of([-1.0], initial=[-2.0], **by(source, [-1.5])))
    assert values.tolist() == [0.0, 0.0, *alone[0].tolist()]
    assert slopes.tolist() == [0.0, 0.0, *alone[1].tolist()]
    assert metrics(term, batch)["unscored" if source == "sampler" else "impossible"] == 2


@pytest.mark.parametrize("ratio", [TokenRatio(), GeometricRatio()], ids=repr)
@pytest.mark.parametrize(("estimator", "weight"), ALLOWED)
def test_no_log_probs_make_nan(estimator: Any, weight: Any, ratio: Ratio) -> None:
    extremes = [0.0, -1.0, -60.0, -95.0, -200.0, -1e4, -1e30, -INF]
    rows = list(itertools.product(extremes, repeat=3))
    logps = {
        name: torch.tensor(column).unsqueeze(-1)
        for name, column in zip(("policy", "old", "initial"), zip(*rows, strict=True), strict=True)
    }
    logps["policy"].requires_grad_()
    batch = TokenBatch(mask=torch.ones(len(rows), 1), logps=logps)
    loss = Objective(drift=KL(estimator=estimator, weight=weight, ratio=ratio))(batch).loss
    (slopes,) = torch.autograd.grad(loss, [logps["policy"]])
    assert not loss.isnan()
    assert slopes.isfinite().all()
