from typing import Any

import pytest
import torch
from loss_vectors import double, vectors
from torch import Tensor

from rlstab.batch import Column, LogProbs, TokenBatch
from rlstab.errors import ConfigError
from rlstab.losses import KLCov, Needs, Objective, TopCovariance, run_parts
from rlstab.losses._covariance import covariance


def from_vector() -> tuple[TokenBatch, Tensor, dict[str, Any]]:
    (vector,) = vectors("kl_cov")
    inputs = vector["inputs"]
    logp = double(inputs["logp"]).requires_grad_()
    batch = TokenBatch(
        mask=torch.tensor(inputs["mask"]),
        advantages=double(inputs["advantages"]),
        logps={"policy": logp, "old": double(inputs["old_logp"])},
    )
    return batch, logp, vector


def random_step(rows: int = 8, length: int = 12) -> TokenBatch:
    generator = torch.Generator().manual_seed(0)
    old = -3 * torch.rand(rows, length, generator=generator)
    return TokenBatch(
        mask=torch.arange(length) < torch.randint(2, length + 1, (rows, 1), generator=generator),
        advantages=torch.randn(rows, generator=generator),
        logps={"policy": old + 0.1 * torch.randn(rows, length, generator=generator), "old": old},
    )


def test_vector() -> None:
    batch, logp, vector = from_vector()
    hyper, expected = vector["hyper"], vector["expected"]
    summands = covariance(batch.logp("policy").detach(), batch.token_advantages(), batch.mask)
    wanted = [value for row in expected["cov"] for value in row if value is not None]
    torch.testing.assert_close(summands[batch.mask], double(wanted))
    term = KLCov(fraction=hyper["k_fraction"], coef=hyper["coef"])
    prepared = run_parts(term.requires, batch)
    assert sorted(prepared.part(term.selection.key).nonzero().tolist()) == sorted(expected["selected"])

    penalty, _ = Objective(kl=term)(prepared)
    ratio = (batch.logp("policy") - batch.logp("old")).exp()
    base = -(ratio * batch.token_advantages() * batch.mask).sum() / batch.mask.sum()  # the paper clips nothing
    (base + penalty).backward()
    torch.testing.assert_close((base + penalty).detach(), double(expected["loss"]))
    torch.testing.assert_close(logp.grad, double(expected["grad"]))


@pytest.mark.parametrize(("tokens", "fraction", "chosen"), [(7, 0.3, 2), (7, 1e-3, 1), (10, 0.5, 5), (4, 1.0, 4)])
def test_how_many_tokens_are_chosen(tokens: int, fraction: float, chosen: int) -> None:
    batch = TokenBatch(
        mask=torch.ones(1, tokens), advantages=torch.randn(1, tokens), logps={"policy": -torch.rand(1, tokens)}
    )
    assert TopCovariance(fraction=fraction).compute(batch).sum() == chosen


def test_ties_go_to_the_first_tokens() -> None:
    batch = TokenBatch(mask=torch.ones(3, 4), advantages=torch.ones(3), logps={"policy": torch.full((3, 4), -1.0)})
    chosen = TopCovariance(fraction=0.5).compute(batch)
    assert chosen.flatten().tolist() == [True] * 6 + [False] * 6


def test_padding_and_tool_tokens_are_never_chosen() -> None:
    mask = torch.tensor([[True, True, True, False]])
    loss_mask = torch.tensor([[True, False, True, False]])
    logps = {"policy": torch.tensor([[-1.0, 50.0, -3.0, torch.nan]])}
    batch = TokenBatch(mask=mask, loss_mask=loss_mask, advantages=double([[1.0, 90.0, -1.0, 90.0]]), logps=logps)
    assert TopCovariance(fraction=1.0).compute(batch).tolist() == loss_mask.tolist()
    assert not TopCovariance().compute(batch.replace(loss_mask=torch.zeros_like(mask))).any()


def test_wider_padding_chooses_the_same_tokens() -> None:
    batch = random_step()
    wide = TokenBatch(
        mask=torch.nn.functional.pad(batch.mask, (0, 117)),
        advantages=batch.advantages,
        logps={"policy": torch.nn.functional.pad(batch.logp("policy"), (0, 117), value=-torch.inf)},
    )
    part = TopCovariance(fraction=0.1)
    assert torch.equal(part.compute(wide)[:, :12], part.compute(batch))


def test_a_token_without_finite_log_prob_spoils_nothing() -> None:
    logps = {"policy": torch.tensor([[-1.0, -torch.inf, -3.0]], requires_grad=True), "old": torch.zeros(1, 3)}
    batch = TokenBatch(mask=torch.ones(1, 3), advantages=torch.tensor([[1.0, 1.0, -1.0]]), logps=logps)
    term = KLCov(fraction=1.0)
    loss, _ = Objective(kl=term)(run_parts(term.requires, batch))
    loss.backward()
    torch.testing.assert_close(loss.detach(), torch.tensor(4 / 3))
    torch.testing.assert_close(logps["policy"].grad, torch.tensor([[-1 / 3, 0.0, -1 / 3]]))


def test_on_policy_it_is_exactly_inert() -> None:
    batch = random_step()
    logp = batch.logp("old").clone().requires_grad_()
    term = 100 * KLCov(fraction=0.5)
    loss, _ = Objective(kl=term)(run_parts(term.requires, batch.replace(logps={"policy": logp})))
    loss.backward()
    assert logp.grad is not None
    assert loss == 0
    assert not logp.grad.any()
    assert term.inert_on_policy


def test_the_micro_batch_form_chooses_by_itself() -> None:
    batch = random_step()
    term = KLCov(fraction=0.2, over="micro_batch")
    assert term.requires == {LogProbs("policy"), LogProbs("old"), Column("advantages")}
    step = KLCov(fraction=0.2)
    assert step.requires == {LogProbs("policy"), LogProbs("old"), Needs(step.selection)}
    whole = term.loss(batch).values
    torch.testing.assert_close(whole, step.loss(run_parts(step.requires, batch)).values)
    halves = torch.cat([term.loss(part).values for part in batch.split([4, 4])])
    assert not torch.equal(halves, whole)


def test_the_covariance_predicts_the_change_of_entropy() -> None:
    """A natural policy-gradient step of size η changes a softmax policy's entropy by about −η Cov(log π, A)."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(6, generator=generator, dtype=torch.float64)
    advantages = torch.randn(6, generator=generator, dtype=torch.float64)

    def entropy(z: Tensor) -> Tensor:
        logp = z.log_softmax(-1)
        return -(logp.exp() * logp).sum(-1)

    logp = logits.log_softmax(-1)
    tokens = torch.multinomial(logp.exp(), 400_000, replacement=True, generator=generator).unsqueeze(0)
    estimate = covariance(logp[tokens], advantages[tokens], torch.ones_like(tokens, dtype=torch.bool)).mean()
    change = (entropy(logits + 1e-5 * advantages) - entropy(logits)) / 1e-5
    torch.testing.assert_close(change, -estimate, rtol=0.02, atol=0.0)


@pytest.mark.parametrize(
    ("build", "key"),
    [
        (lambda: KLCov(fraction=0.0), r"KLCov\.fraction"),
        (lambda: KLCov(fraction=1.5), r"KLCov\.fraction"),
        (lambda: TopCovariance(fraction=-1.0), r"TopCovariance\.fraction"),
        (lambda: KLCov(over="generation"), r"KLCov\.over.*'micro_batch'"),  # type: ignore[arg-type]
    ],
)
def test_refusals(build: Any, key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        build()
