import math
from typing import Any

import pytest
import torch
from torch import Tensor

from rlstab.batch import LogProbs, TokenBatch
from rlstab.errors import ConfigError
from rlstab.losses import (
    ClippedSurrogate,
    GeometricRatio,
    GSPOTokenRatio,
    ImportanceSurrogate,
    PreClippedRatio,
    Ratio,
    SequenceRatio,
    TokenRatio,
)
from rlstab.losses._ratio import leave_out, missing, ratio_of

X = torch.tensor([[0.3, -0.1, 0.4], [0.2, 0.6, 9.0]], dtype=torch.float64)
MASK = torch.tensor([[True, True, True], [True, True, False]])


def batch_of(x: Tensor, mask: Tensor = MASK, advantages: Tensor | None = None) -> TokenBatch:
    """A batch whose log-ratio is `x`."""
    old = torch.full_like(x, -1.0).detach()
    return TokenBatch(mask=mask, logps={"policy": old + x, "old": old}, advantages=advantages)


def test_hand_worked_values() -> None:
    batch = batch_of(X)
    torch.testing.assert_close(TokenRatio().log_ratio(batch), torch.where(MASK, X, 0.0))
    torch.testing.assert_close(SequenceRatio().log_ratio(batch), torch.tensor([[0.6], [0.8]], dtype=torch.float64))
    torch.testing.assert_close(GeometricRatio().log_ratio(batch), torch.tensor([[0.2], [0.4]], dtype=torch.float64))
    token = GSPOTokenRatio().log_ratio(batch)
    torch.testing.assert_close(token, torch.tensor([[0.2], [0.4]], dtype=torch.float64).expand(2, 3))


@pytest.mark.parametrize(
    ("ratio", "expected"),
    [
        (TokenRatio(), [[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]]),
        (SequenceRatio(), [[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]]),
        (GeometricRatio(), [[1 / 3, 1 / 3, 1 / 3], [0.5, 0.5, 0.0]]),
    ],
)
def test_gradient_of_the_log_ratio(ratio: Ratio, expected: list[list[float]]) -> None:
    x = X.clone().requires_grad_()
    ratio.log_ratio(batch_of(x)).sum().backward()
    torch.testing.assert_close(x.grad, torch.tensor(expected, dtype=torch.float64))


def test_gspo_token_equals_gspo_where_a_sequence_has_one_advantage() -> None:
    gradients = []
    for ratio in (GeometricRatio(), GSPOTokenRatio()):
        x = X.clone().requires_grad_()
        batch = batch_of(x, advantages=torch.tensor([1.0, -2.0], dtype=torch.float64))
        policy = ClippedSurrogate(ratio=ratio, low=0.1, high=0.5).mean("sequence")
        loss = policy.mean.reduce(policy.loss(batch).values, batch)
        loss.backward()
        gradients.append((loss.detach(), x.grad))
    torch.testing.assert_close(gradients[0], gradients[1])


def test_gspo_token_gives_each_token_its_own_advantage() -> None:
    x = X.clone().requires_grad_()
    advantages = torch.tensor([[1.0, 0.0, -1.0], [2.0, 0.0, 5.0]], dtype=torch.float64)
    ImportanceSurrogate(ratio=GSPOTokenRatio()).loss(batch_of(x, advantages=advantages)).values.sum().backward()
    s = torch.tensor([[0.2], [0.4]], dtype=torch.float64).exp()
    torch.testing.assert_close(x.grad, torch.where(MASK, -s * advantages, 0.0))


def test_on_policy_gspo_has_the_gradient_of_grpo() -> None:
    gradients = []
    for ratio in (TokenRatio(), GeometricRatio(), GSPOTokenRatio()):
        logp = X.clone().requires_grad_()
        batch = TokenBatch(mask=MASK, logps={"policy": logp}, advantages=torch.tensor([1.0, -2.0], dtype=torch.float64))
        policy = ClippedSurrogate(ratio=ratio).mean("sequence")
        policy.mean.reduce(policy.loss(batch).values, batch).backward()
        gradients.append(logp.grad)
    torch.testing.assert_close(gradients[1], gradients[0])
    torch.testing.assert_close(gradients[2], gradients[0])


def test_pre_clip_bounds_any_ratio() -> None:
    x = torch.tensor([[20.0, 1.0, -20.0]], dtype=torch.float64, requires_grad=True)
    mask = torch.ones(1, 3, dtype=torch.bool)
    clipped = PreClippedRatio(min=0.5, max=100.0).log_ratio(batch_of(x, mask))
    torch.testing.assert_close(clipped.exp(), torch.tensor([[100.0, math.e, 0.5]], dtype=torch.float64))
    clipped.sum().backward()
    torch.testing.assert_close(x.grad, torch.tensor([[0.0, 1.0, 0.0]], dtype=torch.float64))
    sequence = PreClippedRatio(ratio=SequenceRatio(), max=2.0)
    assert sequence.sequence_level
    assert sequence.log_ratio(batch_of(X)).exp() == pytest.approx(torch.tensor([[math.exp(0.6)], [2.0]]))


def test_a_wrapper_is_against_what_it_wraps() -> None:
    ratio = PreClippedRatio(ratio=TokenRatio(against="sampler"))
    assert ratio.against == "sampler"
    assert ratio.requires == {LogProbs("policy"), LogProbs("sampler")}
    assert ratio.replace(max=5.0).against == "sampler"
    assert ratio.inert_on_policy == ()
    assert PreClippedRatio().inert_on_policy


@pytest.mark.parametrize("wrong", [{"min": 0.0}, {"min": 1.5}, {"max": 0.5}, {"max": math.nan}])
def test_pre_clip_refuses_bounds_that_exclude_one(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"PreClippedRatio\.{next(iter(wrong))}: expected"):
        PreClippedRatio(**wrong)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_ratio_stays_finite_together_with_a_product_of_two(dtype: torch.dtype) -> None:
    x = torch.tensor([-math.inf, -1e4, 1.0, 1e4, math.inf], dtype=dtype, requires_grad=True)
    ratio = ratio_of(x)
    assert (ratio * ratio).isfinite().all()
    assert ratio[2] == x.detach()[2].exp()
    ratio.square().sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert x.grad[3:].tolist() == [0.0, 0.0]


def test_a_broken_policy_is_not_hidden() -> None:
    assert ratio_of(torch.tensor([math.nan])).isnan()


def test_log_probs_that_are_known_to_be_complete_are_not_searched() -> None:
    old = torch.tensor([[-1.0, -math.inf]])
    batch = TokenBatch(mask=torch.ones(1, 2), logps={"policy": torch.zeros(1, 2), "old": old})
    values = torch.ones(1, 2)
    assert missing(batch, "old").tolist() == [[False, True]]
    assert leave_out(values, batch, "old").tolist() == [[1.0, 0.0]]
    trusted = batch.replace(complete=frozenset({"old"}))
    assert not missing(trusted, "old").any()
    assert leave_out(values, trusted, "old") is values


def test_on_policy_the_old_log_probs_are_missing_where_the_policys_are() -> None:
    batch = TokenBatch(mask=torch.ones(1, 2), logps={"policy": torch.tensor([[-math.inf, -1.0]])})
    assert missing(batch, "old") is missing(batch, "policy")
    assert missing(batch, "old").tolist() == [[True, False]]
