"""Divergences over the whole vocabulary against sums written out, and their closed gradient against autograd."""

import math
from collections.abc import Callable

import pytest
import torch
from generators import FAMILY, NAMES
from torch import Tensor

from rlstab.batch import ExactDivergence, LogProbs, TokenBatch
from rlstab.errors import ConfigError, MissingFieldError, ShapeError
from rlstab.losses import (
    CauchySchwarz,
    ChiSquared,
    Divergence,
    ForwardKL,
    Hellinger,
    JensenShannon,
    Objective,
    ReverseKL,
    SkewJSD,
    exact_divergence,
    exact_kl,
    exact_statistics,
)

INF = math.inf
TERMS = [term for term, _ in FAMILY]

every_generator = pytest.mark.parametrize(("term", "f"), FAMILY, ids=NAMES)
with_cauchy_schwarz = pytest.mark.parametrize("term", [*TERMS, CauchySchwarz()], ids=[*NAMES, CauchySchwarz().name])


def logits_of(*shape: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ours, theirs = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    return ours.requires_grad_(), theirs


def written_out(f: Callable[[Tensor], Tensor], logits: Tensor, ref_logits: Tensor, temperature: float) -> Tensor:
    policy, reference = ((z / temperature).softmax(-1) for z in (logits, ref_logits))
    return (reference * f(policy / reference)).sum(-1)


def cauchy_schwarz(logits: Tensor, ref_logits: Tensor, temperature: float) -> Tensor:
    policy, reference = ((z / temperature).softmax(-1) for z in (logits, ref_logits))
    sums = reference.square().sum(-1), policy.square().sum(-1), (reference * policy).sum(-1)
    return sums[0].log() + sums[1].log() - 2 * sums[2].log()


def assert_equal_with_gradient(found: Tensor, truth: Tensor, leaf: Tensor) -> None:
    torch.testing.assert_close(found, truth, atol=1e-10, rtol=0.0)
    weights = torch.linspace(-1, 2, found.numel(), dtype=torch.float64).reshape(found.shape)
    gradients = [torch.autograd.grad((weights * value).sum(), [leaf])[0] for value in (found, truth)]
    torch.testing.assert_close(*gradients, atol=1e-10, rtol=0.0)


@every_generator
@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
def test_value_and_gradient(term: Divergence, f: Callable[[Tensor], Tensor], temperature: float) -> None:
    logits, reference = logits_of(2, 3, 7)
    found = exact_divergence(term, logits, reference, temperature=temperature)
    assert_equal_with_gradient(found, written_out(f, logits, reference, temperature), logits)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_cauchy_schwarz(temperature: float) -> None:
    logits, reference = logits_of(2, 3, 7)
    found = exact_divergence(CauchySchwarz(), logits, reference, temperature=temperature)
    assert_equal_with_gradient(found, cauchy_schwarz(logits, reference, temperature), logits)


@pytest.mark.parametrize("at_once", [1, 20])
def test_portions_change_nothing(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    logits, reference = logits_of(2, 3, 7)
    whole = exact_divergence(JensenShannon(), logits, reference)
    monkeypatch.setattr("rlstab.losses._exact.ELEMENTS_AT_ONCE", at_once)
    assert_equal_with_gradient(exact_divergence(JensenShannon(), logits, reference), whole, logits)


def test_no_position_and_one_distribution_alone() -> None:
    logits, reference = logits_of(3, 7)
    assert exact_divergence(ReverseKL(), logits[:0], reference[:0]).shape == (0,)
    alone = exact_divergence(ReverseKL(), logits[0], reference[0])
    torch.testing.assert_close(alone, exact_divergence(ReverseKL(), logits, reference)[0])


@with_cauchy_schwarz
def test_gradcheck(term: Divergence | CauchySchwarz) -> None:
    logits, reference = logits_of(2, 5)

    def value(z: Tensor) -> Tensor:
        return exact_divergence(term, z, reference, temperature=0.8)

    assert torch.autograd.gradcheck(value, [logits])


@with_cauchy_schwarz
def test_equal_policies_have_no_divergence_and_no_gradient(term: Divergence | CauchySchwarz) -> None:
    logits, _ = logits_of(4, 50)
    value = exact_divergence(term, logits, logits.detach())
    torch.testing.assert_close(value, torch.zeros_like(value), atol=1e-14, rtol=0.0)
    (slope,) = torch.autograd.grad(value.sum(), [logits])
    torch.testing.assert_close(slope, torch.zeros_like(slope), atol=1e-15, rtol=0.0)


def test_the_reference_has_no_gradient() -> None:
    logits, reference = logits_of(3, 5)
    reference.requires_grad_()
    value = exact_divergence(JensenShannon(), logits, reference)
    (slope,) = torch.autograd.grad(value.sum(), [reference], allow_unused=True)
    assert slope is None


@with_cauchy_schwarz
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_tokens_that_both_policies_exclude_do_not_count(term: Divergence | CauchySchwarz, dtype: torch.dtype) -> None:
    ours, theirs = (z.detach().to(dtype) for z in logits_of(3, 6))
    shorter = ours[:, :4].clone().requires_grad_()
    ours[:, 4:] = theirs[:, 4:] = -INF
    ours.requires_grad_()
    value, expected = exact_divergence(term, ours, theirs), exact_divergence(term, shorter, theirs[:, :4])
    torch.testing.assert_close(value, expected)
    (slope,) = torch.autograd.grad(value.sum(), [ours])
    (expected_slope,) = torch.autograd.grad(expected.sum(), [shorter])
    torch.testing.assert_close(slope[:, :4], expected_slope)
    assert not slope[:, 4:].any()


@with_cauchy_schwarz
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("far", [90.0, 200.0, 800.0, 1e5, INF])
def test_far_logits_are_never_nan(term: Divergence | CauchySchwarz, dtype: torch.dtype, far: float) -> None:
    """One token excluded by the policy, one by the reference, one by both."""
    logits = torch.tensor([[0.0, 1.0, -far, 0.0, -far]], dtype=dtype, requires_grad=True)
    reference = torch.tensor([[1.0, 0.0, 0.0, -far, -far]], dtype=dtype)
    value = exact_divergence(term, logits, reference)
    assert (value >= 0).all()
    (slope,) = torch.autograd.grad(value.sum(), [logits], retain_graph=True)
    assert slope.isfinite().all()
    (slope,) = torch.autograd.grad((value * 0.0).nan_to_num().sum(), [logits])
    assert not slope.isnan().any()


def test_what_only_one_policy_excludes_by_hand() -> None:
    """π = (1/2, 1/2, 0), ref = (1/2, 0, 1/2)."""
    logits = torch.tensor([[0.0, 0.0, -INF]], dtype=torch.float64)
    reference = torch.tensor([[0.0, -INF, 0.0]], dtype=torch.float64)
    for term, expected in [
        (ReverseKL(), INF),
        (ForwardKL(), INF),
        (JensenShannon(), math.log(2) / 2),
        (Hellinger(), 1.0),
    ]:
        assert exact_divergence(term, logits, reference).item() == pytest.approx(expected)
    nothing_shared = torch.tensor([[-INF, -INF, 0.0]], dtype=torch.float64)
    assert exact_divergence(CauchySchwarz(), logits, nothing_shared).item() == INF


def test_values_that_fit_survive_ratios_that_do_not() -> None:
    """χ² with ref = e^-85 and π = e^-42: u² overflows float32, ref·u² does not."""
    tail = torch.tensor([[0.0, -42.0]]), torch.tensor([[0.0, -85.0]])
    value = exact_divergence(ChiSquared(), *tail)
    assert value.item() == pytest.approx(math.exp(2 * -42.0 + 85.0), rel=1e-4)
    rare = torch.tensor([[0.0, -10.0]]), torch.tensor([[0.0, -100.0]])
    assert exact_divergence(ChiSquared(), *rare).item() == pytest.approx(math.exp(-20.0 + 100.0), rel=1e-4)


@with_cauchy_schwarz
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(term: Divergence | CauchySchwarz, dtype: torch.dtype) -> None:
    ours, theirs = (z.detach().to(dtype) for z in logits_of(3, 9))
    exact, raised = ours.requires_grad_(), ours.detach().float().requires_grad_()
    value, expected = exact_divergence(term, exact, theirs), exact_divergence(term, raised, theirs.float())
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, expected)
    (slope,) = torch.autograd.grad(value.sum(), [exact])
    assert slope.dtype == dtype
    torch.testing.assert_close(slope.float(), torch.autograd.grad(expected.sum(), [raised])[0], atol=1e-2, rtol=1e-2)


# --- shared passes -------------------------------------------------------------------


def test_statistics_are_those_of_each_divergence_alone() -> None:
    logits, initial = logits_of(2, 3, 7)
    moving = logits_of(2, 3, 7, seed=1)[1]
    terms = [ReverseKL(form="exact"), Hellinger(form="exact", reference="moving"), CauchySchwarz(coef=0.1)]
    requires = Objective({str(i): term for i, term in enumerate(terms)}).requires | {LogProbs("policy")}
    found = exact_statistics(requires, logits, {"initial": initial, "moving": moving}, temperature=0.7)
    assert list(found) == ["cauchy_schwarz() from initial", "hellinger() from moving", "reverse_kl() from initial"]
    for term, reference in zip(terms, (initial, moving, initial), strict=True):
        (need,) = (need for need in term.requires if isinstance(need, ExactDivergence))
        alone = exact_divergence(need.generator, logits, reference, temperature=0.7)
        assert_equal_with_gradient(found[need.key], alone, logits)


def test_terms_read_what_statistics_leave() -> None:
    logits, reference = logits_of(2, 3, 7)
    objective = Objective(drift=0.5 * JensenShannon(form="exact"), spread=CauchySchwarz())
    mask = torch.tensor([[True, True, False], [True, False, False]])
    vocab = exact_statistics(objective.requires, logits, {"initial": reference})
    loss, terms = objective(TokenBatch(mask=mask, vocab=vocab))
    divergence = exact_divergence(JensenShannon(), logits, reference)
    other = exact_divergence(CauchySchwarz(), logits, reference)
    expected = (0.5 * divergence + other)[mask].mean()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(value, [logits])[0] for value in (loss, expected)))
    torch.testing.assert_close(terms["drift"].metrics["value"].value(), divergence[mask].mean().detach())
    assert terms["spread"].metrics["overflow"].value() == 0


