import math
from typing import Any

import pytest
import torch
from loss_vectors import check_vector, double, vector_batch, vectors

from rlstab.batch import TokenBatch
from rlstab.errors import CompositionError, ConfigError
from rlstab.losses import (
    ClippedSurrogate,
    GeometricRejection,
    MaskedIS,
    Objective,
    PolicyGradient,
    SamplerWeight,
    TokenRatio,
    TruncatedIS,
    Veto,
)


def rho_batch(rho: Any, mask: Any = None) -> TokenBatch:
    """A batch whose old policy is `rho` times as likely as the sampler; None where the sampler left no score."""
    values = double([[math.nan if r is None else r for r in row] for row in rho])
    mask = torch.ones_like(values) if mask is None else torch.tensor(mask)
    return TokenBatch(mask=mask, logps={"old": torch.full_like(values, -1.0), "sampler": -1.0 - values.log()})


def numbers(weight: SamplerWeight, batch: TokenBatch) -> dict[str, float]:
    return {name: float(metric.value()) for name, metric in weight.factor(batch).metrics.items()}


# --- worked examples -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "weight"),
    [
        ("tis_token", TruncatedIS(max=2.0)),
        ("icepop_token", MaskedIS(min=0.5, max=5.0)),
        ("mis_sequence_mask", MaskedIS(max=2.5, level="sequence")),
    ],
)
def test_vectors(method: str, weight: SamplerWeight) -> None:
    (vector,) = vectors(method)
    policy = ClippedSurrogate(low=0.2, high=0.28, weights=(weight,))
    check_vector(Objective(policy=policy), vector)
    batch, _ = vector_batch(vector["inputs"])
    values = torch.where(batch.mask, policy.loss(batch).values, 0.0)
    torch.testing.assert_close(values, double(vector["expected"]["per_token_loss"]))


# --- what the parts do -----------------------------------------------------------------

RHO = [[0.1, 1.0, 4.0], [0.5, 2.0, 7.0]]
MASK = [[1, 1, 1], [1, 1, 0]]


def test_truncation_and_masking_per_token() -> None:
    batch = rho_batch(RHO, MASK)
    inside = torch.tensor(MASK).bool()
    for weight, expected in [
        (TruncatedIS(max=2.0), [[0.1, 1.0, 2.0], [0.5, 2.0, 0.0]]),
        (TruncatedIS(min=0.4, max=2.0), [[0.4, 1.0, 2.0], [0.5, 2.0, 0.0]]),
        (TruncatedIS(min=0.4, max=None), [[0.4, 1.0, 4.0], [0.5, 2.0, 0.0]]),
        (MaskedIS(max=2.0), [[0.1, 1.0, 0.0], [0.5, 2.0, 0.0]]),
        (MaskedIS(min=0.5, max=2.0), [[0.0, 1.0, 0.0], [0.5, 2.0, 0.0]]),
        (MaskedIS(min=0.5), [[0.0, 1.0, 4.0], [0.5, 2.0, 0.0]]),
    ]:
        torch.testing.assert_close(torch.where(inside, weight.factor(batch).values, 0.0), double(expected))


def test_sequence_level_takes_the_product() -> None:
    batch = rho_batch(RHO, MASK)
    for weight, expected in [
        (TruncatedIS(max=0.8, level="sequence"), [0.4, 0.8]),
        (MaskedIS(max=0.8, level="sequence"), [0.4, 0.0]),
    ]:
        values = weight.factor(batch).values.expand(2, 3)[:, :2]
        torch.testing.assert_close(values, double(expected).unsqueeze(-1).expand(2, 2))


def test_raw_and_corrected_ratios_are_logged_apart_and_masked() -> None:
    found = numbers(TruncatedIS(max=2.0), rho_batch(RHO, MASK))
    assert found == pytest.approx(
        {
            "truncated_is/raw_mean": 7.6 / 5,
            "truncated_is/raw_min": 0.1,
            "truncated_is/raw_max": 4.0,
            "truncated_is/mean": 5.6 / 5,
            "truncated_is/min": 0.1,
            "truncated_is/max": 2.0,
            "truncated_is/changed": 1 / 5,
            "unscored": 0,
        }
    )
    masked = numbers(MaskedIS(max=0.8, level="sequence"), rho_batch(RHO, MASK))
    assert masked["masked_is/raw_max"] == pytest.approx(1.0)
    assert masked["masked_is/max"] == pytest.approx(0.4)
    assert masked["masked_is/min"] == 0
    assert masked["masked_is/changed"] == 0.5


def test_geometric_rejection_keeps_the_band() -> None:
    batch = rho_batch([[2.0, 0.5], [1.1, 1.1], [1.2, 1.2], [9.0, 9.0]], [[1, 1], [1, 1], [1, 1], [0, 0]])
    weight = GeometricRejection(low=0.95, high=1.15)
    torch.testing.assert_close(weight.factor(batch).values[:3, 0], double([1.0, 1.0, 0.0]))
    found = numbers(weight, batch)
    assert found["geometric_rejection/kept"] == pytest.approx(2 / 3)
    assert found["geometric_rejection/raw_min"] == pytest.approx(1.0)
    assert found["geometric_rejection/raw_max"] == pytest.approx(1.2)


def test_veto_drops_the_sequence_of_one_bad_token_by_its_raw_ratio() -> None:
    batch = rho_batch([[1.0, 9e-5], [1.0, 1.1e-4], [1.0, 1e-9]], [[1, 1], [1, 1], [1, 0]])
    torch.testing.assert_close(Veto().factor(batch).values[:, 0], double([0.0, 1.0, 1.0]))
    found = numbers(Veto(), batch)
    assert found["veto/kept"] == pytest.approx(2 / 3)
    assert found["veto/raw_min"] == pytest.approx(9e-5)


