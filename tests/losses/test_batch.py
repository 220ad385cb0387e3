from typing import Any, get_args, get_type_hints

import pytest
import torch

from rlstab.batch import Column, Count, TokenBatch
from rlstab.errors import MissingFieldError, ShapeError

MASK = torch.tensor([[True, True, True], [True, True, False]])
LOSS_MASK = torch.tensor([[True, False, True], [True, True, False]])


def junk(value: float) -> torch.Tensor:
    return torch.where(LOSS_MASK, -1.0, value)


@pytest.mark.parametrize("value", [-torch.inf, torch.inf, torch.nan, 1e30])
def test_what_is_not_trained_on_is_zero(value: float) -> None:
    batch = TokenBatch(
        mask=MASK,
        loss_mask=LOSS_MASK,
        logps={"policy": junk(value), "sampler": junk(value)},
        vocab={"entropy": junk(value)},
        advantages=junk(value),
    )
    for tensor in (batch.logp("policy"), batch.logp("sampler"), batch.statistic("entropy"), batch.column("advantages")):
        torch.testing.assert_close(tensor, torch.where(LOSS_MASK, -1.0, 0.0))


def test_zeroed_positions_pass_no_gradient() -> None:
    logp = junk(-torch.inf).requires_grad_()
    TokenBatch(mask=MASK, loss_mask=LOSS_MASK, logps={"policy": logp}).logp("policy").square().sum().backward()
    torch.testing.assert_close(logp.grad, torch.where(LOSS_MASK, -2.0, 0.0))


def test_nan_inside_stays() -> None:
    sampler = torch.tensor([[torch.nan, -1.0, -1.0], [-1.0, torch.nan, torch.nan]])
    cleaned = TokenBatch(mask=MASK, logps={"sampler": sampler}).logp("sampler")
    assert cleaned.isnan().tolist() == [[True, False, False], [False, True, False]]


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_half_precision_is_raised(given: torch.dtype, kept: torch.dtype) -> None:
    values = torch.full((2, 3), -1.5, dtype=given)
    batch = TokenBatch(mask=MASK, logps={"policy": values}, vocab={"entropy": values})
    assert batch.logp("policy").dtype == batch.statistic("entropy").dtype == kept
    assert batch.logp("policy")[0, 0] == -1.5


def test_masks_may_come_as_numbers() -> None:
    batch = TokenBatch(mask=MASK.long(), loss_mask=LOSS_MASK.int())
    assert torch.equal(batch.mask, MASK)
    assert torch.equal(batch.loss_mask, LOSS_MASK)
    assert torch.equal(TokenBatch(mask=MASK.float()).loss_mask, MASK)
    assert batch.shape == (2, 3)


def test_only_the_policy_keeps_its_graph() -> None:
    policy, old = torch.zeros(2, 3, requires_grad=True), torch.zeros(2, 3, requires_grad=True)
    batch = TokenBatch(mask=MASK, logps={"policy": policy, "old": old})
    assert batch.logp("policy").requires_grad
    assert not batch.logp("old").requires_grad


def test_the_old_policy_is_the_policy_itself_where_nothing_was_recorded() -> None:
    policy = torch.randn(2, 3, requires_grad=True)
    batch = TokenBatch(mask=MASK, logps={"policy": policy})
    torch.testing.assert_close(batch.logp("old"), batch.logp("policy").detach())
    assert not batch.logp("old").requires_grad
    recorded = batch.replace(logps={"policy": policy, "old": torch.full((2, 3), -9.0)})
    assert recorded.logp("old")[0, 0] == -9


def test_the_behaviour_policy_is_the_first_that_was_recorded() -> None:
    zeros = torch.zeros(2, 3)
    for recorded, expected in [("policy", "old"), ("policy old", "old"), ("policy old sampler", "sampler")]:
        batch = TokenBatch(mask=MASK, logps=dict.fromkeys(recorded.split(), zeros))
        assert batch.behaviour(None) == expected
        assert batch.behaviour("initial") == "initial"


