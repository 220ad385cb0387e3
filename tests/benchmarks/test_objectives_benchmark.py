"""The benchmark of objectives runs what is not there yet, keeps its runs, and writes figures."""

import json
from pathlib import Path
from typing import Any

from running import output_of

SMALLEST = ["--seeds", "1", "--steps", "2", "--rows", "16", "--warm-up", "2"]
KEPT = {
    "demonstrations": {"none", "SFT", "DFT"},
    "spikes": {"no clip", "clip 1", "clip 30", "Stable-SPAM"},
}
MADE = {"demonstrations": "TrSFT", "spikes": "ZClip"}


def test_runs_are_kept_and_told(tmp_path: Path) -> None:
    before = {"pass@1": 0.5, "entropy": 0.25}
    for suite, arms in KEPT.items():
        for arm in arms:
            (tmp_path / f"{suite}-{arm}-2-16-2-0.json".replace(" ", "_")).write_text(json.dumps(before))
    file = tmp_path / "figures.json"
    output_of("benchmarks/objectives.py", "--runs", tmp_path, "--json", file, *SMALLEST, "--suites", *KEPT)
    figures: dict[str, Any] = json.loads(file.read_text())
    for suite, arms in KEPT.items():
        assert figures[suite].keys() == {*arms, MADE[suite]}
        assert all(figures[suite][arm]["0"] == before for arm in arms)
        made = figures[suite][MADE[suite]]["0"]
        assert 0 <= made["pass@1"] <= 1
        assert made.keys() > before.keys()
        assert (tmp_path / f"{suite}-{MADE[suite]}-2-16-2-0.json").is_file()
