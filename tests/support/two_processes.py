"""Processes forked off that of the tests, which has imported what they need; two of them meet through gloo."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from torch.multiprocessing.spawn import start_processes

__all__ = ["PROCESSES", "in_two_processes"]

SECONDS = 240
# A process with threads for GPUs cannot be forked.
PROCESSES = get_context("spawn") if torch.cuda.is_available() else get_context("fork")


def in_two_processes(work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `work(*arguments)` returns in each, with the environment that a launcher makes."""
    store = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
    with tempfile.TemporaryDirectory() as folder:
        given = store.port, Path(folder), work, arguments
        both = start_processes(_as_rank, given, nprocs=2, join=False, start_method=PROCESSES.get_start_method())
        deadline = time.monotonic() + SECONDS
        try:
            while not both.join(deadline - time.monotonic()):
                assert time.monotonic() < deadline, f"the two processes have not ended within {SECONDS} s"
        finally:
            for process in both.processes:
                process.kill()
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(2)]


def _as_rank(rank: int, port: int, folder: Path, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.environ.update(RANK=f"{rank}", LOCAL_RANK=f"{rank}", WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=f"{port}", TORCHELASTIC_USE_AGENT_STORE="True")
    torch.set_num_threads(1)
    torch.save(work(*arguments), folder / f"{rank}.pt")
    if distributed.is_initialized():
        distributed.destroy_process_group()
