"""Runs a program and its tests under limits, and reports how many tests passed; started by path in a bare process."""

import ast
import ctypes
import json
import os
import resource
import sys
from typing import Any

NEW_USER, NEW_NETWORK = 0x10000000, 0x40000000
REFUSED = ("socket.connect", "socket.bind", "socket.getaddrinfo", "socket.sendto")


def limit(seconds: int, memory: int, file_size: int) -> None:
    """Give up time, memory, file sizes, core dumps and, where the system allows it, the network."""
    for what, most in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, file_size),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, 64),
    ):
        resource.setrlimit(what, (most, most))
    if sys.platform == "linux":
        ctypes.CDLL(None).unshare(NEW_USER | NEW_NETWORK)  # a process without the right to do so keeps its network

    def refuse(event: str, arguments: tuple[Any, ...]) -> None:
        if event in REFUSED:
            raise PermissionError(f"{event}: the tests of a reward have no network")

    sys.addaudithook(refuse)


def passed(program: str, tests: str) -> list[bool]:
    """Whether each statement of the tests passes after the program has run; all fail if the program does."""
    statements = ast.parse(tests).body
    space: dict[str, Any] = {"__name__": "__main__"}
    try:
        exec(compile(program, "<completion>", "exec"), space)
    except BaseException:  # a program may raise anything, SystemExit included
        return [False] * len(statements)
    return [_holds(statement, space) for statement in statements]


def _holds(statement: ast.stmt, space: dict[str, Any]) -> bool:
    try:
        exec(compile(ast.Module([statement], []), "<tests>", "exec"), space)
    except BaseException:  # likewise
        return False
    return True


if __name__ == "__main__":
    job = json.load(sys.stdin)
    report = os.fdopen(int(sys.argv[1]), "w")
    limit(job["seconds"], job["memory"], job["file_size"])
    json.dump(passed(job["program"], job["tests"]), report)
    report.flush()
    os._exit(0)
