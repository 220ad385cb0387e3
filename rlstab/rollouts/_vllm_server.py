"""The routes of a server: completions as they finish, scores, and new weights."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing, nullcontext
from itertools import groupby
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qsl

import torch

from rlstab.errors import ConfigError, EngineError
from rlstab.rollouts._server_key import Receive, Scope, Send
from rlstab.rollouts._server_wire import PROTOCOL, Status, decoded, encoded, read_call, route_text
from rlstab.rollouts._vllm_calls import Call, Completion, Limits
from rlstab.rollouts._vllm_driver import Driver
from rlstab.rollouts._vllm_routes import RouteStream

__all__ = ["ServerRoutes", "WeightTransfer"]

BEAT = 1.0
"""Seconds between two signs of life while completions are under way."""

LARGEST = 64 << 20
"""Most bytes of a request."""

WeightTransfer = Literal["file", "nccl"]
"""How a server takes new weights: see `ServerSettings`."""

Document = dict[str, Any]
Lines = AsyncGenerator[Document, None]


class RefusedError(EngineError):
    """A request that is answered with a status of HTTP."""

    def __init__(self, status: int, **document: object) -> None:
        super().__init__(str(document))
        self.status = status
        self.document = document


class ServerRoutes:
    """An ASGI application around a running vLLM.

    Args:
        driver: vLLM.
        limits: what it can take.
        folder: where uploaded weights go.
        transfer: how weights come.
        patience: seconds without a token, or for an update of weights, after which vLLM is taken for dead.
        experts: reads the experts that tokens went to, if they are returned.
    """

    def __init__(
        self,
        driver: Driver,
        limits: Limits,
        *,
        folder: Path,
        transfer: WeightTransfer,
        patience: float,
        experts: RouteStream | None,
    ) -> None:
        self._experts = experts
        self._transfer = transfer
        self._driver = driver
        self._limits = limits
        self._folder = folder
        self._patience = patience
        self._session = ""
        self._begun = False
        self._streams = 0
        self._updating = asyncio.Lock()

    @property
    def fault(self) -> str:
        """What is wrong, or ""."""
        if self._begun and not self._updating.locked():
            return "has a part of its new weights only, as an update failed"
        if self._driver.engine.errored:
            return "its core has died"
        silent = time.monotonic() - self._driver.progress
        if self._streams and not self._updating.locked() and silent > self._patience:
            return f"its core gave no sign of life for {self._patience:g} s"
        return ""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        routes: dict[tuple[str, str], Callable[[bytes, Scope], Awaitable[Document | Lines]]] = {
            ("GET", "status"): self._status,
            ("POST", "generate"): self._generate,
            ("POST", "score"): self._score,
            ("POST", "weights"): self._weights,
            ("POST", "transfer"): self._join,
            ("PUT", "files"): self._file,
        }
        name, _, rest = scope["path"].rpartition("/rlstab/")[2].partition("/")
        scope["rlstab.file"] = rest
        try:
            route = routes.get((scope["method"], name))
            if route is None:
                raise RefusedError(404, error="no such route")
            answer = await route(await _body(receive), scope)
        except RefusedError as refused:
            await _respond(send, refused.status, encoded(refused.document))
        except ConfigError as mistake:
            await _respond(send, 422, encoded({"error": str(mistake)}))
        else:
            if isinstance(answer, dict):
                await _respond(send, 200, encoded(answer))
            else:
                await self._stream(answer, receive, send)

    async def _status(self, body: bytes, scope: Scope) -> Document:
        config = self._driver.engine.vllm_config
        return vars(
            Status(
                protocol=PROTOCOL,
                session=self._session,
                weight_version=self._driver.version,
                context=self._limits.context,
                dtype=str(config.model_config.dtype).removeprefix("torch."),
                workers=config.parallel_config.world_size,
                transfer=self._transfer,
                routes=self._experts is not None,
                fault=self.fault,
            )
        )

    async def _generate(self, body: bytes, scope: Scope) -> Lines:
        document = self._opened(body)
        requests, sampling = read_call(document)
        if document["routes"] and self._experts is None:
            raise ConfigError("routes are asked for, which this server does not return; start it with --routes true")
        experts = self._experts if document["routes"] else None
        return self._completions(Call(requests, sampling, (), self._limits), int(document["seed"]), experts)

    async def _completions(self, call: Call, seed: int, experts: RouteStream | None) -> Lines:
        reading = nullcontext() if experts is None else experts.reading(call)
        async with reading as routes_of, aclosing(self._driver.answers(call, seed)) as answers:
            async for place, completion in answers:
                routes = None if routes_of is None else await routes_of(place, completion)
                yield {"place": place, **_answer(completion, call), "routes": route_text(routes)}

    async def _score(self, body: bytes, scope: Scope) -> Lines:
        document = self._opened(body)
        return self._scores([torch.tensor(ids) for ids in document["sequences"]])

    async def _scores(self, sequences: list[torch.Tensor]) -> Lines:
        async with aclosing(self._driver.scores(sequences)) as answers:
            async for place, scores in answers:
                yield {"place": place, "scores": scores.tolist()}

    def _opened(self, body: bytes) -> Document:
        """The document of a request from the engine whose weights are here."""
        document: Document = _read(body)
        if fault := self.fault:
            raise RefusedError(503, error=f"vLLM: {fault}")
        if document.get("session") != self._session:
            raise RefusedError(409, error="the server has other weights: it was restarted, or serves another trainer")
        return document

    async def _stream(self, lines: Lines, receive: Receive, send: Send) -> None:
        """Send lines as they come, and blank ones while there is progress; stop when nobody listens any more."""
        headers = [(b"content-type", b"application/x-ndjson")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        if not self._streams:
            self._driver.progress = time.monotonic()
        self._streams += 1
        tasks = [asyncio.ensure_future(work) for work in (_poured(lines, send), _left(receive), self._beats(send))]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._streams -= 1
            for task in tasks:
                task.cancel()
            ended = await asyncio.gather(*tasks, return_exceptions=True)
        for outcome in ended:
            if isinstance(outcome, Exception):
                raise outcome
        await send({"type": "http.response.body", "body": b""})

    async def _beats(self, send: Send) -> None:
        seen = 0.0
        while True:
            await asyncio.sleep(BEAT)
            if self._driver.progress > seen or self._updating.locked():
                seen = self._driver.progress
                await send({"type": "http.response.body", "body": b"\n", "more_body": True})

    async def _file(self, body: bytes, scope: Scope) -> Document:
        """Append a piece to an uploaded file."""
        name = scope["rlstab.file"]
        if not re.fullmatch(r"[\w-]{1,128}", name):
            raise RefusedError(404, error="no such file")
        path = self._folder / name
        size = path.stat().st_size if path.exists() else 0
        if dict(parse_qsl(scope["query_string"].decode())).get("offset") != str(size):
            raise RefusedError(409, size=size)
        await asyncio.to_thread(_append, path, body)
        return {"size": size + len(body)}

    async def _join(self, body: bytes, scope: Scope) -> Document:
        """Form a group of NCCL with the trainer."""
        await asyncio.wait_for(self._driver.start_transfer(_read(body)["init_info"]), self._patience)
        return {}

    async def _weights(self, body: bytes, scope: Scope) -> Document:
        """Take weights: from files, or as they are broadcast."""
        document = _read(body)
        files: Mapping[str, Mapping[str, Any]] = document.get("files", {})
        places = {kind: self._found(file) for kind, file in files.items()}
        if missing := [kind for kind, place in places.items() if place is None]:
            raise RefusedError(409, missing=missing)
        info = document.get("info") or {"paths": {kind: str(place) for kind, place in places.items()}}
        async with self._updating:
            self._session = str(document["session"])
            self._begun = True
            await asyncio.wait_for(self._driver.update(info, int(document["version"])), self._patience)
            self._begun = False
        kept = {file["name"] for file in files.values()}
        for path in self._folder.iterdir():
            if path.name not in kept:
                path.unlink()
        return {"version": self._driver.version}

    def _found(self, file: Mapping[str, Any]) -> Path | None:
        """Where the file is: at its own path, if this machine sees it, or among the uploaded."""
        for path in (Path(file["path"]), self._folder / Path(file["name"]).name):
            if path.is_file() and path.stat().st_size == file["size"]:
                return path
        return None


def _answer(completion: Completion, call: Call) -> Document:
    if call.records_sets:
        call.check_sets(completion)
    return {
        "token_ids": completion.token_ids,
        "logprobs": completion.logprobs,
        "versions": [[version, len(list(run))] for version, run in groupby(completion.versions)],
        "reason": completion.reason,
        "waited": completion.waited,
        "worked": completion.worked,
        "kept": [kept.tolist() for kept in completion.kept] if call.records_sets else None,
    }


def _read(body: bytes) -> Document:
    document = decoded(body)
    if not isinstance(document, dict):
        raise RefusedError(422, error="expected an object")
    return document


def _append(path: Path, body: bytes) -> None:
    with path.open("ab") as file:
        file.write(body)


async def _body(receive: Receive) -> bytes:
    pieces, size, more = [], 0, True
    while more:
        message = await receive()
        piece = message.get("body", b"")
        size += len(piece)
        if size > LARGEST:
            raise RefusedError(413, error=f"a request of more than {LARGEST} bytes")
        pieces.append(piece)
        more = message.get("more_body", False)
    return b"".join(pieces)


async def _respond(send: Send, status: int, body: bytes) -> None:
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _poured(lines: Lines, send: Send) -> None:
    from vllm.v1.engine.exceptions import EngineDeadError

    async with aclosing(lines):
        try:
            async for line in lines:
                await send({"type": "http.response.body", "body": encoded(line), "more_body": True})
        except (EngineError, ConfigError, ValueError) as mistake:
            last = encoded({"error": str(mistake)})
            await send({"type": "http.response.body", "body": last, "more_body": True})
        except EngineDeadError:
            return  # the stream ends early, as that of a server that was killed


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
