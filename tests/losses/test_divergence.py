"""Generators, numerics and the terms around them; what they estimate is proved in `test_divergence_proofs`."""

import inspect
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from generators import FAMILY, NAMES, derivative, generalized_jsd
from torch import Tensor

import rlstab.losses
from rlstab.batch import ExactDivergence, LogProbs, TokenBatch
from rlstab.errors import ConfigError, MissingFieldError
from rlstab.losses import (
    AlphaDivergence,
    ChiSquared,
    ChiSquaredMixture,
    ClippedAlpha,
    Divergence,
    ForwardKL,
    GeneralizedJSD,
    Hellinger,
    Jeffreys,
    JensenShannon,
    Objective,
    ReverseChiSquared,
    ReverseKL,
    SkewJSD,
    SoftenedKL,
    warn_overflow,
)
from rlstab.schema import signal

INF = math.inf
FAR = [-INF, -1e30, -700.0, -88.0, -50.0, -1.0, 0.0, 1.0, 50.0, 88.0, 700.0, 1e30, INF]
TERMS = [term for term, _ in FAMILY]
CLOSED = [ReverseKL(), ForwardKL(), JensenShannon(), Hellinger(), Jeffreys(), ChiSquaredMixture()]
CLOSED += [GeneralizedJSD(beta=0.5), SkewJSD(alpha=0.0), SkewJSD(alpha=1.0), AlphaDivergence(alpha=1.0)]

every_generator = pytest.mark.parametrize(("term", "f"), FAMILY, ids=NAMES)
every_term = pytest.mark.parametrize("term", TERMS, ids=NAMES)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def one_token(dtype: torch.dtype = torch.float64, **logps: float) -> TokenBatch:
    """A batch of one token with these log-probs; that of the policy asks for gradient."""
    tensors = {source: torch.tensor([[value]], dtype=dtype) for source, value in logps.items()}
    tensors["policy"].requires_grad_()
    return TokenBatch(mask=torch.ones(1, 1), logps=tensors)


# --- generators ----------------------------------------------------------------------


def test_the_whole_family_is_compared() -> None:
    exported = [vars(rlstab.losses)[name] for name in rlstab.losses.__all__]
    family = {cls for cls in exported if inspect.isclass(cls) and issubclass(cls, Divergence)} - {Divergence}
    assert {type(term) for term in TERMS} == family


