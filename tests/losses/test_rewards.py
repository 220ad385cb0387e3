import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from loss_vectors import double, vectors

from rlstab.batch import TokenBatch
from rlstab.errors import ConfigError
from rlstab.losses import (
    GroupCenter,
    GroupNorm,
    MixedGroups,
    MixedGroupsOnly,
    Objective,
    PolicyGradient,
    SoftOverlong,
    Unsolved,
    UnsolvedOnly,
    run_parts,
    soft_overlong,
    thinking_trust,
    trusted_rewards,
)


def batch_of(rewards: list[float], group: list[int], lengths: list[int] | None = None) -> TokenBatch:
    lengths = lengths or [1] * len(rewards)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(-1)
    return TokenBatch(
        mask=mask,
        rewards=double(rewards),
        group=torch.tensor(group),
        logps={"policy": torch.full(mask.shape, -1.0, dtype=torch.float64).requires_grad_()},
    )


# --- length --------------------------------------------------------------------------


def test_vector_of_soft_overlong() -> None:
    (vector,) = vectors("dapo_soft_overlong")
    hyper = vector["hyper"]
    found = soft_overlong(double(vector["inputs"]["lengths"]), longest=hyper["L_max"], cache=hyper["L_cache"])
    torch.testing.assert_close(found, double(vector["expected"]["rewards"]))


def test_the_penalty_comes_before_the_advantage() -> None:
    batch = batch_of([1.0, 1.0, 1.0, math.nan], [0, 0, 0, 0], [2, 3, 4, 4])
    found = SoftOverlong(advantage=GroupCenter(), longest=4, cache=2).compute(batch)
    torch.testing.assert_close(found, double([0.5, 0.0, -0.5, 0.0]))
    plain = SoftOverlong(advantage=GroupNorm(), longest=400, cache=2).compute(batch)
    torch.testing.assert_close(plain, GroupNorm().compute(batch))


# --- groups without signal -----------------------------------------------------------


@pytest.mark.parametrize("unit", ["token", "sequence"])
def test_the_mean_is_that_of_the_mixed_groups_alone(unit: Any) -> None:
    """As if the groups without signal had never been sampled."""
    whole = batch_of([1.0, 0.0, 1.0, 1.0, 0.0, 2.0, math.nan], [0, 0, 1, 1, 2, 2, 1], [1, 3, 2, 2, 1, 2, 3])
    objective = Objective(policy=PolicyGradient(weights=[MixedGroupsOnly(unit=unit)]).mean(unit))

    def gradient(batch: TokenBatch, objective: Objective) -> torch.Tensor:
        batch = batch.replace(advantages=GroupCenter().compute(batch))
        ready = run_parts(objective.requires, batch)
        (found,) = torch.autograd.grad(objective(ready).loss, [batch.logps["policy"]])
        return found

    mixed = torch.tensor([0, 1, 4, 5])
    scored = whole.select(torch.arange(6)).replace(counts={})
    alone = scored.select(mixed).replace(counts={})
    expected = gradient(alone, Objective(policy=PolicyGradient().mean(unit)))
    torch.testing.assert_close(gradient(scored, objective)[mixed], expected)
    kept = MixedGroupsOnly(unit=unit)
    share = kept.factor(run_parts(kept.requires, scored)).metrics["mixed_groups_only/kept"].value()
    assert share == pytest.approx(7 / 11)


def test_where_no_group_has_a_signal_nothing_is_trained_on() -> None:
    assert MixedGroups().compute(batch_of([1.0, 1.0, 0.0, math.nan], [0, 0, 1, 1])).tolist() == [0, 0, 0, 0]


# --- teachers ------------------------------------------------------------------------


