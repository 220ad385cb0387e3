from typing import Any

import pytest
import torch
from loss_vectors import double, vectors
from torch import Tensor

from rlstab.batch import Column, TokenBatch, VocabStat
from rlstab.errors import ConfigError, MissingFieldError
from rlstab.losses import (
    ClippedSurrogate,
    ConflictMask,
    ConflictWeight,
    EntropyFilter,
    GroupCenter,
    Needs,
    Objective,
    ReinforcePPBaseline,
    run_parts,
)


def from_vector(vector: dict[str, Any]) -> TokenBatch:
    inputs = vector["inputs"]
    mask = torch.tensor(inputs["mask"])
    return TokenBatch(
        mask=mask,
        token_ids=torch.tensor(inputs["token_ids"]),
        rewards=double(inputs["rewards"]),
        group=torch.zeros(len(mask), dtype=torch.long),
        vocab={"entropy": double(inputs["mean_entropy"]).unsqueeze(-1).expand(mask.shape)},
    )


def weights_of(weight: ConflictWeight, batch: TokenBatch) -> Tensor:
    return weight.factor(run_parts(weight.requires, batch)).values


def batch_of(tokens: list[list[int]], rewards: list[float], group: list[int] | None = None) -> TokenBatch:
    length = max(map(len, tokens))
    return TokenBatch(
        mask=torch.tensor([[True] * len(row) + [False] * (length - len(row)) for row in tokens]),
        token_ids=torch.tensor([row + [99] * (length - len(row)) for row in tokens]),
        rewards=torch.tensor(rewards),
        group=torch.tensor(group or [0] * len(tokens)),
    )


def test_vector() -> None:
    (vector,) = vectors("gtpo")
    batch, expected = from_vector(vector), vector["expected"]
    runs = ConflictMask().compute(batch)
    torch.testing.assert_close(runs.abs(), double(expected["fwd_run"]) + double(expected["bwd_run"]))
    for overlap in ("max", "product"):  # no token lies in both runs here
        weights = weights_of(ConflictWeight(overlap=overlap), batch)
        torch.testing.assert_close(weights * batch.mask, double(expected["lam"]))
    advantages = EntropyFilter(threshold=0.7).compute(batch)
    torch.testing.assert_close(advantages, double(expected["adjusted_advantages"]))


def test_vector_of_the_whole_loss() -> None:
    (vector,) = vectors("gtpo")
    batch, expected = from_vector(vector), vector["expected"]
    logp = torch.full(batch.shape, -1.0, dtype=torch.float64, requires_grad=True)
    batch = batch.replace(logps={"policy": logp}, advantages=EntropyFilter(threshold=0.7).compute(batch))
    objective = Objective(policy=ClippedSurrogate(weights=(ConflictWeight(),)).mean("sequence"))
    loss, terms = objective(run_parts(objective.requires, batch))
    loss.backward()
    torch.testing.assert_close(loss.detach(), double(expected["loss_mean_over_group"]))
    torch.testing.assert_close(logp.grad, double(expected["grad_mean_over_group"]))
    share = sum(expected["n_conflict_union"]) / batch.mask.sum()
    torch.testing.assert_close(terms["policy"].metrics["conflict_weight/conflict"].value(), share, check_dtype=False)


def test_vector_of_the_overlap() -> None:
    (vector,) = vectors("gtpo_overlap")
    batch, expected = from_vector(vector), vector["expected"]
    torch.testing.assert_close(weights_of(ConflictWeight(), batch), double(expected["lam_max2"]))
    product = weights_of(ConflictWeight(overlap="product"), batch)
    torch.testing.assert_close(product, double(expected["lam_code_product"]))


def test_shared_tokens_in_the_middle_are_no_conflict() -> None:
    runs = ConflictMask().compute(batch_of([[1, 5, 2], [3, 5, 4]], [1.0, 0.0]))
    assert not runs.any()


def test_groups_do_not_mix_and_may_differ_in_size() -> None:
    tokens = [[1, 2], [1, 2], [1, 3], [1, 2], [1, 4, 2]]
    runs = ConflictMask().compute(batch_of(tokens, [1.0, 1.0, 0.0, 0.0, 1.0], group=[5, 5, 5, -1, -1]))
    assert runs.tolist() == [[1, 0, 0], [1, 0, 0], [-1, 0, 0], [-1, -1, 0], [1, 0, 1]]


