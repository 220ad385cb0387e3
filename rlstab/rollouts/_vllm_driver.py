"""vLLM in processes of its own, as coroutines on the event loop that it lives on."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import Tensor

from rlstab.rollouts._vllm_calls import Call, Completion, scores_of, scoring_call

if TYPE_CHECKING:
    from vllm import SamplingParams, TokensPrompt
    from vllm.v1.engine.async_llm import AsyncLLM

__all__ = ["Driver", "InFlight"]

Answer = TypeVar("Answer")
InFlight = Literal["keep", "wait", "abort"]
"""What happens to requests in flight when new weights come: see `VLLMEngine`."""

SETTLED = 0.01
"""Seconds without a new token after which a paused engine has handed over all it had."""


class Driver:
    """Generation, scores and new weights of an `AsyncLLM`.

    Args:
        engine: the engine, made on this loop.
        in_flight: what happens to requests in flight when new weights come.
    """

    def __init__(self, engine: AsyncLLM, *, in_flight: InFlight) -> None:
        self.engine = engine
        self.processes = list(engine.engine_core.resources.engine_manager.processes)
        self.version = 0
        self.tokens = 0
        """How many have been sampled so far."""
        self.progress = time.monotonic()
        """When something came of it last."""
        self._in_flight = in_flight
        self._kinds = _Kinds(self._return_whole)

    @property
    def context(self) -> int:
        """Most tokens of a prompt and its completion."""
        return int(self.engine.vllm_config.model_config.max_model_len)

    async def start_transfer(self, init_info: Mapping[str, Any]) -> None:
        """Prepare for new weights."""
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        await self.engine.init_weight_transfer_engine(WeightTransferInitRequest(dict(init_info)))

    async def generate(self, call: Call, seed: int) -> list[Completion]:
        """All completions of a call, in order."""
        completions: dict[int, Completion] = {}
        async with aclosing(self.answers(call, seed)) as answers:
            async for place, completion in answers:
                completions[place] = completion
        return [completions[place] for place in range(len(completions))]

    async def answers(self, call: Call, seed: int) -> AsyncGenerator[tuple[int, Completion], None]:
        """The completions of a call as they finish, with their places; `seed` is for requests without one."""
        async with self._kinds.share(call.whole):
            await self.call_workers("rlstab_seed", seed=seed)
            pairs = zip(call.prompts(), call.params(), strict=True)
            work = [self._answer(place, *pair, call) for place, pair in enumerate(pairs)]
            async with aclosing(_as_completed(work)) as finished:
                async for answer in finished:
                    yield answer

    async def _answer(
        self, place: int, prompt: TokensPrompt, params: SamplingParams, call: Call
    ) -> tuple[int, Completion]:
        from vllm.sampling_params import RequestOutputKind

        params.output_kind = RequestOutputKind.DELTA
        completion, called = Completion(), time.perf_counter()
        async for output in self.engine.generate(prompt, params, request_id=uuid.uuid4().hex):
            (chosen,) = output.outputs
            completion.extend(chosen.token_ids, chosen.logprobs, self.version, keeps=call.records_sets)
            self.tokens += len(chosen.token_ids)
            self.progress = time.monotonic()
            if not completion.waited:
                completion.waited = time.perf_counter() - called
            completion.reason, completion.routed = chosen.finish_reason, chosen.routed_experts
        completion.worked = time.perf_counter() - called - completion.waited
        return place, completion

    async def scores(self, sequences: Sequence[Tensor]) -> AsyncGenerator[tuple[int, Tensor], None]:
        """Log-probs of each sequence's tokens but the first as they come, with their places."""
        prompts, params = scoring_call(sequences)
        work = [self._score(place, prompt, params) for place, prompt in enumerate(prompts)]
        async with aclosing(_as_completed(work)) as finished:
            async for answer in finished:
                yield answer

    async def _score(self, place: int, prompt: TokensPrompt, params: SamplingParams) -> tuple[int, Tensor]:
        scores = torch.empty(0)
        async for output in self.engine.generate(prompt, params, request_id=uuid.uuid4().hex):
            if output.prompt_logprobs is not None:
                scores = scores_of(output.prompt_logprobs)
            self.progress = time.monotonic()
        return place, scores

    async def update(self, info: Mapping[str, Any], version: int) -> None:
        """Take new weights and forget what was computed with the old ones."""
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        engine = self.engine
        await engine.pause_generation(mode=self._in_flight)
        before = -1
        while before != self.tokens:  # what is on its way still belongs to the old weights
            before = self.tokens
            await asyncio.sleep(SETTLED)
        await engine.start_weight_update()
        await engine.update_weights(WeightTransferUpdateRequest(dict(info)))
        await engine.finish_weight_update(str(version))
        self.version = version
        await engine.resume_generation()

    async def call_workers(self, method: str, **arguments: Any) -> list[Any]:
        """What a method of the worker extension returns in each worker."""
        answers: list[Any] = await self.engine.collective_rpc(method, kwargs=arguments)
        return answers

    def kill(self) -> None:
        """End its processes at once."""
        for process in self.processes:
            process.kill()

    async def end_reading(self) -> None:
        """End what reads from the core before the core ends, which would be an error to it."""
        reading = self.engine.output_handler
        if reading is not None:
            reading.cancel()
            await asyncio.wait([reading])

    async def _return_whole(self, whole: bool) -> None:
        await self.call_workers("rlstab_whole_log_probs", whole=whole)


class _Kinds:
    """Lets calls of one kind run together; a call of the other kind waits until they have ended."""

    def __init__(self, switch: Callable[[bool], Awaitable[None]]) -> None:
        self._switch = switch
        self._changed = asyncio.Condition()
        self._running = 0
        self._kind = False

    @asynccontextmanager
    async def share(self, kind: bool) -> AsyncIterator[None]:
        async with self._changed:
            await self._changed.wait_for(lambda: not self._running or self._kind == kind)
            if self._kind != kind:
                await self._switch(kind)
                self._kind = kind
            self._running += 1
        try:
            yield
        finally:
            async with self._changed:
                self._running -= 1
                self._changed.notify_all()


async def _as_completed(work: Sequence[Coroutine[Any, Any, Answer]]) -> AsyncGenerator[Answer, None]:
    """Results as they come; if one fails, or nobody wants more, the others are given up."""
    tasks = [asyncio.create_task(one) for one in work]
    try:
        for finished in asyncio.as_completed(tasks):
            yield await finished
    finally:
        for task in tasks:
            task.cancel()
