"""What runs in a worker process: calls one function again and again, as the process at the other end asks.

Started by path, so that nothing but the function's own module is imported.
"""

import contextlib
import importlib
import importlib.util
import os
import resource
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any


def load(target: str, name: str) -> Callable[..., Any]:
    """The function of a module, which is given by its file or by its import path."""
    if target.endswith(".py"):
        spec = importlib.util.spec_from_file_location("target", target)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    else:
        module = importlib.import_module(target)
    function: Any = module
    for part in name.split("."):
        function = vars(function)[part]
    return function  # type: ignore[no-any-return]


def serve(connection: Connection) -> None:
    """Answer calls until the other end is closed."""
    path, target, name, memory = connection.recv()
    sys.path[:] = path
    if memory is not None:
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    function = load(target, name)
    connection.send("ready")
    while True:
        arguments, columns = connection.recv()
        try:
            answer = (True, function(*arguments, **columns))
        except BaseException as error:  # told to the other end, whatever it is
            answer = (False, f"{type(error).__name__}: {error}")
        connection.send(answer)


if __name__ == "__main__":
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    with contextlib.suppress(EOFError, BrokenPipeError), Connection(int(sys.argv[1])) as other_end:
        serve(other_end)
