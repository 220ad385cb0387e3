"""What goes over the wire between `VLLMServerEngine` and its servers, and the checks of what comes back."""

from __future__ import annotations

import base64
import binascii
import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from rlstab.errors import ConfigError, EngineError, ShapeError
from rlstab.rollouts._draw import stream_keys
from rlstab.rollouts._kept import KeptSets
from rlstab.rollouts._request import Request, Sampling
from rlstab.rollouts._rollout import FinishReason, Rollout, Timing, Turn
from rlstab.rollouts._vllm_calls import TIES
from rlstab.routing import Routers

__all__ = [
    "PROTOCOL",
    "LostError",
    "MalformedError",
    "Question",
    "Status",
    "call_document",
    "decoded",
    "encoded",
    "read_call",
    "read_scores",
    "route_text",
]

PROTOCOL = 2

CERTAIN = 1e-3
"""Rounding may make a certain token a little more than certain: the largest log-prob."""

REASONS = ("stop", "length", "abort")


class LostError(EngineError):
    """A server that does not answer, or not as it should: dead, hung, or restarted."""


class MalformedError(LostError):
    """A server that answers with something else than was asked for."""


@dataclass(frozen=True, kw_only=True)
class Status:
    """What a server says of itself.

    Args:
        protocol: version of the wire format.
        session: the engine whose weights it has, or "".
        weight_version: their version.
        context: most tokens of a prompt and its completion.
        dtype: precision of the weights.
        workers: number of processes that hold the model.
        transfer: how it takes weights: `file` or `nccl`.
        routes: whether it returns the experts that tokens went to.
        fault: what is wrong, or "".
    """

    protocol: int
    session: str
    weight_version: int
    context: int
    dtype: str
    workers: int
    transfer: str
    routes: bool
    fault: str

    @classmethod
    def read(cls, document: object) -> Status:
        """The status in an answer."""
        fields = {
            field.name: {"str": str, "int": int, "bool": bool}[cast(str, field.type)]
            for field in dataclasses.fields(cls)
        }
        found = _mapping(document, set(fields))
        for name, kind in fields.items():
            if type(found[name]) is not kind:
                raise MalformedError(f"{name} is {_shortened(found[name])}; expected {kind.__name__}")
        return cls(**found)


def encoded(document: object) -> bytes:
    """A document as one line."""
    return json.dumps(document, separators=(",", ":")).encode() + b"\n"


