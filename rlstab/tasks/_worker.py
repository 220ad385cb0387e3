"""A function in a process of its own: it may be called from any thread, and is stopped when it takes too long."""

import atexit
import os
import subprocess
import sys
import threading
from functools import cache
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

from rlstab.errors import RewardError

__all__ = ["LateError", "Worker", "worker"]

MAIN = Path(__file__).with_name("_worker_main.py")
MIB = 2**20
START_SECONDS = 120.0


class LateError(RewardError):
    """A call that was not answered in time."""


class Worker:
    """Calls a function in another process, which is started when it is needed, also after it had to be killed.

    A library that guards its time by signals does not work in threads, and a thread cannot be stopped; a process can.

    Args:
        target: file, or import path, of the function's module.
        name: the function's name in it.
        memory: most address space of the process, in MiB; None for no limit.
    """

    def __init__(self, target: str, name: str, *, memory: int | None) -> None:
        self._target = target
        self._name = name
        self._memory = None if memory is None else memory * MIB
        self._lock = threading.Lock()
        self._owner = 0
        self._process: subprocess.Popen[bytes]
        self._connection: Connection
        self._running = False
        atexit.register(self.stop)

    def call(self, *arguments: Any, timeout: float, **columns: Any) -> Any:
        """The function's result.

        Args:
            arguments: what the function is called with; it must be picklable.
            timeout: seconds that the call may take.
            columns: keyword arguments, likewise.

        Raises:
            LateError: if it takes longer.
            RewardError: if it raises, cannot be loaded, or its process dies.
        """
        with self._lock:
            if not self._running or self._owner != os.getpid():
                self._start()
            self._connection.send((arguments, columns))
            succeeded, result = self._answer(timeout)
        if not succeeded:
            raise RewardError(f"{self._name}: {result}")
        return result

    def stop(self) -> None:
        """Kill the process, if it runs and is one's own."""
        if self._running and self._owner == os.getpid():
            self._running = False
            self._process.kill()
            self._process.wait()
            self._connection.close()

    def _start(self) -> None:
        self._connection, other_end = Pipe()
        self._process = subprocess.Popen(
            [sys.executable, str(MAIN), str(other_end.fileno())],
            pass_fds=[other_end.fileno()],
            stdin=subprocess.DEVNULL,
        )
        other_end.close()
        self._owner, self._running = os.getpid(), True
        self._connection.send((sys.path, self._target, self._name, self._memory))
        self._answer(START_SECONDS)

    def _answer(self, timeout: float) -> Any:
        if not self._connection.poll(timeout):
            self.stop()
            raise LateError(f"{self._name}: no answer within {timeout:g} s")
        try:
            return self._connection.recv()
        except (EOFError, ConnectionError) as error:
            self.stop()
            raise RewardError(f"{self._name}: its process died") from error


@cache
def worker(target: str, name: str, *, memory: int | None = None) -> Worker:
    """The worker of a function, one for each set of arguments."""
    return Worker(target, name, memory=memory)
