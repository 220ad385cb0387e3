from collections.abc import Callable
from typing import Any

import pytest
import torch
from loss_vectors import double, vector_batch, vectors
from torch import Tensor

from rlstab.batch import TokenBatch
from rlstab.errors import ConfigError
from rlstab.losses import (
    ClipCov,
    ClippedSurrogate,
    CovarianceSample,
    EntropyCovariance,
    MeanCovariance,
    Objective,
    presets,
    run_parts,
)
from rlstab.losses._covariance import covariance
from rlstab.losses._covariance_band import lots


def from_vector(method: str) -> tuple[TokenBatch, Tensor, dict[str, Any], dict[str, Any]]:
    (vector,) = vectors(method)
    batch, logp = vector_batch(vector["inputs"], token_ids=torch.tensor([[5, 6, 7, 8], [5, 9, 7, 0]]))
    return batch, logp, vector["hyper"], vector["expected"]


def objective_of(hyper: dict[str, Any], **changes: Any) -> Objective:
    weight = ClipCov(fraction=hyper["clip_cov_ratio"], min=hyper["lb"], max=hyper["ub"], **changes)
    policy = ClippedSurrogate(low=hyper["eps_low"], high=hyper["eps_high"], weights=[weight])
    return Objective(policy=policy.mean("token"))


def test_vector_in_which_all_eligible_tokens_are_drawn() -> None:
    batch, logp, hyper, expected = from_vector("clip_cov")
    summands = covariance(batch.logp("policy").detach(), batch.token_advantages(), batch.mask)
    torch.testing.assert_close(
        summands[batch.mask], double([c for row in expected["cov"] for c in row if c is not None])
    )
    objective = objective_of(hyper)
    ready = run_parts(objective.requires, batch)
    loss, terms = objective(ready)
    loss.backward()
    torch.testing.assert_close(loss.detach(), double(expected["loss"]), rtol=0, atol=1e-12)
    torch.testing.assert_close(logp.grad, double(expected["grad"]), rtol=0, atol=1e-12)
    drawn = ready.part(CovarianceSample(fraction=0.5).key).nonzero().tolist()
    assert drawn == expected["selected"] == expected["eligible"]
    assert terms["policy"].metrics["clip_cov/drawn"].value() == pytest.approx(3 / 7)


def test_vector_in_which_one_of_three_is_drawn() -> None:
    """Each seed draws one of the listed alternatives, and each of them comes about equally often."""
    batch, logp, hyper, expected = from_vector("clip_cov_random")
    sampled = [CovarianceSample(fraction=hyper["clip_cov_ratio"], seed=seed).compute(batch) for seed in range(600)]
    wanted = [entry["selected"][0] for entry in expected["alternatives_equally_likely"]]
    counts = [sum(drawn.nonzero().tolist() == [place] for drawn in sampled) for place in wanted]
    assert sum(counts) == 600
    assert all(150 < count < 250 for count in counts)
    for entry in expected["alternatives_equally_likely"]:
        seed = next(s for s, drawn in enumerate(sampled) if drawn.nonzero().tolist() == entry["selected"])
        objective = objective_of(hyper, seed=seed)
        loss = objective(run_parts(objective.requires, batch)).loss
        (slope,) = torch.autograd.grad(loss, [logp], retain_graph=True)
        torch.testing.assert_close(loss.detach(), double(entry["loss"]), rtol=0, atol=1e-12)
        torch.testing.assert_close(slope, double(entry["grad"]), rtol=0, atol=1e-12)


def random_step(rows: int = 16, length: int = 12) -> TokenBatch:
    generator = torch.Generator().manual_seed(0)
    old = -3 * torch.rand(rows, length, generator=generator, dtype=torch.float64)
    return TokenBatch(
        mask=torch.arange(length) < torch.randint(2, length + 1, (rows, 1), generator=generator),
        advantages=torch.randn(rows, generator=generator, dtype=torch.float64),
        logps={"policy": old + 0.1 * torch.randn(rows, length, generator=generator), "old": old},
        token_ids=torch.randint(0, 50, (rows, length), generator=generator),
    )


def test_as_many_are_drawn_as_asked_for_and_only_from_the_band() -> None:
    batch, part = random_step(), CovarianceSample(fraction=0.1, min=-0.5, max=0.5)
    drawn, eligible = part.compute(batch), part.eligible(batch)
    assert drawn.sum() == int(0.1 * batch.loss_mask.sum())
    assert not (drawn & ~eligible).any()
    assert (CovarianceSample(fraction=1.0, min=-0.5, max=0.5).compute(batch) == eligible).all()


