"""Functions in processes of their own: from any thread, stopped when late, started again."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlstab.errors import ConfigError, RewardError
from rlstab.tasks import FunctionReward, MathAnswer, RewardBatch
from rlstab.tasks._worker import LateError, Worker

MODULE = """
import os, time

def echo(*arguments, **columns):
    print("a function may print")
    return os.getpid(), arguments, columns

def wait(completions, **columns):
    for text in completions:
        time.sleep(float(text))
    return [1.0] * len(completions)

def fail(*arguments):
    raise KeyError("no")

def die():
    os._exit(3)

def grab(size):
    return len(bytearray(size))
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "some_rewards.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "some_rewards"


@pytest.fixture
def made() -> Iterator[list[Worker]]:
    workers: list[Worker] = []
    yield workers
    for worker in workers:
        worker.stop()


def make(made: list[Worker], module: str, name: str, memory: int | None = None) -> Worker:
    made.append(Worker(module, name, memory=memory))
    return made[-1]


def test_a_worker_answers_from_every_thread_with_one_process(module: str, made: list[Worker]) -> None:
    worker = make(made, module, "echo")
    answers = []
    threads = [
        threading.Thread(target=lambda n=n: answers.append(worker.call(n, timeout=30, also=n))) for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted((arguments, columns) for _, arguments, columns in answers) == [((n,), {"also": n}) for n in range(4)]
    assert len({pid for pid, _, _ in answers}) == 1


def test_a_late_call_is_stopped_and_the_next_one_answered(module: str, made: list[Worker]) -> None:
    worker = make(made, module, "wait")
    assert worker.call(["0"], timeout=30) == [1.0]
    start = time.monotonic()
    with pytest.raises(LateError, match=r"^wait: no answer within 0\.2 s$"):
        worker.call(["60"], timeout=0.2)
    assert time.monotonic() - start < 10
    assert worker.call(["0"], timeout=30) == [1.0]


def test_what_fails_there_is_told_here(module: str, made: list[Worker]) -> None:
    with pytest.raises(RewardError, match=r"^fail: KeyError: 'no'$"):
        make(made, module, "fail").call(timeout=30)
    worker = make(made, module, "die")
    for _ in range(2):
        with pytest.raises(RewardError, match=r"^die: its process died$"):
            worker.call(timeout=30)
    with pytest.raises(RewardError, match=r"^missing: its process died$"):
        make(made, module, "missing").call(timeout=30)


def test_memory_is_limited(module: str, made: list[Worker]) -> None:
    worker = make(made, module, "grab", memory=300)
    assert worker.call(2**20, timeout=30) == 2**20
    with pytest.raises(RewardError, match=r"^grab: MemoryError"):
        worker.call(2**30, timeout=30)


def test_a_reward_function_that_is_late_is_named_with_its_sample(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import some_rewards  # type: ignore[import-not-found]

    part = FunctionReward(function=some_rewards.wait, timeout=0.5)
    with pytest.raises(RewardError, match=r"^some_rewards\.wait: wait: no answer within 0\.5 s; completion 1 is '60'$"):
        part(["?"] * 2, ["0", "60"], note=["a", "b"], trainer_state=object())
    counted = FunctionReward(function=some_rewards.wait, timeout=0.5, on_error="none")
    assert counted.judge(RewardBatch(prompts=["?"] * 2, completions=["60", "0"])) == ([None, 1.0], 1)


def lengths(completions: list[str], extra: list[int], **columns: object) -> list[float]:
    return [float(len(text) * factor) for text, factor in zip(completions, extra, strict=True)]


async def later(completions: list[str], **columns: object) -> list[float]:
    return [0.0] * len(completions)


class Callable:
    def __call__(self, completions: list[str], **columns: object) -> list[float]:
        return [1.0] * len(completions)


def test_a_function_is_called_as_the_host_does() -> None:
    assert FunctionReward(function=lengths)(["?"] * 2, ["ab", "c"], extra=[1, 3]) == [2.0, 3.0]
    assert FunctionReward(function=Callable())(["?"] * 2, ["ab", "c"]) == [1.0, 1.0]
    assert FunctionReward(function=Callable()).label == "Callable"
    assert not FunctionReward(function=lengths, per_sample=False).separable


def test_functions_that_cannot_be_called_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"later is asynchronous; give it to the trainer's reward_funcs itself"):
        FunctionReward(function=later)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"<lambda> cannot be imported by another process"):
        FunctionReward(function=lambda completions, **columns: [0.0], timeout=1.0)
    with pytest.raises(ConfigError, match=r"FunctionReward: timeout 0\.0; expected seconds above 0"):
        FunctionReward(function=lengths, timeout=0.0)


@pytest.fixture
def math() -> type[MathAnswer]:
    pytest.importorskip("math_verify", reason="needs math-verify, of the extra `tasks`")
    return MathAnswer


TOWER = r"\boxed{9^{9^{9^{9}}}}"


def test_an_expression_beyond_the_limits(math: type[MathAnswer]) -> None:
    assert math(timeout=1.0).score(TOWER, "1") == 0.0
    assert math(timeout=1.0, late="none").score(TOWER, "1") is None
    with pytest.raises(RewardError, match=r"^compare: no answer within 1 s$"):
        math(timeout=1.0, late="raise").score(TOWER, "1")
    assert math().score(r"\boxed{2}", "2") == 1.0


def test_expressions_are_compared_in_any_thread(math: type[MathAnswer]) -> None:
    found: list[float | None] = []
    thread = threading.Thread(target=lambda: found.append(math().score(r"\boxed{\frac{1}{2}}", "0.5")))
    thread.start()
    thread.join()
    assert found == [1.0]


def test_limits_of_the_comparison(math: type[MathAnswer]) -> None:
    with pytest.raises(ConfigError, match=r"MathAnswer: timeout 0; expected seconds above 0"):
        math(timeout=0)
