"""A run folder gives back what was put into it, as one trajectory, and says clearly what it cannot do."""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlstab.errors import ConfigError, RecordError, RlstabError
from rlstab.record import RunFolder


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "run", config_text="seed: 0\n")


def strict(file: Path) -> list[Any]:
    """Parse every line as standard JSON, as parsers of other languages do."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in file.read_text("utf-8").splitlines()]


def test_metrics_come_back_exactly_and_every_line_is_standard_json(folder: RunFolder) -> None:
    values = {"a": 0.1 + 0.2, "b": 5e-324, "c": -0.0, "d": float("inf"), "e": float("-inf"), "f": 1 << 60, "g": 1.0}
    folder.append_metrics(1, values)
    of_numpy: dict[str, Any] = {"a": np.float64("nan"), "h": np.float32(0.1), "i": np.int64(3)}
    folder.append_metrics(2, of_numpy)
    first, second = folder.metrics().rows
    assert dict(first.values) == values
    assert str(first.values["c"]) == "-0.0"
    assert isinstance(first.values["f"], int)
    assert np.isnan(second.values["a"])
    assert second.values["h"] == float(np.float32(0.1))
    assert abs(second.time - time.time()) < 60
    assert [row["step"] for row in strict(folder.path / "metrics.jsonl")] == [1, 2]


def test_series_and_keys(folder: RunFolder) -> None:
    folder.append_metrics(1, {"x": 1.0, "y": 2.0})
    folder.append_metrics(2, {"y": float("inf")})
    folder.append_metrics(3, {"z": 0, "x": 3.0})
    metrics = folder.metrics()
    assert metrics.keys() == ("x", "y", "z")
    assert metrics.series("x").steps.tolist() == [1, 3]
    assert metrics.series("y").values.tolist() == [2.0, np.inf]
    assert metrics.series("absent").values.shape == (0,)


def test_lines_of_one_step_are_one_row_and_the_later_value_counts(folder: RunFolder) -> None:
    folder.append_metrics(1, {"x": 1.0, "y": 1.0})
    folder.append_metrics(1, {"x": 2.0, "z": 2.0})
    (row,) = folder.metrics().rows
    assert dict(row.values) == {"x": 2.0, "y": 1.0, "z": 2.0}


def test_events_keep_nested_data(folder: RunFolder) -> None:
    values = {"eval/pass@1": 0.5, "eval/kl": float("nan")}
    folder.append_event("evaluation", step=0, phase="before", values=values, parts=(1, [None, True]))
    folder.append_event("worker_death", reason="line\nbreak \u2028 “ü” \ud800")
    first, second = folder.events().rows
    assert (first.kind, first.step, first.fields["phase"]) == ("evaluation", 0, "before")
    assert first.fields["parts"] == [1, [None, True]]
    assert str(first.fields["values"]) == str(values)
    assert second.step is None
    assert second.fields["reason"] == "line\nbreak \u2028 “ü” \ud800"
    assert folder.events().of("worker_death") == (second,)


def test_keys_that_look_like_our_own_notation_survive(folder: RunFolder) -> None:
    fields = {"$float": "nan", "$$x": {"$float": 1.5, "$y": [float("-inf")]}}
    folder.append_event("odd", data=fields)
    assert folder.events().rows[0].fields["data"] == fields


def test_killed_and_resumed_run_reads_as_one_trajectory(folder: RunFolder) -> None:
    for step in range(1, 8):
        folder.append_metrics(step, {"x": float(step)})
    folder.append_event("alarm", step=3)
    folder.append_event("alarm", step=6)
    folder.append_event("interrupted")
    resumed = RunFolder.open(folder.path)
    resumed.resume_at(4)
    for step in range(5, 7):
        resumed.append_metrics(step, {"x": 10.0 * step})
    series = folder.metrics().series("x")
    assert series.steps.tolist() == [1, 2, 3, 4, 5, 6]
    assert series.values.tolist() == [1, 2, 3, 4, 50, 60]
    assert [(event.kind, event.step) for event in folder.events().rows] == [
        ("alarm", 3),
        ("interrupted", None),
        ("resume", 4),
    ]
    assert folder.events().of("resume")[0].fields["reached"] == 7


def test_a_second_resume_from_an_earlier_step_wins_over_both(folder: RunFolder) -> None:
    for start, factor in ((0, 1.0), (4, 10.0), (2, 100.0)):
        run = RunFolder.open(folder.path)
        if start:
            run.resume_at(start)
        for step in range(start + 1, start + 4):
            run.append_metrics(step, {"x": factor * step})
    assert RunFolder.open(folder.path).attempt == 2
    assert folder.metrics().series("x").values.tolist() == [1, 2, 300, 400, 500]
    assert [event.step for event in folder.events().of("resume")] == [4, 2]


def test_a_resume_on_the_same_object_counts_too(folder: RunFolder) -> None:
    for step in (1, 2, 3):
        folder.append_metrics(step, {"x": 1.0})
        folder.append_rollouts(step, [{"completion": "first"}])
    folder.resume_at(1)
    folder.append_metrics(2, {"x": 2.0})
    folder.append_rollouts(2, [{"completion": "second"}])
    assert folder.metrics().series("x").values.tolist() == [1, 2]
    assert [(row.step, row.fields["completion"]) for row in folder.rollouts().rows] == [(1, "first"), (2, "second")]


def test_rollouts_are_bounded_in_rows_text_and_steps(folder: RunFolder) -> None:
    assert folder.append_rollouts(0, [{"completion": "a" * 30_000, "reward": float("nan")}] * 100) == 64
    rows = folder.rollouts().rows
    assert len(rows) == 64
    assert rows[0].fields["completion"] == "a" * 20_000 + "… [10000 more characters]"
    for step in range(1, 600):
        folder.append_rollouts(step, [{"completion": str(step)}])
    steps = [row.step for row in folder.rollouts().rows if row.step]
    assert 256 <= len(steps) <= 512
    assert steps[-1] == 599
    assert max(np.diff([0, *steps])) == 2
    assert folder.rollouts().rows[0].step == 0


def test_secrets_stay_out_of_config_and_events(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", config_text="trainer: {hub_token: hf_ab, lr: 1e-5}\n")
    folder.append_event("sync", url="https://me:pw@host/x", headers={"Authorization": "Basic abc"}, attempts=3)
    written = folder.config_path.read_text() + (folder.path / "events.jsonl").read_text()
    assert "hf_ab" not in written
    assert "pw" not in written
    assert "abc" not in written
    assert folder.config_text() == "trainer: {hub_token: <redacted>, lr: 1e-5}\n"
    assert folder.events().rows[0].fields == {
        "url": "https://<redacted>@host/x",
        "headers": {"Authorization": "<redacted>"},
        "attempts": 3,
    }


def test_create_makes_parents_and_takes_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert RunFolder.create(tmp_path / "empty", config_text="a: 1").config_text() == "a: 1"
    folder = RunFolder.create(tmp_path / "deep" / "er" / "run", config_text="")
    assert RunFolder.open(folder.path).metrics().rows == ()
    assert folder.checkpoints.is_dir()
    assert folder.plots.is_dir()


def test_create_after_a_kill_during_creation(tmp_path: Path) -> None:
    (tmp_path / ".config.yaml.new").write_text("a: ")
    assert RunFolder.create(tmp_path, config_text="a: 1").config_text() == "a: 1"


def test_create_in_an_existing_run_folder(folder: RunFolder) -> None:
    folder.append_metrics(1, {"x": 1.0})
    with pytest.raises(RecordError, match=r"run is not empty \(holds config.yaml, metrics.jsonl\): choose another"):
        RunFolder.create(folder.path, config_text="seed: 0\n")
    same = RunFolder.create(folder.path, config_text="seed: 0\n", exist_ok=True)
    assert len(same.metrics().rows) == 1
    assert same.events().rows == ()
    changed = RunFolder.create(folder.path, config_text="seed: 1\n", exist_ok=True)
    assert changed.config_text() == "seed: 1\n"
    assert changed.events().of("config_replaced")[0].fields == {"previous": "seed: 0\n"}


def test_paths_that_are_no_run_folders(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RecordError, match="is a file, expected a folder"):
        RunFolder.create(tmp_path / "file", config_text="")
    with pytest.raises(RecordError, match=r"cannot create the run folder .*: Not a directory"):
        RunFolder.create(tmp_path / "file" / "run", config_text="")
    with pytest.raises(RecordError, match="there is no such folder"):
        RunFolder.open(tmp_path / "absent")
    with pytest.raises(RecordError, match=r"is not a run folder: it holds no config\.yaml"):
        RunFolder.open(tmp_path)
    assert issubclass(RecordError, RlstabError)
    assert issubclass(RecordError, OSError)


def test_config_that_cannot_be_read(folder: RunFolder, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config_text is not YAML: .*line 1"):
        RunFolder.create(tmp_path / "other", config_text="a: [1")
    assert not (tmp_path / "other").exists()
    folder.config_path.write_bytes(b"a: \xff")
    with pytest.raises(RecordError, match=r"cannot read .*config.yaml: not UTF-8 at byte 3"):
        folder.config_text()
    folder.config_path.unlink()
    with pytest.raises(RecordError, match=r"cannot read .*config.yaml: No such file"):
        folder.config_text()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"x": "0.5"}, "metric x='0.5' is a str, expected a number"),
        ({"x": None}, "metric x=None is a NoneType, expected a number"),
        ({"step": 1.0}, "the name 'step' is reserved"),
        ({1: 1.0}, "metrics has the key 1, expected a string"),
    ],
)
def test_metrics_that_are_refused(folder: RunFolder, values: dict[Any, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        folder.append_metrics(1, values)
    assert folder.metrics().rows == ()


@pytest.mark.parametrize("step", [-1, 1.5, "3"])
def test_steps_that_are_refused(folder: RunFolder, step: Any) -> None:
    with pytest.raises(ConfigError, match="expected an integer ≥ 0"):
        folder.append_metrics(step, {})
    with pytest.raises(ConfigError, match="expected an integer ≥ 0"):
        folder.append_rollouts(step, [{}])
    with pytest.raises(ConfigError, match="expected an integer ≥ 0"):
        folder.resume_at(step)
    assert folder.attempt == 0


def test_event_fields_that_are_refused(folder: RunFolder) -> None:
    with pytest.raises(ConfigError, match=r"event e\.a\.b\[1\]=<object .* is a object, expected a number, string"):
        folder.append_event("e", a={"b": [1, object()]})
    with pytest.raises(ConfigError, match=r"event e\.a=b'x' is a bytes"):
        folder.append_event("e", a=b"x")
    with pytest.raises(ConfigError, match="the name 'attempt' is reserved"):
        folder.append_event("e", attempt=1)
    assert folder.events().rows == ()


def test_appending_and_reading_are_fast(folder: RunFolder) -> None:
    """CPU time, so that a busy machine does not matter: a line < 1 ms, 10 000 steps < 1 s."""
    values = {f"objective/term{index}/loss": index / 7 for index in range(30)} | {"mismatch/k3": float("nan")}
    started = time.process_time()
    for step in range(10_000):
        folder.append_metrics(step, values)
    written = time.process_time()
    assert len(folder.metrics().rows) == 10_000
    read = time.process_time()
    assert (written - started) / 10_000 < 1e-3
    assert read - written < 1.0
