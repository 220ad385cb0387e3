import math
from typing import Any

import pytest
import torch
from loss_vectors import check_vector, double, vector_batch, vectors
from torch import Tensor

from rlstab.batch import TokenBatch
from rlstab.errors import ConfigError, ShapeError
from rlstab.losses import (
    CISPO,
    GMPO,
    SAPO,
    ClippedSurrogate,
    GeometricRatio,
    Metric,
    Objective,
    PreClippedRatio,
    SequenceRatio,
    Surrogate,
)
from rlstab.losses._clipped import clipped_surrogate, sapo_surrogate


def value(metrics: dict[str, Metric], name: str) -> float:
    return float(metrics[name].value())


def ratio_batch(ratios: Any, advantages: Any, mask: Any = None, dtype: torch.dtype = torch.float64) -> TokenBatch:
    """A batch with the given ratios."""
    logp = torch.tensor(ratios, dtype=dtype).log()
    mask = torch.ones_like(logp) if mask is None else torch.tensor(mask)
    logps = {"policy": logp.requires_grad_(), "old": torch.zeros_like(logp)}
    return TokenBatch(mask=mask, logps=logps, advantages=torch.tensor(advantages, dtype=dtype))


# --- worked examples -----------------------------------------------------------------


def test_vectors_of_the_clips() -> None:
    (dapo,) = vectors("dapo_clip_higher")
    check_vector(Objective(policy=ClippedSurrogate(low=0.2, high=0.28)), dapo)
    (dr_grpo,) = vectors("dr_grpo")
    check_vector(Objective(policy=ClippedSurrogate().mean(4)), dr_grpo)
    (dual,) = vectors("dual_clip_ppo")
    check_vector(Objective(policy=ClippedSurrogate(dual=3.0)), dual)
    check_vector(Objective(policy=ClippedSurrogate(cap=3.0)), dual)
    (pre,) = vectors("stable_reinforce_preclip")
    check_vector(Objective(policy=ClippedSurrogate(ratio=PreClippedRatio()).mean("sequence")), pre)


@pytest.mark.parametrize(("name", "low", "high"), [("gspo", 0.2, 0.28), ("gspo_paper_eps", 3e-4, 4e-4)])
def test_vectors_of_gspo(name: str, low: float, high: float) -> None:
    (vector,) = vectors(name)
    policy = ClippedSurrogate(ratio=GeometricRatio(), low=low, high=high).mean("sequence")
    check_vector(Objective(policy=policy), vector)
    batch, _ = vector_batch(vector["inputs"])
    torch.testing.assert_close(policy.loss(batch).values[:, 0], double(vector["expected"]["per_seq_loss"]))


def test_vectors_of_luspo() -> None:
    (vector,) = vectors("luspo")
    policy = ClippedSurrogate(ratio=GeometricRatio(), low=0.2, high=0.28).mean(1)
    check_vector(Objective(policy=policy), vector)


def test_vectors_of_gmpo() -> None:
    (vector,) = vectors("gmpo")
    check_vector(Objective(policy=GMPO()), vector)


def test_vectors_of_cispo() -> None:
    (ceiling,) = vectors("cispo_abs_ceiling")
    check_vector(Objective(policy=CISPO(max=1.28)), ceiling)
    (delta,) = vectors("cispo_delta")
    check_vector(Objective(policy=CISPO(min=0.8, max=1.28)), delta)


def test_vectors_of_sapo() -> None:
    (vector,) = vectors("sapo")
    check_vector(Objective(policy=SAPO().mean("sequence")), vector)


@pytest.mark.parametrize("method", ["dapo_clip_higher", "dual_clip_ppo", "sapo", "cispo_abs_ceiling"])
def test_unreduced_values(method: str) -> None:
    policies: dict[str, Surrogate] = {
        "dapo_clip_higher": ClippedSurrogate(high=0.28),
        "dual_clip_ppo": ClippedSurrogate(dual=3.0),
        "sapo": SAPO(),
        "cispo_abs_ceiling": CISPO(max=1.28),
    }
    (vector,) = vectors(method)
    batch, _ = vector_batch(vector["inputs"])
    values = torch.where(batch.mask, policies[method].loss(batch).values, 0.0)
    torch.testing.assert_close(values, double(vector["expected"]["per_token_loss"]))


