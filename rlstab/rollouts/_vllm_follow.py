"""Has vLLM's processes, and servers, end with the process that drives them, however that ends, while they start too."""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
from contextlib import suppress
from pathlib import Path

__all__ = ["follow_leader", "leader_environment"]

LEADER = "RLSTAB_LEADER"
"""Environment variable that names the machine, the process namespace and the process that vLLM is driven from."""


def leader_environment() -> dict[str, str]:
    """What a process has to find in its environment to end with this one."""
    return {LEADER: f"{_here()} {os.getpid()}"} if sys.platform == "linux" else {}


def follow_leader() -> None:
    """End with the process that the environment names, if it names one of this machine.

    The name is taken out of the environment: it is not meant for processes that this one starts.
    """
    here, _, leader = os.environ.pop(LEADER, "").rpartition(" ")
    if leader and here == _here() and int(leader) != os.getpid():
        threading.Thread(target=_follow, args=[int(leader)], name="rlstab-follow", daemon=True).start()


def _here() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {Path('/proc/self/ns/pid').readlink()}"


def _follow(leader: int) -> None:
    """Wait for the death of a process, and end those between it and this one, where it is an ancestor, and this one."""
    between = _between(leader)
    with suppress(ProcessLookupError):  # it may be dead already
        select.select([os.pidfd_open(leader)], [], [])
    for process in between:
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    os._exit(1)


def _between(leader: int) -> list[int]:
    between: list[int] = []
    ancestor = os.getppid()
    while ancestor not in (leader, 0):
        between.append(ancestor)
        ancestor = _parent_of(ancestor)
    return between if ancestor == leader else []


def _parent_of(process: int) -> int:
    """The parent of a process, or 0 where there is none."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except FileNotFoundError:
        return 0
    return int(status.partition("\nPPid:")[2].split()[0])
