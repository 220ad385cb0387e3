"""Forms of divergences for tiles against the general estimate, over all log-ratios."""

from typing import Any

import pytest
import torch
from generators import FAMILY, NAMES
from torch import Tensor

from rlstab.errors import ConfigError
from rlstab.losses import AlphaDivergence, CauchySchwarz, ClippedAlpha, Divergence, GeneralizedJSD, SkewJSD
from rlstab.losses._streamed_forms import Estimated, FForm, Form, Pair, form_of

every_generator = pytest.mark.parametrize("generator", [term for term, _ in FAMILY], ids=NAMES)


def f_form(generator: Divergence) -> FForm:
    form = form_of(generator)
    assert isinstance(form, FForm)
    return form


def pairs(dtype: torch.dtype = torch.float64) -> Pair:
    """Every combination of log-probs between 0 and -150, and of neighbours."""
    logp = -torch.cat([torch.linspace(0, 3, 13), torch.linspace(5, 150, 30)]).double()
    near = torch.tensor([0.0, 1e-6, -1e-6, 1e-3, -1e-3, 0.1, -0.1]).double()
    ours = torch.cat([logp.repeat_interleave(len(logp)), logp.repeat_interleave(len(near))])
    theirs = torch.cat([logp.repeat(len(logp)), (logp.unsqueeze(-1) + near).flatten()])
    return Pair(ours.to(dtype).unsqueeze(0), theirs.to(dtype).unsqueeze(0))


@every_generator
def test_summands_are_those_of_the_generator(generator: Divergence) -> None:
    pair = pairs()
    value, slope = f_form(generator).both(pair)
    truth = generator.estimate(pair.logp, pair.ref_logp)
    scale = pair.larger + truth.value + truth.slope.abs()  # what is rounded
    assert ((value - truth.value).abs() <= 1e-13 * scale).all()
    assert ((slope - truth.slope).abs() <= 1e-13 * scale).all()


@every_generator
def test_the_slope_alone_is_the_same_to_rounding(generator: Divergence) -> None:
    pair, form = pairs(), f_form(generator)
    slope = form.both(pair)[1]
    found = form.slope(pair, form.sums(pair))
    assert ((found - slope).abs() <= 1e-14 * (10 * pair.larger + 10 * slope.abs())).all()


@every_generator
@pytest.mark.parametrize("distance", [1e-5, 1e-3, 1e-1])
def test_rounding_is_small_beside_the_log_ratio(generator: Divergence, distance: float) -> None:
    """The value is of order a², its rounding of order a; a sum of π a would round like π."""
    logp = torch.linspace(-9, 0, 500).log_softmax(-1).unsqueeze(0)
    pair = Pair(logp, logp + distance * torch.linspace(-1, 1, 500).sin())
    form = f_form(generator)
    truth, _ = generator.estimate(pair.logp.double(), pair.ref_logp.double())
    value = form.value(form.sums(pair))
    assert (value - truth.sum(-1)).abs() <= 1e-6 * distance * abs(parameter(generator)) * pair.p.sum()


def parameter(generator: Divergence) -> float:
    """How steep it is, roughly."""
    return 4.0 if isinstance(generator, AlphaDivergence | SkewJSD) else 2.0


def test_fast_forms_are_for_parameters_that_keep_digits() -> None:
    slow: list[Divergence] = [
        GeneralizedJSD(beta=0.01),
        GeneralizedJSD(beta=0.99),
        SkewJSD(alpha=1e-6),
        AlphaDivergence(alpha=0.95),
    ]
    assert [form_of(generator) for generator in slow] == [Estimated(generator) for generator in slow]
    assert {type(term) for term, _ in FAMILY if isinstance(form_of(term), Estimated)} == {ClippedAlpha}


def test_beyond_the_dtype_values_are_infinite_and_slopes_are_not() -> None:
    pair = Pair(torch.tensor([[0.0, -200.0]]), torch.tensor([[-200.0, 0.0]]))
    for term, _ in FAMILY:
        value, slope = f_form(term).both(pair)
        assert not value.isnan().any()
        assert slope.isfinite().all()
        truth, _ = term.estimate(pair.logp, pair.ref_logp)
        torch.testing.assert_close(value, truth)


def test_any_other_generator_is_estimated() -> None:
    class Own(Divergence):
        def df(self, a: Tensor) -> Tensor:
            return a

        def log_scaled_f(self, a: Tensor) -> Tensor:
            return a

    own: Any = Own()
    assert form_of(own) == Estimated(own)


def test_what_is_no_sum_over_the_vocabulary_is_refused() -> None:
    class Own:
        name = "own()"

    own: Any = Own()
    with pytest.raises(ConfigError, match=r"own\(\): cannot be summed tile by tile"):
        form_of(own)


@pytest.mark.parametrize("distance", [1e-3, 0.1, 3.0, 60.0])
def test_cauchy_schwarz(distance: float) -> None:
    """In float32 against float64, in two tiles."""
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 200, generator=random, dtype=torch.float64)
    other = logits + distance * torch.randn(5, 200, generator=random, dtype=torch.float64)
    whole = Pair(logits.log_softmax(-1).float(), other.log_softmax(-1).float())
    truth, slope = CauchySchwarz().over_vocabulary(whole.logp.double(), whole.ref_logp.double())
    form: Form = form_of(CauchySchwarz())
    tiles = [Pair(whole.logp[:, part], whole.ref_logp[:, part]) for part in (slice(0, 70), slice(70, 200))]
    sums = form.merge(*(form.sums(tile) for tile in tiles))
    value = form.value(sums)
    assert ((value - truth).abs() <= 1e-5 * truth + 1e-7).all()
    found = torch.cat([form.slope(tile, sums) for tile in tiles], dim=-1)
    assert (found - slope).norm() <= (1e-6 + 1e-7 / distance) * slope.norm()  # a difference of probabilities
    assert not form.mean_slope(sums).any()
