"""The benchmark of what watching costs runs, and what it times is the same training."""

import json
from pathlib import Path

from running import output_of


def test_watched_and_alone_end_with_the_same_weights(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    sizes = ["--models", "tiny", "--rounds", "1", "--steps", "2"]
    assert "watched / alone" in output_of("benchmarks/watch_overhead.py", *sizes, "--json", file)
    (row,) = json.loads(file.read_text())["watch"]
    assert row["identical"]
    assert row["ratio"] > 0.3
    assert row["parameters"] > 80_000
