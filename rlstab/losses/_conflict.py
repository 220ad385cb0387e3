"""GTPO: tokens that a group's good and bad completions share, and the entropy filter of its advantages."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlstab.batch import Column, Requirement, TokenBatch, VocabStat
from rlstab.errors import ConfigError
from rlstab.losses._advantage import Advantage, GroupCenter, group_index, scored_rows
from rlstab.losses._checks import check_choice, check_number, check_part, check_positive
from rlstab.losses._metrics import Metric, token_mean
from rlstab.losses._parts import RolloutPart
from rlstab.losses._weight import Factor, Weight


@dataclass(frozen=True, kw_only=True)
class ConflictMask(RolloutPart):
    r"""Tokens at the start and end that completions of positive and of negative advantage have in common.

    A token is in conflict from the front if the same token stands at the same position of at least one completion with
    $A > 0$ and at least one with $A < 0$ of its group; from the back likewise, counted from the last token. Only the
    unbroken run of such tokens at the start, $F_{it} \in \{0, 1\}$, and that at the end, $K_{it}$, count, so that
    shared prefixes and suffixes (format tags) are found and not the middle. Completions with $A = 0$ take no part.

    Args:
        advantage: the advantage whose sign decides.

    Returns of `compute`: $\operatorname{sgn}(A_i)(F_{it} + K_{it})$, `[N, T]`.

    Raises:
        ConfigError: at the first batch, if the advantage differs from token to token.

    Reference: GTPO: Stabilizing Group Relative Policy Optimization via Gradient and Entropy Control,
    https://arxiv.org/abs/2508.03772

    >>> batch = TokenBatch(
    ...     mask=torch.ones(2, 3),
    ...     token_ids=torch.tensor([[5, 6, 9], [5, 7, 9]]),
    ...     rewards=torch.tensor([1.0, 0.0]),
    ...     group=torch.tensor([0, 0]),
    ... )
    >>> ConflictMask().compute(batch)
    tensor([[ 1.,  0.,  1.],
            [-1.,  0., -1.]])
    """

    advantage: Advantage = field(default_factory=GroupCenter)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_part("ConflictMask.advantage", self.advantage, Advantage, "GroupCenter()")

    @property
    def requires(self) -> frozenset[Requirement]:
        """Tokens, groups, and what the advantage reads."""
        return super().requires | {Column("token_ids"), Column("group")}

    def compute(self, batch: TokenBatch) -> Float[Tensor, "N T"]:
        """The signed number of runs that a token lies in."""
        advantages = self.advantage.compute(batch)
        if advantages.dim() == 2:
            raise ConfigError(
                f"ConflictMask.advantage: {type(self.advantage).__name__} has one advantage per token, and conflicts "
                "are decided by the sign of a whole completion: use one per completion, such as GroupCenter()"
            )
        sign = advantages.sign().unsqueeze(-1)
        position = batch.mask.cumsum(-1) - 1
        from_end = batch.mask.sum(-1, keepdim=True) - 1 - position
        front = _run(_shared(batch, position, sign), batch.mask)
        back = _run(_shared(batch, from_end, sign).flip(-1), batch.mask.flip(-1)).flip(-1)
        return torch.where(front | back, sign * (front.to(sign.dtype) + back.to(sign.dtype)), 0.0)


def _shared(batch: TokenBatch, position: Int[Tensor, "N T"], sign: Float[Tensor, "N 1"]) -> Bool[Tensor, "N T"]:
    """Tokens that stand at `position` of completions of both signs in their group."""
    token = torch.where(batch.mask, batch.column("token_ids"), 0)
    group = group_index(batch.column("group")).unsqueeze(-1)
    place = (group * token.shape[1] + position.clamp(min=0)) * (token.max() + 1) + token
    index: Tensor = torch.unique(place, return_inverse=True)[1]

    def held_by(rows: Bool[Tensor, "N 1"]) -> Bool[Tensor, "N T"]:
        held = torch.zeros(token.numel(), dtype=torch.bool, device=token.device)
        held[index[rows & batch.mask]] = True
        return held[index]

    return held_by(sign > 0) & held_by(sign < 0) & (sign != 0) & batch.mask


def _run(flags: Bool[Tensor, "N T"], mask: Bool[Tensor, "N T"]) -> Bool[Tensor, "N T"]:
    """The unbroken run of flags that begins at the first token."""
    return (flags | ~mask).long().cumprod(-1).bool() & mask


@dataclass(frozen=True, kw_only=True)
class ConflictWeight(Weight):
    r"""Weight of a token that a group's good and bad completions share: `positive` in a good one, 0 in a bad one.

    $\lambda_{it} = 1$ for a token that is in no conflict (see `ConflictMask`). Where the runs at the start and at the
    end overlap, `overlap="max"` keeps $\lambda$ = `positive`; `"product"` squares it, as the released code does.

    Args:
        positive: $\lambda$ in conflict where $A > 0$.
        overlap: `max` or `product`.
        mask: the rollout part that finds the conflicts.

    Metrics: `conflict_weight/conflict`, the share of tokens in conflict.

    Raises:
        ConfigError: if `positive` is not above 0, or `overlap` is another word.

    Reference: GTPO: Stabilizing Group Relative Policy Optimization via Gradient and Entropy Control,
    https://arxiv.org/abs/2508.03772

    >>> weight = ConflictWeight()
    >>> batch = TokenBatch(mask=torch.ones(1, 4), parts={weight.mask.key: torch.tensor([[1.0, 0.0, -1.0, 2.0]])})
    >>> weight.factor(batch).values
    tensor([[2., 1., 0., 2.]])
    """

    positive: float = 2.0
    overlap: Literal["max", "product"] = "max"
    mask: ConflictMask = field(default_factory=ConflictMask)

    def __post_init__(self) -> None:
        check_choice("ConflictWeight.overlap", self.overlap, ("max", "product"))
        check_positive("ConflictWeight.positive", self.positive)
        check_part("ConflictWeight.mask", self.mask, ConflictMask, "ConflictMask()")

    @property
    def requires(self) -> frozenset[Requirement]:
        """The conflicts."""
        return frozenset({self.mask.needed})

    def factor(self, batch: TokenBatch) -> Factor:
        """The weight of each token."""
        runs = batch.part(self.mask.key)
        positive = self.positive ** (runs if self.overlap == "product" else runs.clamp(max=1))
        metrics: Mapping[str, Metric] = {
            "conflict_weight/conflict": token_mean((runs != 0).to(runs.dtype), batch.loss_mask)
        }
        return Factor(torch.where(runs < 0, 0.0, positive), metrics)


@dataclass(frozen=True, kw_only=True)
class EntropyFilter(Advantage):
    r"""Another advantage minus an entropy penalty, and 0 for completions of high entropy, as in GTPO.

    $A'_i = (A_i - \gamma H_i)\,1[H_i \le \tau]$ with $H_i$ the mean entropy (nats) of the policy over the trained
    tokens of completion $i$, taken when the rollouts were made. $H < \ln 2$ implies that one token has more than half
    of the mass. Meant for a starting policy whose own mean entropy lies below $\tau$: others would train on nothing.

    Args:
        advantage: the advantage to adjust.
        threshold: $\tau$, in nats; the default is the paper's (its code has 0.7).
        scale: $\gamma$.

    Reference: GTPO: Stabilizing Group Relative Policy Optimization via Gradient and Entropy Control,
    https://arxiv.org/abs/2508.03772

    >>> batch = TokenBatch(
    ...     mask=torch.ones(2, 1),
    ...     rewards=torch.tensor([1.0, 0.0]),
    ...     group=torch.tensor([0, 0]),
    ...     vocab={"entropy": torch.tensor([[0.2], [0.9]])},
    ... )
    >>> EntropyFilter().compute(batch)
    tensor([0.4800, 0.0000])
    """

    advantage: Advantage = field(default_factory=GroupCenter)
    threshold: float = math.log(2)
    scale: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_part("EntropyFilter.advantage", self.advantage, Advantage, "GroupCenter()")
        check_number("EntropyFilter.threshold", self.threshold)
        check_number("EntropyFilter.scale", self.scale)

    @property
    def requires(self) -> frozenset[Requirement]:
        """Entropies, and what the advantage reads."""
        return super().requires | {VocabStat("entropy")}

    def compute(self, batch: TokenBatch) -> Float[Tensor, "N"] | Float[Tensor, "N T"]:
        """The adjusted advantages; 0 where there is no reward."""
        advantages = self.advantage.compute(batch)
        entropy = batch.statistic("entropy").detach()  # a reward, not a bonus: the policy gradient carries it
        entropies = (entropy * batch.loss_mask).sum(-1) / batch.loss_mask.sum(-1).clamp(min=1)
        kept = (entropies <= self.threshold) & scored_rows(batch)
        if advantages.dim() == 2:
            entropies, kept = entropies.unsqueeze(-1), kept.unsqueeze(-1)
        return torch.where(kept, advantages - self.scale * entropies, 0.0)
