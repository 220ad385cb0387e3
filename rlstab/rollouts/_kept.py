"""Kept sets of truncated sampling, and log-probs renormalised over them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rlstab.errors import ShapeError

__all__ = ["KeptSets", "renormalised_logprobs"]


@dataclass(frozen=True)
class KeptSets:
    """The tokens that truncated sampling could have drawn, for each position of one completion.

    Args:
        token_ids: the kept tokens of all positions, one position after the other.
        counts: how many tokens each position kept; 0 for a token that was not sampled (a tool's).

    Raises:
        ShapeError: if the counts do not add up to the number of tokens.

    Example:
        >>> kept = KeptSets(token_ids=torch.tensor([3, 5, 7]), counts=torch.tensor([2, 1]))
        >>> [position.tolist() for position in kept.split()]
        [[3, 5], [7]]
    """

    token_ids: Int[Tensor, "M"]
    counts: Int[Tensor, "T"]

    def __post_init__(self) -> None:
        if self.token_ids.ndim != 1 or self.counts.ndim != 1 or int(self.counts.sum()) != len(self.token_ids):
            raise ShapeError(
                f"KeptSets: expected as many token ids as the counts add up to ({int(self.counts.sum())}), "
                f"got token_ids of shape {tuple(self.token_ids.shape)} and counts of shape {tuple(self.counts.shape)}"
            )

    @classmethod
    def of(cls, positions: Sequence[Tensor]) -> KeptSets:
        """The kept sets of a completion, from one vector of token ids per position."""
        counts = torch.tensor([len(position) for position in positions], dtype=torch.int64)
        return cls(torch.cat([*positions, torch.empty(0, dtype=torch.int64)]), counts)

    def split(self) -> tuple[Tensor, ...]:
        """One vector of token ids per position."""
        positions: tuple[Tensor, ...] = self.token_ids.split(self.counts.tolist())
        return positions

    def padded(self) -> Int[Tensor, "T M"]:
        """The sets as a rectangle: a row per position, -1 after its last token."""
        width = int(self.counts.max()) if len(self.counts) else 0
        inside = torch.arange(width) < self.counts[:, None]
        return torch.full(inside.shape, -1, dtype=torch.int64).masked_scatter_(inside, self.token_ids)


def renormalised_logprobs(
    logits: Float[Tensor, "*shape V"],
    token_ids: Int[Tensor, "*shape"],
    kept_ids: Int[Tensor, "*shape M"],
) -> Float[Tensor, "*shape"]:
    r"""Log-probs of tokens under a policy truncated to a kept set of tokens.

    $\log \tilde\pi(a) = z_a - \log \sum_{k \in K} e^{z_k}$

    for logits z and the kept set K of the position, which must hold the token a. With sampler and trainer on the same
    sets, ratios and gradients are those of the truncated policy, without bias; a ratio against untruncated log-probs
    would miss the tail instead. A position that kept nothing (of a tool's token) gives the untruncated log-prob.

    Args:
        logits: logits over the vocabulary, divided by the sampling temperature; log-probs serve as well.
        token_ids: the tokens.
        kept_ids: the kept sets, padded with -1 (`KeptSets.padded`).

    Returns:
        Log-probs in nats, in float32 at least, with the gradient of `logits`.

    Example:
        >>> logits = torch.tensor([[0.0, 0.0, 0.0, 0.0]])
        >>> renormalised_logprobs(logits, torch.tensor([1]), torch.tensor([[1, 2, -1]])).exp()
        tensor([0.5000])
    """
    logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    chosen = logits.gather(-1, token_ids[..., None]).squeeze(-1)
    padding = kept_ids < 0
    kept = logits.gather(-1, kept_ids.clamp(min=0)).masked_fill(padding, -torch.inf)
    empty = padding.all(-1)
    normaliser = torch.logsumexp(kept.masked_fill(empty[..., None], 0.0), -1)
    return chosen - torch.where(empty, torch.logsumexp(logits, -1), normaliser)
