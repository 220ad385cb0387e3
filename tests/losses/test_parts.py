import copy
import pickle
from collections.abc import Callable
from dataclasses import FrozenInstanceError, dataclass, field

import pytest
import torch
from torch import Tensor

from rlstab.batch import Column, LogProbs, Requirement, TokenBatch
from rlstab.errors import MissingFieldError
from rlstab.losses import Needs, Part, RolloutPart, StepStatistic, prepared_parts, run_parts


@dataclass(frozen=True, kw_only=True)
class RowLength(RolloutPart):
    scale: float = 1.0

    def compute(self, batch: TokenBatch) -> Tensor:
        return self.scale * batch.mask.sum(-1).float()


@dataclass(frozen=True, kw_only=True)
class RelativeLength(RolloutPart):
    lengths: RowLength = field(default_factory=RowLength)

    @property
    def requires(self) -> frozenset[Requirement]:
        return frozenset({self.lengths.needed, Column("rewards")})

    def compute(self, batch: TokenBatch) -> Tensor:
        lengths = batch.part(self.lengths.key)
        return lengths / lengths.mean()


@dataclass(frozen=True, kw_only=True)
class LongestRow(StepStatistic):
    relative: RelativeLength = field(default_factory=RelativeLength)

    @property
    def requires(self) -> frozenset[Requirement]:
        return frozenset({self.relative.needed})

    def compute(self, batch: TokenBatch) -> Tensor:
        return batch.part(self.relative.key).max() * batch.logp("policy").mean()


@dataclass(frozen=True, kw_only=True)
class Holder(Part):
    inner: tuple[Part, ...] = ()
    one: Part | None = None


def batch_of() -> TokenBatch:
    logp = torch.full((2, 3), -1.0, requires_grad=True)
    return TokenBatch(
        mask=torch.tensor([[True, True, True], [True, False, False]]),
        rewards=torch.zeros(2),
        logps={"policy": logp},
    )


def test_requirements_come_from_the_parts_inside() -> None:
    holder = Holder(inner=(RelativeLength(),), one=LongestRow())
    assert holder.requires == {Needs(RowLength()), Column("rewards"), Needs(RelativeLength())}
    assert Holder().requires == frozenset()


def test_needs_are_run_first_each_once_phase_by_phase() -> None:
    needs = [Needs(LongestRow()), Needs(RelativeLength()), Needs(RowLength())]
    for requires in (needs, needs[::-1], needs[:1], [*needs, LogProbs("old")]):
        rollout = prepared_parts(requires, RolloutPart)
        assert rollout == [RowLength(), RelativeLength()]
        assert prepared_parts(requires, StepStatistic) == [LongestRow()]


def test_run_parts_leaves_detached_results_under_their_keys() -> None:
    batch = run_parts([LongestRow().needed], batch_of())
    assert batch.part(RowLength().key).tolist() == [3.0, 1.0]
    assert batch.part(RelativeLength().key).tolist() == [1.5, 0.5]
    assert batch.part(LongestRow().key).dim() == 0
    assert not batch.part(LongestRow().key).requires_grad


def test_results_travel_with_their_rows() -> None:
    batch = run_parts([LongestRow().needed], batch_of())
    first, second = batch.split([1, 1])
    assert first.part(RowLength().key).tolist() == [3.0]
    assert second.part(RowLength().key).tolist() == [1.0]
    assert second.part(LongestRow().key) == batch.part(LongestRow().key)


def test_a_result_that_nobody_computed_names_its_part() -> None:
    with pytest.raises(MissingFieldError, match=r"RowLength\(scale=2\.0\).*run_parts"):
        batch_of().part(RowLength(scale=2.0).key)


def test_parts_are_values() -> None:
    part = LongestRow()
    for same in (LongestRow(), copy.deepcopy(part), pickle.loads(pickle.dumps(part)), part.replace()):
        assert same == part
        assert hash(same) == hash(part)
        assert same.key == part.key
    other = part.replace(relative=RelativeLength(lengths=RowLength(scale=3.0)))
    assert other != part
    assert other.key != part.key
    assert RowLength().key != RelativeLength().key


def test_a_class_has_no_key_and_passes_for_no_part() -> None:
    assert not [cls for cls in (RolloutPart, RowLength, LongestRow) if "key" in vars(cls)]
    with pytest.raises(AttributeError):
        _ = RowLength.key


@pytest.mark.parametrize("change", [lambda p: setattr(p, "scale", 2.0), lambda p: delattr(p, "scale")])
def test_parts_cannot_be_changed(change: Callable[[RowLength], None]) -> None:
    with pytest.raises(FrozenInstanceError):
        change(RowLength())
