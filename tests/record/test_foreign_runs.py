"""Runs that others wrote read as they were, and what cannot be read says so in one line."""

import json
import math
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from rlstab.errors import RecordError
from rlstab.record import Run, RunFolder, read_run
from rlstab.record._reading import LARGEST

FOREIGN = Path(__file__).parent / "foreign"
STORES: dict[str, dict[str, Any]] = {
    "trainer_state.json": {},
    "log.jsonl": {},
    "log.csv": {"columns": {"step": "it"}},
    "events.out.tfevents.1": {},
    "run-1.wandb": {},
    "trackio.db": {"name": "one"},
}
LOG = json.loads((FOREIGN / "trainer_state.json").read_text())["log_history"]
KEYS = {
    "reward": "train/reward",
    "entropy": "train/entropy",
    "rewards/reward/mean": "rewards/reward/mean",
    "mismatch/k3": "mismatch/k3",
}


@pytest.mark.parametrize("name", STORES)
def test_every_store_holds_the_same_log(name: str) -> None:
    run = read_run(FOREIGN / name, **STORES[name])
    for theirs, ours in KEYS.items():
        series = run.metrics.series(ours)
        assert series.steps.tolist() == [entry["step"] for entry in LOG]
        assert series.values.tolist() == pytest.approx([entry[theirs] for entry in LOG], rel=1e-6)
    losses = run.metrics.series("train/loss").values
    assert math.isnan(losses[-1])
    assert not any(map(math.isnan, losses[:-1]))
    assert run.metrics.torn == 0


def test_stores_bring_their_configuration() -> None:
    assert json.loads(read_run(FOREIGN / "run-1.wandb").config)["model"] == {"layers": 2}
    assert json.loads(read_run(FOREIGN / "trackio.db", name="two").config)["learning_rate"] == 0.0005


def test_a_store_of_several_runs_asks_for_one() -> None:
    with pytest.raises(RecordError, match=r"holds 2 runs \(one, two\): name one$"):
        read_run(FOREIGN / "trackio.db")
    with pytest.raises(RecordError, match=r"not 'three'"):
        read_run(FOREIGN / "trackio.db", name="three")


@pytest.mark.parametrize("name", ["events.out.tfevents.1", "run-1.wandb", "log.jsonl"])
def test_a_torn_store_keeps_what_stands_before(name: str, tmp_path: Path) -> None:
    whole = (FOREIGN / name).read_bytes()
    torn = tmp_path / name
    torn.write_bytes(whole[: len(whole) * 2 // 3])
    run = read_run(torn)
    assert run.metrics.torn == 1
    assert 3 <= len(run.metrics.rows) < 12
    assert run.metrics.rows[0].values["train/reward"] == pytest.approx(LOG[0]["reward"])


def attempt(path: Path, **how: Any) -> Run | str:
    """The run, or the message why it cannot be read."""
    try:
        return read_run(path, **how)
    except RecordError as error:
        return str(error)


@pytest.mark.parametrize("name", STORES)
@pytest.mark.parametrize("size", [1, 5, 12, 40, 1500])
def test_no_cut_or_garbage_raises_anything_else(name: str, size: int, tmp_path: Path) -> None:
    for content in (
        (FOREIGN / name).read_bytes()[:size],
        b"\xff" * size,
        b"[" * size * 100,
        (FOREIGN / name).read_bytes()[: size + 7] + b"\x80" * size,
    ):
        broken = tmp_path / name
        broken.write_bytes(content)
        outcome = attempt(broken, **STORES[name])
        if isinstance(outcome, Run):
            assert outcome.metrics.rows
        else:
            assert name in outcome
            assert "\n" not in outcome


def test_a_trainers_folder_reads_its_own_state_or_that_of_its_last_checkpoint(tmp_path: Path) -> None:
    for step in (50, 9):
        (tmp_path / f"checkpoint-{step}").mkdir()
        state = {"log_history": [{"step": step, "reward": 0.5}]}
        (tmp_path / f"checkpoint-{step}/trainer_state.json").write_text(json.dumps(state))
    assert read_run(tmp_path).last_step == 9
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": [{"step": 80, "eval_reward": 0.5}]}))
    run = read_run(tmp_path)
    assert (run.last_step, run.has("eval/reward"), run.name) == (80, True, tmp_path.name)


def test_a_run_folder_is_read_as_itself(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", config_text="seed: 0")
    folder.append_metrics(1, {"train/reward": 0.5})
    assert read_run(folder.path) == Run.of(folder)


def test_tables_without_steps_count_their_rows(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text("score,note\n0.5,x\n,y\ninf,z\n")
    run = read_run(file, columns={"train/reward": "score"})
    assert run.metrics.series("train/reward").steps.tolist() == [1, 3]
    assert run.metrics.series("train/reward").values.tolist() == [0.5, math.inf]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "a,b\n1,2\n", "has no column 'x' \\(asked for as train/reward\\); it has: a, b"),
        ("a.jsonl", '{"a": 1}\n', "has no column 'x'"),
        ("trainer_state.json", "{}", "columns are for .csv and .jsonl"),
    ],
)
def test_columns_that_are_not_there(name: str, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(RecordError, match=message):
        read_run(tmp_path / name, columns={"train/reward": "x"})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "", "is empty"),
        ("a.csv", "a,b\nx,y\n", "holds no numbers by step"),
        ("a.txt", "x", "what this is cannot be told from its name; expected a run folder"),
        ("trainer_state.json", '{"log_history": 3}', "has no list 'log_history'"),
        ("trainer_state.json", '{"log_hist', "is not JSON"),
        ("a.jsonl", "x\ny\n", "none of 2 lines is a JSON object"),
        ("a.wandb", "x", "is no wandb run"),
        ("a.db", "x" * 200, "is no trackio store"),
    ],
)
def test_what_cannot_be_read_says_why(name: str, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(RecordError, match=message):
        read_run(tmp_path / name)


def test_what_is_not_there_says_what_would_be_read(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"there is no .*gone; expected a run folder of rlstab, trainer_state.json"):
        read_run(tmp_path / "gone")
    with pytest.raises(RecordError, match="holds no run; expected"):
        read_run(tmp_path)


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    with file.open("wb") as sparse:
        sparse.truncate(LARGEST + 1)
    with pytest.raises(RecordError, match=r"has 1\.1 GB, expected at most 1\.1"):
        read_run(file)


def test_a_store_is_only_read(tmp_path: Path) -> None:
    store = tmp_path / "p.db"
    store.write_bytes((FOREIGN / "trackio.db").read_bytes())
    before = store.read_bytes()
    read_run(store, name="one")
    assert store.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["p.db"]
    with sqlite3.connect(store) as database:
        database.execute("UPDATE metrics SET step = -1 WHERE id = 1")
    assert read_run(store, name="one").metrics.torn == 1
