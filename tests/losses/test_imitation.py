import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from loss_vectors import check_vector, double, vector_batch, vectors
from torch import Tensor

from rlstab.batch import TokenBatch
from rlstab.errors import ConfigError
from rlstab.losses import (
    CHORD,
    DFT,
    PSFT,
    SFT,
    ClippedSurrogate,
    EntropySFT,
    ForwardKL,
    Imitation,
    ImportanceSFT,
    Objective,
    PolicyShaping,
    Term,
    TrSFT,
    exact_divergence,
    presets,
)


@pytest.mark.parametrize(
    ("method", "objective"),
    [
        ("sft", presets.sft()),
        ("dft", presets.dft()),
        ("trsft_logp_form", presets.trsft()),
        ("trsft_surrogate", Objective(imitation=TrSFT(form="surrogate"))),
        ("luffy_policy_shaping", Objective(demonstrations=PolicyShaping())),
        ("chord_phi", Objective(imitation=CHORD())),
        ("psft", presets.psft()),
        ("iw_sft_seq", presets.iw_sft()),
        ("iw_sft_token", presets.iw_sft(level="token")),
    ],
)
def test_vectors(method: str, objective: Objective) -> None:
    (vector,) = vectors(method)
    check_vector(objective, vector, rows="demonstration")


@pytest.mark.parametrize("method", ["sft", "dft", "trsft_logp_form", "chord_phi", "iw_sft_token"])
def test_weights_of_the_vectors(method: str) -> None:
    (vector,) = vectors(method)
    terms: dict[str, Imitation] = {
        "sft": SFT(),
        "dft": DFT(),
        "trsft_logp_form": TrSFT(),
        "chord_phi": CHORD(),
        "iw_sft_token": ImportanceSFT(level="token"),
    }
    batch, logp = vector_batch(vector["inputs"], rows="demonstration")
    expected = vector["expected"].get("per_token_weight") or vector["expected"]["weights"]
    torch.testing.assert_close(terms[method].weight(logp.detach(), batch), double([expected]))


def test_vector_of_asft() -> None:
    (vector,) = vectors("asft_logits")
    inputs, expected = vector["inputs"], vector["expected"]
    logits = double([inputs["logits"]]).requires_grad_()
    anchor = presets.asft(coef=vector["hyper"]["kl_weight"]).terms["anchor"]
    (need,) = anchor.requires
    kl = exact_divergence(ForwardKL(), logits, double([inputs["ref_probs"]]).log())
    batch = TokenBatch(
        mask=torch.ones(1, 1),
        logps={"policy": logits.log_softmax(-1)[:, inputs["label"]].unsqueeze(-1)},
        vocab={need.key: kl.unsqueeze(-1)},  # type: ignore[attr-defined]
        rows="demonstration",
    )
    loss = presets.asft(coef=vector["hyper"]["kl_weight"])(batch).loss
    loss.backward()
    torch.testing.assert_close(kl.detach(), double([expected["kl_ref_policy"]]), rtol=0, atol=1e-12)
    torch.testing.assert_close(loss.detach(), double(expected["loss"]), rtol=0, atol=1e-12)
    torch.testing.assert_close(logits.grad, double([expected["grad_logits"]]), rtol=0, atol=1e-12)


def test_vector_of_srft() -> None:
    (vector,) = vectors("srft_weights")
    entropy, expected = double([[vector["inputs"]["entropy"]]]), vector["expected"]
    batch = TokenBatch(mask=torch.ones(1, 1), logps={"policy": double([[-1.0]])}, vocab={"entropy": entropy})
    for scale, sign, name in ((0.5, -1, "w_sft"), (0.1, 1, "w_rl")):
        loss = EntropySFT(scale=scale, sign=sign).loss(batch).values  # type: ignore[arg-type]
        torch.testing.assert_close(loss, double([[expected[name]]]), rtol=0, atol=1e-12)


def slope(term: Term, p: float, **fields: Any) -> float:
    logp = double([[p]]).log().requires_grad_()
    logps = {"policy": logp, "initial": double([[0.5]]).log(), "old": double([[0.5]]).log()}
    batch = TokenBatch(mask=torch.ones(1, 1), logps=logps, advantages=double([1.0]), **fields)
    term.loss(batch).values.sum().backward()
    assert logp.grad is not None
    return logp.grad.item()


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.99])
def test_the_limits_of_trsft(p: float) -> None:
    assert slope(TrSFT(alpha=1e-9), p) == slope(SFT(), p) == -1
    assert slope(TrSFT(alpha=1.0), p) == pytest.approx(slope(DFT(), p))
    assert slope(TrSFT(form="surrogate"), p) == pytest.approx(slope(TrSFT(), p))


