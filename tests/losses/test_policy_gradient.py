import math
from typing import Any

import pytest
import torch
from loss_vectors import check_vector, double, vector_batch, vectors

from rlstab.batch import Column, LogProbs, TokenBatch
from rlstab.errors import CompositionError, ConfigError
from rlstab.losses import (
    VESPO,
    AStarPO,
    GPGAdvantage,
    ImportanceSurrogate,
    MaskedIS,
    Objective,
    PolicyGradient,
    SequenceRatio,
    TokenRatio,
    TruncatedIS,
    Veto,
    optimal_value,
)
from rlstab.losses._policy_gradient import vespo_weight

MASK = torch.tensor([[True, True, True], [True, True, False]])


@pytest.mark.parametrize(("index", "advantage"), [(0, GPGAdvantage()), (1, GPGAdvantage(norm="std", correction=False))])
def test_vectors_of_gpg(index: int, advantage: GPGAdvantage) -> None:
    vector = vectors("gpg")[index]  # the third is another framework's correction
    rewards, size = double(vector["inputs"]["rewards"]), vector["inputs"]["group"]
    batch, _ = vector_batch(vector["inputs"], rewards=rewards, group=torch.arange(len(rewards)) // size)
    check_vector(Objective(policy=PolicyGradient()), vector, advantages=advantage.compute(batch))


def test_vector_of_vespo() -> None:
    (vector,) = vectors("vespo")
    check_vector(Objective(policy=VESPO()), vector)
    batch, _ = vector_batch(vector["inputs"])
    assert float(VESPO().loss(batch).metrics["phi"].value()) == pytest.approx(sum(vector["expected"]["phi"]) / 2)


def test_vector_of_a_star_po() -> None:
    (vector,) = vectors("a_star_po")
    hyper, inputs, expected = vector["hyper"], vector["inputs"], vector["expected"]
    values = optimal_value(double(inputs["ref_sample_rewards"]), beta=hyper["beta1"])
    torch.testing.assert_close(values, double(expected["v_star"]))
    given = {"rewards": double(inputs["rewards"]), "baseline": values}
    check_vector(Objective(policy=AStarPO(beta=hyper["beta2"])), vector, **given)
    batch, _ = vector_batch(inputs, **given)
    losses = AStarPO(beta=hyper["beta2"]).loss(batch).values
    torch.testing.assert_close(losses[:, 0], double(expected["per_seq_loss"]))


def test_policy_gradient_reads_neither_ratio_nor_old_policy() -> None:
    assert PolicyGradient().requires == {Column("advantages"), LogProbs("policy")}
    leaf = double([[-1.0, -2.0]]).requires_grad_()
    batch = TokenBatch(mask=torch.ones(1, 2), logps={"policy": leaf}, advantages=double([3.0]))
    PolicyGradient().loss(batch).values.sum().backward()
    torch.testing.assert_close(leaf.grad, double([[-3.0, -3.0]]))


@pytest.mark.parametrize("ratio", [TokenRatio(), SequenceRatio()])
def test_importance_surrogate_equals_reinforce_on_policy(ratio: Any) -> None:
    gradients = []
    for policy in (PolicyGradient(), ImportanceSurrogate(ratio=ratio)):
        leaf = double([[-1.0, -2.0, -0.5], [-3.0, -1.0, 0.0]]).requires_grad_()
        batch = TokenBatch(mask=MASK, logps={"policy": leaf}, advantages=double([2.0, -1.0]))
        values = policy.loss(batch).values
        (torch.where(MASK, values, 0.0) if values.shape == MASK.shape else values).sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize("advantage", [1.0, 0.0, -1.0])
def test_vespo_weight_is_one_on_policy_and_largest_at_k_over_lambda(advantage: float) -> None:
    k, rate = (2.0, 3.0) if advantage >= 0 else (3.0, 2.0)
    shape = {"k_pos": 2.0, "lambda_pos": 3.0, "k_neg": 3.0, "lambda_neg": 2.0}

    def phi(weight: float) -> float:
        return float(vespo_weight(double([[weight]]).log(), double([[advantage]]), **shape))

    assert phi(1.0) == pytest.approx(1.0)
    assert phi(k / rate) > max(phi(k / rate * 1.01), phi(k / rate * 0.99))
    assert phi(1e6) == 0
    assert phi(1e-9) == pytest.approx(phi(1e-8))


def test_vespo_takes_the_sampler_into_its_weight() -> None:
    policy, old = double([[-1.0, -1.2, -0.7], [-2.0, -1.0, 0.0]]), double([[-1.1, -1.0, -0.7], [-2.0, -1.5, 0.0]])
    sampler = old - double([[0.3, -0.2, 1.5], [0.1, 0.1, 0.0]])
    batch = TokenBatch(
        mask=MASK,
        logps={"policy": policy, "old": old, "sampler": sampler},
        advantages=double([1.0, -1.0]),
    )
    metrics = VESPO(correction=TruncatedIS(max=2.0)).loss(batch).metrics
    rho = (old - sampler).exp().clamp(max=2.0)
    log_w = ((policy - old + rho.log()) * MASK).sum(-1)
    assert float(metrics["ratio_max"].value()) == pytest.approx(float(log_w.exp().max()))
    same_ratio = batch.replace(logps={"policy": policy, "old": torch.where(MASK, old - rho.log(), 0.0)})
    torch.testing.assert_close(
        VESPO(correction=TruncatedIS(max=2.0)).loss(batch).values, VESPO().loss(same_ratio).values
    )


def test_vespo_leaves_out_tokens_without_a_score_but_not_their_sequence() -> None:
    logps = {"policy": double([[-1.0, -1.0]]), "old": double([[-1.0, -1.0]]), "sampler": double([[math.nan, -1.0]])}
    batch = TokenBatch(mask=torch.ones(1, 2), logps=logps, advantages=double([1.0]))
    dropped = VESPO(correction=MaskedIS(max=3.0)).loss(batch)
    torch.testing.assert_close(dropped.values, double([[0.0, 1.0]]))
    assert dropped.metrics["unscored"].value() == 1
    kept = VESPO(correction=MaskedIS(max=3.0, unscored="keep")).loss(batch)
    torch.testing.assert_close(kept.values, double([[1.0, 1.0]]))


def test_vespo_refuses_a_correction_beside_its_weight() -> None:
    with pytest.raises(CompositionError, match=r"VESPO\.weights: TruncatedIS.*correction=TruncatedIS"):
        VESPO(weights=(TruncatedIS(),))
    with pytest.raises(CompositionError, match="twice"):
        VESPO(weights=(TruncatedIS(),), correction=TruncatedIS())
    with pytest.raises(CompositionError, match="against the sampler"):
        VESPO(ratio=TokenRatio(against="sampler"), correction=TruncatedIS())
    assert VESPO(weights=(Veto(),), correction=TruncatedIS()).requires >= {LogProbs("sampler"), LogProbs("old")}


def test_optimal_value_lies_between_mean_and_best() -> None:
    rewards = double([[0.0, 0.0, 1.0], [0.4, 0.4, 0.4]])
    torch.testing.assert_close(optimal_value(rewards, beta=1e4), rewards.mean(-1), rtol=0, atol=1e-4)
    torch.testing.assert_close(optimal_value(rewards, beta=1e-3), rewards.amax(-1), rtol=0, atol=2e-3)
    with pytest.raises(ConfigError, match=r"optimal_value\.beta"):
        optimal_value(rewards, beta=0.0)


def test_a_star_po_needs_no_advantage_and_passes_over_rows_without_a_reward() -> None:
    assert Column("advantages") not in AStarPO().requires
    leaf = double([[-1.0], [-1.0]]).requires_grad_()
    batch = TokenBatch(
        mask=torch.ones(2, 1),
        rewards=double([1.0, math.nan]),
        baseline=double([0.5, 0.5]),
        logps={"policy": leaf, "initial": double([[-2.0], [-2.0]])},
    )
    loss = AStarPO(beta=0.1).loss(batch)
    loss.values.sum().backward()
    torch.testing.assert_close(loss.values.detach(), double([[0.16], [0.0]]))
    torch.testing.assert_close(leaf.grad, double([[2 * 0.1 * -0.4], [0.0]]))
    assert loss.metrics["advantage"].value() == 0.5


@pytest.mark.parametrize("policy", [PolicyGradient(), ImportanceSurrogate(), VESPO()], ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("advantage", [-2.0, 0.0, 2.0])
@pytest.mark.parametrize(("logp", "old"), [(-1e-3, -200.0), (-math.inf, -1.0), (-1.0, -math.inf)])
def test_extreme_log_probs_give_finite_numbers(policy: Any, advantage: float, logp: float, old: float) -> None:
    leaf = torch.tensor([[logp, -1.0]], requires_grad=True)
    batch = TokenBatch(
        mask=torch.ones(1, 2),
        logps={"policy": leaf, "old": torch.tensor([[old, -1.0]])},
        advantages=torch.tensor([advantage]),
    )
    loss = Objective(policy=policy)(batch).loss
    loss.backward()
    assert loss.isfinite()
    assert leaf.grad is not None
    assert leaf.grad.isfinite().all()


@pytest.mark.parametrize(
    ("part", "wrong", "message"),
    [
        (VESPO, {"k_pos": -1.0}, r"VESPO\.k_pos"),
        (VESPO, {"lambda_neg": 0.0}, r"VESPO\.lambda_neg"),
        (VESPO, {"ratio": SequenceRatio()}, r"VESPO\.ratio.*TokenRatio"),
        (AStarPO, {"beta": 0.0}, r"AStarPO\.beta"),
    ],
)
def test_arguments_out_of_range_are_refused(part: Any, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        part(**wrong)
