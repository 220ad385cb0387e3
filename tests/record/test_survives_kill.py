"""Whatever happens to the writer, every complete line is read again and the next one is not lost."""

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlstab.errors import RecordError
from rlstab.record import RunFolder

numbers = st.one_of(st.floats(), st.integers(-(2**63), 2**63))
keys = st.text(min_size=1).filter(lambda key: key not in {"kind", "step", "time", "attempt"})
tables = st.lists(st.dictionaries(keys, numbers, max_size=4), min_size=1, max_size=6)
data = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, st.text()),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(), inner, max_size=3)),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def new_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], RunFolder]:
    """Make a fresh folder at every call: Hypothesis runs one test many times."""
    return lambda: RunFolder.create(tmp_path_factory.mktemp("record") / "run", config_text="")


def write(folder: RunFolder, rows: list[dict[str, float]]) -> None:
    for step, values in enumerate(rows):
        folder.append_metrics(step, values)


@settings(deadline=None, max_examples=150)
@given(rows=tables, share=st.floats(0, 1), more=tables)
def test_cut_anywhere_keeps_every_complete_line(
    new_folder: Callable[[], RunFolder], rows: list[dict[str, float]], share: float, more: list[dict[str, float]]
) -> None:
    folder = new_folder()
    write(folder, rows)
    file = folder.path / "metrics.jsonl"
    whole = file.read_bytes()
    cut = round(share * len(whole))
    file.write_bytes(whole[:cut])
    ends = [end for end, byte in enumerate(whole) if byte == ord("\n")]
    complete = sum(end <= cut for end in ends)
    partial = cut not in (0, *ends, *(end + 1 for end in ends))

    metrics = RunFolder.open(folder.path).metrics()
    assert [row.step for row in metrics.rows] == list(range(complete))
    assert metrics.torn == partial
    assert repr([dict(row.values) for row in metrics.rows]) == repr(rows[:complete])

    again = RunFolder.open(folder.path)
    for step, values in enumerate(more, start=complete):
        again.append_metrics(step, values)
    metrics = again.metrics()
    assert repr([dict(row.values) for row in metrics.rows]) == repr(rows[:complete] + more)
    assert metrics.torn == partial


@settings(deadline=None, max_examples=100)
@given(
    rows=tables, junk=st.binary(min_size=1).map(lambda junk: b"\x00" + junk.replace(b"\n", b"")), place=st.integers(0)
)
def test_a_line_of_junk_anywhere_is_skipped_and_counted(
    new_folder: Callable[[], RunFolder], rows: list[dict[str, float]], junk: bytes, place: int
) -> None:
    folder = new_folder()
    write(folder, rows)
    file = folder.path / "metrics.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    lines.insert(place % (len(lines) + 1), junk + b"\n")
    file.write_bytes(b"".join(lines))
    metrics = folder.metrics()
    assert len(metrics.rows) == len(rows)
    assert metrics.torn == 1


@pytest.mark.parametrize(
    "line",
    [
        *(b"{}", b"[]", b"3", b"\xff\xfe{", b'{"step": 1}', b'{"step":"1","time":0,"attempt":0}'),
        b'{"step":1,"time":0,"attempt":0,"x":NaN}',
    ],
)
def test_lines_of_others_are_skipped_and_counted(new_folder: Callable[[], RunFolder], line: bytes) -> None:
    folder = new_folder()
    write(folder, [{"x": 1.0}])
    for name in ("metrics.jsonl", "events.jsonl", "rollouts/step_000000000.jsonl"):
        file = folder.path / name
        file.parent.mkdir(exist_ok=True)
        with file.open("ab") as out:
            out.write(line + b"\n")
    write(folder, [{}, {"x": 2.0}])
    assert folder.metrics().series("x").values.tolist() == [1.0, 2.0]
    assert (folder.metrics().torn, folder.events().torn, folder.rollouts().torn) == (1, 1, 1)


@settings(deadline=None, max_examples=150)
@given(value=data)
def test_any_event_data_come_back(new_folder: Callable[[], RunFolder], value: Any) -> None:
    folder = new_folder()
    folder.append_event("any", reply=value)
    (event,) = folder.events().rows
    assert repr(event.fields["reply"]) == repr(value)


WRITER = """
import sys
from rlstab.record import RunFolder
folder = RunFolder.open(sys.argv[1])
step = int(sys.argv[2])
while True:
    step += 1
    folder.append_metrics(step, {f"objective/term{i}/loss": step + i / 7 for i in range(200)})
    folder.append_event("note", step=step, text="x" * 500)
"""


def kill_when_grown(file: Path, growth: int, arguments: list[str]) -> None:
    """Start the writer, and kill it without warning as soon as the file has grown."""
    size = file.stat().st_size if file.exists() else 0
    child = subprocess.Popen([sys.executable, "-c", WRITER, *arguments])
    deadline = time.monotonic() + 60
    try:
        while not file.exists() or file.stat().st_size < size + growth:
            assert child.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.001)
    finally:
        os.kill(child.pid, signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL


def test_kill_9_and_resume(new_folder: Callable[[], RunFolder]) -> None:
    folder = new_folder()
    start = 0
    for _ in range(3):
        kill_when_grown(folder.path / "metrics.jsonl", 200_000, [str(folder.path), str(start)])
        metrics = RunFolder.open(folder.path).metrics()
        reached = metrics.rows[-1].step
        assert [row.step for row in metrics.rows] == list(range(1, reached + 1))
        assert all(len(row.values) == 200 for row in metrics.rows)
        assert metrics.torn <= 3
        start = reached - 5
        RunFolder.open(folder.path).resume_at(start)
    series = folder.metrics().series("objective/term0/loss")
    assert series.steps.tolist() == list(range(1, start + 1))
    assert series.values.tolist() == list(range(1, start + 1))
    assert len(folder.events().of("resume")) == 3


def test_a_write_that_the_system_cuts_short(new_folder: Callable[[], RunFolder]) -> None:
    """A file-size limit makes the system take part of a line, as a full disk does; with room again the run goes on."""
    folder = new_folder()
    write(folder, [{"x": 1.0}])
    size = (folder.path / "metrics.jsonl").stat().st_size
    script = f"""
import resource
from rlstab.record import RunFolder
resource.setrlimit(resource.RLIMIT_FSIZE, ({size + 20}, {resource.RLIM_INFINITY}))
RunFolder.open({str(folder.path)!r}).append_metrics(1, {{"x": 2.0}})
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "RecordError: cannot write to" in done.stderr
    assert "File too large; raise the limit on file size" in done.stderr
    assert (folder.path / "metrics.jsonl").stat().st_size == size + 20
    assert folder.metrics().torn == 1
    folder.append_metrics(1, {"x": 3.0})
    assert folder.metrics().series("x").values.tolist() == [1.0, 3.0]
    assert folder.metrics().torn == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full to play a full disk")
def test_full_disk_is_reported_with_a_remedy(new_folder: Callable[[], RunFolder]) -> None:
    folder = new_folder()
    (folder.path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(RecordError, match=r"metrics\.jsonl: No space left on device; free some space, then resume"):
        folder.append_metrics(1, {"x": 1.0})
