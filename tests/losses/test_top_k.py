"""K tokens and a bucket: a lower bound by enumeration, for every generator and every choice of tokens."""

import math

import pytest
import torch
from generators import FAMILY, NAMES
from torch import Tensor

from rlstab.errors import ConfigError, ShapeError
from rlstab.losses import Divergence, ReverseKL, exact_divergence, top_k_divergence

VOCABULARY = 9
every_generator = pytest.mark.parametrize("generator", [term for term, _ in FAMILY], ids=NAMES)


def distributions(farthest: float = 3.0) -> tuple[Tensor, Tensor]:
    """Many pairs, near and far, as log-probs."""
    random = torch.Generator().manual_seed(0)
    near, far = (torch.randn(200, VOCABULARY, generator=random, dtype=torch.float64) for _ in range(2))
    scale = torch.logspace(-2, math.log10(farthest), 200, dtype=torch.float64).unsqueeze(-1)
    return near.log_softmax(-1), (near + scale * far).log_softmax(-1)


@every_generator
@pytest.mark.parametrize("order", ["reference's top", "policy's top", "neither"])
def test_a_lower_bound_that_rises_to_the_divergence(generator: Divergence, order: str) -> None:
    logp, ref_logp = distributions()
    by = {"reference's top": ref_logp, "policy's top": logp, "neither": -(logp - ref_logp).abs()}[order]
    ids = by.argsort(-1, descending=True)
    logp, ref_logp = logp.gather(-1, ids), ref_logp.gather(-1, ids)
    exact = exact_divergence(generator, logp, ref_logp)
    bounds = [
        top_k_divergence(generator, logp[:, :k], ref_logp[:, :k], resolution=1e-14) for k in range(VOCABULARY + 1)
    ]
    assert bounds[0].abs().max() == 0
    for lower, upper in zip(bounds, [*bounds[1:], exact], strict=True):
        assert (lower <= upper + 1e-8 * (1 + exact)).all()
    torch.testing.assert_close(bounds[-1], exact, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(bounds[-2], exact, rtol=1e-6, atol=1e-12)  # a bucket of one token


@every_generator
def test_a_lower_bound_where_tokens_are_all_but_impossible(generator: Divergence) -> None:
    logp, ref_logp = distributions(farthest=60.0)
    exact = exact_divergence(generator, logp, ref_logp)
    for k in range(VOCABULARY + 1):
        bound = top_k_divergence(generator, logp[:, :k], ref_logp[:, :k])
        assert (bound <= exact * (1 + 1e-8) + 1e-12).all()


@every_generator
@pytest.mark.parametrize("resolution", [1e-6, 1e-2, 0.3])
def test_a_coarse_resolution_only_lowers_the_bound(generator: Divergence, resolution: float) -> None:
    logp, ref_logp = distributions()
    fine, coarse = (
        top_k_divergence(generator, logp[:, :4], ref_logp[:, :4], resolution=limit) for limit in (1e-14, resolution)
    )
    assert (coarse <= fine + 1e-8 * (1 + fine)).all()


def test_without_the_bucket_it_is_no_bound() -> None:
    logp, ref_logp = distributions()
    top = ref_logp.argsort(-1, descending=True)[:, :3]
    logp, ref_logp = logp.gather(-1, top), ref_logp.gather(-1, top)
    assert ((logp - ref_logp) * logp.exp()).sum(-1).min() < 0
    assert top_k_divergence(ReverseKL(), logp, ref_logp).min() >= 0


@every_generator
def test_the_gradient_is_that_of_the_buckets(generator: Divergence) -> None:
    logits, ref_logits = (x[::20].clone() for x in distributions())
    logits.requires_grad_()
    logp, ref_logp = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    (found,) = torch.autograd.grad(
        top_k_divergence(generator, logp[:, :4], ref_logp[:, :4]).sum(), [logits], retain_graph=True
    )
    merged, ref_merged = (torch.cat([x[:, :4], x[:, 4:].logsumexp(-1, keepdim=True)], -1) for x in (logp, ref_logp))
    (truth,) = torch.autograd.grad(exact_divergence(generator, merged, ref_merged).sum(), [logits])
    torch.testing.assert_close(found, truth, rtol=1e-8, atol=1e-12)


def test_rounded_log_probs_that_leave_nothing() -> None:
    """A server's log-probs may add up to a little more than 1, which no tail may turn into infinity."""
    ref_logp = torch.tensor([0.75, 0.25]).log() + 1e-4
    logp = torch.tensor([0.5, 0.25]).log().requires_grad_()
    bound = top_k_divergence(ReverseKL(), logp, ref_logp)
    bound.backward()
    assert bound.isfinite()
    assert logp.grad is not None
    assert logp.grad.isfinite().all()


def test_half_precision_is_raised() -> None:
    logp = torch.tensor([0.5, 0.25]).log().bfloat16()
    assert top_k_divergence(ReverseKL(), logp, logp).dtype == torch.float32


@pytest.mark.wrong_shapes
def test_refusals() -> None:
    with pytest.raises(ShapeError, match=r"ref_logp: expected the shape of logp \[2\], got \[3\]"):
        top_k_divergence(ReverseKL(), torch.zeros(2), torch.zeros(3))
    with pytest.raises(ConfigError, match="resolution: expected a number from 0 to 1, got 2"):
        top_k_divergence(ReverseKL(), torch.zeros(2), torch.zeros(2), resolution=2)
