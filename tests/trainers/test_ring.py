"""The ring of snapshots is bounded, its files are whole whenever a process is killed, and checkpoints hold it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from random import Random
from typing import Any

import pytest
from loops import Loop, snapshot_at

from rlstab.errors import ConfigError, RecordError
from rlstab.trainers._guard import Snapshot, restore, take
from rlstab.trainers._ring import IN_CHECKPOINT, Ring, read, write
from rlstab.trainers._sharded_weights import Shards
from rlstab.trainers._weights import WEIGHTS, Copies


def snapshots(*steps: int) -> list[Snapshot]:
    run = Loop()
    return [take(step, Copies(run.model, run.optimizer), run.optimizer, run.scheduler, {}) for step in steps]


def test_the_ring_is_bounded_and_goes_further_back_each_time() -> None:
    ring = Ring(3)
    for snapshot in snapshots(0, 10, 20, 30):
        ring.add(snapshot)
    assert ring.steps == [10, 20, 30]
    assert ring.before(25).step == 20
    assert ring.before(26).step == 10
    assert ring.before(27).step == 10


@pytest.mark.parametrize("folder", [None, "disk"])
def test_the_best_snapshot_stays_however_old_it_is(folder: str | None, tmp_path: Path) -> None:
    """Held-out scores tell more than the reward; without any score the newest stay."""
    place = tmp_path / folder if folder else None
    ring, scores = Ring(3, folder=place), [{"train/reward": reward} for reward in (0.2, 0.8, 0.7, 0.5, 0.3, 0.4)]
    for step, of_step in enumerate(scores):
        ring.add(snapshot_at(10 * step, of_step))
    assert ring.steps == [10, 40, 50]
    ring.save(tmp_path / "checkpoint")
    other = Ring(3, folder=tmp_path / "other" if folder else None)
    other.load(tmp_path / "checkpoint")
    for held in (ring, other):
        held.add(snapshot_at(60, {"train/reward": 0.5, "eval/reward": 0.1}))
        assert held.steps == [40, 50, 60]
        held.add(snapshot_at(70, {"train/reward": 0.9, "eval/reward": 0.0}))
        held.add(snapshot_at(80, {"train/reward": 0.9}))
        held.add(snapshot_at(90, {"train/reward": 0.9}))
        assert held.steps == [60, 80, 90]
        assert held.before(85).step == 80
        assert [held.before(step).step for step in (75, 65, 50)] == [60, 60, 60]  # the best one is not used up


@pytest.mark.parametrize("scored", [False, True])
def test_a_run_that_ends_takes_the_best_from_before_the_evidence(scored: bool) -> None:
    ring = Ring(4)
    for step, reward in ((10, 0.2), (20, 0.8), (30, 0.5), (40, 0.9)):
        ring.add(snapshot_at(step, {"eval/reward": reward} if scored else {}))
    assert ring.before(35, best=True).step == (20 if scored else 30)
    assert ring.steps == [10, 20]


def test_without_an_older_one_the_oldest_is_taken() -> None:
    ring = Ring(2)
    for snapshot in snapshots(10, 20):
        ring.add(snapshot)
    assert ring.before(5).step == 10
    assert ring.steps == [10]


# ---------------------------------------------------------------------- files and checkpoints


def test_a_file_holds_the_snapshot_bit_for_bit(tmp_path: Path) -> None:
    run = Loop()
    run.run(3)
    write(
        take(3, Copies(run.model, run.optimizer), run.optimizer, run.scheduler, {"rollbacks": 1}),
        tmp_path / "a.safetensors",
    )
    expected = run.run(4)
    restore(read(tmp_path / "a.safetensors"), Copies(run.model, run.optimizer), run.optimizer, run.scheduler)
    assert run.run(4) == expected
    assert read(tmp_path / "a.safetensors").extra == {"rollbacks": 1}


def test_a_torn_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write(snapshot_at(3), path)
    whole = path.read_bytes()
    for size in (0, 7, 8, 200, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(RecordError, match=r"a\.safetensors cannot be read"):
            read(path)


def test_a_state_that_is_no_text_is_refused(tmp_path: Path) -> None:
    run = Loop()
    snapshot = take(0, Copies(run.model, run.optimizer), run.optimizer, run.scheduler, {"custom": {1, 2}})
    with pytest.raises(ConfigError, match=r"leave Guard\.folder unset"):
        write(snapshot, tmp_path / "a.safetensors")


class Pages(Shards):
    """A checkpoint of several files, all of which hold the same."""

    def write(self, path: Path) -> dict[str, Any]:
        for page in range(20):
            (path / f"{page}").write_text("x" * 1000)
        return {"pages": 20}

    def read(self, path: Path, values: Mapping[str, Any]) -> None:
        assert [file.read_text() for file in path.iterdir()] == ["x" * 1000] * values["pages"]


def keep_on(folder: Path) -> None:
    """What a process does that is going to be killed."""
    ring, snapshot, pages = Ring(2, folder=folder), snapshot_at(0), Pages(folder)
    for step in range(10_000):
        values = {**snapshot.values, **pages.take(step).values}
        ring.add(replace(snapshot, step=step, values=values))


def test_a_kill_at_any_moment_leaves_whole_files(tmp_path: Path) -> None:
    """With weights in a folder that belongs to all processes; what a checkpoint holds outlives the ring."""
    random = Random(0)
    for attempt in range(8):
        folder = tmp_path / str(attempt)
        process = get_context("fork").Process(target=keep_on, args=(folder,), daemon=True)
        process.start()
        while not list(folder.glob("step-*.safetensors")):
            time.sleep(0.005)
        time.sleep(random.uniform(0.0, 0.05))
        process.kill()
        process.join()
        kept = [read(path) for path in folder.glob("step-*.safetensors")]
        assert 1 <= len(kept) <= 3  # a third where the oldest was about to go
        assert all(snapshot.extra["products"] == {"learning_rate": 0.5} for snapshot in kept)
        assert folders_in(folder)
        for step in folders_in(folder):
            Pages(folder).put_back(step, {}, {"pages": 20})
        ring = Ring(2, folder=folder)
        assert not ring.load(None)
        assert not list(folder.glob("step-*"))


def test_the_weights_of_all_processes_go_where_the_ring_goes(tmp_path: Path) -> None:
    """Two processes, one of which links and removes what belongs to both; a third was not there when it was written."""
    pages, folder, saved = Pages(tmp_path / "a"), tmp_path / "a", tmp_path / "checkpoint"
    rings = [Ring(2, folder=folder, rank=rank, ranks=2) for rank in (1, 0)]
    for step in (0, 10, 20):
        values = pages.take(step).values
        for ring in rings:
            snapshot = snapshot_at(step)
            ring.add(replace(snapshot, values={**snapshot.values, **values}))
    for _ in range(2):  # the same checkpoint once more
        for ring in rings:
            ring.save(saved)
    assert folders_in(folder) == folders_in(saved / IN_CHECKPOINT) == [10, 20]
    for ring in rings:
        assert ring.before(15).step == 10
        assert folders_in(folder) == [10, 20]  # to be read, until all are back
        ring.sweep()
        ring.load(None)
    assert folders_in(folder) == []
    others = [Ring(2, folder=tmp_path / "b", rank=rank, ranks=2) for rank in (1, 0)]
    assert [other.load(saved) for other in others] == [True, True]
    Pages(tmp_path / "b").put_back(20, {}, others[0].before(25).values)
    assert [Ring(2, folder=tmp_path / "c", rank=rank, ranks=3).load(saved) for rank in range(3)] == [False] * 3
    with pytest.raises(
        ConfigError, match=r"process 0 does not see .*step-00000030\.weights: expected a folder that all"
    ):
        pages.put_back(30, {}, {})


def folders_in(folder: Path) -> list[int]:
    """The steps whose weights are there."""
    return sorted(int(path.name[5:13]) for path in folder.glob(f"step-*{WEIGHTS}"))


@pytest.mark.parametrize("folder", [None, "disk"])
def test_a_checkpoint_holds_the_ring(folder: str | None, tmp_path: Path) -> None:
    place = tmp_path / folder if folder else None
    ring = Ring(2, folder=place)
    for step in (10, 20, 30):
        ring.add(snapshot_at(step))
    ring.save(tmp_path / "checkpoint")
    ring.add(snapshot_at(40))
    other = Ring(2, folder=tmp_path / "other" if folder else None)
    assert other.load(tmp_path / "checkpoint")
    assert other.steps == [20, 30]
    assert other.before(25).step == 20
    assert ring.steps == [30, 40]
    assert Ring(2, folder=place, rank=1).load(tmp_path / "checkpoint") is False