def test_an_infinite_exact_divergence_is_counted() -> None:
    logits = torch.tensor([[[0.0, 0.0], [0.0, 0.0]]], requires_grad=True)
    reference = torch.tensor([[[0.0, -INF], [0.0, 1.0]]])
    term = ReverseKL(form="exact")
    vocab = exact_statistics(term.requires, logits, {"initial": reference})
    values, metrics = term.loss(TokenBatch(mask=torch.ones(1, 2), vocab=vocab))
    assert values.isinf().tolist() == [[True, False]]
    assert metrics["overflow"].value() == 1
    (slope,) = torch.autograd.grad(values.sum(), [logits])
    assert slope.isfinite().all()


def test_without_gradient_nothing_is_kept_for_it() -> None:
    logits, reference = logits_of(3, 5)
    assert not exact_divergence(ReverseKL(), logits.detach(), reference).requires_grad
    with torch.no_grad():
        assert not exact_divergence(ReverseKL(), logits, reference).requires_grad


either_function = pytest.mark.parametrize(
    "function", [exact_kl, lambda *args, **kw: exact_divergence(ReverseKL(), *args, **kw)], ids=["kl", "divergence"]
)


@either_function
@pytest.mark.wrong_shapes
def test_another_vocabulary_is_refused(function: Callable[..., Tensor]) -> None:
    logits, reference = logits_of(3, 5)
    with pytest.raises(ShapeError, match=r"ref_logits: .*\[3, 5\], got \[3, 4\]"):
        function(logits, reference[:, :4])


