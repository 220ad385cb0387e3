"""The interface that every rollout engine has."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Self

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rlstab.errors import ConfigError
from rlstab.rollouts._request import Request, Sampling
from rlstab.rollouts._rollout import Rollout
from rlstab.rollouts._weights import WeightSource

__all__ = ["Engine", "Health", "Listener"]

#: Is told what befalls an engine: the kind of the event, and its fields as they go to the run folder.
Listener = Callable[[str, Mapping[str, object]], None]


@dataclass(frozen=True, kw_only=True)
class Health:
    """The state of an engine.

    Args:
        alive: it can generate.
        engine: its id.
        weight_version: version of the weights it samples with.
        detail: what is wrong, or "".

    Example:
        >>> Health(alive=False, engine="engine-0", weight_version=4, detail="closed").detail
        'closed'
    """

    alive: bool
    engine: str
    weight_version: int
    detail: str = ""


class Engine(ABC):
    """Samples completions and takes new weights. A context manager: leaving the block closes it.

    Example:
        >>> from rlstab.models import tiny_causal_lm, tiny_tokenizer
        >>> from rlstab.rollouts import TransformersEngine
        >>> tokenizer = tiny_tokenizer("0123456789=")
        >>> with TransformersEngine(tiny_causal_lm(tokenizer), tokenizer) as engine:
        ...     engine.health().alive, engine.weight_version
        (True, 0)
        >>> engine.health().alive
        False
    """

    @property
    @abstractmethod
    def id(self) -> str:
        """Name of the engine in rollouts and events."""

    @property
    @abstractmethod
    def weight_version(self) -> int:
        """Version of the weights it samples with: that of the last `sync_weights`, 0 before the first."""

    @property
    @abstractmethod
    def shares_weights(self) -> bool:
        """Does it sample with the very tensors that are trained? Such an engine cannot be stale."""

    @property
    def works_beside(self) -> bool:
        """Can it sample on another thread, with a seed, while this process trains?"""
        return not self.shares_weights

    @property
    def returns_routes(self) -> bool:
        """Do its rollouts say which experts every token went to?"""
        return False

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Precision of the weights that it samples with."""

    def drop(self) -> None:  # noqa: B027  # most engines sample nothing ahead of time
        """Forget rollouts that were begun ahead of time, as after a return to earlier weights."""

    def listen(self, listener: Listener) -> None:  # noqa: B027  # most engines have nothing to tell
        """Tell `listener` of deaths and returns from now on, on the thread that sees them."""

    @abstractmethod
    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Rollout]:
        """Continue every prompt.

        Args:
            requests: the prompts, any number.
            sampling: how to draw.

        Returns:
            One rollout per request, in their order, none missing.

        Raises:
            EngineError: if a request cannot be answered; nothing is returned then.
        """

    async def generate_async(self, requests: Sequence[Request], sampling: Sampling) -> list[Rollout]:
        """`generate` for a program with an event loop, which does other work meanwhile.

        Without a seed one is drawn from this thread's generator. Several calls may be under way at a time; what they do
        at once is the engine's. A call that is cancelled is no longer waited for; of servers it is withdrawn.

        Raises:
            ConfigError: if the engine cannot sample beside other work of this process (`works_beside`).
            EngineError: see `generate`.

        Example:
            ```python
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(engine.generate_async([request], sampling)) for request in requests]
            ```
        """
        if not self.works_beside:
            raise ConfigError(
                f"{self.id}: generate_async of an engine that shares weights or generators with this thread; call "
                "generate, or make one of its own: TransformersEngine(share=False), VLLMEngine(in_process=False)"
            )
        if sampling.seed is None:
            sampling = replace(sampling, seed=int(torch.randint(2**62, ())))
        return await asyncio.to_thread(self.generate, requests, sampling)

    @abstractmethod
    def score(self, sequences: Sequence[Int[Tensor, "_"]]) -> list[Float[Tensor, "_"]]:
        """Log-probs that the engine's model gives to tokens of others, at temperature 1.

        Args:
            sequences: token ids of whole sequences, of two tokens at least.

        Returns:
            One vector per sequence: the log-prob of each token but the first, given all before it.

        Raises:
            EngineError: if a sequence cannot be scored.
        """

    @abstractmethod
    def sync_weights(self, source: WeightSource, version: int) -> None:
        """Take the weights of `source`, and forget whatever was computed with the old ones.

        Args:
            source: the trainer's weights.
            version: their version, which every token sampled from now on carries; it never decreases.

        Raises:
            WeightSyncError: if the weights do not fit, or the version is older than the present one.
        """

    @abstractmethod
    def health(self) -> Health:
        """The state of the engine, without waiting for requests in flight; never raises."""

    @abstractmethod
    def close(self) -> None:
        """Give back what the engine holds. Closing twice is fine; generating afterwards is an error."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
