from collections.abc import Callable
from typing import Any

import pytest
import torch
from enumeration import Tokens, assert_exact, expectation, gradient, relative
from generators import alpha_divergence, forward_kl, reverse_kl
from loss_vectors import double
from torch import Tensor

from rlstab.batch import ExactDivergence, TokenBatch
from rlstab.errors import ConfigError
from rlstab.losses import (
    AdaptiveAlpha,
    AlphaDivergence,
    ClippedAlpha,
    EntropyBalancedKL,
    ForwardKL,
    GuidedKL,
    Head,
    Term,
    ZLoss,
    exact_divergence,
    exact_statistics,
    streamed_statistics,
)
from rlstab.losses._streamed_forms import Pair, form_of


def logits_of(world: Tokens) -> tuple[Tensor, Tensor]:
    return world.logits["policy"].unsqueeze(0), world.logits["initial"].unsqueeze(0)


def exact(term: Any, world: Tokens) -> Tensor:
    return exact_divergence(term, *logits_of(world)).sum()


def whole_loss(term: Term, world: Tokens) -> Tensor:
    """The loss of a term at one position whose logits are those of the world."""
    policy, reference = logits_of(world)
    (source,) = {need.source for need in term.requires if isinstance(need, ExactDivergence)}
    found = exact_statistics(term.requires, policy, {source: reference})
    batch = TokenBatch(mask=torch.ones(1, 1), vocab={key: value.unsqueeze(0) for key, value in found.items()})
    return term.loss(batch).values.sum()


# --- AlphaNet ------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [-1.0, 0.5, 2.0])
@pytest.mark.parametrize("clip", [1.5, 5.0])
@pytest.mark.parametrize("seed", [0, 3])
def test_the_clipped_gradient_is_that_of_the_paper(alpha: float, clip: float, seed: int) -> None:
    """-sum q min(t^alpha, c) / alpha grad log q, t = teacher/student, over the whole vocabulary."""
    world = Tokens(seed=seed)
    q, ref = world.rows["policy"][:, 0], world.rows["initial"][:, 0].detach()
    factor = ((ref - q.detach()) * alpha).exp().clamp(max=clip)
    paper = gradient(-(q.detach().exp() * factor / alpha * q).sum(), world)
    assert_exact(gradient(exact(ClippedAlpha(alpha=alpha, clip=clip), world), world), paper)


@pytest.mark.parametrize("alpha", [-1.0, 0.5, 2.0])
def test_sampled_and_exact_form_agree_and_value_goes_with_gradient(alpha: float) -> None:
    world, term = Tokens(), ClippedAlpha(alpha=alpha, clip=1.5)
    sampled = expectation(term, world, drawn_by="old", recorded=("policy", "old", "initial"))
    whole = exact(term, world)
    assert_exact(sampled, whole)
    assert_exact(gradient(sampled, world), gradient(whole, world))
    u = double([1e-3, 0.1, 0.9, 1.0, 1.1, 3.0, 300.0]).requires_grad_()
    f = term.f(u.log())
    (slope,) = torch.autograd.grad(f.sum(), [u])
    assert_exact(slope, term.df(u.detach().log()))
    h = 1e-6
    numeric = (term.f((u.detach() + h).log()) - term.f((u.detach() - h).log())) / (2 * h)
    torch.testing.assert_close(numeric[1:], slope[1:], rtol=1e-4, atol=1e-6)


def test_the_clip_biases_the_divergence_that_it_clips() -> None:
    """As reported for the released loss: the more, the farther alpha is from 0."""
    world = Tokens(seed=3)
    errors = []
    for alpha in (0.5, -1.0, 2.0):
        truth = gradient(world.divergence(alpha_divergence(alpha)), world)
        assert_exact(gradient(exact(AlphaDivergence(alpha=alpha), world), world), truth)
        errors.append(relative(gradient(exact(ClippedAlpha(alpha=alpha, clip=1.5), world), world) - truth, truth))
    assert errors[0] > 0.01
    assert errors[1] > 0.1
    assert errors[2] > 0.1
    assert all(error == 0 for error in (relative(a, b) for a, b in [far_clip(world, alpha) for alpha in (-1.0, 2.0)]))


def far_clip(world: Tokens, alpha: float) -> tuple[Tensor, Tensor]:
    """The difference that a clip beyond all ratios makes, and the gradient."""
    plain = gradient(exact(AlphaDivergence(alpha=alpha), world), world)
    return gradient(exact(ClippedAlpha(alpha=alpha, clip=1e9), world), world) - plain, plain


