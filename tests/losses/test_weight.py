import math
from typing import Any

import pytest
import torch
from loss_vectors import check_vector, double, vector_batch, vectors

from rlstab.batch import TokenBatch
from rlstab.errors import ConfigError
from rlstab.losses import (
    ClippedSurrogate,
    Objective,
    OffPolicySequenceMask,
    PolicyGradient,
    TopEntropy,
    TruncatedCompletions,
    run_parts,
)
from rlstab.losses._weight import masked_quantile


@pytest.mark.parametrize(("method", "delta"), [("opsm", 0.1), ("opsm_delta_0.5", 0.5)])
def test_vectors_of_the_off_policy_mask(method: str, delta: float) -> None:
    (vector,) = vectors(method)
    mask = OffPolicySequenceMask(delta=delta)
    check_vector(Objective(policy=ClippedSurrogate(high=0.28, weights=(mask,)).mean("sequence")), vector)
    batch, _ = vector_batch(vector["inputs"])
    torch.testing.assert_close(mask.factor(batch).values[:, 0], double(vector["expected"]["keep"]))


def off_policy_batch(**logps: Any) -> TokenBatch:
    mask = torch.ones(1, 2, dtype=torch.bool)
    return TokenBatch(mask=mask, logps={k: double([v]) for k, v in logps.items()}, advantages=double([-1.0]))


def test_off_policy_mask_asks_the_sampler_where_there_is_one() -> None:
    drifted = off_policy_batch(policy=[-3.0, -1.0], old=[-1.0, -1.0])
    assert not OffPolicySequenceMask(delta=0.9).factor(drifted).values.any()
    agreed = off_policy_batch(policy=[-3.0, -1.0], old=[-1.0, -1.0], sampler=[-3.0, -1.0])
    assert OffPolicySequenceMask(delta=0.9).factor(agreed).values.all()
    assert not OffPolicySequenceMask(delta=0.9, behaviour="old").factor(agreed).values.any()


def test_off_policy_mask_finds_no_evidence_in_a_token_without_a_score() -> None:
    batch = off_policy_batch(policy=[-3.0, -1.5], old=[-3.0, -1.5], sampler=[math.nan, -1.0])
    assert OffPolicySequenceMask(delta=0.3).factor(batch).values.all()  # 0.5 over two tokens
    assert not OffPolicySequenceMask(delta=0.2).factor(batch).values.any()


def test_off_policy_mask_with_advantages_per_token() -> None:
    batch = off_policy_batch(policy=[-3.0, -3.0], old=[-1.0, -1.0]).replace(advantages=double([[1.0, -1.0]]))
    torch.testing.assert_close(OffPolicySequenceMask(delta=0.5).factor(batch).values, double([[1.0, 0.0]]))


@pytest.mark.parametrize("q", [0.0, 0.2, 0.5, 0.77, 0.8, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_masked_quantile_is_torch_quantile_bit_for_bit(q: float, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    for n in (1, 2, 3, 17, 100):
        values = torch.rand(2, 100, generator=generator, dtype=dtype)
        mask = torch.zeros(200, dtype=torch.bool)
        mask[torch.randperm(200, generator=generator)[:n]] = True
        mask = mask.view(2, 100)
        assert masked_quantile(values, mask, q) == torch.quantile(values[mask], q)
    assert masked_quantile(values, torch.zeros_like(mask), q).isnan()


def entropy_batch() -> TokenBatch:
    generator = torch.Generator().manual_seed(3)
    mask = torch.arange(6) < torch.tensor([6, 3, 5, 1]).unsqueeze(-1)
    entropy = torch.rand(4, 6, generator=generator)
    logps = {"policy": torch.randn(4, 6, generator=generator)}
    advantages = torch.tensor([1.0, -1.0, 2.0, 0.5])
    return TokenBatch(mask=mask, logps=logps, vocab={"entropy": entropy}, advantages=advantages)


def test_top_entropy_keeps_the_most_uncertain_tokens() -> None:
    batch = entropy_batch()
    for fraction in (0.0, 0.2, 0.5, 1.0):
        kept = TopEntropy(fraction=fraction, over="micro_batch").factor(batch).values.bool()
        inside = batch.vocab["entropy"][batch.mask]
        threshold = torch.quantile(inside, 1 - fraction)
        assert torch.equal(kept, (batch.vocab["entropy"] >= threshold) & batch.mask)
        assert kept.sum() == (inside >= threshold).sum()
    assert TopEntropy(fraction=0.0, over="micro_batch").factor(batch).values.sum() == 1


@pytest.mark.parametrize("sizes", [[1, 1, 1, 1], [2, 2], [3, 1]])
def test_top_entropy_over_a_step_is_the_same_under_any_split(sizes: list[int]) -> None:
    policy = PolicyGradient(weights=(TopEntropy(fraction=0.4),))
    batch = run_parts(policy.requires, entropy_batch())
    whole = policy.weights[0].factor(batch).values
    parts = [policy.weights[0].factor(part).values for part in batch.split(sizes)]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=0)
    local = TopEntropy(fraction=0.4, over="micro_batch")
    if sizes == [1, 1, 1, 1]:
        assert not torch.equal(torch.cat([local.factor(part).values for part in batch.split(sizes)]), whole)


def test_truncated_completions_give_nothing_but_stay_in_the_count() -> None:
    leaf = double([[-1.0, -1.0], [-1.0, 0.0]]).requires_grad_()
    batch = TokenBatch(
        mask=torch.tensor([[1, 1], [1, 0]]),
        logps={"policy": leaf},
        advantages=double([1.0, 1.0]),
        truncated=torch.tensor([True, False]),
    )
    loss, reports = Objective(policy=PolicyGradient(weights=(TruncatedCompletions(),)))(batch)
    loss.backward()
    assert loss.item() == pytest.approx(1 / 3)
    torch.testing.assert_close(leaf.grad, double([[0.0, 0.0], [-1 / 3, 0.0]]))
    assert reports["policy"].metrics["truncated_completions/kept"].value() == 0.5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OffPolicySequenceMask(delta=-0.1), r"OffPolicySequenceMask\.delta"),
        (lambda: TopEntropy(fraction=1.5), r"TopEntropy\.fraction: expected a number from 0 to 1, got 1.5"),
        (
            lambda: TopEntropy(fraction=0.5).replace(over="generation"),
            r"TopEntropy\.over: expected one of 'step', 'micro_batch'",
        ),
    ],
)
def test_arguments_out_of_range_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()
