"""Programs are judged by their tests, and stopped at their limits."""

import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from rlstab.errors import ConfigError
from rlstab.tasks import Accuracy, HubTask, UnitTests

TESTS = "assert double(2) == 4\nassert double(-1) == -2\nassert double(0) == 0\nassert double('a') == 'aa'"
RIGHT = "def double(x):\n    return 2 * x"


@pytest.fixture(scope="module")
def scorer() -> UnitTests:
    return UnitTests(timeout=20)


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        (RIGHT, 1.0),
        (f"First:\n```python\ndef double(x): return 3\n```\nbetter:\n```py\n{RIGHT}\n```\nDone.", 1.0),
        (f"```\n{RIGHT}\n```", 1.0),
        ("def double(x): return x * x", 0.0),
        ("def double(x):", 0.0),
        ("", 0.0),
        (f"{RIGHT}\nraise SystemExit(0)", 0.0),
        (f"{RIGHT}\nimport os; os._exit(0)", 0.0),
        (f"{RIGHT}\nprint('[true, true, true, true]')", 1.0),
        (f"{RIGHT}\nimport os, signal; os.kill(os.getpid(), signal.SIGKILL)", 0.0),
        ("\ud800", 0.0),
        ("a\0b", 0.0),
    ],
)
def test_a_program_must_pass_all_tests(scorer: UnitTests, completion: str, reward: float) -> None:
    assert scorer.score(completion, TESTS) == reward


def test_the_share_of_passed_tests() -> None:
    partial = UnitTests(timeout=20, partial=True)
    assert partial.score("def double(x): return x * x", TESTS) == 0.5  # 2 and 0, but neither -1 nor text
    assert partial.score(RIGHT, TESTS) == 1.0
    assert partial.score("import os; os._exit(0)", TESTS) == 0.0


@pytest.mark.parametrize("tests", ["assert (", "", "# nothing", "a\0b"])
def test_tests_that_test_nothing_judge_nothing(scorer: UnitTests, tests: str) -> None:
    assert scorer.score(RIGHT, tests) is None


def ends_within(seconds: float, scorer: UnitTests, program: str) -> bool:
    start = time.monotonic()
    assert scorer.score(program, "assert True") == 0.0
    return time.monotonic() - start < seconds


def test_time_is_limited() -> None:
    assert ends_within(10, UnitTests(timeout=1), "while True: pass")
    assert ends_within(10, UnitTests(timeout=1), "import time; time.sleep(60)")


def test_memory_is_limited(scorer: UnitTests) -> None:
    small = UnitTests(timeout=20, memory=200)
    program = f"block = bytearray({400 * 2**20})"
    assert small.score(program, "assert block") == 0.0
    assert scorer.score(program, "assert block is not None") == 1.0


def test_files_are_limited(scorer: UnitTests) -> None:
    write = "with open('a', 'wb') as file: file.write(bytes({}))"
    assert scorer.score(write.format(2**19), "assert True") == 1.0
    assert scorer.score(write.format(2**21), "assert True") == 0.0


def test_programs_have_no_network(scorer: UnitTests) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        program = f"import socket; socket.create_connection(('127.0.0.1', {port}), timeout=5)"
        subprocess.run([sys.executable, "-c", program], check=True)
        assert scorer.score(program, "assert True") == 0.0


def test_programs_see_an_empty_folder_and_no_variables(scorer: UnitTests, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "1")
    assert scorer.score("import os", "assert os.listdir() == []\nassert 'SECRET' not in os.environ") == 1.0


def test_what_a_program_leaves_behind_is_killed(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    program = (
        "import subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"open({str(pid)!r}, 'w').write(str(child.pid))"
    )
    assert UnitTests(timeout=20).score(program, "assert True") == 1.0
    assert eventually_gone(int(pid.read_text()))


def test_a_process_that_keeps_the_report_open_does_not_block(scorer: UnitTests) -> None:
    program = "import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(30)\n    os._exit(0)"
    start = time.monotonic()
    assert scorer.score(program, "assert True") == 1.0
    assert time.monotonic() - start < 25


def eventually_gone(pid: int) -> bool:
    for _ in range(100):
        stat = Path(f"/proc/{pid}/stat")
        if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.05)
    return False


def test_many_programs_at_a_time() -> None:
    part = Accuracy(scorer=UnitTests(timeout=20, processes=2), column="tests")
    completions = [RIGHT, "def double(x): return 0", RIGHT]
    assert part(["?"] * 3, completions, tests=[TESTS, TESTS, None]) == [1.0, 0.0, None]


def test_a_task_asks_its_scorer_for_all_at_once() -> None:
    task = HubTask(dataset="unused", scorer=UnitTests(timeout=20, processes=2))
    assert task.reward(["?"] * 2, [RIGHT, ""], answer=[TESTS, TESTS]) == [1.0, 0.0]


def test_no_file_descriptor_is_left_open(scorer: UnitTests) -> None:
    scorer.score(RIGHT, TESTS)
    before = len(list(Path("/proc/self/fd").iterdir()))
    scorer.score(RIGHT, TESTS)
    UnitTests(timeout=0.2).score("while True: pass", TESTS)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


@pytest.mark.parametrize("key", ["timeout", "memory", "file_size", "processes"])
def test_limits_are_positive(key: str) -> None:
    changes: dict[str, Any] = {key: 0}
    with pytest.raises(ConfigError, match=f"UnitTests: {key} 0; expected a number above 0"):
        UnitTests(**changes)