@pytest.mark.wrong_shapes
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mask": torch.ones(3)}, r"mask: expected \[B, T\], got \[3\]"),
        ({"loss_mask": torch.ones(2, 4)}, r"loss_mask: expected the mask's shape \[2, 3\], got \[2, 4\]"),
        ({"token_ids": torch.ones(2, dtype=torch.long)}, "token_ids"),
        ({"logps": {"policy": torch.ones(1, 3)}}, r"logps\['policy'\].*\[1, 3\]"),
        ({"vocab": {"entropy": torch.ones(3, 2)}}, r"vocab\['entropy'\].*\[3, 2\]"),
        ({"rewards": torch.ones(2, 1)}, r"rewards: expected one value per row \[2\], got \[2, 1\]"),
        ({"baseline": torch.ones(1)}, "baseline"),
        ({"group": torch.ones(3, dtype=torch.long)}, "group"),
        ({"truncated": torch.ones(2, 3)}, "truncated"),
        ({"advantages": torch.ones(2, 1)}, r"advantages: expected \[2\] or \[2, 3\], got \[2, 1\]"),
    ],
)
def test_wrong_shapes_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        TokenBatch(**{"mask": MASK, **fields})


def test_missing_fields_say_how_to_get_them() -> None:
    batch = TokenBatch(mask=MASK, logps={"policy": torch.zeros(2, 3)})
    with pytest.raises(MissingFieldError, match=r"'initial'.*\['policy'\].*LogProbs\('initial'\)"):
        batch.logp("initial")
    with pytest.raises(MissingFieldError, match=r"rewards.*Column\('rewards'\)"):
        batch.column("rewards")
    with pytest.raises(MissingFieldError, match=r"'reward' is no column.*'rewards'"):
        batch.column("reward")
    with pytest.raises(MissingFieldError, match=r"'entropy'.*requires"):
        batch.statistic("entropy")
    with pytest.raises(KeyError):
        TokenBatch(mask=MASK).logp("old")


def test_every_column_is_a_field() -> None:
    columns = {"advantages": torch.ones(2), "rewards": torch.ones(2), "baseline": torch.ones(2)}
    columns |= {"group": torch.arange(2), "truncated": torch.ones(2) > 0, "token_ids": torch.ones(2, 3).long()}
    columns |= {"router_log_ratios": MASK[..., None, None] * torch.ones(2, 3, 4, 2)}
    assert set(get_args(get_type_hints(Column)["name"])) == set(columns)
    batch = TokenBatch(mask=MASK, **columns)  # type: ignore[arg-type]
    for name, value in columns.items():
        torch.testing.assert_close(batch.column(name), value)


def test_advantages_get_a_token_axis() -> None:
    assert TokenBatch(mask=MASK, advantages=torch.ones(2)).token_advantages().shape == (2, 1)
    assert TokenBatch(mask=MASK, advantages=torch.ones(2, 3)).token_advantages().shape == (2, 3)


def test_counts_default_to_the_batch() -> None:
    batch = TokenBatch(mask=MASK, loss_mask=LOSS_MASK)
    assert (batch.count("step").tokens, batch.count("step").sequences) == (4, 2)
    given = batch.replace(counts={"step": Count(tokens=40, sequences=20)})
    assert given.count("step").tokens == 40
    assert given.count("micro_batch").tokens == 4


def test_a_split_keeps_rows_together_and_counts_whole() -> None:
    generator = torch.Generator().manual_seed(0)
    batch = TokenBatch(
        mask=torch.rand(6, 4, generator=generator) < 0.8,
        logps={"policy": torch.randn(6, 4, generator=generator)},
        advantages=torch.randn(6, generator=generator),
        group=torch.arange(6),
        vocab={"entropy": torch.rand(6, 4, generator=generator)},
        parts={"per row": torch.arange(6.0), "number": torch.tensor(3.0)},
        rows="buffer",
    )
    parts = batch.split([1, 3, 2])
    assert [len(part.mask) for part in parts] == [1, 3, 2]
    for name in ("policy",):
        torch.testing.assert_close(torch.cat([p.logp(name) for p in parts]), batch.logp(name))
    torch.testing.assert_close(torch.cat([p.column("group") for p in parts]), batch.column("group"))
    torch.testing.assert_close(torch.cat([p.statistic("entropy") for p in parts]), batch.statistic("entropy"))
    torch.testing.assert_close(torch.cat([p.part("per row") for p in parts]), batch.part("per row"))
    for part in parts:
        assert part.rows == "buffer"
        assert part.part("number") == 3
        assert part.count("step").tokens == part.count("generation").tokens == batch.mask.sum()
        assert part.count("step").sequences == 6
        assert part.count("micro_batch").tokens == part.mask.sum()
        assert part.count("micro_batch").sequences == len(part.mask)
    nested = parts[1].split([2, 1])[0]
    assert nested.count("step").sequences == 6