def test_rows_without_advantage_take_no_part() -> None:
    tokens = [[1, 2], [1, 2], [1, 3]]
    assert not ConflictMask().compute(batch_of(tokens, [0.0, torch.nan, 0.0])).any()
    runs = ConflictMask().compute(batch_of([*tokens, [7, 8]], [1.0, 0.0, 0.5, 0.5]))  # A = .5, -.5, 0, 0
    assert runs.tolist() == [[2, 2], [-2, -2], [0, 0], [0, 0]]


def test_one_sided_group_has_no_conflict() -> None:
    assert not ConflictMask().compute(batch_of([[1, 2], [1, 2]], [1.0, 1.0])).any()


def test_row_order_and_padding_do_not_matter() -> None:
    (vector,) = vectors("gtpo")
    batch = from_vector(vector)
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(ConflictMask().compute(batch.select(order)), ConflictMask().compute(batch)[order])
    junk = torch.where(batch.mask, batch.column("token_ids"), -(2**62))
    torch.testing.assert_close(
        ConflictMask().compute(batch.replace(token_ids=junk)), ConflictMask().compute(batch), rtol=0, atol=0
    )


def test_left_padding_is_padding() -> None:
    right = batch_of([[1, 2, 3], [1, 3]], [1.0, 0.0])
    flipped = right.mask.flip(-1)
    left = right.replace(mask=flipped, loss_mask=flipped, token_ids=torch.tensor([[1, 2, 3], [99, 1, 3]]))
    expected = ConflictMask().compute(right)
    runs = ConflictMask().compute(left)
    assert runs[0].tolist() == expected[0].tolist() == [1, 0, 1]
    assert runs[1].tolist() == [0, *expected[1, :2].tolist()] == [0, -1, -1]


def test_only_the_rollout_part_reads_tokens_and_groups() -> None:
    part = ConflictMask()
    assert ConflictWeight().requires == {Needs(part)}
    assert part.requires == {Column("token_ids"), Column("group"), Column("rewards")}
    with pytest.raises(MissingFieldError, match="ConflictMask"):
        ConflictWeight().factor(batch_of([[1]], [1.0]))


def test_entropy_filter_wraps_any_advantage() -> None:
    batch = batch_of([[1, 2], [1], [1]], [1.0, 0.0, torch.nan])
    batch = batch.replace(vocab={"entropy": torch.tensor([[0.1, 0.3], [0.6, 7.0], [0.1, 7.0]])})
    part = EntropyFilter(advantage=GroupCenter(), scale=0.5)
    assert VocabStat("entropy") in part.requires
    torch.testing.assert_close(part.compute(batch), torch.tensor([0.5 - 0.5 * 0.2, -0.5 - 0.5 * 0.6, 0.0]))
    per_token = EntropyFilter(advantage=ReinforcePPBaseline(), threshold=0.5).compute(batch)
    whitened = ReinforcePPBaseline().compute(batch)
    torch.testing.assert_close(per_token[0], whitened[0] - 0.1 * 0.2)
    assert not per_token[1:].any()


def test_entropy_below_ln_2_means_one_token_holds_the_majority() -> None:
    logits = torch.randn(20_000, 5, dtype=torch.float64) * torch.linspace(0.1, 5, 20_000).unsqueeze(-1)
    logp = logits.log_softmax(-1)
    low = -(logp.exp() * logp).sum(-1) < EntropyFilter().threshold
    assert low.any()
    assert not low.all()
    assert (logp.exp().amax(-1)[low] > 0.5).all()


@pytest.mark.parametrize(
    ("build", "key"),
    [
        (lambda: ConflictWeight(overlap="sum"), r"ConflictWeight\.overlap.*'max'.*'sum'"),  # type: ignore[arg-type]
        (lambda: ConflictWeight(positive=0.0), r"ConflictWeight\.positive"),
        (
            lambda: ConflictMask(advantage=ReinforcePPBaseline()).compute(batch_of([[1]], [1.0])),
            r"ConflictMask\.advantage.*GroupCenter\(\)",
        ),
    ],
)
def test_refusals(build: Any, key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        build()
