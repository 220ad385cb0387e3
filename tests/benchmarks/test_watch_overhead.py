"""The benchmark of what watching costs runs, and what it times is the same training."""

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "watch_overhead.py"


def test_watched_and_alone_end_with_the_same_weights(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    command = [sys.executable, str(SCRIPT), "--models", "tiny", "--rounds", "1", "--steps", "2", "--json", str(file)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=SCRIPT.parents[1], env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert "watched / alone" in done.stdout
    (row,) = json.loads(file.read_text())["watch"]
    assert row["identical"]
    assert row["ratio"] > 0.3
    assert row["parameters"] > 80_000