def test_neither_order_nor_padding_nor_rounding_changes_the_draw() -> None:
    batch, part = random_step(), CovarianceSample(fraction=0.1, min=-0.5, max=0.5)
    drawn = part.compute(batch)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    assert torch.equal(part.compute(batch.select(order)), drawn[order])

    def wider(x: Tensor) -> Tensor:
        return torch.nn.functional.pad(x, (0, 3), value=1)

    padded = TokenBatch(
        mask=torch.nn.functional.pad(batch.mask, (0, 3)),
        advantages=batch.advantages,
        logps={name: wider(value) for name, value in batch.logps.items()},
        token_ids=wider(batch.column("token_ids")),
    )
    assert torch.equal(part.compute(padded)[:, :12], drawn)
    rounded = batch.replace(logps={name: value * (1 + 1e-13) for name, value in batch.logps.items()})
    assert torch.equal(part.compute(rounded), drawn)


def test_other_seeds_and_other_steps_draw_others() -> None:
    batch = random_step()
    draws = [CovarianceSample(fraction=0.05, min=-0.5, max=0.5, seed=seed).compute(batch) for seed in range(20)]
    assert len({tuple(drawn.flatten().tolist()) for drawn in draws}) == 20
    later = batch.replace(advantages=batch.advantages * 1.3)  # type: ignore[operator]  # other tokens are eligible
    assert not torch.equal(CovarianceSample(fraction=0.05, min=-0.5, max=0.5).compute(later), draws[0])


def test_lots_are_fair() -> None:
    tokens = torch.randint(0, 5, (200, 50), generator=torch.Generator().manual_seed(3))
    drawn = lots(tokens, torch.ones_like(tokens, dtype=torch.bool), torch.tensor(7)).double() / 2**63
    assert abs(drawn.mean()) < 0.02
    assert abs(drawn.std() - 3**-0.5) < 0.01
    assert abs(torch.corrcoef(torch.stack([drawn[:, :-1].flatten(), drawn[:, 1:].flatten()]))[0, 1]) < 0.03


def test_what_the_clip_has_stopped_is_not_eligible() -> None:
    old = torch.full((2, 3), -2.0, dtype=torch.float64)
    ratios = double([[0.5, 1.0, 1.5], [0.5, 1.0, 1.5]])
    batch = TokenBatch(
        mask=torch.ones(2, 3),
        advantages=double([1.0, -1.0]),
        logps={"policy": old + ratios.log(), "old": old},
        token_ids=torch.arange(6).view(2, 3),
    )
    part = CovarianceSample(fraction=1.0, min=-9.0, max=9.0, low=0.2, high=0.28)
    assert part.eligible(batch).tolist() == [[True, True, False], [False, True, True]]
    assert CovarianceSample(fraction=1.0, min=-9.0, max=9.0).eligible(batch).all()


def test_a_micro_batch_of_the_whole_step_is_the_step() -> None:
    batch = random_step()
    step, local = ClipCov(fraction=0.1, min=-0.5, max=0.5), ClipCov(fraction=0.1, min=-0.5, max=0.5, over="micro_batch")
    whole = step.factor(run_parts(step.requires, batch)).values
    torch.testing.assert_close(local.factor(batch).values, whole)
    halves = torch.cat([local.factor(part).values for part in batch.split([8, 8])])
    assert not torch.equal(halves, whole)


def test_the_covariance_of_a_step_is_a_metric_under_any_split() -> None:
    batch, weight = random_step(), EntropyCovariance()
    ready = run_parts(weight.requires, batch)
    both = torch.stack([batch.logp("policy"), batch.token_advantages().expand(batch.shape)])[:, batch.mask]
    expected = torch.cov(both, correction=0)
    torch.testing.assert_close(MeanCovariance().compute(batch), expected[0, 1])
    parts = [weight.factor(micro).metrics["entropy_covariance/mean"] for micro in ready.split([3, 9, 4])]
    torch.testing.assert_close(parts[0].merge(parts[1]).merge(parts[2]).value(), expected[0, 1])
    assert (weight.factor(ready).values == 1).all()


def test_the_preset_leaves_room_for_the_ratio() -> None:
    policy: Any = presets.clip_cov().terms["policy"]
    (weight,) = policy.weights
    assert (policy.low, policy.high) == (weight.low, weight.high) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ClipCov(fraction=0.0), r"CovarianceSample\.fraction"),
        (lambda: ClipCov(min=5.0, max=5.0), r"CovarianceSample\.max: expected a covariance above min=5\.0, got 5\.0"),
        (lambda: ClipCov(seed=-1), r"CovarianceSample\.seed"),
        (lambda: ClipCov(over="generation"), r"ClipCov\.over: expected one of 'step', 'micro_batch'"),  # type: ignore[arg-type]
    ],
)
def test_refusals(build: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build()
