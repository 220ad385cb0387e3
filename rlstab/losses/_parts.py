"""What every part of an objective is: a frozen value that says what it reads, keyed by what it is."""

import dataclasses
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar, Self

from torch import Tensor

from rlstab.batch import Requirement, TokenBatch


@dataclass(frozen=True, kw_only=True)
class Part(ABC):
    """A piece of an objective, immutable and told apart by its fields. Abstract.

    >>> from rlstab.losses import CISPO, TruncatedIS
    >>> part = CISPO(weights=[TruncatedIS(max=2.0)])
    >>> part.replace(max=4.0) == CISPO(max=4.0, weights=[TruncatedIS(max=2.0)])
    True
    >>> part.requires == CISPO().requires | TruncatedIS(max=2.0).requires
    True
    """

    _metric_name: ClassVar[str]

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        cls._metric_name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", cls.__name__).lower()

    @property
    def requires(self) -> frozenset[Requirement]:
        """What this part and the parts inside it read from the batch."""
        return self._inner_requires()

    @property
    def inert_on_policy(self) -> tuple[str, ...]:
        """What cannot act while each batch gets one update by the policy that sampled it, for a notice to the user."""
        return tuple(text for part in self._inner_parts() for text in part.inert_on_policy)

    def _inner_requires(self) -> frozenset[Requirement]:
        return frozenset(need for part in self._inner_parts() for need in part.requires)

    def _inner_parts(self) -> Iterable["Part"]:
        for own in dataclasses.fields(self):
            value = self.__dict__.get(own.name)
            for item in value if isinstance(value, list | tuple) else (value,):
                if isinstance(item, Part):
                    yield item

    def replace(self, **changes: object) -> Self:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)


def part_name(part: Part) -> str:
    """The name of a part in metrics: its class in snake case.

    >>> from rlstab.losses import TruncatedIS
    >>> part_name(TruncatedIS(max=2.0))
    'truncated_is'
    """
    return part._metric_name


@dataclass(frozen=True, kw_only=True)
class Prepared(Part):
    """A part that computes a tensor before the terms run; they read it as `batch.part(key)`. Abstract.

    A subclass with a `__post_init__` of its own calls `super().__post_init__()`, which sets the key.

    >>> from rlstab.losses import GroupNorm
    >>> GroupNorm(eps=1e-6).key
    'GroupNorm(eps=1e-06, ddof=1)'
    """

    key: str = field(init=False, repr=False, compare=False)
    """Its name in a batch: the same for equal parts. Set once, because a compiled loss cannot build text."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "key", repr(self))

    @abstractmethod
    def compute(self, batch: TokenBatch) -> Tensor:
        """The tensor to leave: 0-dim, or with one row per row of `batch`."""

    @property
    def needed(self) -> "Needs":
        """This part as something that a term can require."""
        return Needs(self)


@dataclass(frozen=True, kw_only=True)
class RolloutPart(Prepared):
    """Phase 1: sees the whole generation batch of all ranks, before it is shuffled and split.

    Groups exist only here. What `compute` returns (`[N]` or `[N, T]`) travels with its rows. The batch holds masks,
    rewards, groups, token ids and the log-probs (`old`, `sampler`, `initial`) that `requires` names.

    >>> @dataclass(frozen=True, kw_only=True)
    ... class Length(RolloutPart):
    ...     scale: float = 0.1
    ...
    ...     def compute(self, batch: TokenBatch) -> Tensor:
    ...         return self.scale * batch.mask.sum(-1)
    >>> import torch
    >>> Length().compute(TokenBatch(mask=torch.tensor([[True, True], [True, False]])))
    tensor([0.2000, 0.1000])
    """


@dataclass(frozen=True, kw_only=True)
class StepStatistic(Prepared):
    """Phase 2: sees detached per-token data of a whole optimizer step, all micro-batches and ranks.

    `compute` returns one number (0-dim) for the step, or a tensor for its rows. Requiring `LogProbs("policy")` costs
    one pass without gradient over the step, unless the old log-probs were recorded and no update has happened since;
    requiring `VocabStat("entropy")` always does.

    >>> from rlstab.batch import VocabStat
    >>> @dataclass(frozen=True, kw_only=True)
    ... class MeanEntropy(StepStatistic):
    ...     @property
    ...     def requires(self) -> frozenset[Requirement]:
    ...         return frozenset({VocabStat("entropy")})
    ...
    ...     def compute(self, batch: TokenBatch) -> Tensor:
    ...         return batch.statistic("entropy").sum() / batch.tokens
    >>> import torch
    >>> batch = TokenBatch(mask=torch.ones(1, 2), vocab={"entropy": torch.tensor([[0.5, 1.5]])})
    >>> MeanEntropy().compute(batch)
    tensor(1.)
    """


@dataclass(frozen=True)
class Needs(Requirement):
    """The result of a rollout part or step statistic, computed before the terms run.

    >>> from rlstab.losses import ConflictMask, ConflictWeight
    >>> ConflictWeight().requires == {Needs(ConflictMask())}
    True
    """

    part: Prepared


def prepared_parts(requires: Iterable[Requirement], kind: type[Prepared]) -> list[Prepared]:
    """The parts of one phase among the requirements, each once, in a fixed order.

    Parts that these parts need themselves come before them.

    Args:
        requires: what an objective reads; only `Needs` count.
        kind: `RolloutPart` or `StepStatistic`.

    >>> from rlstab.losses import KLCov
    >>> prepared_parts(KLCov().requires, StepStatistic)
    [TopCovariance(fraction=0.002)]
    """
    found: dict[str, Prepared] = {}

    def visit(part: Prepared) -> None:
        for need in sorted((n.part for n in part.requires if isinstance(n, Needs)), key=lambda p: p.key):
            visit(need)
        if isinstance(part, kind):
            found.setdefault(part.key, part)

    for part in sorted((n.part for n in requires if isinstance(n, Needs)), key=lambda p: p.key):
        visit(part)
    return list(found.values())


def run_parts(requires: Iterable[Requirement], batch: TokenBatch) -> TokenBatch:
    """The batch with the results of every rollout part and step statistic that `requires` names.

    For a batch that is a whole generation and a whole step at once, as in tests and in one's own training loop;
    trainers run the two phases at their own moments.

    Args:
        requires: what an objective reads; only `Needs` count.
        batch: all rows, with what the parts read.

    Returns:
        A batch whose `parts` hold the results, detached, by the keys of their parts.

    >>> import torch
    >>> from rlstab.losses import EntropyThreshold, TopEntropy
    >>> batch = TokenBatch(mask=torch.ones(1, 3), vocab={"entropy": torch.tensor([[0.1, 0.5, 0.9]])})
    >>> run_parts(TopEntropy(fraction=0.5).requires, batch).part(EntropyThreshold(fraction=0.5).key)
    tensor(0.5000)
    """
    requires = list(requires)
    for kind in (RolloutPart, StepStatistic):
        for part in prepared_parts(requires, kind):
            batch = batch.replace(parts={**batch.parts, part.key: part.compute(batch).detach()})
    return batch