# --- what the parts do -----------------------------------------------------------------


def written_out(ratio: Tensor, advantages: Tensor, low: float, high: float, dual: Any, cap: Any) -> Tensor:
    """The surrogate as the papers write it: a minimum of two branches."""
    clipped = ratio.clamp(1 - low, 1 + high) * advantages
    gain = torch.min((ratio if cap is None else ratio.clamp(max=cap)) * advantages, clipped)
    if dual is not None:
        gain = torch.where(advantages < 0, torch.max(gain, dual * advantages), gain)
    return -gain


@pytest.mark.parametrize(
    ("low", "high", "dual", "cap"),
    [
        (0.2, 0.28, None, None),
        (0.0, 0.0, None, None),
        (1.0, 1.0, None, None),
        (0.2, 0.28, 3.0, None),
        (0.2, 0.28, 1.1, None),
        (0.2, 0.28, None, 4.0),
        (0.2, 0.28, None, 1.1),
        (0.2, 0.28, None, 0.5),
    ],
)
@pytest.mark.parametrize("per_token", [False, True])
def test_bounds_by_sign_are_the_minimum_of_both_branches(
    low: float, high: float, dual: Any, cap: Any, per_token: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    ratio = torch.rand(40, 50, generator=generator) * 5
    ratio[:, 0] = 1.0
    advantages = torch.randn(40, 50 if per_token else 1, generator=generator)
    advantages[3] = 0.0
    found, expected = ratio.clone().requires_grad_(), ratio.clone().requires_grad_()
    ours = clipped_surrogate(found, advantages, low=low, high=high, dual=dual, cap=cap)
    theirs = written_out(expected, advantages, low, high, dual, cap)
    ours.sum().backward()
    theirs.sum().backward()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    torch.testing.assert_close(found.grad, expected.grad, rtol=0, atol=0)


def test_dual_clip_acts_on_negative_advantages_only() -> None:
    ratio = torch.tensor([[0.5, 2.0, 9.0]])
    plain = clipped_surrogate(ratio, torch.tensor([[-1.0]]), low=0.2, high=0.2)
    dual = clipped_surrogate(ratio, torch.tensor([[-1.0]]), low=0.2, high=0.2, dual=3.0)
    torch.testing.assert_close(plain, torch.tensor([[0.8, 2.0, 9.0]]))
    torch.testing.assert_close(dual, torch.tensor([[0.8, 2.0, 3.0]]))
    for advantage in (0.0, 1.0):
        pair = [clipped_surrogate(ratio, torch.tensor([[advantage]]), low=0.2, high=0.2, dual=d) for d in (None, 3.0)]
        torch.testing.assert_close(pair[0], pair[1])


def test_cispo_keeps_a_gradient_where_ppo_has_none() -> None:
    leaf = double([[2.0, 0.1]]).log().requires_grad_()
    logps = {"policy": leaf, "old": torch.zeros_like(leaf)}
    batch = TokenBatch(mask=torch.ones(1, 2), logps=logps, advantages=double([1.0]))
    CISPO(max=1.5).loss(batch).values.sum().backward()
    torch.testing.assert_close(leaf.grad, double([[-1.5, -0.1]]))


@pytest.mark.parametrize("tau", [0.3, 1.0, 7.0])
def test_sapo_has_unit_slope_at_one_for_any_temperature(tau: float) -> None:
    _, slope = sapo_surrogate(double([[1.0]]), double([[2.5]]), tau_pos=tau, tau_neg=1.0)
    torch.testing.assert_close(slope, double([[-2.5]]))


def test_sapo_treats_a_zero_advantage_as_negative_without_effect() -> None:
    batch = ratio_batch([[3.0]], [0.0])
    assert SAPO().loss(batch).values.item() == 0


def test_gmpo_needs_token_ratios_and_row_advantages() -> None:
    with pytest.raises(ConfigError, match=r"GMPO\.ratio.*SequenceRatio"):
        GMPO(ratio=SequenceRatio())
    with pytest.raises(ShapeError, match=r"GMPO.*\[1, 2\]"):
        GMPO().loss(ratio_batch([[1.0, 1.0]], [[1.0, 1.0]]))


# --- metrics -----------------------------------------------------------------


def test_clip_metrics_count_tokens_where_the_gradient_stops() -> None:
    ratios = [[1.5, 1.0, 0.5, 9.0], [0.5, 1.5, 0.5, 1.0], [3.0, 3.0, 3.0, 3.0]]
    mask = [[1, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]]
    batch = ratio_batch(ratios, [1.0, -1.0, 1.0], mask)
    metrics = dict(ClippedSurrogate(low=0.2, high=0.2).loss(batch).metrics)
    assert value(metrics, "clip_high") == pytest.approx(1 / 7)
    assert value(metrics, "clip_low") == pytest.approx(2 / 7)
    assert value(metrics, "clip_region") == pytest.approx(3 / 7)
    assert value(metrics, "clip_low_min") == 0
    assert value(metrics, "clip_high_max") == pytest.approx(1 / 3)
    assert value(metrics, "ratio_max") == pytest.approx(1.5)


def test_clip_metrics_of_sequence_ratios_count_rows() -> None:
    batch = ratio_batch([[1.5, 1.5], [0.5, 0.5], [1.0, 1.0]], [1.0, -1.0, 1.0])
    metrics = dict(ClippedSurrogate(ratio=GeometricRatio()).loss(batch).metrics)
    assert value(metrics, "clip_high") == pytest.approx(1 / 3)
    assert value(metrics, "clip_low") == pytest.approx(1 / 3)
    assert value(metrics, "clip_low_min") == 0
    assert value(metrics, "clip_high_max") == 1


def test_dual_clip_and_cispo_and_gmpo_count_theirs() -> None:
    batch = ratio_batch([[4.0, 1.0, 0.1, 2.0]], [-1.0])
    assert value(dict(ClippedSurrogate(dual=3.0).loss(batch).metrics), "clip_dual") == pytest.approx(1 / 4)
    up = ratio_batch([[4.0, 1.0, 0.1, 6.0]], [1.0])
    assert value(dict(CISPO(max=5.0).loss(up).metrics), "clip_high") == pytest.approx(1 / 4)
    metrics = dict(GMPO().loss(up).metrics)
    assert value(metrics, "clip_high") == pytest.approx(2 / 4)
    assert value(metrics, "ratio_max") == pytest.approx(6.0)


@pytest.mark.parametrize("readable", [False, True])
def test_the_bounds_of_cispo_are_counted_on_their_side_of_the_advantage(readable: bool) -> None:
    ratios, advantages = [[4.0, 0.1, 1.0, 9.0], [4.0, 0.1, 0.2, 9.0], [4.0, 0.1, 1.0, 9.0]], [1.0, -1.0, 0.0]
    mask = [[1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 0]]
    batch = ratio_batch(ratios, advantages, mask).replace(readable=readable)
    metrics = dict(CISPO(max=3.0, min=0.5).loss(batch).metrics)
    assert value(metrics, "clip_high") == pytest.approx(1 / 9)
    assert value(metrics, "clip_low") == pytest.approx(2 / 9)
    assert value(dict(CISPO(max=0.15).loss(batch).metrics), "clip_high") == pytest.approx(2 / 9)  # padding has ratio 1


@pytest.mark.parametrize("readable", [False, True])
def test_padding_is_no_largest_ratio(readable: bool) -> None:
    for largest in (0.5, 1.0, 2.0):
        batch = ratio_batch([[largest, 0.25, 9.0]], [1.0], [[1, 1, 0]]).replace(readable=readable)
        for part in (CISPO(), SAPO(), ClippedSurrogate()):
            assert value(dict(part.loss(batch).metrics), "ratio_max") == pytest.approx(largest), part


def test_metrics_of_micro_batches_merge_to_those_of_the_whole() -> None:
    batch = ratio_batch([[1.5, 1.0], [0.5, 0.5], [2.0, 1.0]], [1.0, -1.0, 1.0], [[1, 1], [1, 0], [1, 1]])
    whole = dict(ClippedSurrogate().loss(batch).metrics)
    first, second = (dict(ClippedSurrogate().loss(part).metrics) for part in batch.split([1, 2]))
    for name, metric in whole.items():
        torch.testing.assert_close(first[name].merge(second[name]).value(), metric.value(), check_dtype=False)


def test_a_micro_batch_without_tokens_changes_no_extreme() -> None:
    batch = ratio_batch([[1.5, 1.0], [9.0, 9.0]], [1.0, 1.0], [[1, 1], [0, 0]])
    full, empty = (dict(ClippedSurrogate().loss(part).metrics) for part in batch.split([1, 1]))
    for name in ("clip_low_min", "clip_high_max", "ratio_max", "clip_high"):
        assert full[name].merge(empty[name]).value() == full[name].value(), name


# --- extremes -----------------------------------------------------------------

SURROGATES = [
    ClippedSurrogate(),
    ClippedSurrogate(dual=3.0),
    ClippedSurrogate(ratio=GeometricRatio()),
    ClippedSurrogate(ratio=SequenceRatio()),
    CISPO(),
    SAPO(),
    GMPO(),
]


@pytest.mark.parametrize("policy", SURROGATES, ids=lambda p: f"{type(p).__name__}-{type(p.ratio).__name__}")
@pytest.mark.parametrize("advantage", [-2.0, 0.0, 2.0])
@pytest.mark.parametrize(("logp", "old"), [(-1e-3, -200.0), (-200.0, -1e-3), (-math.inf, -1.0), (-1.0, -math.inf)])
def test_extreme_ratios_give_finite_numbers(policy: Surrogate, advantage: float, logp: float, old: float) -> None:
    leaf = torch.tensor([[logp, -1.0]], requires_grad=True)
    batch = TokenBatch(
        mask=torch.ones(1, 2),
        logps={"policy": leaf, "old": torch.tensor([[old, -1.0]])},
        advantages=torch.tensor([advantage]),
    )
    loss = Objective(policy=policy)(batch).loss
    loss.backward()
    assert loss.isfinite()
    assert leaf.grad is not None
    assert leaf.grad.isfinite().all()
    if advantage == 0:
        assert loss == 0
        assert not leaf.grad.any()


def test_a_policy_that_returns_nan_is_not_hidden() -> None:
    for policy in SURROGATES:
        batch = TokenBatch(
            mask=torch.ones(1, 1),
            logps={"policy": torch.tensor([[math.nan]]), "old": torch.zeros(1, 1)},
            advantages=torch.ones(1),
        )
        assert Objective(policy=policy)(batch).loss.isnan()


# --- arguments -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "wrong", "message"),
    [
        (ClippedSurrogate, {"low": 1.2}, r"ClippedSurrogate\.low: expected a number from 0 to 1, got 1.2"),
        (ClippedSurrogate, {"low": -0.1}, r"ClippedSurrogate\.low"),
        (ClippedSurrogate, {"high": -0.1}, r"ClippedSurrogate\.high: expected a number of at least 0"),
        (ClippedSurrogate, {"high": math.nan}, r"ClippedSurrogate\.high"),
        (ClippedSurrogate, {"dual": 1.0}, r"ClippedSurrogate\.dual: expected a bound > 1 on the ratio, got 1.0"),
        (ClippedSurrogate, {"cap": 0.0}, r"ClippedSurrogate\.cap"),
        (ClippedSurrogate, {"cap": 4.0, "dual": 3.0}, r"dual=3.0 and cap=4.0.*keep one"),
        (CISPO, {"max": 0.0}, r"CISPO\.max"),
        (CISPO, {"max": 1.0, "min": 1.0}, r"CISPO\.min"),
        (SAPO, {"tau_pos": 0.0}, r"SAPO\.tau_pos"),
        (SAPO, {"tau_neg": -1.0}, r"SAPO\.tau_neg"),
        (GMPO, {"low": -0.4}, r"GMPO\.low"),
    ],
)
def test_arguments_out_of_range_are_refused(part: Any, wrong: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        part(**wrong)


def test_bounds_around_one_are_inert_on_policy() -> None:
    assert ClippedSurrogate().inert_on_policy == ("the clip of ClippedSurrogate",)
    assert CISPO().inert_on_policy
    assert CISPO(max=0.2).inert_on_policy == ()