@pytest.mark.parametrize("seed", range(6))
def test_the_larger_of_the_two_is_taken(seed: int) -> None:
    world, term = Tokens(seed=seed), AdaptiveAlpha(clip=1e9)
    first, second = 0.5 * world.divergence(lambda u: (u - 1) ** 2), world.divergence(forward_kl)
    larger = torch.maximum(first, second)
    assert_exact(whole_loss(term, world), larger)
    assert_exact(gradient(whole_loss(term, world), world), gradient(larger, world))


def test_both_kinds_are_the_larger_somewhere() -> None:
    """A policy that gives tokens up pays the KL, one that puts much on an unlikely token the chi-squared."""
    world, found = Tokens(), []
    for place in (0, int(world.logits["initial"].argmin())):
        with torch.no_grad():
            world.logits["policy"].copy_(world.logits["initial"])
            world.logits["policy"][place] += -12.0 if place == 0 else 5.0
        found.append(world.divergence(forward_kl) > 0.5 * world.divergence(lambda u: (u - 1) ** 2))
    assert found == [True, False]


def test_alpha_of_one_and_zero_are_not_clipped() -> None:
    world = Tokens()
    assert_exact(exact(ClippedAlpha(alpha=1.0), world), world.divergence(forward_kl))
    assert_exact(exact(ClippedAlpha(alpha=0.0), world), world.divergence(reverse_kl))


# --- balance -------------------------------------------------------------------------


@pytest.mark.parametrize("sharpness", [0.3, 3.0])
def test_the_balance_goes_by_who_is_surer(sharpness: float) -> None:
    world = Tokens()
    with torch.no_grad():
        world.logits["policy"] *= sharpness
    favoured, other = (forward_kl, reverse_kl) if sharpness > 1 else (reverse_kl, forward_kl)
    truth = 1.0 * world.divergence(favoured) + 0.25 * world.divergence(other)
    term = EntropyBalancedKL(favoured=1.0, other=0.25, reference="teacher")
    assert_exact(whole_loss(term, world), truth)
    assert_exact(gradient(whole_loss(term, world), world), gradient(truth, world))


def test_an_infinite_kl_of_weight_zero_counts_nothing() -> None:
    policy, teacher = double([[20.0, 0.0]]), double([[0.5, 0.5]]).log()
    assert exact_divergence(EntropyBalancedKL(other=0.0), policy, teacher).isfinite().all()
    certain = double([[0.5, 0.5]]).log(), double([[1.0, 0.0]]).log()
    assert exact_divergence(EntropyBalancedKL(other=0.0), *certain).isinf().all()  # RKL: the teacher excludes a token


# --- guide ---------------------------------------------------------------------------


def test_the_guided_target_is_the_policy_times_the_guide() -> None:
    world = Tokens()
    p, guide = world.rows["policy"][:, 0], world.logits["initial"]
    target = (p.detach() + guide).softmax(-1)
    truth = (target * (target.log() - p)).sum()
    assert_exact(whole_loss(GuidedKL(), world), truth)
    assert_exact(gradient(whole_loss(GuidedKL(), world), world), gradient(truth, world))


def test_a_hard_constraint_costs_the_log_of_what_it_forbids() -> None:
    """KL(q || policy) = -log P(allowed), and the gradient raises P(allowed)."""
    world = Tokens()
    allowed = torch.tensor([True, False, True, True, False, True, True])
    with torch.no_grad():
        world.logits["initial"].copy_(torch.where(allowed, 0.0, -torch.inf))
    p = world.rows["policy"][:, 0]
    truth = -torch.logsumexp(p[allowed], -1)
    assert_exact(whole_loss(GuidedKL(), world), truth)
    assert_exact(gradient(whole_loss(GuidedKL(), world), world), gradient(truth, world))


def test_a_policy_that_can_say_nothing_allowed_has_no_gradient() -> None:
    logits = torch.tensor([[0.0, -torch.inf]], requires_grad=True)
    guide = torch.tensor([[-torch.inf, 0.0]])
    value = exact_divergence(GuidedKL(), logits, guide)
    value.sum().backward()
    assert value.item() == torch.inf
    assert logits.grad is not None
    assert logits.grad.tolist() == [[0.0, 0.0]]


