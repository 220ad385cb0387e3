"""One server as `VLLMServerEngine` sees it: HTTP, its time limits, and what counts as its death."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
from torch import Tensor

from rlstab.errors import ConfigError, EngineError
from rlstab.rollouts._server_key import ServerKey
from rlstab.rollouts._server_wire import PROTOCOL, LostError, MalformedError, Status, decoded, encoded
from rlstab.rollouts._vllm_nccl import Broadcast

__all__ = ["ServerLink"]

PIECE = 8 << 20
"""Bytes of a file that are uploaded at a time."""

LARGEST_DOCUMENT = 1 << 16
"""Most bytes of an answer that is no stream."""

ATTEMPTS = 5
"""How often it may be lost without an answer in between until it is given up."""

CONNECT = 5.0
"""Seconds for a connection."""


class ServerLink:
    """Talks to one server.

    Args:
        url: its address.
        key: what it asks for.
        session: names the engine whose weights it should have.
        upload: whether weights are uploaded even if it sees their files.
        silence: seconds without a sign of life after which it is taken for dead while it samples.
        patience: seconds that it may take over new weights.
        streams: most connections at a time.
    """

    def __init__(
        self,
        url: str,
        key: ServerKey | None,
        *,
        session: str,
        upload: bool,
        silence: float,
        patience: float,
        streams: int,
    ) -> None:
        self.url = _checked(url, key)
        self._session = session
        self._upload_always = upload
        self._client = httpx.AsyncClient(
            base_url=f"{self.url}/rlstab/",
            headers={} if key is None else {"Authorization": key.header},
            timeout=httpx.Timeout(silence, connect=min(CONNECT, silence)),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=streams + 2),
            trust_env=False,  # no proxies, and no passwords of ~/.netrc
            verify=ssl.create_default_context(),
        )
        self._weights = httpx.Timeout(patience, connect=min(CONNECT, patience))
        self.alive = False
        self.cause = "it has not been asked yet"
        self.hopeless = False
        """Does it answer with what is no answer, or never to the end? Then it is left out until the next sync."""
        self.back = asyncio.Event()
        self._deaths = 0
        self._group: Broadcast | None = None

    def lose(self, cause: LostError) -> bool:
        """Note that it is lost; was it alive?"""
        was_alive, self.alive = self.alive, False
        self._deaths += was_alive
        self.cause = str(cause)
        self.hopeless = isinstance(cause, MalformedError) or self._deaths >= ATTEMPTS
        self.back.clear()
        return was_alive

    def find(self) -> bool:
        """Note that it is there, with the weights that it should have; was it lost before?"""
        was_lost = not self.alive
        self.alive, self.cause, self.hopeless = True, "", False
        self.back.set()
        return was_lost

    def trust(self) -> None:
        """Note that it has done what it was asked."""
        self._deaths = 0

    async def status(self) -> Status:
        """What it says of itself.

        Raises:
            LostError: if it does not answer, or is not well.
        """
        status = Status.read(await self._document("GET", "status"))
        if status.protocol != PROTOCOL:
            raise MalformedError(
                f"speaks version {status.protocol} of the protocol, expected {PROTOCOL}: start the server "
                "with the trainer's version of rlstab"
            )
        if status.fault:
            raise LostError(f"vLLM {status.fault}")
        return status

    def has_weights(self, status: Status, version: int) -> bool:
        """Are its weights those that this engine sent last?

        Raises:
            MalformedError: if they are another engine's.
        """
        if status.session not in ("", self._session):
            raise MalformedError("took the weights of another trainer; start a server for each")
        return status.session == self._session and status.weight_version == version

    async def stream(
        self, route: str, document: Mapping[str, Any], *, largest: int
    ) -> AsyncGenerator[dict[str, Any], None]:
        """The lines of an answer as they come.

        Args:
            route: what to ask.
            document: the question.
            largest: most bytes of a line.

        Raises:
            LostError: if it dies, hangs, or has other weights.
            EngineError: if it refuses.
        """
        body = encoded({"session": self._session, **document})
        try:
            async with self._client.stream("POST", route, content=body) as response:
                await self._check(response)
                async with aclosing(_lines(response, largest)) as lines:
                    async for line in lines:
                        found = decoded(line)
                        if not isinstance(found, dict):
                            raise MalformedError("a line that is no object")
                        if "error" in found:
                            raise EngineError(f"{self.url}: {found['error']}")
                        yield found
        except httpx.HTTPError as error:
            raise self._lost(error) from error

    async def send_weights(self, version: int, files: Mapping[str, Path]) -> None:
        """Have it take weights: from the files themselves if it sees them, otherwise uploaded in pieces.

        Raises:
            LostError: if it dies or hangs.
        """
        described = {
            kind: {
                "path": "" if self._upload_always else str(path),
                "name": path.parent.name,
                "size": path.stat().st_size,
            }
            for kind, path in files.items()
        }
        document = {"session": self._session, "version": version, "files": described}
        missing = (await self._document("POST", "weights", document, conflict=True)).get("missing")
        if missing is None:
            return
        if not isinstance(missing, list) or not set(missing) <= set(files):
            raise MalformedError("asks for files that there are not")
        for kind in missing:
            await self._upload(files[kind])
        again = await self._document("POST", "weights", document, conflict=True)
        if "missing" in again:
            raise LostError("lost the weights that it was sent")

    async def broadcast_weights(self, version: int, tensors: Mapping[str, Tensor], status: Status) -> None:
        """Have it take weights over NCCL.

        Raises:
            ConfigError: if this process cannot take part.
            LostError: if it dies or hangs; the group of processes is formed anew then.
        """
        if status.session != self._session:
            self._group = None  # of another process at this address, or of none
        loop = asyncio.get_running_loop()

        def post(route: str, document: Mapping[str, Any]) -> dict[str, Any]:
            asked = self._document("POST", route, {"session": self._session, **document})
            return asyncio.run_coroutine_threadsafe(asked, loop).result()

        def send() -> None:
            if self._group is None:
                self._group = Broadcast(self.url, workers=status.workers, post=post)
            self._group.send(tensors, version)

        try:
            await asyncio.wait_for(asyncio.to_thread(send), self._weights.read)
        except TimeoutError as error:
            self._group = None
            raise LostError("took too long over its weights") from error
        except RuntimeError as error:
            self._group = None
            raise error if isinstance(error, EngineError) else LostError(f"NCCL failed: {error}") from error

    async def _upload(self, path: Path) -> None:
        offset, size = 0, path.stat().st_size
        with path.open("rb") as file:
            while offset < size:
                piece = await asyncio.to_thread(file.read, PIECE)
                answer = await self._document(
                    "PUT", f"files/{path.parent.name}", piece, query={"offset": offset}, conflict=True
                )
                if type(answer.get("size")) is not int or not 0 <= answer["size"] <= size:
                    raise MalformedError(f"has {answer.get('size')!r} bytes of a file of {size}")
                offset = answer["size"]
                file.seek(offset)

    async def _document(
        self,
        method: str,
        route: str,
        content: Mapping[str, Any] | bytes = b"",
        *,
        query: Mapping[str, int] | None = None,
        conflict: bool = False,
    ) -> dict[str, Any]:
        """A short answer; `conflict`: one that says what is missing is an answer too."""
        body = content if isinstance(content, bytes) else encoded(content)
        try:
            timeout = self._weights if method == "POST" else self._client.timeout
            async with self._client.stream(method, route, content=body, params=query, timeout=timeout) as response:
                if not (conflict and response.status_code == httpx.codes.CONFLICT):
                    await self._check(response)
                text = await _read(response)
        except httpx.HTTPError as error:
            raise self._lost(error) from error
        found = decoded(text)
        if not isinstance(found, dict):
            raise MalformedError("an answer that is no object")
        return found

    async def _check(self, response: httpx.Response) -> None:
        code = response.status_code
        if code == httpx.codes.OK:
            return
        if code in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
            raise ConfigError(f"{self.url}: the server refuses the key, or asks for one: set it for both sides alike")
        text = (await _read(response)).decode(errors="replace").strip()[:200]
        if code in (httpx.codes.UNPROCESSABLE_ENTITY, httpx.codes.REQUEST_ENTITY_TOO_LARGE):
            raise EngineError(f"{self.url}: {text}")
        raise LostError(f"status {code}: {text}")

    def _lost(self, error: httpx.HTTPError) -> LostError:
        if isinstance(error, httpx.ReadTimeout):
            return LostError("gave no sign of life for too long")
        return LostError(f"{type(error).__name__}{': ' if str(error) else ''}{error}")

    async def close(self) -> None:
        """End its connections."""
        await self._client.aclose()


def _checked(url: str, key: ServerKey | None) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query or parts.fragment:
        raise ConfigError(
            "VLLMServerEngine: a url is not an address of a server; expected http://HOST:PORT without name, password "
            "and query (the key stands in the environment or in a file)"
        )
    return url.rstrip("/")


async def _lines(response: httpx.Response, largest: int) -> AsyncGenerator[bytes, None]:
    rest = b""
    async for piece in response.aiter_raw():
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if len(line) > largest:
                raise MalformedError(f"an answer of {len(line)} bytes; expected at most {largest}")
            if line:
                yield line
        if len(rest) > largest:
            raise MalformedError(f"an answer of more than {largest} bytes")


async def _read(response: httpx.Response) -> bytes:
    text = b""
    async for piece in response.aiter_raw():
        text += piece
        if len(text) > LARGEST_DOCUMENT:
            raise MalformedError(f"an answer of more than {LARGEST_DOCUMENT} bytes")
    return text
