"""`VLLMServerEngine`: samples with servers that `rlstab serve` started, over HTTP."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Sequence
from contextlib import aclosing
from typing import Any, TypeVar, final

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlstab.errors import ConfigError, EngineError
from rlstab.rollouts._adapters import adapted_tensors
from rlstab.rollouts._draw import stream_keys
from rlstab.rollouts._engine import Health
from rlstab.rollouts._loop import LoopThread
from rlstab.rollouts._named import NamedEngine
from rlstab.rollouts._request import Request, Sampling
from rlstab.rollouts._rollout import Rollout
from rlstab.rollouts._server_key import ServerKey
from rlstab.rollouts._server_link import ServerLink
from rlstab.rollouts._server_wire import LostError, MalformedError, Question, Status, call_document, read_scores
from rlstab.rollouts._server_work import Work
from rlstab.rollouts._vllm_calls import check_images
from rlstab.rollouts._vllm_settings import end_of_sequence
from rlstab.rollouts._weight_file import Parcel, WeightFiles, check_shapes, parcel_of
from rlstab.rollouts._weights import ModelWeights, WeightSource, base_model
from rlstab.routing import Routers

__all__ = ["VLLMServerEngine"]

CHUNK = 8
"""Questions that are sent together."""

FIRST_PAUSE, LONGEST_PAUSE = 0.2, 5.0
"""Seconds between two attempts to reach a lost server: they double from the first to the longest."""

WATCH = 0.05
"""Seconds between two looks at who is alive."""

Answer = TypeVar("Answer")
Ask = Callable[[ServerLink, Sequence[int]], AsyncGenerator[tuple[int, Answer], None]]


@final
class VLLMServerEngine(NamedEngine):
    """Samples with one or many servers that `rlstab serve MODEL` started, on this machine or on others.

    Requests are dealt out in small parts to whichever server has room, and come back one by one as they finish. A
    server that dies, hangs, restarts, or answers with what is no answer is left out: what it had finished is kept, the
    rest is sampled again on the others. It is asked again with growing pauses, and is given the present weights when it
    is back. Each death and return is told to the listeners (`engine_died`, `engine_returned`). Answers are checked
    field by field before anything is made of them.

    New weights go to all servers: one that sees the same files maps them, to the others they are uploaded in pieces. Of
    a policy with PEFT's adapters only these travel, as with `VLLMEngine`. The files stay until the next sync, for
    servers that come back. To a server that was started with `--transfer nccl` all weights are sent from GPU to GPU,
    for which the trainer needs vLLM too; otherwise its side needs none.

    With a seed, a request's completion does not depend on which server it was given to. Without one, completions are
    drawn from torch's global generator too, but which numbers a request gets depends on the course of events.

    Args:
        model: the policy, whose weights the servers are given at once.
        tokenizer: names the end-of-sequence token, beside those of the model's generation config.
        url: the address of the server, or several.
        key_file: file with the servers' key; by default it is read from the environment variable `RLSTAB_SERVER_KEY`.
        max_in_flight: most unfinished requests that a server is given.
        upload: upload weights even to servers that see the trainer's files.
        routes: return the experts that every token went to, from servers that were started with `--routes true`.
        silence: seconds without a sign of life after which a server that samples is taken for dead.
        patience: seconds that a sync may take, and that all servers may be dead, before it is an error.
        name: id of the engine in rollouts and events.

    Raises:
        ConfigError: if an address or a number makes no sense, if a server refuses the key, if servers differ, or if
            routes are asked of a dense model or of servers that return none.
        EngineError: if no server answers.

    Example:
        ```python
        engine = VLLMServerEngine(model, tokenizer, url=["http://10.0.0.1:8000", "http://10.0.0.2:8000"])
        rollouts = engine.generate([Request(prompt_ids=ids)], Sampling(max_new_tokens=256))
        ```
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        url: str | Sequence[str],
        key_file: str | os.PathLike[str] | None = None,
        max_in_flight: int = 256,
        upload: bool = False,
        routes: bool = False,
        silence: float = 120.0,
        patience: float = 300.0,
        name: str = "vllm-server",
    ) -> None:
        super().__init__(name)
        urls = [url] if isinstance(url, str) else list(url)
        _check(urls, max_in_flight=max_in_flight, silence=silence, patience=patience)
        self._patience = patience
        self._lanes = max(1, max_in_flight // CHUNK)
        self._chunk = min(CHUNK, max_in_flight)
        self._stop_ids = end_of_sequence(model.generation_config, tokenizer)
        self._vocabulary: int = base_model(model).config.get_text_config().vocab_size
        self._routers = Routers(model) if routes else None
        self._files = WeightFiles()
        self._sent = 0
        self._closed = False
        self._syncing = asyncio.Lock()
        key, session = ServerKey.read(key_file), uuid.uuid4().hex
        self._links = [
            ServerLink(
                one, key, session=session, upload=upload, streams=self._lanes, silence=silence, patience=patience
            )
            for one in urls
        ]
        self._thread = LoopThread(name)
        parcel = parcel_of(ModelWeights(model))
        self._shapes = parcel.shapes
        try:
            self._context, self._dtype = self._wait(self._met(parcel))
        except BaseException:
            self.close()
            raise

    @property
    def shares_weights(self) -> bool:
        """Never: servers have weights of their own."""
        return False

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the weights that it samples with."""
        return self._dtype

    @property
    def returns_routes(self) -> bool:
        """Do its rollouts say which experts every token went to?"""
        return self._routers is not None

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Rollout]:
        """Continue every prompt: see `Engine.generate`.

        Raises:
            ConfigError: if a request has images.
            EngineError: if the engine is closed, if no server answers for longer than the patience, if a prompt leaves
                no room for a completion, if the model's logits are not finite, or if a kept set is larger than what is
                recorded of it.
        """
        return self._wait(self._answered(requests, sampling))

    async def generate_async(self, requests: Sequence[Request], sampling: Sampling) -> list[Rollout]:
        """`generate` for a program with an event loop: see `Engine.generate_async`."""
        return await asyncio.wrap_future(self._thread.submit(self._answered(requests, sampling)))

    def _answered(self, requests: Sequence[Request], sampling: Sampling) -> Coroutine[Any, Any, list[Rollout]]:
        self._check_usable()
        check_images("VLLMServerEngine", requests)
        stop_ids = self._stop_ids if sampling.stop_ids is None else sampling.stop_ids
        sampling = dataclasses.replace(sampling, stop_ids=tuple(stop_ids))
        return self._deal(len(requests), self._completions(requests, sampling))

    def score(self, sequences: Sequence[Tensor]) -> list[Tensor]:
        """Log-probs of given tokens: see `Engine.score`."""
        self._check_usable()
        return self._wait(self._deal(len(sequences), _scores(sequences)))

    def sync_weights(self, source: WeightSource, version: int) -> None:
        """Send the weights of `source` to every server that answers.

        Raises:
            WeightSyncError: if the version is older than the present one, or if names or shapes differ.
            EngineError: if the engine is closed, or if no server takes them.
        """
        self._check_usable()
        self._check_version(version)
        parcel = parcel_of(source)
        check_shapes(self._name, self._shapes, parcel.shapes)
        self._wait(self._send(parcel, version))
        self._version = version

    def health(self) -> Health:
        """The state of the engine."""
        alive = not self._closed and any(link.alive for link in self._links)
        detail = "closed" if self._closed else self._lost
        return Health(alive=alive, engine=self._name, weight_version=self._version, detail=detail)

    def close(self) -> None:
        """End the connections; the servers run on."""
        if not self._closed:
            self._closed = True
            self._wait(self._hung_up())
            self._thread.close()
            self._files.clear()

    @property
    def _lost(self) -> str:
        """The servers that are lost, and why."""
        return "; ".join(f"{link.url}: {link.cause}" for link in self._links if not link.alive)

    def _check_usable(self) -> None:
        if self._closed:
            raise EngineError(f"{self._name}: the engine is closed; make a new one")

    def _wait(self, work: Coroutine[Any, Any, Answer]) -> Answer:
        return self._thread.submit(work).result()

    async def _hung_up(self) -> None:
        await asyncio.gather(*(link.close() for link in self._links))

    async def _met(self, parcel: Parcel) -> tuple[int, torch.dtype]:
        """Send the first weights; what the servers can take, and in which precision they sample."""
        await self._send(parcel, 0)
        found: list[Status] = [await link.status() for link in self._links if link.alive]
        dtypes = {status.dtype for status in found}
        if len(dtypes) > 1:
            raise ConfigError(f"{self._name}: servers sample in {', '.join(sorted(dtypes))}; expected one precision")
        if self.returns_routes and not all(status.routes for status in found):
            raise ConfigError(f"{self._name}: routes=True with a server that returns none; start it with --routes true")
        return min(status.context for status in found), vars(torch)[dtypes.pop()]

    async def _send(self, parcel: Parcel, version: int) -> None:
        async with self._syncing:
            self._sent = version
            met = await asyncio.gather(*map(self._meet, self._links))
            if any(status is None or status.transfer == "file" for status in met):
                await asyncio.to_thread(self._files.write, parcel)
            pairs = zip(self._links, met, strict=True)
            given = await asyncio.gather(
                *(self._give(link, status, parcel) for link, status in pairs if status), return_exceptions=True
            )
        for outcome in given:
            if outcome is not None:
                raise outcome
        await self._while_some_live(self._one_alive())

    async def _meet(self, link: ServerLink) -> Status | None:
        try:
            return await link.status()
        except LostError as lost:
            self._lose(link, lost, requests=0)
            return None

    async def _one_alive(self) -> None:
        while not any(link.alive for link in self._links):
            await asyncio.sleep(WATCH)

    async def _give(self, link: ServerLink, status: Status, parcel: Parcel) -> None:
        """Send the present weights to one server; it is lost if it does not take them."""
        try:
            if status.transfer == "nccl":
                tensors = dict(adapted_tensors(parcel.base.items(), parcel.changes or {}))
                await link.broadcast_weights(self._sent, tensors, status)
            else:
                await link.send_weights(self._sent, self._files.paths)
        except LostError as lost:
            self._lose(link, lost, requests=0)
        else:
            link.trust()
            self._find(link)

    def _find(self, link: ServerLink) -> None:
        if link.find():
            self._tell("engine_returned", engine=self._name, worker=link.url, version=self._sent)

    def _lose(self, link: ServerLink, lost: LostError, *, requests: int) -> None:
        if link.lose(lost):
            self._tell("engine_died", engine=self._name, worker=link.url, cause=link.cause, requests=requests)

    async def _deal(self, count: int, ask: Ask[Answer]) -> list[Answer]:
        """Ask the servers until all questions are answered."""
        work: Work[Answer] = Work(count)
        lanes = [self._lane(link, work, ask) for _ in range(self._lanes) for link in self._links]  # each its share
        await self._while_some_live(work.ended(), *lanes)
        return work.answers()

    async def _lane(self, link: ServerLink, work: Work[Answer], ask: Ask[Answer]) -> None:
        """Ask one server for one part after the other, while it lives."""
        while True:
            await link.back.wait()
            places = await work.take(self._chunk)
            if not link.alive:
                work.give_back(places)
                continue
            lost: LostError | None = None
            try:
                async with aclosing(ask(link, places)) as answers:
                    async for place, answer in answers:
                        work.note(place, answer)
                        link.trust()
            except LostError as error:
                lost = error
            finally:
                unanswered = work.give_back(places)
            if lost or unanswered:
                self._lose(link, lost or LostError("ended its answer early"), requests=unanswered)

    async def _while_some_live(self, end: Awaitable[object], *work: Awaitable[object]) -> None:
        """Work until the end, and meanwhile wait for lost servers to come back; as long as there is one left."""
        main = asyncio.ensure_future(end)
        others = [asyncio.ensure_future(one) for one in (*work, *map(self._revive, self._links), self._watch())]
        pending: set[asyncio.Future[Any]] = {main, *others}
        try:
            while not main.done():
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
        finally:
            for task in (main, *others):
                task.cancel()
            await asyncio.gather(main, *others, return_exceptions=True)

    async def _watch(self) -> None:
        """End when no server has been alive for longer than the patience, or none can be hoped for."""
        seen = time.monotonic()
        while True:
            if any(link.alive for link in self._links):
                seen = time.monotonic()
            elif time.monotonic() - seen > self._patience or all(link.hopeless for link in self._links):
                raise EngineError(f"{self._name}: no server is left ({self._lost}); start them anew: `rlstab serve`")
            await asyncio.sleep(WATCH)

    async def _revive(self, link: ServerLink) -> None:
        """Ask a lost server again with growing pauses, and give it the present weights if it has others."""
        pause = FIRST_PAUSE
        while True:
            await asyncio.sleep(pause)
            if link.alive or link.hopeless:
                pause = FIRST_PAUSE
                continue
            pause = min(2 * pause, LONGEST_PAUSE)
            async with self._syncing:
                await self._welcome(link)

    async def _welcome(self, link: ServerLink) -> None:
        if link.alive:
            return
        try:
            status = await link.status()
            if not link.has_weights(status, self._sent):
                if status.transfer == "nccl":
                    raise LostError("is back, and gets its weights at the next sync")
                await link.send_weights(self._sent, self._files.paths)
        except LostError as lost:
            link.lose(lost)
        else:
            self._find(link)

    def _completions(self, requests: Sequence[Request], sampling: Sampling) -> Ask[Rollout]:
        """How to ask for completions."""
        seed = int(torch.randint(2**62, ()))
        documents = call_document(requests, sampling)
        questions = [self._question(request, sampling) for request in requests]
        settings = dataclasses.asdict(sampling)

        async def ask(link: ServerLink, places: Sequence[int]) -> AsyncGenerator[tuple[int, Rollout], None]:
            document = {
                "requests": [documents[place] for place in places],
                "sampling": settings,
                "routes": self.returns_routes,
                "seed": int(stream_keys(torch.tensor([seed]), torch.tensor([places[0]]))) % 2**62,
            }
            largest = max(questions[place].largest for place in places)
            async with aclosing(_answers(link, "generate", document, places, largest)) as answers:
                async for place, answer in answers:
                    yield place, questions[place].answer(answer, newest=self._sent, engine=self._name)

        return ask

    def _question(self, request: Request, sampling: Sampling) -> Question:
        room = self._context - len(request.prompt_ids)
        if room < 1:
            raise EngineError(
                f"{self._name}: a prompt of {len(request.prompt_ids)} tokens leaves no room for a completion; expected "
                f"less than max_model_len={self._context}: raise max_model_len, or shorten the prompts"
            )
        limit = min(room, sampling.max_new_tokens, request.max_new_tokens or sampling.max_new_tokens)
        return Question(
            request=request, sampling=sampling, vocabulary=self._vocabulary, limit=limit, routers=self._routers
        )


def _scores(sequences: Sequence[Tensor]) -> Ask[Tensor]:
    """How to ask for scores."""

    async def ask(link: ServerLink, places: Sequence[int]) -> AsyncGenerator[tuple[int, Tensor], None]:
        document = {"sequences": [sequences[place].tolist() for place in places]}
        largest = 4096 + 64 * max(len(sequences[place]) for place in places)
        async for place, answer in _answers(link, "score", document, places, largest):
            yield place, read_scores(answer, len(sequences[place]))

    return ask


async def _answers(
    link: ServerLink, route: str, document: dict[str, Any], places: Sequence[int], largest: int
) -> AsyncGenerator[tuple[int, dict[str, Any]], None]:
    """The answers of a server, with the places of the questions in the whole call."""
    async with aclosing(link.stream(route, document, largest=largest)) as lines:
        async for line in lines:
            place = line.pop("place", None)
            if type(place) is not int or not 0 <= place < len(places):
                raise MalformedError(f"an answer to question {place!r} of {len(places)}")
            yield places[place], line


def _check(urls: Sequence[str], **numbers: float) -> None:
    for name, value in numbers.items():
        if not value > 0:
            raise ConfigError(f"VLLMServerEngine: {name} {value}; expected a number above 0")
    if not urls or len(set(urls)) < len(urls):
        raise ConfigError(f"VLLMServerEngine: {len(urls)} urls; expected one or several that differ")