def decoded(line: bytes) -> Any:
    """The document in a line."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise MalformedError(f"{_shortened(line)} is not JSON") from error


def call_document(requests: Sequence[Request], sampling: Sampling) -> list[dict[str, Any]]:
    """Each request in a form that can be sent to any server, in any company: with a seed of its own if it has one."""
    limit = sampling.max_new_tokens
    return [
        {
            "prompt_ids": list(request.prompt_ids),
            "max_new_tokens": min(limit, request.max_new_tokens or limit),
            "seed": seed,
        }
        for request, seed in zip(requests, _seeds(requests, sampling), strict=True)
    ]


def _seeds(requests: Sequence[Request], sampling: Sampling) -> list[int | None]:
    if sampling.seed is None:
        return [request.seed for request in requests]
    places = torch.arange(len(requests))
    keys = stream_keys(torch.full_like(places, sampling.seed), places).tolist()
    return [key if request.seed is None else request.seed for request, key in zip(requests, keys, strict=True)]


def read_call(document: Any) -> tuple[list[Request], Sampling]:
    """The requests and settings that a server was sent.

    Raises:
        ConfigError: if they are none.
    """
    try:
        settings = dict(document["sampling"])
        for name in ("stop_ids", "forbidden_ids"):
            settings[name] = tuple(settings[name])
        return [Request(**request) for request in document["requests"]], Sampling(**settings)
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"not a call of this protocol: {error}") from error


@dataclass(frozen=True, kw_only=True)
class Question:
    """A request as its answer is checked against it.

    Args:
        request: the request.
        sampling: how to sample, with stop tokens.
        vocabulary: number of tokens.
        limit: most new tokens.
        routers: those of the trainer's model, where the experts of every token are wanted.
    """

    request: Request
    sampling: Sampling
    vocabulary: int
    limit: int
    routers: Routers | None = None

    @property
    def largest(self) -> int:
        """Most bytes of an answer."""
        recorded = min(self.vocabulary, self.sampling.top_k + TIES if self.sampling.top_k else self.vocabulary)
        per_token = 64 + (12 * recorded if self._records_sets else 0)
        per_input = 0 if self.routers is None else 2 * math.prod(_route_sizes(self.routers))
        return 4096 + per_token * self.limit + per_input * (len(self.request.prompt_ids) + self.limit)

    @property
    def _records_sets(self) -> bool:
        sampling = self.sampling
        return sampling.truncated and sampling.truncation == "renormalise" and sampling.temperature > 0

    def answer(self, document: object, *, newest: int, engine: str) -> Rollout:
        """The rollout in an answer.

        Args:
            document: the answer.
            newest: newest version that tokens may have been sampled with.
            engine: name of the engine.

        Raises:
            MalformedError: if it is no answer to this question.
            EngineError: if the model's logits are not finite.
        """
        keys = {"token_ids", "logprobs", "versions", "reason", "waited", "worked", "kept", "routes"}
        found = _mapping(document, keys)
        tokens = self._tokens(found["token_ids"], found["reason"])
        size = len(tokens)
        logprobs = self._logprobs(found["logprobs"], size)
        if math.isnan(float(logprobs.sum())):
            raise EngineError(
                f"{engine}: the model's logits are not finite; its weights have probably diverged: go back to an "
                "earlier checkpoint"
            )
        return Rollout(
            prompt_ids=torch.tensor(self.request.prompt_ids),
            token_ids=tokens,
            loss_mask=torch.ones(size, dtype=torch.bool),
            logprobs=logprobs,
            weight_versions=_versions(found["versions"], size, newest),
            turns=(Turn("policy", 0, size),),
            finish_reason=cast(FinishReason, found["reason"]),
            engine=engine,
            timing=Timing(waiting=_seconds(found["waited"]), generating=_seconds(found["worked"])),
            kept=self._kept(found["kept"], tokens),
            routed_experts=self._routes(found["routes"], size),
        )

    def _tokens(self, ids: object, reason: object) -> Tensor:
        if reason not in REASONS:
            raise MalformedError(f"reason is {_shortened(reason)}; expected one of {', '.join(REASONS)}")
        found = _integers("token_ids", ids, below=self.vocabulary)
        if len(found) > self.limit or not (found or reason == "abort"):
            raise MalformedError(f"{len(found)} tokens; expected 1 to {self.limit}")
        if reason == "stop" and found[-1] not in (self.sampling.stop_ids or ()):
            raise MalformedError(f"a completion that ends with token {found[-1]}; expected a stop token")
        return torch.tensor(found, dtype=torch.int64)

    def _logprobs(self, values: object, size: int) -> Tensor:
        found = _list("logprobs", values, size)
        if not all(type(value) in (float, int) and not value > CERTAIN for value in found):
            raise MalformedError("logprobs hold something else than numbers up to 0")
        return torch.tensor(found, dtype=torch.float32)

    def _kept(self, positions: object, tokens: Tensor) -> KeptSets | None:
        if not self._records_sets:
            if positions is not None:
                raise MalformedError("kept sets that nobody asked for")
            return None
        sets = [_integers("kept", kept, below=self.vocabulary) for kept in _list("kept", positions, len(tokens))]
        if not all(token in kept for token, kept in zip(tokens.tolist(), sets, strict=True)):
            raise MalformedError("a token that is not in its own kept set")
        return KeptSets.of([torch.tensor(kept, dtype=torch.int64) for kept in sets])

    def _routes(self, text: object, size: int) -> Tensor | None:
        if self.routers is None or (text is None and not size):
            if text is not None:
                raise MalformedError("routes that nobody asked for")
            return None
        layers, top_k, width = _route_sizes(self.routers)
        tokens = len(self.request.prompt_ids) + size - 1
        try:
            raw = base64.b64decode(cast(str, text), validate=True)
            ids = np.frombuffer(raw, dtype=f"<u{width}").astype(np.int64).reshape(tokens, layers, top_k)
            return self.routers.accept(torch.from_numpy(ids))
        except (binascii.Error, TypeError, ValueError, ShapeError) as error:
            raise MalformedError(
                f"routes are {_shortened(text)}; expected {top_k} experts of {self.routers.num_experts} for each of "
                f"{tokens} tokens and {layers} layers: {error}"
            ) from error


def route_text(routes: Tensor | None) -> str | None:
    """Routes as they travel: base64 of their ids, in one byte each up to 256 experts, else in two."""
    if routes is None:
        return None
    ids = routes.numpy()
    return base64.b64encode(ids.astype(ids.dtype.newbyteorder("<")).tobytes()).decode("ascii")


def _route_sizes(routers: Routers) -> tuple[int, int, int]:
    """Layers, experts of a token, and bytes of an id."""
    return len(routers.routers), routers.top_k, 1 if routers.num_experts <= 256 else 2


def read_scores(document: object, size: int) -> Tensor:
    """The log-probs in an answer, of all tokens of a sequence but the first."""
    found = _list("scores", _mapping(document, {"scores"})["scores"], size - 1)
    if not all(type(value) in (float, int) for value in found):
        raise MalformedError("scores hold something else than numbers")
    return torch.tensor(found, dtype=torch.float32)


def _versions(runs: object, size: int, newest: int) -> Tensor:
    """Versions of `size` tokens from pairs of a version and how many tokens have it."""
    if not isinstance(runs, list) or len(runs) > max(size, 1):
        raise MalformedError(f"versions are {_shortened(runs)}; expected pairs of a version and a number of tokens")
    pairs = [_integers("versions", run, below=max(newest, size) + 1) for run in runs]
    if not all(len(pair) == 2 for pair in pairs) or sum(pair[1] for pair in pairs) != size:
        raise MalformedError(f"versions are {_shortened(runs)}; expected pairs that cover {size} tokens")
    versions = [pair[0] for pair in pairs]
    if versions != sorted(versions) or any(version > newest for version in versions):
        raise MalformedError(f"versions are {_shortened(versions)}; expected them to grow up to {newest} at most")
    return torch.tensor([version for version, count in pairs for _ in range(count)], dtype=torch.int64)


def _mapping(document: object, keys: set[str]) -> dict[str, Any]:
    if not isinstance(document, Mapping) or set(document) != keys:
        raise MalformedError(f"{_shortened(document)}; expected an object with {', '.join(sorted(keys))}")
    return dict(document)


def _list(name: str, values: object, size: int) -> list[Any]:
    if not isinstance(values, list) or len(values) != size:
        raise MalformedError(f"{name} is {_shortened(values)}; expected a list of {size}")
    return values


def _integers(name: str, values: object, *, below: int) -> list[int]:
    if not isinstance(values, list) or not all(type(value) is int and 0 <= value < below for value in values):
        raise MalformedError(f"{name} is {_shortened(values)}; expected whole numbers from 0 up to {below - 1}")
    return values


def _seconds(value: object) -> float:
    if type(value) not in (float, int) or not 0 <= cast(float, value) < math.inf:
        raise MalformedError(f"a time of {_shortened(value)}; expected seconds")
    return float(cast(float, value))


def _shortened(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)"