@every_generator
def test_f_and_df_are_those_of_the_papers(term: Divergence, f: Callable[[Tensor], Tensor]) -> None:
    a = torch.linspace(-6, 6, 97, dtype=torch.float64)
    torch.testing.assert_close(term.f(a), f(a.exp()), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(term.df(a), derivative(f, a.exp()), rtol=1e-12, atol=1e-12)


@every_term
def test_f_is_normalised_and_convex(term: Divergence) -> None:
    origin = double(0.0)
    assert term.f(origin) == 0
    assert term.df(origin) == 0
    rises = term.df(torch.linspace(-8, 8, 65, dtype=torch.float64)).diff()
    assert (rises >= 0).all() if isinstance(term, ClippedAlpha) else (rises > 0).all()  # straight beyond its clip


@every_term
def test_near_the_reference_no_digit_is_lost(term: Divergence) -> None:
    """For f with curvature f''(1), f(u) = f''(1) a²/2 up to the next order."""
    a = double(-1e-9, 1e-9)
    curvature = term.df(double(1e-5)) / 1e-5
    torch.testing.assert_close(term.f(a), curvature * a.square() / 2, rtol=1e-4, atol=0.0)
    single = term.f(torch.tensor([-1e-4, 1e-4]))
    torch.testing.assert_close(single.double(), term.f(double(-1e-4, 1e-4)), rtol=1e-5, atol=0.0)


@every_term
def test_the_scaled_logarithms_are_those_of_f_and_df(term: Divergence) -> None:
    a = torch.cat([torch.linspace(-30, -1e-3, 50), torch.linspace(1e-3, 30, 50)]).double()
    torch.testing.assert_close(term.log_scaled_f(a), (term.f(a) / a.exp().clamp(min=1)).log(), rtol=1e-9, atol=1e-9)
    slope = term.df(a).abs() * a.exp().clamp(max=1)
    torch.testing.assert_close(term.log_scaled_df(a), slope.log(), rtol=1e-9, atol=1e-9)


@every_term
def test_gradcheck(term: Divergence) -> None:
    a = double(-3.0, -0.7, -1e-2, 1e-2, 0.4, 2.5).requires_grad_()
    reference, sampler = double(-1.0, -2.0, -0.5, -3.0, -2.0, -4.0), double(-1.5, -1.0, -0.7, -2.0, -2.5, -3.0)
    assert torch.autograd.gradcheck(term.f, [a])
    assert torch.autograd.gradcheck(term.df, [a])
    assert torch.autograd.gradcheck(lambda x: term.surrogate(x, reference, reference), [a])

    def off_policy(logp: Tensor) -> Tensor:
        return term.surrogate(logp, reference, sampler)

    assert torch.autograd.gradcheck(off_policy, [a])


def test_mirror_images() -> None:
    """D(π‖ref) and D(ref‖π): f*(u) = u f(1/u)."""
    a = torch.linspace(-5, 5, 41, dtype=torch.float64)
    for one, other in [
        (ReverseKL(), ForwardKL()),
        (ChiSquared(), ReverseChiSquared()),
        (AlphaDivergence(alpha=0.2), AlphaDivergence(alpha=0.8)),
        (AlphaDivergence(alpha=-2.0), AlphaDivergence(alpha=3.0)),
        (SkewJSD(alpha=0.3), SkewJSD(alpha=0.7)),
        (JensenShannon(), JensenShannon()),
        (Hellinger(), Hellinger()),
        (Jeffreys(), Jeffreys()),
    ]:
        torch.testing.assert_close(other.f(a), a.exp() * one.f(-a), rtol=1e-12, atol=1e-12)


def test_members_of_the_family_that_are_multiples_of_each_other() -> None:
    a = torch.linspace(-5, 5, 41, dtype=torch.float64)
    for multiple, one, other in [
        (1.0, GeneralizedJSD(beta=0.5), JensenShannon()),
        (4.0, JensenShannon(), SkewJSD(alpha=0.5)),
        (2.0, Hellinger(), AlphaDivergence(alpha=0.5)),
        (0.5, ChiSquared(), AlphaDivergence(alpha=-1.0)),
        (0.5, ReverseChiSquared(), AlphaDivergence(alpha=2.0)),
    ]:
        torch.testing.assert_close(other.f(a), multiple * one.f(a), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(other.df(a), multiple * one.df(a), rtol=1e-12, atol=1e-12)


# --- limits of parameters ------------------------------------------------------------


@pytest.mark.parametrize(
    ("at", "near", "limit", "distance"),
    [
        (SkewJSD(alpha=0.0), SkewJSD(alpha=1e-9), ForwardKL(), 1e-6),
        (SkewJSD(alpha=1.0), SkewJSD(alpha=1 - 1e-9), ReverseKL(), 1e-6),
        (AlphaDivergence(alpha=0.0), AlphaDivergence(alpha=0.01), ReverseKL(), 0.05),
        (AlphaDivergence(alpha=1.0), AlphaDivergence(alpha=0.99), ForwardKL(), 0.05),
    ],
)
def test_limits(at: Divergence, near: Divergence, limit: Divergence, distance: float) -> None:
    a = torch.linspace(-4, 4, 33, dtype=torch.float64)
    torch.testing.assert_close(at.f(a), limit.f(a), rtol=0, atol=0)
    torch.testing.assert_close(at.df(a), limit.df(a), rtol=0, atol=0)
    torch.testing.assert_close(near.f(a), limit.f(a), rtol=distance, atol=distance)
    torch.testing.assert_close(near.df(a), limit.df(a), rtol=distance, atol=distance)


@pytest.mark.parametrize("beta", [1e-6, 1e-3, 0.999, 1 - 1e-6])
def test_generalized_jsd_close_to_its_ends(beta: float) -> None:
    a = torch.linspace(-3, 3, 13, dtype=torch.float64)[::2]
    expected = generalized_jsd(beta)(a.exp()) / (beta * (1 - beta))
    torch.testing.assert_close(SkewJSD(alpha=beta).f(a), expected, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(GeneralizedJSD(beta=beta).f(a), beta * (1 - beta) * SkewJSD(alpha=beta).f(a))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: GeneralizedJSD(beta=0.0), r"GeneralizedJSD.beta: .*between 0 and 1, got 0.0.*SkewJSD"),
        (lambda: GeneralizedJSD(beta=1.0), r"GeneralizedJSD.beta: .*got 1.0"),
        (lambda: GeneralizedJSD(beta=math.nan), r"GeneralizedJSD.beta: .*got nan"),
        (lambda: SkewJSD(alpha=1.1), r"SkewJSD.alpha: expected a number from 0 to 1, got 1.1"),
        (lambda: AlphaDivergence(alpha=0.001), r"AlphaDivergence.alpha: .*0.01 away from both, got 0.001"),
        (lambda: AlphaDivergence(alpha=INF), r"AlphaDivergence.alpha: .*got inf"),
        (
            lambda: ReverseKL(samples="teacher"),  # type: ignore[arg-type]
            r"ReverseKL.samples: .*'reference', got 'teacher'",
        ),
        (
            lambda: ReverseKL(form="streamed"),  # type: ignore[arg-type]
            r"ReverseKL.form: .*'exact', got 'streamed'",
        ),
        (
            lambda: ReverseKL(target="word"),  # type: ignore[arg-type]
            r"ReverseKL.target: .*'sequence', got 'word'",
        ),
        (lambda: ReverseKL(clamp=0.0), r"ReverseKL.clamp: expected a number > 0, got 0.0"),
        (lambda: ReverseKL(clamp=1.0, form="exact"), r"ReverseKL.clamp: .*got 1.0 with form='exact'"),
        (lambda: ReverseKL(samples="old", form="exact"), r"ReverseKL.samples: .*over the vocabulary, got 'old'"),
        (lambda: JensenShannon(target="sequence", form="exact"), r"JensenShannon.target: .*use form='sampled'"),
        (lambda: ReverseKL(target="sequence").mean(100), r"ReverseKL.mean.unit: .*expected 'sequence', got 100"),
    ],
)
def test_refusals(build: Callable[[], Divergence], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build()


# --- the range of the dtype ----------------------------------------------------------


@every_term
@every_dtype
def test_far_log_ratios_give_numbers_or_infinity(term: Divergence, dtype: torch.dtype) -> None:
    a = torch.tensor(FAR, dtype=dtype, requires_grad=True)
    f, df = term.f(a), term.df(a)
    assert (f >= 0).all()
    assert not df.isnan().any()
    assert (df.sign() == a.sign()).all()
    for value in (f, df):
        (slope,) = torch.autograd.grad(value.sum(), [a])
        assert not slope.isnan().any()
    for scaled in (term.log_scaled_f(a.detach()), term.log_scaled_df(a.detach())):
        assert not scaled.isnan().any()


@every_term
@every_dtype
@pytest.mark.parametrize("sample", ["policy", "reference", 0.0, -1000.0, -INF])
def test_extreme_tokens_are_never_nan(term: Divergence, dtype: torch.dtype, sample: str | float) -> None:
    values = torch.tensor([0.0, -1.0, -50.0, -700.0, -1e30, -INF], dtype=dtype)
    logp, reference = (grid.flatten() for grid in torch.meshgrid(values, values, indexing="ij"))
    logp = logp.clone().requires_grad_()
    known = {"policy": logp.detach(), "reference": reference}
    sample_logp = known[sample] if isinstance(sample, str) else torch.full_like(reference, sample)
    loss = term.surrogate(logp, reference, sample_logp)
    assert (loss >= 0).all()
    (slope,) = torch.autograd.grad(torch.where(loss < INF, loss, 0.0).sum(), [logp], retain_graph=True)
    assert slope.isfinite().all()
    (slope,) = torch.autograd.grad(loss.sum(), [logp])
    assert slope.isfinite().all()
    impossible = (reference == -INF) & (logp == -INF)
    assert not loss[impossible].any()


@every_generator
def test_nothing_overflows_where_the_exact_value_fits(term: Divergence, f: Callable[[Tensor], Tensor]) -> None:
    """U = e^±88 does not fit float32, nor f(u); with ν or w = e^-88 the product does."""
    logp = torch.tensor([-2.0, -90.0], requires_grad=True)
    reference = torch.tensor([-90.0, -2.0])
    loss = term.surrogate(logp, reference, torch.tensor([-2.0, -2.0]))
    (slope,) = torch.autograd.grad(loss.sum(), [logp])
    a = (logp - reference).detach().double()
    exact = (reference.double() + 2).exp() * f(a.exp())
    exact_slope = (logp.detach().double() + 2).exp() * derivative(f, a.exp())
    fits = exact < torch.finfo(torch.float32).max
    assert fits.any()
    torch.testing.assert_close(loss.double()[fits], exact[fits], rtol=1e-4, atol=1e-30)
    torch.testing.assert_close(slope.double()[fits], exact_slope[fits], rtol=1e-4, atol=1e-30)
    assert (loss[~fits] == INF).all()
    assert slope.isfinite().all()


@pytest.mark.parametrize("term", CLOSED, ids=repr)
@pytest.mark.parametrize(("dtype", "accuracy"), [(torch.float32, 1e-5), (torch.float64, 1e-13)])
def test_the_closed_form_is_that_of_the_logarithms(term: Divergence, dtype: torch.dtype, accuracy: float) -> None:
    """From next to the reference (1e-6) to where nothing is left of the smaller probability (60), on both sides."""
    size = torch.logspace(-6, math.log10(60), 200, dtype=torch.float64)
    a = torch.cat([-size, size]).to(dtype).double()
    closed = term.scaled(a.to(dtype))
    assert closed is not None
    torch.testing.assert_close(closed.value.double(), term.log_scaled_f(a).exp(), rtol=accuracy, atol=0.0)
    slope = a.sign() * term.log_scaled_df(a).exp()
    torch.testing.assert_close(closed.slope.double(), slope, rtol=accuracy, atol=0.0)


def test_what_exceeds_the_dtype_is_infinite_counted_and_named() -> None:
    batch = one_token(torch.float32, policy=-1.0, initial=-200.0, old=-1.0)
    values, metrics = ChiSquared().loss(batch)
    assert values.item() == INF
    (slope,) = torch.autograd.grad(values.sum(), [batch.logps["policy"]])
    assert slope.item() == torch.finfo(torch.float32).max
    assert metrics["overflow"].value() == 1
    with pytest.warns(RuntimeWarning, match=r"'drift'.*objective/drift/overflow.*clamp"):
        warn_overflow("drift", {"overflow": 1.0})
    finite = ReverseKL().loss(batch)
    assert finite.metrics["overflow"].value() == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_overflow("drift", {"overflow": 0.0})
        warn_overflow("policy", {})


def test_a_masked_token_beyond_the_dtype_leaves_the_others_their_gradient() -> None:
    logp = torch.tensor([[-1.0, -1.0]], requires_grad=True)
    reference = torch.tensor([[-200.0, -2.0]])
    for mask in (torch.tensor([[False, True]]), torch.tensor([[True, True]])):
        batch = TokenBatch(mask=torch.ones(1, 2), loss_mask=mask, logps={"policy": logp, "initial": reference})
        (slope,) = torch.autograd.grad(Objective(drift=ChiSquared())(batch).loss, [logp])
        expected = 2 * math.expm1(1.0) / mask.sum()
        assert slope[0, 1].item() == pytest.approx(float(expected), rel=1e-5)
        assert slope[0, 0].isfinite()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@every_term
def test_half_precision_is_raised(term: Divergence, dtype: torch.dtype) -> None:
    logp = torch.tensor([-1.0, -2.0], dtype=dtype, requires_grad=True)
    reference = torch.tensor([-2.0, -1.5], dtype=dtype)
    loss = term.surrogate(logp, reference, reference)
    expected = term.surrogate(logp.detach().float(), reference.float(), reference.float())
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.detach(), expected)
    loss.sum().backward()
    assert logp.grad is not None
    assert logp.grad.dtype == dtype