@either_function
def test_a_temperature_of_zero_is_refused(function: Callable[..., Tensor]) -> None:
    logits, reference = logits_of(3, 5)
    with pytest.raises(ConfigError, match=r"temperature: .*> 0, got 0.0"):
        function(logits, reference, temperature=0.0)


def test_a_source_without_logits_is_named() -> None:
    logits, reference = logits_of(3, 5)
    with pytest.raises(MissingFieldError, match=r"\['moving'\], got those of \['initial'\]"):
        exact_statistics(ReverseKL(form="exact", reference="moving").requires, logits, {"initial": reference})
    assert exact_statistics([LogProbs("policy")], logits, {}) == {}


# --- the KL as a number --------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("at_once", [1, 20, 10**6])
def test_exact_kl(temperature: float, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlstab.losses._exact.ELEMENTS_AT_ONCE", at_once)
    logits, reference = logits_of(2, 3, 7)
    found = exact_kl(logits, reference, temperature=temperature)
    assert not found.requires_grad
    truth = exact_divergence(ReverseKL(), logits, reference, temperature=temperature)
    torch.testing.assert_close(found, truth.detach(), atol=1e-12, rtol=0.0)


def test_exact_kl_of_excluded_tokens() -> None:
    logits = torch.tensor([[0.0, 0.0, -INF], [0.0, 0.0, -INF], [0.0, 0.0, 0.0]])
    reference = torch.tensor([[0.0, 0.0, -INF], [0.0, 0.0, 0.0], [0.0, 0.0, -INF]])
    torch.testing.assert_close(exact_kl(logits, reference), torch.tensor([0.0, math.log(1.5), INF]))
    assert exact_kl(logits[:0], reference[:0]).shape == (0,)


def test_exact_kl_of_near_policies_keeps_its_digits() -> None:
    """A KL of 1e-9 in float32, far below the rounding of the log-probs that are subtracted."""
    ours, theirs = (z.detach() for z in logits_of(4, 2000))
    near = ours + 5e-5 * theirs
    truth = exact_kl(ours, near)
    assert (truth < 1e-8).all()
    torch.testing.assert_close(exact_kl(ours.float(), near.float()).double(), truth, rtol=0.02, atol=0.0)


@pytest.mark.compile
@pytest.mark.parametrize("term", [ReverseKL(), SkewJSD(alpha=0.3), CauchySchwarz()], ids=lambda term: term.name)
def test_compiles(term: Divergence | CauchySchwarz) -> None:
    ours, reference = logits_of(3, 9)

    def value(z: Tensor) -> Tensor:
        return exact_divergence(term, z, reference, temperature=0.7).sum()

    torch._dynamo.reset()
    values = value(ours), torch.compile(value, fullgraph=True, backend="aot_eager")(ours)
    torch.testing.assert_close(*values)
    torch.testing.assert_close(*(torch.autograd.grad(v, [ours])[0] for v in values))
