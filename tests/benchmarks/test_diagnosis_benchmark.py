"""The benchmark of the diagnosis: its faults are known causes, it scores runs by their folder and by the host's log."""

import csv
import importlib.util
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from rlstab.monitors import explanations

ROOT = Path(__file__).resolve().parents[2]
RECORDED = ROOT / "tests/monitors/recorded"


@pytest.fixture(scope="module")
def benchmark() -> Iterator[ModuleType]:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    spec = importlib.util.spec_from_file_location("diagnosis_benchmark", ROOT / "benchmarks/diagnosis.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(ROOT / "benchmarks"))


def place_run(mode: str, place: Path) -> None:
    """A recorded run as the folder that it was, with the host's log beside."""
    setting = {"mode": mode, "strength": 0, "task": "sort5", "hidden": 64, "layers": 2, "seed": 7}
    folder = place / f"{mode}-0-sort5-64x2-7"
    folder.mkdir()
    (folder / "collapse.json").write_text(json.dumps(setting))
    shutil.copy(RECORDED / f"{mode}.yaml", folder / "config.yaml")
    log = []
    with (RECORDED / f"{mode}.csv").open() as file, (folder / "metrics.jsonl").open("w") as metrics:
        for row in csv.DictReader(file):
            step = int(row.pop("step"))
            values = {key: float(value) for key, value in row.items() if value and value != "nan"}
            metrics.write(json.dumps({"step": step, "time": 1.0, "attempt": 0, **values}) + "\n")
            log.append({"step": step, **{key.removeprefix("train/"): value for key, value in values.items()}})
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": log}))


def test_every_known_cause_has_a_mode(benchmark: ModuleType) -> None:
    known = {entry.name for entry in explanations()}
    assert {mode.cause for mode in benchmark.MODES.values()} - {None} == known


def test_runs_are_scored_by_folder_and_by_the_hosts_log(benchmark: ModuleType, tmp_path: Path) -> None:
    for mode in ("healthy", "staleness", "learning_rate", "stale_weights"):
        place_run(mode, tmp_path)
    found = benchmark.score(tmp_path)
    assert found["run folder"]["named first and right"][:2] == [3, 3]
    assert found["run folder"]["healthy, and none named"][:2] == [1, 1]
    assert found["host's log"]["confusion"]["staleness"] == {"none": 1}


def test_what_was_not_harmed_or_no_setting_repairs_is_not_run_again(benchmark: ModuleType, tmp_path: Path) -> None:
    for mode in ("healthy", "length"):
        place_run(mode, tmp_path)
    found = benchmark.repairs(benchmark.runs(tmp_path), tmp_path / "fixed")
    (run,) = found["runs"]
    assert (run["cause"], run["changes"], run["heals"]) == ("reward_hacking", (), False)
    assert found["healed by the changes of the first cause"][:2] == [0, 0]
    assert not list((tmp_path / "fixed").glob("*.yaml"))


def test_the_sets_to_study_share_no_run_with_the_final_one(benchmark: ModuleType) -> None:
    sets = sys.modules["collapses"].SETS
    places = {name: {(run.hidden, run.layers, run.task, run.seed) for run in runs} for name, runs in sets.items()}
    assert not places["final"] & (places["tuning"] | places["studied"])
    modes, judged = benchmark.MODES, sys.modules["collapses._sets"].JUDGED
    strong = {repr(modes[r.mode].faults[r.strength]) for r in sets["final"] if r.strength > 0}
    assert not strong & {repr(modes[r.mode].faults[r.strength]) for r in sets["studied"] if r.mode not in judged}


def test_weights_of_few_bits_have_few_levels(benchmark: ModuleType) -> None:
    engine = sys.modules["collapses._engine"]
    weights = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    changed = engine.quantised("w", weights, bits=3)
    assert all(len(row.unique()) <= 7 for row in changed)
    assert (changed - weights).abs().max() <= weights.abs().amax() / 6 + 1e-6
    assert engine.noisy_routers("mlp.up_proj.weight", weights, size=1.0) is weights
    assert not torch.equal(engine.noisy_routers("layers.0.mlp.gate.weight", weights, size=1.0), weights)