# --- the term ------------------------------------------------------------------------


def test_a_token_by_hand() -> None:
    """π = 1/2, ref = 1/4, μ = 1/8: u = 2, ν = 2, w = 4."""
    policy, initial, sampler = (math.log(p) for p in (0.5, 0.25, 0.125))
    for term, value, slope in [
        (ReverseKL(), 2 * (2 * math.log(2) - 1), 4 * math.log(2)),
        (ForwardKL(), 2 * (1 - math.log(2)), 4 * 0.5),
        (ChiSquared(), 2 * 1.0, 4 * 2.0),
        (ChiSquaredMixture(), 2 / 6, 4 * (1 / 3) * (1 / 2 + 1 / 3)),
        (SoftenedKL(), 2 * (3 * math.log(1.5) - 1), 4 * math.log(1.5)),
    ]:
        batch = one_token(policy=policy, initial=initial, sampler=sampler, old=policy)
        values, metrics = term.loss(batch)
        (found,) = torch.autograd.grad(values.sum(), [batch.logps["policy"]], retain_graph=True)
        assert values.item() == pytest.approx(value)
        assert found.item() == pytest.approx(slope)
        assert metrics["value"].value() == pytest.approx(value)
        reward = term.replace(form="reward").loss(batch)
        assert reward.values.item() == pytest.approx(slope * policy)
        assert reward.metrics["value"].value() == pytest.approx(value)
        (found,) = torch.autograd.grad(reward.values.sum(), [batch.logps["policy"]])
        assert found.item() == pytest.approx(slope)


