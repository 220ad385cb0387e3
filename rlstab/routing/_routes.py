"""Routes: which experts each token went to, in as few bytes as that takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self, final

import torch
from jaxtyping import Bool, Float, Int, Integer, Shaped
from torch import Tensor

from rlstab.errors import ShapeError

__all__ = ["Routes", "compact"]

NOBODY = -1
"""Stands for "choose yourself" where ids are handed to a router, and nowhere else."""


def compact(experts: Integer[Tensor, "*shape"], num_experts: int) -> Integer[Tensor, "*shape"]:
    """Expert ids in the smallest type that holds them: uint8 up to 256 experts, else int16.

    Args:
        experts: ids from 0 on.
        num_experts: number of experts of each layer.

    Returns:
        The same ids; the same tensor if its type is right already.

    Example:
        >>> compact(torch.tensor([0, 255]), 256).dtype, compact(torch.tensor([0, 511]), 512).dtype
        (torch.uint8, torch.int16)
    """
    return experts.to(torch.uint8 if num_experts <= 256 else torch.int16)


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Routes:
    """The experts that tokens went to, in every sparse layer.

    A token's entry belongs to the forward in which the token is the input; it decides the log-prob of the *next* token.
    So a completion of T tokens after a prompt of P has entries for P + T − 1 tokens: the last one was never an input.

    Args:
        experts: ids, `[*, L, K]` for L sparse layers and K experts per token, in the type that `compact` chooses: one
            million tokens × 48 layers × 8 experts take 384 MB.
        valid: tokens whose route is known; the others choose for themselves when the routes are replayed.
        logprobs: the router's log-probs of these experts in nats, float32, where they were asked for.

    Raises:
        ShapeError: if the tensors do not fit together, or the ids are in another type.

    Example:
        >>> routes = Routes(experts=torch.zeros(2, 5, 1, 2, dtype=torch.uint8), valid=torch.ones(2, 5).bool())
        >>> routes.nbytes
        30
    """

    experts: Integer[Tensor, "*grid L K"]
    valid: Bool[Tensor, "*grid"]
    logprobs: Float[Tensor, "*grid L K"] | None = None

    def __post_init__(self) -> None:
        if self.experts.dtype not in (torch.uint8, torch.int16):
            raise ShapeError(
                f"Routes: experts are {self.experts.dtype}; expected torch.uint8, or torch.int16 above 256 experts "
                "(see rlstab.routing.compact)"
            )
        if self.experts.shape[:-2] != self.valid.shape or self.experts.dim() < 2:
            raise ShapeError(
                f"Routes: experts {list(self.experts.shape)} and valid {list(self.valid.shape)}; expected "
                "[*, layers, experts per token] and [*]"
            )
        if self.logprobs is not None and self.logprobs.shape != self.experts.shape:
            raise ShapeError(
                f"Routes: logprobs {list(self.logprobs.shape)}; expected one per expert, {list(self.experts.shape)}"
            )

    @property
    def nbytes(self) -> int:
        """Bytes that the tensors take."""
        tensors = (self.experts, self.valid, self.logprobs)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def given(self, place: int) -> Int[Tensor, "N K"]:
        """The ids for the router at `place`, one row per token in row-major order, −1 where a token has no route."""
        experts = self.experts[..., place, :].long()
        return torch.where(self.valid.unsqueeze(-1), experts, NOBODY).reshape(-1, experts.shape[-1])

    def rows(self, mask: Shaped[Tensor, "B T"]) -> list[Routes]:
        """One element per row, without the tokens outside `mask`: what travels with the rows of a batch.

        Args:
            mask: real tokens of a padded batch `[B, T]`, whose routes these are.

        Example:
            >>> routes = Routes(experts=torch.zeros(1, 3, 1, 2, dtype=torch.uint8), valid=torch.ones(1, 3).bool())
            >>> [row.experts.shape for row in routes.rows(torch.tensor([[0, 1, 1]]))]
            [torch.Size([2, 1, 2])]
        """
        kept = mask.bool()
        return [self.select((row, kept[row])) for row in range(len(kept))]

    def select(self, index: int | slice | Tensor | tuple[int | slice | Tensor, ...]) -> Self:
        """The tokens at `index` of the leading axes."""
        logprobs = None if self.logprobs is None else self.logprobs[index]
        return type(self)(experts=self.experts[index], valid=self.valid[index], logprobs=logprobs)

    def to(self, device: torch.device | str) -> Self:
        """The routes on another device."""
        logprobs = None if self.logprobs is None else self.logprobs.to(device)
        return type(self)(experts=self.experts.to(device), valid=self.valid.to(device), logprobs=logprobs)

    @classmethod
    def padded(cls, rows: Sequence[Routes], mask: Shaped[Tensor, "B T"], *, partial: bool = False) -> Self:
        """The routes of a padded batch, from those of its rows, whatever side the padding is on.

        Args:
            rows: routes of each row: of all its real tokens, or of all but the last, which has none then.
            mask: real tokens of the batch; may be on another device than the routes, which follow it.
            partial: a row may have routes of its first tokens only, as where a tool wrote the rest.

        Returns:
            Routes of `[B, T]`; padding has none.

        Raises:
            ShapeError: if a row has routes for another number of tokens than it has tokens.

        Example:
            >>> row = Routes(experts=torch.ones(2, 1, 2, dtype=torch.uint8), valid=torch.ones(2).bool())
            >>> Routes.padded([row], torch.tensor([[0, 1, 1, 1]])).valid
            tensor([[False,  True,  True, False]])
        """
        mask = mask.bool()
        tokens, counts = mask.sum(-1).tolist(), [len(row.valid) for row in rows]
        for place, (expected, got) in enumerate(zip(tokens, counts, strict=True)):
            if not (expected - 1 <= got or partial) or got > expected:
                raise ShapeError(
                    f"routes of row {place}: expected {expected - 1} tokens (prompt and completion but the last) or "
                    f"{expected}, got {got}: the array is truncated, or of another row"
                )
        order = mask.long().cumsum(-1)
        routed = mask & (order <= torch.tensor(counts, device=mask.device).unsqueeze(-1))
        return cls(
            experts=_placed([row.experts for row in rows], routed),
            valid=_placed([row.valid for row in rows], routed),
            logprobs=_placed([row.logprobs for row in rows if row.logprobs is not None], routed)
            if all(row.logprobs is not None for row in rows)
            else None,
        )


def _placed(rows: Sequence[Tensor], routed: Tensor) -> Tensor:
    """The values of all rows, in their order, at the true places of `routed`; zero elsewhere."""
    values = torch.cat(list(rows)).to(routed.device)
    placed = values.new_zeros(*routed.shape, *values.shape[1:])
    placed[routed] = values
    return placed
