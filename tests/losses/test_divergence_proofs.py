"""Expectations over every token and every sequence: what is called unbiased has the true value and gradient."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from enumeration import SOURCES, Sequences, Tokens, assert_exact, expectation, gradient, relative
from generators import FAMILY, NAMES, forward_kl, reverse_kl
from torch import Tensor

from rlstab.batch import ExactDivergence, TokenBatch
from rlstab.losses import Divergence, ForwardKL, ReverseKL, exact_divergence

MUS = [("policy", "policy"), ("old", "old"), ("sampler", "sampler"), ("reference", "initial")]

every_generator = pytest.mark.parametrize(("term", "f"), FAMILY, ids=NAMES)
every_mu = pytest.mark.parametrize(("samples", "drawn_by"), MUS, ids=[samples for samples, _ in MUS])


@every_generator
@every_mu
def test_sampled_tokens(term: Divergence, f: Callable[[Tensor], Tensor], samples: Any, drawn_by: str) -> None:
    world = Tokens()
    truth = world.divergence(f)
    estimate = expectation(term.replace(samples=samples), world, drawn_by=drawn_by)
    assert_exact(estimate, truth)
    assert_exact(gradient(estimate, world), gradient(truth, world))


@every_generator
@every_mu
def test_in_reward_tokens(term: Divergence, f: Callable[[Tensor], Tensor], samples: Any, drawn_by: str) -> None:
    world = Tokens()
    estimate = expectation(term.replace(samples=samples, form="reward"), world, drawn_by=drawn_by)
    assert_exact(gradient(estimate, world), gradient(world.divergence(f), world))


@every_generator
@pytest.mark.parametrize("form", ["sampled", "reward"])
@every_mu
def test_sequences(term: Divergence, f: Callable[[Tensor], Tensor], samples: Any, drawn_by: str, form: Any) -> None:
    world = Sequences()
    truth = world.divergence(f)
    estimate = expectation(term.replace(samples=samples, form=form, target="sequence"), world, drawn_by=drawn_by)
    assert_exact(gradient(estimate, world), gradient(truth, world))
    if form == "sampled":
        assert_exact(estimate, truth)


@pytest.mark.parametrize(
    ("term", "f"), [(ReverseKL(), reverse_kl), (ForwardKL(), forward_kl)], ids=["reverse", "forward"]
)
@every_mu
def test_sequences_exact(term: Divergence, f: Callable[[Tensor], Tensor], samples: Any, drawn_by: str) -> None:
    world = Sequences()
    term = term.replace(samples=samples, form="exact", target="sequence")
    truth = world.divergence(f)
    estimate = expectation(term, world, drawn_by=drawn_by, vocab=exact_of(term, world))
    assert_exact(estimate, truth)
    assert_exact(gradient(estimate, world), gradient(truth, world))


def exact_of(term: Divergence, world: Sequences) -> dict[str, Tensor]:
    """The exact divergence at the prefixes that the rows visit, under the key that the term requires."""
    (need,) = (need for need in term.requires if isinstance(need, ExactDivergence))
    at_prefix = exact_divergence(need.generator, world.logits["policy"], world.logits["initial"])
    return {need.key: at_prefix[world.visited]}


@every_generator
@every_mu
def test_a_token_target_takes_the_prefixes_as_given(
    term: Divergence, f: Callable[[Tensor], Tensor], samples: Any, drawn_by: str
) -> None:
    world = Sequences()
    local = world.local_divergence(f, drawn_by)
    sampled = expectation(term.replace(samples=samples), world, drawn_by=drawn_by)
    exact_term = term.replace(form="exact")
    exact = expectation(exact_term, world, drawn_by=drawn_by, vocab=exact_of(exact_term, world))
    for estimate in (sampled, exact):
        assert_exact(estimate, local)
        assert_exact(gradient(estimate, world), gradient(local, world))


@every_generator
@every_mu
def test_a_token_target_has_a_part_of_the_sequence_gradient(
    term: Divergence, f: Callable[[Tensor], Tensor], samples: Any, drawn_by: str
) -> None:
    world = Sequences()
    truth = gradient(world.divergence(f), world)
    local = gradient(expectation(term.replace(samples=samples), world, drawn_by=drawn_by), world)
    if term.name in ("forward_kl()", "skew_jsd(alpha=0.0)", "alpha_divergence(alpha=1.0)") and samples == "reference":
        assert_exact(local, truth)  # on sequences of the reference nothing is missing
    else:
        assert relative(local - truth, truth) > 0.1


@every_generator
@pytest.mark.parametrize("target", ["token", "sequence"])
def test_the_wrong_samples_are_biased(term: Divergence, f: Callable[[Tensor], Tensor], target: Any) -> None:
    world = Tokens() if target == "token" else Sequences()
    truth = world.divergence(f)
    estimate = expectation(term.replace(samples="policy", target=target), world, drawn_by="old")
    assert relative(estimate - truth, truth) > 0.05
    assert relative(gradient(estimate, world) - gradient(truth, world), gradient(truth, world)) > 0.05


def test_by_default_the_sampler_drew_the_tokens_or_else_the_old_policy_or_else_the_policy() -> None:
    world = Tokens()
    truth = gradient(world.divergence(reverse_kl), world)
    for recorded, drawn_by in [
        (SOURCES, "sampler"),
        (("policy", "old", "initial"), "old"),
        (("policy", "initial"), "policy"),
    ]:
        estimate = expectation(ReverseKL(), world, drawn_by=drawn_by, recorded=recorded)
        assert_exact(gradient(estimate, world), truth)


def spread(term: Divergence, world: Tokens | Sequences, vocab: dict[str, Tensor] | None = None) -> float:
    """The standard deviation of a row's gradient, with rows drawn from the policy."""
    rows = world.rows
    loss = term.loss(TokenBatch(mask=torch.ones_like(rows["policy"]), logps=rows, vocab=vocab or {})).values
    loss = loss.sum(-1) if loss.dim() == 2 else loss
    each = torch.stack([torch.autograd.grad(row, [world.logits["policy"]], retain_graph=True)[0] for row in loss])
    weight = rows["policy"].detach().sum(-1).exp().view(-1, *[1] * (each.dim() - 1))
    mean = (weight * each).sum(0)
    return float((weight * (each - mean).square()).sum().sqrt())


def test_the_exact_sequence_form_varies_least() -> None:
    world = Sequences()
    term = ReverseKL(samples="policy", target="sequence")
    exact = term.replace(form="exact")
    sampled, reward = spread(term, world), spread(term.replace(form="reward"), world)
    assert spread(exact, world, exact_of(exact, world)) < 0.7 * min(sampled, reward)


def test_the_normalisation_of_f_is_that_of_least_variance_near_the_reference() -> None:
    world = Tokens()
    with torch.no_grad():
        world.logits["policy"].copy_(world.logits["initial"] + 0.05 * world.logits["old"])
    rows = world.rows
    u = (rows["policy"] - rows["initial"]).exp()
    weight = (rows["initial"] - rows["policy"].detach()).exp()
    loss = weight * (u * u.log())  # the same divergence with f'(1) = 1
    each = torch.stack([torch.autograd.grad(row, [world.logits["policy"]], retain_graph=True)[0] for row in loss])
    probability = rows["policy"].detach().exp()
    mean = (probability * each).sum(0)
    assert_exact(mean, gradient(world.divergence(reverse_kl), world))
    unnormalised = float((probability * (each - mean).square()).sum().sqrt())
    assert spread(ReverseKL(samples="policy"), world) < 0.2 * unnormalised
