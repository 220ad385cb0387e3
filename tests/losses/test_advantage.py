import math
from typing import Any

import pytest
import torch
from loss_vectors import double, row_mask, vectors
from torch import Tensor

from rlstab.batch import Column, LogProbs, TokenBatch
from rlstab.errors import ConfigError
from rlstab.losses import (
    GFPO,
    OPO,
    Advantage,
    BatchStd,
    GPGAdvantage,
    GroupCenter,
    GroupNorm,
    Groups,
    LeaveOneOut,
    ReinforcePP,
    ReinforcePPBaseline,
    ReMax,
    SigmaFilter,
)

NAN = math.nan


def batch_of(rewards: Any, group: Any = None, lengths: list[int] | None = None, **fields: Any) -> TokenBatch:
    rewards = double(rewards)
    return TokenBatch(
        mask=row_mask(lengths or [1] * len(rewards)),
        rewards=rewards,
        group=torch.zeros(len(rewards), dtype=torch.long) if group is None else torch.as_tensor(group),
        **fields,
    )


def from_vector(vector: dict[str, Any]) -> TokenBatch:
    inputs = vector["inputs"]
    rows = len(inputs["rewards"])
    return batch_of(inputs["rewards"], torch.arange(rows) // inputs.get("group", rows), inputs.get("lengths"))


def per_row(advantages: Tensor) -> Tensor:
    return advantages if advantages.dim() == 1 else advantages[:, 0]


@pytest.mark.parametrize(
    ("method", "part"),
    [
        ("adv_grpo", GroupNorm()),
        ("adv_dr_grpo", GroupCenter()),
        ("adv_rloo", LeaveOneOut()),
        ("adv_reinforce_pp_baseline", ReinforcePPBaseline()),
        ("adv_opo_length_weighted", OPO()),
    ],
)
def test_vectors(method: str, part: Advantage) -> None:
    for vector in vectors(method):
        expected = double(vector["expected"]["advantages"])
        torch.testing.assert_close(per_row(part.compute(from_vector(vector))), expected, atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize("method", ["adv_gfpo_shortest", "adv_gfpo_token_efficiency"])
def test_gfpo_vectors(method: str) -> None:
    for vector in vectors(method):
        hyper = vector["hyper"]
        metric = {"length": "length", "reward/length": "reward_per_length"}[hyper["metric"]]
        part = GFPO(k=hyper["k"], metric=metric, eps=hyper["eps"], ddof=hyper["ddof"])  # type: ignore[arg-type]
        expected = double(vector["expected"]["advantages"])
        torch.testing.assert_close(part.compute(from_vector(vector)), expected, atol=1e-7, rtol=1e-7)


def test_remax_vector() -> None:
    (vector,) = vectors("adv_remax")
    batch = batch_of(vector["inputs"]["rewards"], baseline=double(vector["inputs"]["greedy_rewards"]))
    torch.testing.assert_close(ReMax().compute(batch), double(vector["expected"]["advantages"]))
    assert Column("baseline") in ReMax().requires


def test_gpg_vectors_and_verls_other_alpha() -> None:
    ours, std, verl = vectors("gpg")
    advantages = GPGAdvantage().compute(from_vector(ours))
    expected = double(ours["expected"]["advantages"]) * ours["hyper"]["alpha"]
    torch.testing.assert_close(advantages, expected)
    scaled = GPGAdvantage(norm="std", correction=False).compute(from_vector(std))
    torch.testing.assert_close(scaled, double(std["expected"]["advantages"]))
    assert verl["hyper"]["alpha"] != ours["hyper"]["alpha"]
    assert not torch.allclose(advantages, double(verl["expected"]["advantages"]) * verl["hyper"]["alpha"])


def test_gpg_correction_equals_dropping_uniform_groups_when_lengths_are_equal() -> None:
    rewards, group = double([1, 0, 0, 1, 1, 1, 0, 0, 0]), torch.arange(9) // 3
    corrected = GPGAdvantage().compute(batch_of(rewards, group))
    mixed = group == 0
    dropped = GPGAdvantage(correction=False).compute(batch_of(rewards[mixed], group[mixed]))
    scores = torch.linspace(-1, 1, 9, dtype=torch.float64)
    torch.testing.assert_close((corrected * scores).mean(), (dropped * scores[mixed]).mean())


def test_gpg_of_uniform_groups_only_is_zero() -> None:
    assert not GPGAdvantage().compute(batch_of([1, 1, 0, 0], [0, 0, 1, 1])).any()


def test_sigma_filter_vector() -> None:
    (vector,) = vectors("advantage_filter_3sigma")
    values = double(vector["inputs"]["advantages"])
    batch = batch_of(values, torch.zeros(len(values), dtype=torch.long))
    z = SigmaFilter(advantage=GroupCenter()).compute(batch)[:, 0]
    torch.testing.assert_close(z, double(vector["expected"]["filtered"]))


def test_sigma_filter_cannot_act_on_ten_equal_rows() -> None:
    rewards = double([0.0] * 9 + [1e6])
    assert (SigmaFilter(advantage=GroupCenter()).compute(batch_of(rewards)) != 0).all()


def test_batch_std_by_hand() -> None:
    rewards = double([4.0, 0.0, 1.0, 1.0])
    advantages = BatchStd(eps=0.0).compute(batch_of(rewards, [0, 0, 1, 1]))
    torch.testing.assert_close(advantages, double([2.0, -2.0, 0.0, 0.0]) / rewards.std())


def test_reinforce_pp_by_hand() -> None:
    rewards, lengths = [1.0, -1.0], [3, 1]
    old = double([[-1.0, -1.0, -1.0], [-2.0, 5.0, 5.0]])
    initial = double([[-2.0, -1.0, -0.5], [-2.5, 7.0, 7.0]])
    batch = batch_of(rewards, lengths=lengths, logps={"old": old, "initial": initial})
    returns = double([1 - 0.1 * (1.0 + 0.0 - 0.5), 1 - 0.1 * -0.5, 1 - 0.1 * -0.5, -1 - 0.1 * 0.5])
    expected = (returns - returns.mean()) / (returns.var() + 1e-8).sqrt()
    advantages = ReinforcePP(kl_coef=0.1).compute(batch)
    torch.testing.assert_close(advantages[batch.mask], expected)
    assert not advantages[~batch.mask].any()


def test_reinforce_pp_without_penalty_needs_no_reference() -> None:
    assert ReinforcePP(kl_coef=0.0).requires == {Column("rewards")}
    assert {LogProbs("old"), LogProbs("initial")} <= ReinforcePP().requires
    advantages = ReinforcePP(kl_coef=0.0).compute(batch_of([1.0, 0.0, NAN]))
    torch.testing.assert_close(advantages[:, 0], double([0.5, -0.5, 0.0]) / math.sqrt(0.5))


PARTS: list[Advantage] = [
    GroupNorm(),
    GroupNorm(ddof=0),
    GroupCenter(),
    LeaveOneOut(),
    BatchStd(),
    OPO(),
    GFPO(k=2),
    GFPO(k=2, metric="reward_per_length"),
    GPGAdvantage(),
    GPGAdvantage(norm="std"),
    ReinforcePPBaseline(),
    ReinforcePP(kl_coef=0.0),
    SigmaFilter(advantage=GroupNorm()),
]
REWARDS = [1.0, 0.0, 2.5, 0.25, NAN, 1.5, 0.75, NAN, 0.5]
GROUP = [7, 3, 7, 3, 7, 3, 9, 9, 7]
LENGTHS = [2, 1, 4, 3, 2, 4, 1, 2, 3]


@pytest.mark.parametrize("part", PARTS, ids=repr)
def test_unscored_rows_count_for_nothing(part: Advantage) -> None:
    batch = batch_of(REWARDS, GROUP, LENGTHS)
    scored = ~batch.column("rewards").isnan()
    advantages = part.compute(batch)
    assert advantages.isfinite().all()
    assert not advantages[~scored].any()
    assert advantages[scored].any()
    torch.testing.assert_close(part.compute(batch.select(scored)), advantages[scored])


@pytest.mark.parametrize("part", PARTS, ids=repr)
def test_row_order_and_group_ids_do_not_matter(part: Advantage) -> None:
    batch = batch_of(REWARDS, GROUP, LENGTHS)
    order = torch.tensor([4, 8, 0, 2, 7, 1, 3, 6, 5])
    shuffled = batch.replace(group=batch.column("group") * -1000).select(order)
    torch.testing.assert_close(part.compute(shuffled), part.compute(batch)[order])


@pytest.mark.parametrize("part", PARTS, ids=repr)
def test_equal_rewards_give_exactly_zero(part: Advantage) -> None:
    rewards = torch.full((7,), 0.7)
    assert (rewards.sum() / 7 != rewards).all()  # rounding
    batch = TokenBatch(mask=torch.ones(7, 1), rewards=rewards, group=torch.zeros(7, dtype=torch.long))
    assert not part.compute(batch).any()


@pytest.mark.parametrize("part", [GroupNorm(), GroupCenter(), LeaveOneOut(), BatchStd(), OPO(), GFPO(k=1)], ids=repr)
def test_a_group_of_one_has_advantage_zero(part: Advantage) -> None:
    assert part.compute(batch_of([3.0, 1.0, 0.0], [0, 1, 1]))[0] == 0


@pytest.mark.parametrize("part", PARTS, ids=repr)
def test_no_scored_row_at_all(part: Advantage) -> None:
    assert not part.compute(batch_of([NAN, NAN])).any()


def test_gfpo_ties_go_to_the_first_row() -> None:
    kept = GFPO(k=2).compute(batch_of([1.0, 0.0, 5.0], lengths=[2, 2, 2])) != 0
    assert kept.tolist() == [True, True, False]


def test_tool_tokens_are_no_part_of_whitening_or_length_weights() -> None:
    batch = batch_of([1.0, 0.0], lengths=[2, 2])
    tool = batch.replace(mask=row_mask([3, 2]), loss_mask=torch.tensor([[True, False, True], [True, True, False]]))
    torch.testing.assert_close(OPO().compute(tool), OPO().compute(batch))
    whitened = ReinforcePPBaseline().compute(tool)
    torch.testing.assert_close(whitened[tool.loss_mask], ReinforcePPBaseline().compute(batch).flatten())
    assert whitened[0, 1] == 0


def test_group_norm_equals_the_hosts_formula() -> None:
    rewards = torch.randn(6, 8)
    expected = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
    batch = TokenBatch(mask=torch.ones(48, 1), rewards=rewards.flatten(), group=torch.arange(48) // 8)
    torch.testing.assert_close(GroupNorm().compute(batch), expected.flatten(), atol=1e-6, rtol=1e-6)


def test_groups_weighted_centre() -> None:
    groups = Groups(index=torch.tensor([0, 0, 1]), scored=torch.tensor([True, True, False]))
    centred = groups.centre(torch.tensor([1.0, 5.0, 2.0]), weights=torch.tensor([3.0, 1.0, 1.0]))
    assert centred.tolist() == [-1.0, 3.0, 2.0]
    assert groups.size().tolist() == [2.0, 2.0, 0.0]
    assert groups.number(torch.tensor([True, True, False])) == 1


@pytest.mark.parametrize(
    ("build", "key"),
    [
        (lambda: GFPO(k=0), r"GFPO\.k"),
        (lambda: GFPO(k=1, metric="len"), r"GFPO\.metric.*'length'.*'len'"),  # type: ignore[arg-type]
        (lambda: GPGAdvantage(norm="group"), r"GPGAdvantage\.norm.*'std'.*'group'"),  # type: ignore[arg-type]
        (lambda: SigmaFilter(advantage=GroupNorm(), bound=0.0), r"SigmaFilter\.bound"),
    ],
)
def test_refusals(build: Any, key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        build()
