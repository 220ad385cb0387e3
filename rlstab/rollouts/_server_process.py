"""A server in a process of its own, started and ended from here."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from types import MappingProxyType, TracebackType
from typing import Any, Self, final

import torch

from rlstab.errors import EngineError
from rlstab.rollouts._vllm_follow import leader_environment

__all__ = ["ServerProcess"]

START = "import sys; from rlstab.cli import main; sys.exit(main())"
GRACE = 10.0
"""Seconds that a server is given to end by itself."""


@final
class ServerProcess:
    """`rlstab serve` in a process of this machine, for tests, checks, and trainers that want one of their own.

    Ends with the block, with `close`, or with the process that made it, however that ends. Its log is shown when it
    does not start.

    Args:
        model: folder or name of a checkpoint, with its tokenizer.
        dtype: precision to sample in; that of the checkpoint by default.
        arguments: arguments of vLLM's engine and of its server.
        options: further options of the command, such as `{"patience": 60}`.
        port: port to bind; 0 takes a free one.
        patience: seconds that it may take to start.

    Raises:
        EngineError: if it does not start.

    Example:
        ```python
        with ServerProcess("checkpoint") as server, VLLMServerEngine(model, tokenizer, url=server.url) as engine:
            ...
        ```
    """

    def __init__(
        self,
        model: str,
        *,
        dtype: torch.dtype | None = None,
        arguments: Mapping[str, Any] = MappingProxyType({}),
        options: Mapping[str, object] = MappingProxyType({}),
        port: int = 0,
        patience: float = 600.0,
    ) -> None:
        given = {**options, "port": port, "arguments": json.dumps(dict(arguments))}
        given |= {} if dtype is None else {"dtype": str(dtype).removeprefix("torch.")}
        words = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  # as long as the process
        self.process = subprocess.Popen(
            [sys.executable, "-c", START, "serve", model, *words],
            env={
                **os.environ,
                **leader_environment(),
                "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            },
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        self.url = self._announced(patience)

    def _announced(self, patience: float) -> str:
        lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, args=[lines], name="rlstab-serve", daemon=True).start()
        deadline, line = time.monotonic() + patience, ""
        while not line.startswith("rlstab serve: "):
            try:
                line = lines.get(timeout=max(deadline - time.monotonic(), 0.0))
            except queue.Empty:
                self.close()
                raise EngineError(f"rlstab serve: not ready after {patience:g} s{self._said()}") from None
            if not line:
                self.close()
                raise EngineError(f"rlstab serve: ended with exit code {self.process.returncode}{self._said()}")
        return line.split()[-1]

    def _read(self, lines: queue.Queue[str]) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as output:
            for line in output:
                lines.put(line)
        lines.put("")

    def _said(self) -> str:
        self._log.seek(0)
        text = self._log.read().decode(errors="replace").strip()
        return f"; its log ends with: {text[-2000:]}" if text else ""

    def close(self) -> None:
        """End it, and wait until it has ended."""
        self.process.terminate()
        try:
            self.process.wait(GRACE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
        self._log.close()
