"""Programs, judged by unit tests."""

import ast
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import final

from rlstab.tasks._checks import check_fields
from rlstab.tasks._scorers import Scorer

__all__ = ["UnitTests"]

MAIN = Path(__file__).with_name("_code_main.py")
FENCED = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)```", re.DOTALL | re.IGNORECASE)
KIB, MIB = 2**10, 2**20
MOST_REPORTED = 64 * KIB  # what a pipe holds


@final
@dataclass(frozen=True, kw_only=True)
class UnitTests(Scorer):
    r"""1 if a Python program passes its tests, else 0; the answer is the tests' text.

    The program is the completion's last fenced block, or the whole completion. It runs first, then each statement of
    the tests, such as an `assert`. Every program gets a fresh process without input and output, in an empty folder,
    without the parent's environment variables, under limits of time, memory and file size, and without network: sockets
    are refused in Python, and the process leaves the network where the system lets it (Linux with user namespaces).

    This is resource-limited, not a sandbox: a program can read the files that you can read, start processes, and forge
    its result if it sets out to. For programs that you do not trust, run the whole training in a container.

    A row whose tests are no Python cannot be judged.

    Args:
        timeout: seconds for a program and its tests, by the clock; CPU time is limited likewise.
        memory: most address space, in MiB.
        file_size: largest file that may be written, in KiB.
        partial: reward the share of passed statements instead.
        processes: programs that run at a time.

    Raises:
        ConfigError: if a limit is not positive.

    Example:
        >>> scorer = UnitTests(timeout=20)
        >>> tests = "assert double(2) == 4"
        >>> scorer.score("So: ```python\ndef double(x): return 2 * x\n```", tests)
        1.0
        >>> scorer.score("def double(x): return x * x + 1", tests)
        0.0
    """

    timeout: float = 10.0
    memory: int = 1024
    file_size: int = 1024
    partial: bool = False
    processes: int = 1

    def __post_init__(self) -> None:
        limits = ("timeout", "memory", "file_size", "processes")
        check_fields(self, {key: (vars(self)[key] > 0, "a number above 0") for key in limits})

    def score(self, completion: str, answer: str) -> float | None:
        """Run the program and its tests."""
        try:
            count = len(ast.parse(answer).body)
        except (SyntaxError, ValueError):
            return None
        if count == 0:
            return None
        passed = self._passed(_program(completion), answer)
        return sum(passed) / count if self.partial else float(passed == [True] * count)

    def scores(self, completions: Sequence[str], answers: Sequence[str]) -> list[float | None]:
        """Run many programs, `processes` at a time."""
        with ThreadPoolExecutor(self.processes) as pool:
            return list(pool.map(self.score, completions, answers))

    def _passed(self, program: str, tests: str) -> list[bool]:
        """Which statements of the tests passed; none if the process did not come to their end."""
        job = {
            "program": program,
            "tests": tests,
            "seconds": ceil(self.timeout),
            "memory": self.memory * MIB,
            "file_size": self.file_size * KIB,
        }
        with tempfile.TemporaryDirectory(prefix="rlstab-tests-") as folder:
            report = _run(json.dumps(job).encode(), folder, self.timeout)
        with suppress(ValueError):
            passed = json.loads(report)
            return [item is True for item in passed] if isinstance(passed, list) else []
        return []


def _program(completion: str) -> str:
    blocks = FENCED.findall(completion)
    return str(blocks[-1]) if blocks else completion


def _run(job: bytes, folder: str, timeout: float) -> bytes:
    """What the process reports, nothing if it does not end in time; all that it started in its session is killed."""
    reading, writing = os.pipe()
    os.set_blocking(reading, False)  # a program may leave a process behind that keeps the other end open
    try:
        process = subprocess.Popen(
            [sys.executable, "-I", str(MAIN), str(writing)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=[writing],
            cwd=folder,
            env={"PATH": os.defpath, "HOME": folder, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
    finally:
        os.close(writing)
    with os.fdopen(reading, "rb", buffering=0) as report, process:
        try:
            process.communicate(job, timeout=timeout)
        except subprocess.TimeoutExpired:
            return b""
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        return report.read(MOST_REPORTED) or b""