@pytest.mark.parametrize("form", ["sampled", "reward"])
@pytest.mark.parametrize("target", ["token", "sequence"])
@every_term
def test_a_token_without_a_score_is_left_out_and_counted(term: Divergence, form: Any, target: Any) -> None:
    term = term.replace(form=form, target=target)
    logp = double(-1.0, -2.0, -0.5).unsqueeze(0).requires_grad_()
    others = {
        "initial": double(-1.5, -0.7, -0.6),
        "old": double(-1.1, -1.9, -0.5),
        "sampler": double(-1.0, math.nan, -0.4),
    }
    batch = TokenBatch(mask=torch.ones(1, 3), logps={"policy": logp, **{k: v.unsqueeze(0) for k, v in others.items()}})
    loss, metrics = term.loss(batch)
    (slope,) = torch.autograd.grad(loss.sum(), [logp], retain_graph=True)
    without = batch.replace(loss_mask=torch.tensor([[True, False, True]]))
    expected, expected_metrics = term.loss(without)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(slope, torch.autograd.grad(expected.sum(), [logp])[0])
    assert slope[0, 1] == 0
    assert metrics["unscored"].value() == 1
    assert expected_metrics["unscored"].value() == 0
    torch.testing.assert_close(metrics["value"].value(), expected_metrics["value"].value())


