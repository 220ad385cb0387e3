import copy
import pickle
from typing import Any

import pytest
import torch

from rlstab.batch import Count, TokenBatch
from rlstab.errors import ConfigError, ShapeError
from rlstab.losses import KLCov, Mean

BATCH = TokenBatch(mask=torch.tensor([[True, True, True], [True, False, False]]))
LOSS = torch.tensor([[1.0, 2.0, 3.0], [10.0, -1e30, 1e30]])


@pytest.mark.parametrize(
    ("unit", "expected"), [("token", 16 / 4), ("sequence", (2 + 10) / 2), (5, 16 / (2 * 5)), (1, 16 / 2)]
)
def test_units(unit: Any, expected: float) -> None:
    assert Mean(unit=unit).reduce(LOSS, BATCH) == expected


def test_one_value_per_row() -> None:
    assert Mean(unit="sequence").reduce(torch.tensor([1.0, 5.0]), BATCH) == 3
    with pytest.raises(ShapeError, match=r"no mean over 'token'.*\.mean\('sequence'\)"):
        Mean().reduce(torch.tensor([1.0, 5.0]), BATCH)


def test_a_column_counts_once_per_token() -> None:
    assert Mean().reduce(torch.tensor([[1.0], [5.0]]), BATCH) == (3 * 1 + 5) / 4


@pytest.mark.parametrize("unit", ["token", "sequence", 7])
@pytest.mark.parametrize("over", ["step", "generation"])
def test_shares_of_a_scope_add_up(unit: Any, over: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    batch = TokenBatch(mask=torch.rand(8, 5, generator=generator) < 0.6)
    loss = torch.randn(8, 5, generator=generator, dtype=torch.float64)
    mean = Mean(unit=unit, over=over)
    whole = mean.reduce(loss, batch)
    for sizes in ([8], [4, 4], [1] * 8, [3, 5]):
        rows = loss.split(sizes)
        shares = [mean.reduce(part, micro) for part, micro in zip(rows, batch.split(sizes), strict=True)]
        torch.testing.assert_close(torch.stack(shares).sum(), whole)


def test_a_mean_over_the_micro_batch_depends_on_the_split() -> None:
    mean = Mean(unit="token", over="micro_batch")
    shares = [mean.reduce(part, micro) for part, micro in zip(LOSS.split(1), BATCH.split([1, 1]), strict=True)]
    assert [float(share) for share in shares] == [2.0, 10.0]
    assert mean.reduce(LOSS, BATCH) == 4


@pytest.mark.parametrize("unit", ["token", "sequence", 3])
def test_nothing_to_average_is_zero(unit: Any) -> None:
    empty = TokenBatch(mask=torch.zeros(2, 3))
    assert Mean(unit=unit).reduce(torch.zeros(2, 3), empty) == 0
    no_rows = TokenBatch(mask=torch.zeros(0, 3))
    assert Mean(unit=unit).reduce(torch.zeros(0, 3), no_rows) == 0
    counted = empty.replace(counts={"step": Count(tokens=0, sequences=0)})
    assert Mean(unit=unit).reduce(torch.zeros(2, 3), counted) == 0


def test_a_term_shows_its_mean_and_gives_a_copy_with_another() -> None:
    term = KLCov()
    other = term.mean("sequence", over="generation")
    assert (term.mean.unit, term.mean.over) == ("token", "step")
    assert (other.mean.unit, other.mean.over) == ("sequence", "generation")
    assert other.replace(coef=2.0).mean == other.mean
    assert KLCov(mean=Mean(unit=8)).mean.unit == 8
    assert term != other
    assert term == other.mean("token")
    assert hash(term) == hash(other.mean())
    assert repr(other.mean) == "Mean(unit='sequence', over='generation')"
    for copied in (copy.deepcopy(other), pickle.loads(pickle.dumps(other))):
        assert copied == other
        assert copied.mean("token") == term


@pytest.mark.parametrize("tokens", [0.5, torch.tensor(0.5)])
def test_a_rank_may_count_less_than_one_token(tokens: Any) -> None:
    """Two tokens on four ranks: each rank divides by 1/2, and the mean over ranks is the mean over tokens."""
    batch = TokenBatch(mask=torch.tensor([[True]]), counts={"step": Count(tokens=tokens, sequences=1)})
    ranks = [Mean().reduce(torch.tensor([[loss]]), batch) for loss in (3.0, 5.0)] + [torch.tensor(0.0)] * 2
    assert torch.stack(ranks).mean() == 4


@pytest.mark.parametrize("unit", ["tokens", 0, -3, 2.5, True, None])
def test_unknown_units_are_refused(unit: Any) -> None:
    with pytest.raises(ConfigError, match=r"mean\.unit: expected 'token', 'sequence' or a length > 0"):
        Mean(unit=unit)


def test_unknown_scopes_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"mean\.over: expected 'step'.*'epoch'"):
        KLCov().mean(over="epoch")  # type: ignore[arg-type]