def test_veto_sees_a_ratio_too_small_for_a_float() -> None:
    logps = {"old": torch.tensor([[-500.0, -1.0]]), "sampler": torch.tensor([[-1.0, -1.0]])}
    batch = TokenBatch(mask=torch.ones(1, 2), logps=logps)
    assert not Veto(threshold=1e-37).factor(batch).values.any()


# --- tokens without a score -----------------------------------------------------------------

WEIGHTS = [
    TruncatedIS(max=2.0),
    TruncatedIS(max=2.0, level="sequence"),
    MaskedIS(max=2.0),
    MaskedIS(max=2.0, level="sequence"),
    GeometricRejection(low=0.5, high=2.0),
    Veto(),
]


@pytest.mark.parametrize("weight", WEIGHTS, ids=repr)
def test_a_token_without_a_score_is_left_out_and_counted(weight: SamplerWeight) -> None:
    batch = rho_batch([[None, 1.5, 1.0], [1.0, 1.0, None]], [[1, 1, 1], [1, 1, 0]])
    found = weight.factor(batch)
    assert found.values.isfinite().all()
    assert found.values[0, 0] == 0
    assert (found.values[:, 1] > 0).all()
    assert found.metrics["unscored"].value() == 1  # the other NaN is padding
    kept = weight.replace(unscored="keep").factor(batch)
    assert kept.metrics["unscored"].value() == 1
    assert kept.values[0, 0] > 0


@pytest.mark.parametrize("weight", WEIGHTS, ids=repr)
def test_a_token_without_a_score_is_no_evidence(weight: SamplerWeight) -> None:
    with_it = weight.replace(unscored="keep").factor(rho_batch([[1.5, 1.0, None]]))
    without = weight.replace(unscored="keep").factor(rho_batch([[1.5, 1.0, 3.0]], [[1, 1, 0]]))
    torch.testing.assert_close(with_it.values.expand(1, 3)[:, :2], without.values.expand(1, 3)[:, :2])
    for name in set(with_it.metrics) - {"unscored"}:
        torch.testing.assert_close(with_it.metrics[name].value(), without.metrics[name].value())


@pytest.mark.parametrize("weight", WEIGHTS, ids=repr)
def test_nothing_scored_at_all(weight: SamplerWeight) -> None:
    batch = rho_batch([[None, None]])
    assert not weight.factor(batch).values.any()
    torch.testing.assert_close(
        weight.replace(unscored="keep").factor(batch).values.expand(1, 2), torch.ones(1, 2), check_dtype=False
    )


@pytest.mark.parametrize("weight", WEIGHTS, ids=repr)
@pytest.mark.parametrize(("old", "sampler"), [(-1.0, -math.inf), (-math.inf, -1.0), (-1.0, -300.0), (-300.0, -1.0)])
def test_infinite_and_huge_ratios_give_a_finite_weight(weight: SamplerWeight, old: float, sampler: float) -> None:
    leaf = torch.tensor([[-1.0, -1.0]], requires_grad=True)
    logps = {"policy": leaf, "old": torch.tensor([[old, -1.0]]), "sampler": torch.tensor([[sampler, -1.0]])}
    batch = TokenBatch(mask=torch.ones(1, 2), logps=logps, advantages=torch.ones(1))
    loss = Objective(policy=PolicyGradient(weights=(weight,)))(batch).loss
    loss.backward()
    assert loss.isfinite()
    assert leaf.grad is not None
    assert leaf.grad.isfinite().all()


# --- composition -----------------------------------------------------------------


def test_masks_go_with_one_correction_but_two_corrections_are_refused() -> None:
    ClippedSurrogate(weights=(TruncatedIS(), Veto(), GeometricRejection(low=0.9, high=1.1)))
    with pytest.raises(CompositionError, match="TruncatedIS and MaskedIS would multiply the same mismatch ratio twice"):
        ClippedSurrogate(weights=(TruncatedIS(), MaskedIS(max=2.0)))


def test_a_ratio_against_the_sampler_takes_masks_but_no_correction() -> None:
    ratio = TokenRatio(against="sampler")
    ClippedSurrogate(ratio=ratio, weights=(Veto(),))
    with pytest.raises(CompositionError, match=r"against the sampler, so MaskedIS would count.*twice"):
        ClippedSurrogate(ratio=ratio, weights=(MaskedIS(max=2.0),))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TruncatedIS(max=None), "TruncatedIS: expected min or max or both, got neither"),
        (lambda: MaskedIS(), "MaskedIS: expected min or max or both"),
        (lambda: MaskedIS(min=2.0, max=1.0), r"MaskedIS\.max: expected a ratio above 2.0, got 1.0"),
        (lambda: MaskedIS(min=-1.0), r"MaskedIS\.min"),
        (lambda: MaskedIS(max=math.nan), r"MaskedIS\.max"),
        (
            lambda: TruncatedIS().replace(level="row"),
            r"TruncatedIS\.level: expected one of 'token', 'sequence', got 'row'",
        ),
        (
            lambda: TruncatedIS().replace(unscored="zero"),
            r"TruncatedIS\.unscored: expected one of 'drop', 'keep', got 'zero'",
        ),
        (lambda: GeometricRejection(low=0.0, high=1.0), r"GeometricRejection\.low"),
        (lambda: GeometricRejection(low=1.1, high=0.9), r"GeometricRejection\.high: expected a ratio above low=1.1"),
        (lambda: Veto(threshold=0.0), r"Veto\.threshold"),
    ],
)
def test_arguments_out_of_range_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()