def test_names_tell_parameters_and_sources_apart() -> None:
    keys = {
        need.key
        for term in (
            EntropyBalancedKL(),
            EntropyBalancedKL(other=0.1),
            EntropyBalancedKL(reference="teacher"),
            GuidedKL(),
        )
        for need in term.requires
        if isinstance(need, ExactDivergence)
    }
    assert len(keys) == 4
    assert EntropyBalancedKL(coef=0.3).requires == EntropyBalancedKL().requires


# --- inside the trainer, streamed over the vocabulary ------------------------------


@pytest.mark.parametrize(
    "term",
    [
        AdaptiveAlpha(clip=1.5),
        ClippedAlpha(alpha=2.0, clip=1.5, form="exact"),
        EntropyBalancedKL(other=0.25),
        EntropyBalancedKL(other=0.0),
        GuidedKL(reference="initial"),
    ],
    ids=lambda term: repr(term)[:30],
)
def test_streamed_from_hidden_states_they_are_those_of_the_logits(term: Term) -> None:
    """With a vocabulary wider than a stripe, and tokens that a hard guide or a teacher excludes."""
    draw = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    hidden, reference = random(5, 4).requires_grad_(), random(5, 4)
    weights, bias = (random(700, 4), random(700, 4)), random(700)
    if isinstance(term, GuidedKL):
        bias[::3] = -torch.inf
    heads = Head(weight=weights[0]), Head(weight=weights[1], bias=bias)
    streamed = streamed_statistics(
        hidden,
        heads[0],
        torch.arange(5),
        requirements=term.requires,
        references={"initial": (reference, heads[1])},
    )
    logits = hidden @ weights[0].T
    dense = exact_statistics(term.requires, logits, {"initial": reference @ weights[1].T + bias})
    for key, value in dense.items():
        torch.testing.assert_close(streamed[key], value, rtol=1e-9, atol=1e-9)
        ours, truth = (torch.autograd.grad(x.sum(), [hidden], retain_graph=True) for x in (streamed[key], value))
        torch.testing.assert_close(ours, truth, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("term", [EntropyBalancedKL(other=0.25), GuidedKL()], ids=repr)
def test_sums_over_parts_of_the_vocabulary_merge_to_those_of_the_whole(term: Any) -> None:
    world, form = Tokens(), form_of(term)
    logp, ref_logp = (world.rows[name].detach().T for name in ("policy", "initial"))
    parts = [form.sums(Pair(logp[:, cut], ref_logp[:, cut])) for cut in (slice(0, 2), slice(2, 7))]
    whole = form.sums(Pair(logp, ref_logp))
    assert_exact(form.merge(*parts), whole)
    assert_exact(form.value(whole), exact_divergence(term, *logits_of(world)).detach())


# --- z-loss --------------------------------------------------------------------------


def test_z_loss_and_its_gradient() -> None:
    logits = torch.randn(1, 2, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    log_z = logits.logsumexp(-1)
    term = ZLoss()
    values, metrics = term.loss(TokenBatch(mask=torch.ones(1, 2), vocab={"log_z": log_z}))
    (slope,) = torch.autograd.grad((term.coefficient * values).sum(), [logits])
    torch.testing.assert_close(slope, (2e-4 * log_z.unsqueeze(-1) * logits.softmax(-1)).detach())
    assert metrics["log_z"].value() == pytest.approx(log_z.mean().item())
    assert metrics["abs_max"].value() == log_z.abs().max()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ClippedAlpha(clip=1.0), r"ClippedAlpha\.clip: expected a bound > 1, got 1\.0"),
        (lambda: ClippedAlpha(alpha=0.001), r"AlphaDivergence\.alpha: expected 0, 1 or a number"),
        (lambda: AdaptiveAlpha(negative=1.0), r"AdaptiveAlpha\.positive: expected a number above negative=1\.0"),
        (lambda: EntropyBalancedKL(favoured=0.0), r"EntropyBalancedKL\.favoured"),
        (lambda: EntropyBalancedKL(other=2.0), r"EntropyBalancedKL\.other: expected a number from 0 to 1\.0"),
    ],
)
def test_refusals(build: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build()


def test_the_clip_holds_the_pull_of_a_token_that_the_policy_added() -> None:
    a = double([0.0, 2.0, 50.0])
    assert ClippedAlpha(alpha=-1.0).df(a).tolist() == pytest.approx([0.0, 4.0, 4.0])
    assert ForwardKL().df(a)[2] == pytest.approx(1.0)