def test_a_clamp_acts_only_on_request_and_is_counted() -> None:
    logp = double(-1.0, -9.0, -1.0).unsqueeze(0).requires_grad_()
    initial = double(-1.5, -1.0, -9.0).unsqueeze(0)
    batch = TokenBatch(mask=torch.ones(1, 3), logps={"policy": logp, "initial": initial})
    free, clamped = (ForwardKL(samples="reference", clamp=clamp).loss(batch) for clamp in (None, 2.0))
    assert "clamped" not in free.metrics
    assert clamped.metrics["clamped"].value() == 2
    torch.testing.assert_close(free.values.detach()[0], ForwardKL().f(double(0.5, -8.0, 8.0)))
    torch.testing.assert_close(clamped.values.detach()[0], ForwardKL().f(double(0.5, -2.0, 2.0)))
    (slope,) = torch.autograd.grad(clamped.values.sum(), [logp], retain_graph=True)
    assert slope[0, 0] != 0
    assert not slope[0, 1:].any()
    (slope,) = torch.autograd.grad(free.values.sum(), [logp])
    assert slope.all()


def test_requires() -> None:
    policy, old, sampler, initial = (LogProbs(name) for name in ("policy", "old", "sampler", "initial"))
    exact = ExactDivergence(ReverseKL(), "initial")
    assert ReverseKL().requires == {policy, old, initial}
    assert ReverseKL(samples="sampler").requires == {policy, sampler, initial}
    assert ReverseKL(samples="policy").requires == {policy, initial}
    assert ReverseKL(samples="reference", reference="moving").requires == {policy, LogProbs("moving")}
    assert ReverseKL(form="exact").requires == {exact}
    assert ReverseKL(form="exact", target="sequence").requires == {exact, policy, old}
    forward = ForwardKL(form="exact", target="sequence", samples="old")
    assert forward.requires == {ExactDivergence(ForwardKL(), "initial"), policy, old, initial}


def test_an_exact_requirement_is_the_generator_and_the_source_alone() -> None:
    terms = [
        GeneralizedJSD(beta=0.3, form="exact"),
        GeneralizedJSD(beta=0.3, form="exact", coef=0.1).mean("sequence"),
        GeneralizedJSD(beta=0.3, form="exact", rows="buffer"),
    ]
    assert len({need for term in terms for need in term.requires}) == 1
    (need,) = terms[0].requires
    assert isinstance(need, ExactDivergence)
    assert need.key == "generalized_jsd(beta=0.3) from initial"
    (moving,) = terms[0].replace(reference="moving").requires
    (other,) = GeneralizedJSD(beta=0.4, form="exact").requires
    assert len({need, moving, other}) == 3


def test_a_reference_that_is_missing_is_named() -> None:
    with pytest.raises(MissingFieldError, match="initial"):
        ReverseKL().loss(one_token(policy=-1.0))


