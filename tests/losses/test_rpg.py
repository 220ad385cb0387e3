"""All eight RPG losses against the gradient of the objective that they name, by expectation over everything."""

from itertools import product
from typing import Literal

import pytest
import torch
from enumeration import Sequences, Tokens, assert_exact, gradient, relative
from torch import Tensor

from rlstab.batch import TokenBatch
from rlstab.errors import ConfigError
from rlstab.losses import RPG, ReverseKL, SequenceRatio, TokenRatio
from rlstab.losses._rpg import rpg_penalty

Direction = Literal["forward", "reverse"]
EIGHT = [
    pytest.param(RPG(divergence=d, normalised=n, form=f, beta=0.3, clip=False), id=f"{d}-{n}-{f}")  # type: ignore[arg-type]
    for d, n, f in product(("forward", "reverse"), (True, False), ("differentiable", "reinforce"))
]


def rewards_of(world: Tokens | Sequences) -> Tensor:
    rows = world.rows["policy"].shape[0]
    return torch.randn(rows, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def kl(divergence: Direction, p: Tensor, q: Tensor) -> Tensor:
    """KL(old || policy) or KL(policy || old) from log-probs of all outcomes."""
    return (q.exp() * (q - p)).sum() if divergence == "forward" else (p.exp() * (p - q)).sum()


def objective(world: Tokens | Sequences, term: RPG, old: str = "old") -> Tensor:
    """Minus what the paper maximises: expected reward less the KL."""
    rows = world.rows
    p, q = rows["policy"].sum(-1), rows[old].detach().sum(-1)
    return -(p.exp() * rewards_of(world)).sum() + term.beta * kl(term.divergence, p, q)


def drawn(world: Tokens | Sequences, term: RPG, drawn_by: str = "old") -> Tensor:
    rows = world.rows
    batch = TokenBatch(
        mask=torch.ones_like(rows["policy"], dtype=torch.bool),
        advantages=rewards_of(world),
        logps={source: rows[source] for source in ("policy", drawn_by)},
    )
    values = term.loss(batch).values
    return (rows[drawn_by].detach().sum(-1).exp() * values.sum(-1)).sum()  # one value per row sums to itself


@pytest.mark.parametrize("term", EIGHT)
@pytest.mark.parametrize("seed", [0, 1])
def test_each_has_the_gradient_of_the_objective(term: RPG, seed: int) -> None:
    world = Tokens(seed=seed)
    assert_exact(gradient(drawn(world, term), world), gradient(objective(world, term), world))


@pytest.mark.parametrize("term", EIGHT)
def test_of_whole_sequences_with_the_ratio_of_sequences(term: RPG) -> None:
    world = Sequences()
    whole = term.replace(ratio=SequenceRatio())
    assert_exact(gradient(drawn(world, whole), world), gradient(objective(world, whole), world))


@pytest.mark.parametrize("term", EIGHT)
def test_the_reference_may_be_the_sampler(term: RPG) -> None:
    world = Tokens()
    against = term.replace(ratio=TokenRatio(against="sampler"))
    truth = gradient(objective(world, term, "sampler"), world)
    assert_exact(gradient(drawn(world, against, "sampler"), world), truth)


@pytest.mark.parametrize("term", [case for case in EIGHT if case.values[0].form == "differentiable"])  # type: ignore[union-attr]
def test_the_value_is_that_of_the_objective(term: RPG) -> None:
    world = Tokens()
    assert_exact(drawn(world, term), objective(world, term))


@pytest.mark.parametrize("divergence", ["forward", "reverse"])
@pytest.mark.parametrize("normalised", [True, False])
def test_the_slope_of_the_penalty(divergence: Direction, normalised: bool) -> None:
    log_ratio = torch.linspace(-3, 3, 7, dtype=torch.float64).unsqueeze(0).requires_grad_()
    value, slope = rpg_penalty(log_ratio, divergence=divergence, normalised=normalised)
    (found,) = torch.autograd.grad(value.sum(), [log_ratio])
    assert_exact(-slope, found)
    if not normalised:
        assert (value >= 0).all()


def test_the_unnormalised_forms_vary_less() -> None:
    world = Tokens()
    q = world.rows["old"].detach()
    log_ratio = 0.1 * (world.rows["policy"].detach() - q)

    def spread(divergence: Direction, normalised: bool) -> Tensor:
        value, _ = rpg_penalty(log_ratio, divergence=divergence, normalised=normalised)
        weight = q.exp()
        return (weight * (value - (weight * value).sum()) ** 2).sum()

    for divergence in ("forward", "reverse"):
        assert spread(divergence, False) < 0.1 * spread(divergence, True)


def test_the_grpo_penalty_is_not_that_of_the_policy() -> None:
    """k3 on old samples, without a weight: the paper's correction is the weight that carries gradient."""
    world = Tokens()
    rows = world.rows
    weight = rows["old"].detach().exp()
    a = rows["policy"] - rows["initial"].detach()
    plain = (weight * (torch.expm1(-a) + a)).sum()
    truth = gradient(kl("reverse", rows["policy"], rows["initial"].detach()), world)
    assert relative(gradient(plain, world) - truth, truth) > 0.3
    corrected = (weight * (rows["policy"] - rows["old"].detach()).exp() * (torch.expm1(-a) + a)).sum()
    assert_exact(gradient(corrected, world), truth)


# --- the clip ------------------------------------------------------------------------


def slopes(term: RPG, ratios: list[float], advantage: float) -> Tensor:
    """The gradient in the log-prob of each token, for tokens of the given ratios."""
    old = torch.full((1, len(ratios)), -5.0, dtype=torch.float64)
    logp = (old + torch.tensor([ratios], dtype=torch.float64).log()).requires_grad_()
    batch = TokenBatch(
        mask=torch.ones_like(old), advantages=torch.tensor([advantage]).double(), logps={"policy": logp, "old": old}
    )
    (found,) = torch.autograd.grad(term.loss(batch).values.sum(), [logp])
    return found[0]


@pytest.mark.parametrize("form", ["differentiable", "reinforce"])
def test_a_reverse_kl_is_clipped_with_the_reward(form: Literal["differentiable", "reinforce"]) -> None:
    term = RPG(form=form, beta=0.5, low=0.2, high=0.28, dual=3.0)
    ratios = [0.5, 0.9, 1.1, 1.4, 4.0]
    rising, falling = slopes(term, ratios, 2.0), slopes(term, ratios, -2.0)
    whole = torch.tensor([-w * (2.0 - 0.5 * torch.tensor(w).double().log()) for w in ratios])
    torch.testing.assert_close(rising, torch.where(torch.tensor(ratios).double() < 1.28, whole, 0.0))
    whole = torch.tensor([-w * (-2.0 - 0.5 * torch.tensor(w).double().log()) for w in ratios])
    inside = torch.tensor([0.8 < w < 3.0 for w in ratios])
    torch.testing.assert_close(falling, torch.where(inside, whole, 0.0))


def test_a_forward_kl_stays_beside_the_clip_of_the_reward() -> None:
    term = RPG(divergence="forward", form="differentiable", beta=0.5, dual=3.0)
    expected = [-0.5 * 2 + 0.5 * (0.5 - 1), -1.1 * 2 + 0.5 * 0.1, 0.5 * (1.4 - 1)]
    torch.testing.assert_close(slopes(term, [0.5, 1.1, 1.4], 2.0), torch.tensor(expected).double())


def test_a_forward_kl_is_dropped_with_the_reward_in_the_reinforce_form() -> None:
    term = RPG(divergence="forward", form="reinforce", beta=0.5, dual=3.0)
    expected = [-(0.5 * 2 + 0.5 * 0.5), -(1.1 * 2 - 0.5 * 0.1), 0.0]
    torch.testing.assert_close(slopes(term, [0.5, 1.1, 1.4], 2.0), torch.tensor(expected).double())


def test_the_sign_that_the_clip_goes_by_is_that_of_reward_and_penalty() -> None:
    """At A = 0.1 and w = 1.4 the penalty outweighs the reward, and the clip of a falling token lets it."""
    term = RPG(form="reinforce", beta=1.0, dual=3.0)
    assert slopes(term, [1.4], 0.1)[0] > 0


def test_what_the_clip_stops_is_counted() -> None:
    old = torch.full((1, 4), -5.0)
    batch = TokenBatch(
        mask=torch.ones(1, 4),
        advantages=torch.ones(1),
        logps={"policy": old + torch.tensor([[0.5, 1.0, 1.5, 2.0]]).log(), "old": old},
    )
    assert RPG().loss(batch).metrics["clipped"].value() == 0.5
    assert "clipped" not in RPG(clip=False).loss(batch).metrics


def test_the_unnormalised_reverse_form_is_the_divergence_beside_the_plain_surrogate() -> None:
    world = Tokens()
    rows = world.rows
    batch = TokenBatch(
        mask=torch.ones(7, 1), advantages=rewards_of(world), logps={name: rows[name] for name in ("policy", "old")}
    )
    ours = RPG(beta=0.3, clip=False).loss(batch).values
    ratio = (rows["policy"] - rows["old"].detach()).exp()
    apart = -ratio * rewards_of(world).unsqueeze(-1)
    apart = apart + 0.3 * ReverseKL(reference="old", samples="reference").loss(batch).values
    assert_exact(ours, apart)
    assert_exact(gradient(ours.sum(), world), gradient(apart.sum(), world))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"divergence": "js"}, r"RPG\.divergence: expected one of 'forward', 'reverse'"),
        ({"form": "k3"}, r"RPG\.form: expected one of"),
        ({"beta": float("nan")}, r"RPG\.beta: expected a finite number"),
        ({"low": 1.5}, r"RPG\.low: expected a number from 0 to 1"),
        ({"high": -0.1}, r"RPG\.high"),
        ({"dual": 0.9}, r"RPG\.dual: expected a number of at least 1, got 0\.9"),
    ],
)
def test_refusals(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RPG(**changes)  # type: ignore[arg-type]