@pytest.mark.parametrize(
    ("q", "alpha", "expected"),
    [
        ([0.62, 0.30, 0.05, 0.03], 0.1, [0.62 / 0.92, 0.30 / 0.92, 0.0, 0.0]),
        ([0.62, 0.30, 0.05, 0.03], 0.02, [0.62, 0.30, 0.05, 0.03]),
        ([0.905, 0.095], 0.1, [0.953, 0.047]),
    ],
)
def test_trsft_keeps_the_modes_and_drops_the_rest(q: list[float], alpha: float, expected: list[float]) -> None:
    """Where descent ends in one context: q_k / C above the crossing C = sum of the q_k above alpha C."""
    logits = torch.zeros(len(q), dtype=torch.float64, requires_grad=True)
    for _ in range(2500):
        logps = logits.log_softmax(-1)
        batch = TokenBatch(mask=torch.ones(len(q), 1), logps={"policy": logps.unsqueeze(-1)})
        loss = (double(q) * TrSFT(alpha=alpha).loss(batch).values[:, 0]).sum()
        (grad,) = torch.autograd.grad(loss, [logits])
        with torch.no_grad():
            logits -= 3.0 * grad
    torch.testing.assert_close(logits.softmax(-1).detach(), double(expected), rtol=0, atol=2e-3)


def test_shaping_learns_most_where_the_probability_is_gamma() -> None:
    found = {p: -slope(PolicyShaping(gamma=0.1), p) for p in (0.01, 0.05, 0.1, 0.2, 0.9)}
    assert max(found, key=lambda p: found[p]) == 0.1
    assert found[0.1] == pytest.approx(0.25)


def test_psft_is_ppo_with_an_advantage_of_one() -> None:
    logp = double([[-0.2, -1.0, -3.0]]).requires_grad_()
    batch = TokenBatch(
        mask=torch.ones(1, 3), advantages=double([1.0]), logps={"policy": logp, "old": double([[-0.9, -1.0, -2.0]])}
    )
    ours, ppo = PSFT(high=0.28).loss(batch).values, ClippedSurrogate(low=0.2, high=0.28).loss(batch).values
    torch.testing.assert_close(ours, ppo)
    slopes = [torch.autograd.grad(loss.sum(), [logp], retain_graph=True) for loss in (ours, ppo)]
    torch.testing.assert_close(*slopes)


@pytest.mark.parametrize("term", [SFT(), DFT(), TrSFT(), CHORD(), ImportanceSFT()], ids=repr)
def test_weights_carry_no_gradient(term: Imitation) -> None:
    logp = double([[-0.7]]).requires_grad_()
    batch = TokenBatch(mask=torch.ones(1, 1), logps={"policy": logp, "initial": double([[-1.0]])})
    values, metrics = term.loss(batch)
    (found,) = torch.autograd.grad(values.sum(), [logp])
    torch.testing.assert_close(-found.squeeze(), metrics["weight"].value())
    assert metrics["nll"].value() == pytest.approx(0.7)


def test_demonstrations_have_a_mean_of_their_own() -> None:
    """Beside rollouts their number of tokens changes nothing for the policy's loss."""
    objective = presets.chord(mu=0.25)
    rollouts = TokenBatch(mask=torch.ones(3, 4), advantages=torch.ones(3), logps={"policy": -torch.ones(3, 4)})

    def loss(rows: int) -> Tensor:
        demonstrations = TokenBatch(
            mask=torch.ones(rows, 2), logps={"policy": torch.full((rows, 2), 0.4).log()}, rows="demonstration"
        )
        return objective(rollouts, demonstrations).loss

    expected = -0.75 * 1.0 + 0.25 * 0.24 * -math.log(0.4)
    assert loss(1).item() == pytest.approx(expected) == pytest.approx(loss(5).item())


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: TrSFT(alpha=0.0), r"TrSFT\.alpha"),
        (lambda: TrSFT(alpha=1.5), r"TrSFT\.alpha: expected a number from 0 to 1"),
        (lambda: TrSFT(form="log"), r"TrSFT\.form: expected one of 'weighted', 'surrogate'"),  # type: ignore[arg-type]
        (lambda: ImportanceSFT(level="row"), r"ImportanceSFT\.level"),  # type: ignore[arg-type]
        (lambda: ImportanceSFT(tau=0.0), r"ImportanceSFT\.tau"),
        (lambda: ImportanceSFT(min=20.0), r"ImportanceSFT\.min: expected a weight in \[0, max=16\.0\), got 20\.0"),
        (lambda: EntropySFT(scale=-1.0), r"EntropySFT\.scale"),
        (lambda: EntropySFT(sign=2), r"EntropySFT\.sign: expected -1 or 1, got 2"),  # type: ignore[arg-type]
        (lambda: PSFT(high=-0.1), r"PSFT\.high"),
        (lambda: PolicyShaping(gamma=0.0), r"PolicyShaping\.gamma"),
    ],
)
def test_refusals(build: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build()