def test_a_split_has_to_use_all_rows() -> None:
    with pytest.raises(ShapeError, match=r"sizes: expected a sum of 2 rows, got \[1, 2\]"):
        TokenBatch(mask=MASK).split([1, 2])


def test_rows_are_selected_by_index_too() -> None:
    batch = TokenBatch(mask=MASK, rewards=torch.tensor([1.0, 2.0]))
    assert batch.select(torch.tensor([1, 0, 1])).column("rewards").tolist() == [2, 1, 2]
    assert batch.select(torch.tensor([False, True])).column("rewards").tolist() == [2]


def test_what_comes_zeroed_is_taken_as_it_is() -> None:
    logp = torch.tensor([[-1.0, 7.0]])
    mask = torch.tensor([[True, False]])
    assert TokenBatch(mask=mask, logps={"policy": logp}, zeroed=True).logp("policy") is logp
    batch = TokenBatch(mask=mask, logps={"policy": logp})
    assert batch.logp("policy").tolist() == [[-1.0, 0.0]]
    assert batch.replace(rows="buffer").logp("policy") is batch.logp("policy")
    assert batch.replace(logps={"policy": logp}).logp("policy").tolist() == [[-1.0, 0.0]]
    assert batch.replace(mask=torch.ones(1, 2), loss_mask=torch.ones(1, 2)).token_weight.tolist() == [[1.0, 1.0]]


def test_once_computes_once_for_each_batch() -> None:
    batch = TokenBatch(mask=torch.tensor([[1, 1], [1, 0]]))
    calls: list[int] = []

    def count(of: TokenBatch) -> torch.Tensor:
        calls.append(1)
        return of.loss_mask.sum()

    assert [int(batch.once("count", count)) for _ in range(3)] == [3, 3, 3]
    assert len(calls) == 1
    assert [int(part.once("count", count)) for part in batch.split([1, 1])] == [2, 1]


def test_new_log_probs_are_not_known_to_be_complete() -> None:
    logps = {"policy": torch.zeros(4, 2), "old": torch.zeros(4, 2)}
    batch = TokenBatch(mask=torch.ones(4, 2), logps=logps, complete=frozenset({"old"}))
    assert batch.select(slice(2)).complete == batch.replace(rows="buffer").complete == {"old"}
    assert all(part.complete == {"old"} for part in batch.split([1, 3]))
    assert batch.replace(logps=logps).complete == batch.replace(mask=torch.ones(4, 2)).complete == frozenset()
    assert batch.replace(logps=logps, complete=frozenset({"policy"})).complete == {"policy"}


@pytest.mark.parametrize("lost", [-torch.inf, torch.nan])
def test_a_readable_batch_finds_out_what_is_complete(lost: float) -> None:
    logps = {"policy": torch.tensor([[-1.0, -2.0]]), "sampler": torch.tensor([[-1.0, lost]])}
    unread = TokenBatch(mask=torch.ones(1, 2), logps=logps, complete=frozenset({"sampler"}))
    assert unread.scores_all("sampler")
    assert not unread.scores_all("policy")
    batch = unread.replace(complete=frozenset(), readable=True)
    assert batch.scores_all("policy")
    assert batch.scores_all("old")  # on policy
    assert not batch.scores_all("sampler")
    elsewhere = {**logps, "old": torch.full((1, 2), -torch.inf)}
    assert not batch.replace(logps=elsewhere).scores_all("old")
    assert batch.replace(logps=elsewhere, mask=torch.zeros(1, 2), loss_mask=torch.zeros(1, 2)).scores_all("old")


@pytest.mark.parametrize("far", [-100.0, -torch.inf, torch.nan])
def test_a_readable_batch_finds_out_which_ratios_need_no_bound(far: float) -> None:
    logps = {
        "policy": torch.tensor([[-1.0, -2.0]]),
        "old": torch.tensor([[-1.5, -2.0]]),
        "initial": torch.tensor([[-1.0, far]]),
    }
    unread = TokenBatch(mask=torch.ones(1, 2), logps=logps)
    assert unread.apart("policy", "old").tolist() == [[0.5, 0.0]]
    assert not unread.close("policy", "old")
    batch = unread.replace(readable=True)
    assert batch.close("policy", "old")
    assert not batch.close("policy", "initial")
    nothing = TokenBatch(mask=torch.ones(1, 0), logps={"policy": torch.ones(1, 0)}, readable=True)
    assert not nothing.close("policy", "old")
