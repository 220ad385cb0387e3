"""What the KL penalties of the hosts descend, by expectation over every token: the table in `KL`, cell by cell."""

from typing import Literal, NamedTuple

import pytest
import torch
from enumeration import Sequences, Tokens, assert_exact, expectation, gradient, relative
from generators import forward_kl, reverse_kl
from torch import Tensor

from rlstab.batch import TokenBatch
from rlstab.errors import ConfigError
from rlstab.losses import KL, ForwardKL, ReverseKL, TokenRatio

Drawn = Literal["policy", "old", "sampler"]


class Cell(NamedTuple):
    """Whose KL the value is, and whose gradient the gradient (None: of neither)."""

    value: str | None
    gradient: str | None


REVERSE, FORWARD, NEITHER = "reverse", "forward", None
ON_POLICY = {
    ("k1", "differentiable"): Cell(REVERSE, REVERSE),
    ("k2", "none"): Cell(NEITHER, REVERSE),
    ("k2", "detached"): Cell(NEITHER, REVERSE),
    ("k2", "differentiable"): Cell(NEITHER, NEITHER),
    ("k3", "none"): Cell(REVERSE, FORWARD),
    ("k3", "detached"): Cell(REVERSE, FORWARD),
    ("k3", "differentiable"): Cell(REVERSE, REVERSE),
}
OFF_POLICY = ON_POLICY | {
    ("k2", "none"): Cell(NEITHER, NEITHER),
    ("k3", "none"): Cell(NEITHER, NEITHER),
}
CELLS = [
    pytest.param(estimator, weight, drawn_by, cell, id=f"{estimator}-{weight}-{drawn_by}")
    for drawn_by, table in (("policy", ON_POLICY), ("old", OFF_POLICY), ("sampler", OFF_POLICY))
    for (estimator, weight), cell in table.items()
]
MARGIN = 0.03


def truths(world: Tokens) -> dict[str, Tensor]:
    return {REVERSE: world.divergence(reverse_kl), FORWARD: world.divergence(forward_kl)}


@pytest.mark.parametrize(("estimator", "weight", "drawn_by", "cell"), CELLS)
@pytest.mark.parametrize("seed", [0, 1])
def test_the_table(estimator: str, weight: str, drawn_by: Drawn, cell: Cell, seed: int) -> None:
    world = Tokens(seed=seed)
    against = TokenRatio(against="sampler") if drawn_by == "sampler" else TokenRatio()
    term = KL(estimator=estimator, weight=weight, ratio=against)  # type: ignore[arg-type]
    recorded = ("policy", "initial") if drawn_by == "policy" else ("policy", "initial", drawn_by)
    estimate = expectation(term, world, drawn_by=drawn_by, recorded=recorded)
    slope = gradient(estimate, world)
    for name, truth in truths(world).items():
        if cell.value == name:
            assert_exact(estimate, truth)
        else:
            assert relative(estimate - truth, truth) > MARGIN
        if cell.gradient == name:
            assert_exact(slope, gradient(truth, world))
        else:
            assert relative(slope - gradient(truth, world), gradient(truth, world)) > MARGIN


@pytest.mark.parametrize("drawn_by", ["policy", "old"])
def test_k1_has_no_gradient_towards_the_reference(drawn_by: Drawn) -> None:
    """On policy it is zero; off policy it is that of -KL(old‖π), in which the reference does not occur."""
    world = Tokens()
    rows = world.rows
    probability = rows[drawn_by].detach().exp()
    k1 = rows["policy"] - rows["initial"]
    estimate = (probability * k1).sum()
    to_old = (rows["old"].exp() * (rows["old"] - rows["policy"])).sum()
    expected = torch.zeros(7, dtype=torch.float64) if drawn_by == "policy" else -gradient(to_old, world)
    assert_exact(gradient(estimate, world), expected)
    weighted = (rows["policy"].detach().exp() * k1).sum()
    assert_exact(gradient(weighted, world), torch.zeros(7, dtype=torch.float64))


@pytest.mark.parametrize("weight", ["none", "detached"])
def test_k1_without_a_gradient_is_refused(weight: Literal["none", "detached"]) -> None:
    with pytest.raises(ConfigError, match=r"k1.*expected gradient.*differentiable"):
        KL(estimator="k1", weight=weight)


def test_a_differentiable_weight_turns_k2_round_below_minus_two() -> None:
    """Where the policy has suppressed a token below e^-2 of the reference, descent suppresses it further."""
    log_ratio = torch.tensor([[-3.0, -2.0, -1.0, 1.0]], dtype=torch.float64)
    logp = (-4.0 + log_ratio).requires_grad_()
    batch = TokenBatch(mask=torch.ones(1, 4), logps={"policy": logp, "initial": logp.detach() - log_ratio})
    loss = KL(estimator="k2", weight="differentiable").loss(batch).values
    (slope,) = torch.autograd.grad(loss.sum(), [logp], retain_graph=True)
    assert_exact(slope, log_ratio + log_ratio.square() / 2)
    assert slope[0, 0] > 0  # descent lowers it
    (right,) = torch.autograd.grad(KL(estimator="k2", weight="detached").loss(batch).values.sum(), [logp])
    assert right[0, 0] < 0


@pytest.mark.parametrize("clamped", [20.0, 300.0])
def test_k3_is_not_clamped_where_the_policy_gave_up_a_token(clamped: float) -> None:
    """A clamp at 10, as other trainers have it, has gradient 0 below ref/13.6."""
    logp = torch.tensor([[-1.0 - clamped]], dtype=torch.float64, requires_grad=True)
    batch = TokenBatch(mask=torch.ones(1, 1), logps={"policy": logp, "initial": torch.tensor([[-1.0]]).double()})
    for term in (KL(estimator="k3"), ForwardKL(samples="policy"), ReverseKL(samples="policy")):
        (slope,) = torch.autograd.grad(term.loss(batch).values.sum(), [logp], retain_graph=True)
        assert slope.item() < -1


def test_k3_without_a_weight_is_what_grpo_prints_and_the_weighted_one_deepseek_v32() -> None:
    """Weighted k3 is `ReverseKL` token by token, and the k3 loss has the gradient of `ForwardKL`, in each sample."""
    world = Tokens()
    rows = world.rows
    batch = TokenBatch(mask=torch.ones(7, 1), logps={name: rows[name] for name in ("policy", "old", "initial")})
    weighted = KL(estimator="k3", weight="differentiable").loss(batch).values
    ours = ReverseKL().loss(batch).values
    assert_exact(weighted, ours)
    assert_exact(gradient(weighted.sum(), world), gradient(ours.sum(), world))
    on_policy = batch.replace(logps={name: rows[name] for name in ("policy", "initial")})
    plain, forward = (term.loss(on_policy).values for term in (KL(estimator="k3"), ForwardKL()))
    assert_exact(gradient(plain.sum(), world), gradient(forward.sum(), world))


@pytest.mark.parametrize("drawn_by", ["policy", "old"])
def test_no_token_penalty_has_the_gradient_of_sequences(drawn_by: Drawn) -> None:
    world = Sequences()
    truth = gradient(world.divergence(reverse_kl), world)
    local = gradient(world.local_divergence(reverse_kl, drawn_by), world)
    recorded = ("policy", "initial") if drawn_by == "policy" else ("policy", "initial", "old")
    term = KL(estimator="k3", weight="differentiable")
    found = gradient(expectation(term, world, drawn_by=drawn_by, recorded=recorded), world)
    assert_exact(found, local)
    assert relative(found - truth, truth) > 0.1
