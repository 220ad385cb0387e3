"""A request while it is being answered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rlstab.errors import EngineError
from rlstab.rollouts._draw import Draw


@dataclass(eq=False, kw_only=True)
class Answer:
    """What has been drawn for one request so far.

    Args:
        prompt: the prompt.
        limit: most tokens to draw.
        stream: key of its random stream.
        features: the request's features.
        routes: experts chosen for the tokens that were inputs, in pieces `[*, L, K]`.
    """

    prompt: tuple[int, ...]
    limit: int
    stream: int
    features: Mapping[str, Tensor]
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    kept: list[Tensor] = field(default_factory=list)
    routes: list[Tensor] = field(default_factory=list)
    started: float = 0.0
    ended: float = 0.0

    def stopped(self, stop_ids: AbstractSet[int]) -> bool:
        """Did a stop token end it?"""
        return bool(self.token_ids) and self.token_ids[-1] in stop_ids


def record_routes(answers: Sequence[Answer], steps: Sequence[Tensor], counts: Sequence[int]) -> None:
    """Append to each answer the routes of its tokens in the first `counts` of `steps`, of one token per row each."""
    if steps:
        for answer, routes, count in zip(answers, torch.cat(list(steps), dim=1).cpu(), counts, strict=True):
            answer.routes.append(routes[:count])


def record(answers: Sequence[Answer], draws: Sequence[Draw], counts: Sequence[int], clock: Sequence[float]) -> None:
    """Append to each answer the first `counts` of its draws, made at the times `clock`.

    Raises:
        EngineError: if a log-prob is NaN, as it is where the model's logits are not finite.
    """
    if not draws:
        return
    logprobs = torch.stack([drawn.logprobs for drawn in draws], dim=1)
    if logprobs.isnan().any():
        raise EngineError(
            "the model's logits are not finite; its weights have probably diverged: go back to an earlier checkpoint"
        )
    tokens = torch.stack([drawn.token_ids for drawn in draws], dim=1).tolist()
    for answer, ids, values, count in zip(answers, tokens, logprobs.tolist(), counts, strict=True):
        answer.token_ids += ids[:count]
        answer.logprobs += values[:count]
        if count:
            answer.ended = clock[count - 1]
    for step, drawn in enumerate(draws):
        if drawn.kept is not None:
            for answer, kept, count in zip(answers, drawn.kept.split(), counts, strict=True):
                if step < count:
                    answer.kept.append(kept)
