"""One sampled completion, with everything that is known about how it was sampled."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int, Integer, Shaped
from torch import Tensor

from rlstab.errors import ConfigError, ShapeError
from rlstab.rollouts._kept import KeptSets

__all__ = ["NOT_SAMPLED", "FinishReason", "Rollout", "Timing", "Turn", "join_turns"]

FinishReason = Literal["stop", "length", "abort"]
"""Why a completion ended: a stop token, the limit of tokens, or an interruption that left a part of it."""

NOT_SAMPLED = -1
"""The weight version of a token that no policy sampled (a tool's)."""


@dataclass(frozen=True)
class Turn:
    """A stretch of a completion by one author: tokens `start` up to `stop`, not including it.

    Example:
        >>> turn = Turn("tool", start=4, stop=9)
        >>> turn.stop - turn.start
        5
    """

    author: Literal["policy", "tool"]
    start: int
    stop: int


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Where the time went, in seconds: from the call to the first work on the prompt, and from there to the end.

    Example:
        >>> timing = Timing(waiting=0.25, generating=1.5)
        >>> timing.waiting + timing.generating
        1.75
    """

    waiting: float
    generating: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Rollout:
    """A completion with the log-prob, under the policy that sampled it, and the weight version of every token.

    `P` is the number of prompt tokens, `T` that of the completion. All tensors are on the CPU. Two rollouts are equal
    if every field is, NaN equal to NaN.

    Args:
        prompt_ids: the prompt.
        token_ids: the completion, with the stop token that ended it.
        loss_mask: tokens that the policy sampled: all but those of tools.
        logprobs: log-prob in nats of each token under the distribution that it was drawn from (see `Sampling`), in
            float32; NaN for a token that the engine could not score or did not sample.
        weight_versions: version of the weights that sampled each token (see `Engine.sync_weights`); `NOT_SAMPLED` for
            a tool's.
        turns: who wrote what, in order and without gaps.
        finish_reason: why it ended.
        engine: id of the engine that sampled it (the last one, if several did).
        timing: where the time went.
        kept: the tokens that could have been drawn, where sampling was truncated and the engine records them.
        routed_experts: experts chosen at each layer, for prompt and completion but its last token, which was never an
            input; None where the engine does not record them.
        images: the request's images.
        features: the request's features.

    Raises:
        ShapeError: if the tensors do not fit together, or are of another type: ids and versions are int64, log-probs
            float32, masks bool.

    Example:
        >>> rollout = Rollout(
        ...     prompt_ids=torch.tensor([5, 6]),
        ...     token_ids=torch.tensor([7, 2]),
        ...     loss_mask=torch.tensor([True, True]),
        ...     logprobs=torch.tensor([-0.5, -0.25]),
        ...     weight_versions=torch.tensor([3, 3]),
        ...     turns=(Turn("policy", 0, 2),),
        ...     finish_reason="stop",
        ...     engine="engine-0",
        ...     timing=Timing(waiting=0.0, generating=0.1),
        ... )
        >>> rollout.logprobs.sum()
        tensor(-0.7500)
    """

    prompt_ids: Int[Tensor, "P"]
    token_ids: Int[Tensor, "T"]
    loss_mask: Bool[Tensor, "T"]
    logprobs: Float[Tensor, "T"]
    weight_versions: Int[Tensor, "T"]
    turns: tuple[Turn, ...]
    finish_reason: FinishReason
    engine: str
    timing: Timing
    kept: KeptSets | None = None
    routed_experts: Integer[Tensor, "S L K"] | None = None
    images: tuple[Shaped[Tensor, "_ _ _"], ...] = ()
    features: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, dtype in _VECTORS.items():
            tensor: Tensor = vars(self)[name]
            if tensor.ndim != 1 or tensor.dtype != dtype:
                raise ShapeError(f"Rollout: {name} is {_described(tensor)}; expected a vector of {dtype}")
        size = len(self.token_ids)
        covered = {name: len(vars(self)[name]) for name in ("loss_mask", "logprobs", "weight_versions")}
        covered["turns"] = self.turns[-1].stop if self.turns else 0
        covered["kept"] = size if self.kept is None else len(self.kept.counts)
        for name, found in covered.items():
            if found != size:
                raise ShapeError(f"Rollout: {name} covers {found} tokens; expected {size}, as token_ids has")
        steps = len(self.prompt_ids) + size - 1
        if self.routed_experts is not None and (self.routed_experts.ndim != 3 or len(self.routed_experts) != steps):
            raise ShapeError(
                f"Rollout: routed_experts is {_described(self.routed_experts)}; expected [tokens, layers, experts] for "
                f"{steps} tokens, all of prompt and completion but the last"
            )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Rollout):
            return NotImplemented
        return all(_same(vars(self)[entry.name], vars(other)[entry.name]) for entry in dataclasses.fields(self))

    __hash__ = None  # type: ignore[assignment]


_VECTORS = {
    "prompt_ids": torch.int64,
    "token_ids": torch.int64,
    "loss_mask": torch.bool,
    "logprobs": torch.float32,
    "weight_versions": torch.int64,
}


def _described(tensor: Tensor) -> str:
    return f"a tensor of {tensor.dtype} and shape {list(tensor.shape)}"


def _same(one: object, other: object) -> bool:
    match one, other:
        case Tensor(), Tensor():
            return one.dtype == other.dtype and one.shape == other.shape and _same_values(one, other)
        case KeptSets(), KeptSets():
            return _same(vars(one), vars(other))
        case tuple(), tuple():
            return len(one) == len(other) and all(map(_same, one, other))
        case Mapping(), Mapping():
            return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    return one == other


def _same_values(one: Tensor, other: Tensor) -> bool:
    equal = one == other
    return bool((equal | ((one != one) & (other != other))).all())  # NaN is the value that differs from itself


def join_turns(rollouts: Sequence[Rollout]) -> Rollout:
    """One rollout out of the turns of a conversation with tools.

    Each prompt begins with the prompt and the completion of the turn before; what it adds is the tool's: outside the
    loss, without log-prob and of the version `NOT_SAMPLED`. Kept sets and routes stay if every turn has them; a token's
    routes are those of the turn that sampled it. Times add up; finish reason, engine and images are the last turn's.

    Args:
        rollouts: the turns in order, at least one.

    Returns:
        The whole conversation as a completion of the first prompt.

    Raises:
        ConfigError: if there is no turn, or if a prompt does not begin with the conversation so far.

    Example:
        >>> def turn(prompt: list[int], completion: list[int]) -> Rollout:
        ...     size = len(completion)
        ...     return Rollout(
        ...         prompt_ids=torch.tensor(prompt),
        ...         token_ids=torch.tensor(completion),
        ...         loss_mask=torch.ones(size, dtype=torch.bool),
        ...         logprobs=torch.zeros(size),
        ...         weight_versions=torch.zeros(size, dtype=torch.int64),
        ...         turns=(Turn("policy", 0, size),),
        ...         finish_reason="stop",
        ...         engine="engine-0",
        ...         timing=Timing(waiting=0.0, generating=0.1),
        ...     )
        >>> whole = join_turns([turn([5], [7, 8]), turn([5, 7, 8, 9], [2])])  # a tool added token 9
        >>> whole.token_ids.tolist(), whole.loss_mask.tolist()
        ([7, 8, 9, 2], [True, True, False, True])
    """
    if not rollouts:
        raise ConfigError("join_turns: got no rollout; expected at least one")
    whole = rollouts[0]
    for turn in rollouts[1:]:
        whole = _append_turn(whole, turn)
    return whole


def _append_turn(whole: Rollout, turn: Rollout) -> Rollout:
    past = torch.cat([whole.prompt_ids, whole.token_ids])
    if len(turn.prompt_ids) < len(past) or not torch.equal(turn.prompt_ids[: len(past)], past):
        raise ConfigError(
            "join_turns: a prompt does not begin with prompt and completion of the turn before it; pass the turns of "
            "one conversation in order, with token ids that were not decoded and encoded again"
        )
    added = turn.prompt_ids[len(past) :]
    start, resume = len(whole.token_ids), len(whole.token_ids) + len(added)
    shifted = [Turn(part.author, part.start + resume, part.stop + resume) for part in turn.turns]
    return dataclasses.replace(
        turn,
        prompt_ids=whole.prompt_ids,
        token_ids=torch.cat([whole.token_ids, added, turn.token_ids]),
        loss_mask=torch.cat([whole.loss_mask, torch.zeros(len(added), dtype=torch.bool), turn.loss_mask]),
        logprobs=torch.cat([whole.logprobs, torch.full((len(added),), torch.nan), turn.logprobs]),
        weight_versions=torch.cat(
            [whole.weight_versions, torch.full((len(added),), NOT_SAMPLED), turn.weight_versions]
        ),
        turns=(*whole.turns, *([Turn("tool", start, resume)] if len(added) else []), *shifted),
        timing=Timing(
            waiting=whole.timing.waiting + turn.timing.waiting,
            generating=whole.timing.generating + turn.timing.generating,
        ),
        kept=_joined_kept(whole.kept, len(added), turn.kept),
        routed_experts=_joined_routes(whole.routed_experts, turn.routed_experts),
    )


def _joined_kept(first: KeptSets | None, added: int, then: KeptSets | None) -> KeptSets | None:
    if first is None or then is None:
        return None
    gap = torch.zeros(added, dtype=torch.int64)
    return KeptSets(torch.cat([first.token_ids, then.token_ids]), torch.cat([first.counts, gap, then.counts]))


def _joined_routes(first: Tensor | None, then: Tensor | None) -> Tensor | None:
    return None if first is None or then is None else torch.cat([first, then[len(first) :]])
