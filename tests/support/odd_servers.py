"""Servers that do not do what they should: plain HTTP, with scripted answers."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

__all__ = ["OddServer", "good_answer"]

Line = dict[str, Any] | bytes


def good_answer(place: int = 0, size: int = 3) -> dict[str, Any]:
    """An answer that nothing is wrong with."""
    return {
        "place": place,
        "token_ids": [5] * size,
        "logprobs": [-0.5] * size,
        "versions": [[0, size]],
        "reason": "length",
        "waited": 0.1,
        "worked": 0.2,
        "kept": None,
        "routes": None,
    }


def encoded(line: dict[str, Any]) -> bytes:
    return json.dumps(line).encode() + b"\n"


class OddServer:
    """Takes weights, and answers a call of `generate` with the lines that it is told to.

    Args:
        lines: what to answer to the document of a call.
        status: what it says of itself instead.
        code: status of HTTP that it answers everything with.
        pause: seconds until it answers a call.
    """

    def __init__(
        self,
        lines: Callable[[dict[str, Any]], list[Line]] = lambda document: [],
        *,
        status: dict[str, Any] | None = None,
        code: int = 200,
        pause: float = 0.0,
    ) -> None:
        self.calls: list[dict[str, Any]] = []
        session = ""
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                found = {
                    "protocol": 2,
                    "session": session,
                    "weight_version": 0,
                    "context": 256,
                    "dtype": "float32",
                    "workers": 1,
                    "transfer": "file",
                    "routes": True,
                    "fault": "",
                }
                self.answer(json.dumps(found | (status or {})).encode())

            def do_POST(self) -> None:
                nonlocal session
                document = json.loads(self.rfile.read(int(self.headers["content-length"])))
                if self.path.endswith("/weights"):
                    session = document["session"]
                    self.answer(b'{"version":0}')
                    return
                outer.calls.append(document)
                time.sleep(pause)
                self.answer(b"".join(one if isinstance(one, bytes) else encoded(one) for one in lines(document)))

            def answer(self, body: bytes) -> None:
                self.send_response(code)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                with suppress(BrokenPipeError):  # nobody waits any more
                    self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()