def test_reference_and_samples_have_no_gradient() -> None:
    logps = {
        name: double(-1.0 - i / 5, -2.0).unsqueeze(0).requires_grad_()
        for i, name in enumerate(["policy", "old", "initial"])
    }
    for term in TERMS:
        loss = term.surrogate(logps["policy"], logps["initial"], logps["old"]).sum()
        found = torch.autograd.grad(loss, list(logps.values()), allow_unused=True)
        assert [gradient is not None for gradient in found] == [True, False, False]


@pytest.mark.parametrize("target", ["token", "sequence"])
@every_term
def test_an_empty_row_counts_nothing(term: Divergence, target: Any) -> None:
    logp = double(-1.0, -2.0).repeat(2, 1).requires_grad_()
    batch = TokenBatch(
        mask=torch.tensor([[True, True], [False, False]]),
        logps={"policy": logp, "initial": double(-2.0, -1.0).repeat(2, 1)},
    )
    values, metrics = term.replace(target=target).loss(batch)
    assert not values[1].any()
    (slope,) = torch.autograd.grad(values.sum(), [logp])
    assert not slope[1].any()
    torch.testing.assert_close(metrics["value"].value(), values[0].mean().detach())


def test_a_sequence_target_is_averaged_over_rows() -> None:
    logp = double(-1.0, -2.0).repeat(2, 1).requires_grad_()
    logps = {"policy": logp, "initial": double(-2.0, -1.5).repeat(2, 1)}
    batch = TokenBatch(mask=torch.tensor([[True, True], [True, False]]), logps=logps)
    term = ChiSquared(target="sequence", samples="reference")
    assert term.mean.unit == "sequence"
    expected = (math.expm1(0.5) ** 2 + math.expm1(1.0) ** 2) / 2
    assert Objective(drift=term)(batch).loss.item() == pytest.approx(expected)


@pytest.mark.parametrize("clamp", [None, 1.0])
@pytest.mark.parametrize("form", ["sampled", "reward", "exact"])
def test_the_schema_knows_the_metrics(form: Any, clamp: float | None) -> None:
    if form == "exact":
        clamp = None
    term = ReverseKL(form=form, clamp=clamp)
    batch = one_token(policy=-1.0, initial=-2.0)
    batch = batch.replace(
        vocab={need.key: torch.ones(1, 1) for need in term.requires if isinstance(need, ExactDivergence)}
    )
    units = {name: signal(f"objective/drift/{name}").unit for name in term.loss(batch).metrics}
    counts = {name for name in units if name != "value"}
    assert {"overflow"} <= counts <= {"overflow", "unscored", "clamped"}
    assert {units[name] for name in counts} == {"tokens"}


def test_a_generator_of_ones_own_needs_two_functions() -> None:
    class LeCam(Divergence):
        """f = (1 - u)² / (2 (1 + u)): ours under another name."""

        def df(self, a: Tensor) -> Tensor:
            u = a.exp()
            return (u - 1) * (u + 3) / (2 * (1 + u) ** 2)

        def log_scaled_f(self, a: Tensor) -> Tensor:
            u = a.exp()
            return ((1 - u) ** 2 / (2 * (1 + u))).log() - a.relu()

    a = torch.linspace(-3, 3, 20, dtype=torch.float64)
    torch.testing.assert_close(LeCam().f(a), ChiSquaredMixture().f(a))
    batch = one_token(policy=-1.0, initial=-2.0, old=-1.5)
    torch.testing.assert_close(LeCam().loss(batch).values, ChiSquaredMixture().loss(batch).values)


@pytest.mark.compile
@pytest.mark.parametrize("form", ["sampled", "reward"])
@pytest.mark.parametrize("target", ["token", "sequence"])
@pytest.mark.parametrize("term", [ReverseKL(), AlphaDivergence(alpha=2.5)], ids=lambda term: term.name)
def test_compiles_in_every_form(term: Divergence, form: Any, target: Any) -> None:
    term = term.replace(form=form, target=target, clamp=3.0)
    generator = torch.Generator().manual_seed(0)
    logps = {name: -1 - 2 * torch.rand(3, 4, generator=generator) for name in ("policy", "old", "sampler", "initial")}
    logps["sampler"][0, 0] = math.nan

    def loss_of(logp: Tensor) -> Tensor:
        batch = TokenBatch(mask=torch.ones(3, 4), logps=logps | {"policy": logp})
        return term.loss(batch).values.sum()

    torch._dynamo.reset()
    logp = logps["policy"].requires_grad_()
    losses = loss_of(logp), torch.compile(loss_of, fullgraph=True, backend="aot_eager")(logp)
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*(torch.autograd.grad(loss, [logp]) for loss in losses))
