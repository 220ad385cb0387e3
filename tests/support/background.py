"""What goes on beside a test: work on another thread, and processes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

import psutil

from rlstab.errors import EngineError

__all__ = ["InBackground", "family_of", "gone", "runs"]


class InBackground(threading.Thread):
    """Work on another thread, which begins at once: its result, or the error of its engine."""

    def __init__(self, work: Callable[[], Any]) -> None:
        super().__init__()
        self._work = work
        self.result: Any = None
        self.error: EngineError | None = None
        self.start()

    def run(self) -> None:
        try:
            self.result = self._work()
        except EngineError as error:
            self.error = error


def family_of(process: int) -> list[psutil.Process]:
    """A process, its children, theirs, and so on."""
    parent = psutil.Process(process)
    return [parent, *parent.children(recursive=True)]


def runs(process: psutil.Process) -> bool:
    """Is it there, and not merely waiting to be buried?"""
    with suppress(psutil.NoSuchProcess):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False


def gone(processes: Iterable[psutil.Process], within: float = 30.0) -> bool:
    """Have all of them ended, after some seconds at most?"""
    deadline = time.monotonic() + within
    while any(map(runs, processes)):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True