def test_a_teacher_is_needed_by_the_wrong_or_by_whole_groups() -> None:
    batch = batch_of([1.0, 0.0, 0.0, 0.2, math.nan, 0.0], [0, 0, 1, 1, 1, 0])
    assert Unsolved().compute(batch).tolist() == [0, 1, 1, 1, 0, 1]
    assert Unsolved(level="group").compute(batch).tolist() == [0, 0, 1, 1, 0, 0]
    assert Unsolved(threshold=0.1).compute(batch).tolist() == [0, 1, 1, 0, 0, 1]
    weight = UnsolvedOnly(level="group")
    values, metrics = weight.factor(run_parts(weight.requires, batch))
    assert values.flatten().tolist() == [0, 0, 1, 1, 0, 0]
    assert metrics["unsolved_only/kept"].value() == pytest.approx(1 / 3)


# --- trust in a reward of the thinking -----------------------------------------------


def test_vector_of_trust_grpo() -> None:
    (vector,) = vectors("trust_grpo")
    inputs, hyper, expected = vector["inputs"], vector["hyper"], vector["expected"]
    outcome, thinking = double(inputs["outcome"]), double(inputs["thinking"])
    group = torch.zeros(4, dtype=torch.long)
    trust = thinking_trust(outcome, thinking, group, threshold=hyper["threshold"])
    torch.testing.assert_close(trust, double([expected["gamma"]] * 4), rtol=0, atol=1e-12)
    rewards = trusted_rewards(outcome, thinking, group, step=inputs["step"], alpha=hyper["alpha"], decay=hyper["T"])
    torch.testing.assert_close(rewards, double(expected["rewards"]), rtol=0, atol=1e-12)
    batch = TokenBatch(mask=torch.ones(4, 1), rewards=rewards, group=group)
    torch.testing.assert_close(GroupNorm(eps=hyper["eps"]).compute(batch), double(expected["advantages"]))


def test_groups_are_trusted_one_by_one() -> None:
    outcome, thinking = double([1, 0, 1, 0, 1, 1, 0, math.nan]), double([0.2, 0.7, 0.9, 0.1, 0.3, 0.4, 0.5, 0.9])
    group = torch.tensor([0, 0, 5, 5, 7, 7, 8, 8])
    trust = thinking_trust(outcome, thinking, group)
    torch.testing.assert_close(trust, double([math.exp(-0.5)] * 2 + [1.0] * 6))


def test_uniform_groups_may_go_without_a_thinking_reward() -> None:
    outcome, thinking = double([1, 1, 1, 0, math.nan]), double([0.2, 0.6, 0.5, 0.5, 0.5])
    group = torch.tensor([0, 0, 1, 1, 1])
    plain = trusted_rewards(outcome, thinking, group, step=0)
    skipped = trusted_rewards(outcome, thinking, group, step=0, skip_uniform_groups=True)
    torch.testing.assert_close(plain[:4], double([1.06, 1.18, 1.15, 0.15]))
    torch.testing.assert_close(skipped[:4], double([1.0, 1.0, 1.15, 0.15]))
    assert plain[4].isnan()
    assert skipped[4].isnan()


def trusted(**changes: Any) -> torch.Tensor:
    return trusted_rewards(torch.zeros(1), torch.zeros(1), torch.tensor([0]), **changes)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: SoftOverlong(longest=10, cache=0),
            r"soft_overlong\.cache: expected a number of tokens from 1 to longest=10, got 0",
        ),
        (lambda: SoftOverlong(longest=10, cache=11), r"soft_overlong\.cache"),
        (lambda: SoftOverlong(longest=9, cache=2, advantage=GroupNorm), r"SoftOverlong\.advantage.*call it"),  # type: ignore[arg-type]
        (lambda: MixedGroups(unit="row"), r"MixedGroups\.unit"),  # type: ignore[arg-type]
        (lambda: UnsolvedOnly(level="row"), r"Unsolved\.level"),  # type: ignore[arg-type]
        (lambda: Unsolved(threshold=math.nan), r"Unsolved\.threshold"),
        (lambda: trusted(step=-1), r"trusted_rewards\.step"),
        (lambda: trusted(step=1, decay=0.0), r"trusted_rewards\.decay"),
    ],
)
def test_refusals(build: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build()
