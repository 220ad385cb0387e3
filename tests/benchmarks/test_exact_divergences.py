"""The benchmark of exact divergences runs, computes what the host computes, and writes figures that add up."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "exact_divergences.py"


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    file = tmp_path_factory.mktemp("benchmark") / "figures.json"
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--json", str(file)]
    command += ["--rounds", "1", "--shapes", "32x1000x16", "8x64x4"]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=SCRIPT.parents[1], env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert "not measured: liger: JSD alone (needs CUDA, the device is cpu)" in done.stdout
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def test_every_shape_has_every_pass(figures: dict[str, Any]) -> None:
    assert [result["shape"] for result in figures["results"]] == ["32x1000x16", "8x64x4"]
    for result in figures["results"]:
        assert {name.split(":")[0] for name in result["passes"]} == {"host", "rlstab", "logits"}
        for found in result["passes"].values():
            assert 0 < found["min"] <= found["matmuls"] <= found["max"]


def test_host_and_rlstab_compute_the_same(figures: dict[str, Any]) -> None:
    for result in figures["results"]:
        assert result["difference"]["values"] < 1e-4
        assert result["difference"]["gradients"] < 1e-4


def test_goals_are_those_of_the_table(figures: dict[str, Any]) -> None:
    for result in figures["results"]:
        rows, goals = result["passes"], result["goals"]
        assert goals["matmuls with one divergence"] == rows["rlstab: + reverse KL"]["matmuls"]
        assert goals["share of the host's time"] == pytest.approx(
            rows["rlstab: + reverse KL"]["matmuls"] / rows["host: + reverse KL"]["matmuls"]
        )
        assert goals["share of the matmul rate"] == pytest.approx(6 / goals["matmuls with one divergence"])


def test_machine_versions_date_and_command_are_noted(figures: dict[str, Any]) -> None:
    noted = {"date", "command", "device", "cpu", "cores", "threads", "python", "torch", "trl", "rlstab"}
    assert noted <= figures["machine"].keys()
