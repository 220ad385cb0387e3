"""The benchmark of early warnings finds the harm, the alarm before it, and the quiet of a healthy run."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlstab.record import RunFolder

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "early_warning.py"


def write(folder: Path, *, fault: str, steps: int = 90) -> None:
    """A run that learns; `staleness` comes apart from its sampler and falls, `nan_forward` ends in NaN."""
    rng = np.random.default_rng(len(fault))
    run = RunFolder.create(folder / f"{fault}-3", config_text="seed: 3")
    for step in range(1, steps):
        learned = 0.9 - 0.5 * math.exp(-step / 20)
        stale = fault == "staleness"
        values = {
            "train/reward": learned * (0.3 if stale and step > 60 else 1.0) + 0.02 * float(rng.normal()),
            "policy/entropy": 0.2 + 0.4 * math.exp(-step / 20),
            "train/grad_norm": math.exp(0.2 * float(rng.normal())),
            "objective/loss": math.nan if fault == "nan_forward" and step == 40 else float(rng.normal()),
            "mismatch/k3": 1e-10 if not stale else 1e-3 * math.exp(step / 8),
        }
        run.append_metrics(step, values)


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("runs")
    for fault in ("healthy", "staleness", "nan_forward"):
        write(folder, fault=fault)
    command = [sys.executable, str(SCRIPT), str(folder), "--json", str(folder / "out.json")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=SCRIPT.parents[1], check=False)
    assert done.returncode == 0, done.stderr
    assert "harms warned of in time" in done.stdout
    assert "alarms per 1000 steps of the controls: 0.00 (0 in 89)" in done.stdout
    return {row["fault"]: row for row in json.loads((folder / "out.json").read_text())}


def test_a_healthy_run_has_neither_harm_nor_alarm(verdicts: dict[str, dict[str, Any]]) -> None:
    assert (verdicts["healthy"]["harm"], verdicts["healthy"]["alarms"]) == (None, 0)
    assert verdicts["healthy"]["first"]["entropy < half its start"] is not None


def test_the_warning_comes_before_the_harm(verdicts: dict[str, dict[str, Any]]) -> None:
    row = verdicts["staleness"]
    assert 60 < row["harm"] <= 70
    assert 40 <= row["first"]["rules"] < 60
    assert row["first"]["gradient norm > 5"] is None


def test_what_is_not_finite_is_a_harm_at_its_step(verdicts: dict[str, dict[str, Any]]) -> None:
    assert (verdicts["nan_forward"]["harm"], verdicts["nan_forward"]["first"]["rules"]) == (40, 40)
