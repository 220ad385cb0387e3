"""The example and the benchmark of routing run, and print what they promise."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from rlstab.models import tiny_moe, tiny_tokenizer

ROOT = Path(__file__).resolve().parents[2]


def output_of(script: str, *arguments: str) -> str:
    run = subprocess.run(
        [sys.executable, "-W", "error:::rlstab", ROOT / script, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return run.stdout


def test_example() -> None:
    text = output_of("examples/moe_replay.py", "2")
    lines = [line.strip() for line in text.splitlines() if line.startswith(("replay=", "  "))]
    assert [line for line in lines if line.startswith("replay=")] == ["replay=None", "replay=R3"]
    flips = [line.split()[1] for line in lines if line.startswith("routes/flip_share")]
    assert flips[1] == "0.0e+00"


def test_benchmark(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    sizes = ["--seeds", "1", "--prompts", "8", "--warmup", "2"]
    text = output_of("benchmarks/moe_mismatch.py", "--parts", "static", *sizes, "--json", str(file))
    assert "router noise 0.3" in text
    for row in json.loads(file.read_text())["static"]:
        assert row["flips_replayed"] == 0
        assert (row["flips_native"] > 0.1) == row["engine"].startswith("router noise")


def test_the_guide_replays_outside_a_trainer() -> None:
    text = (ROOT / "docs/guide/moe.md").read_text()
    (block,) = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    model = tiny_moe(tiny_tokenizer("01"))
    names: dict[str, Any] = {"model": model, "batch": {"input_ids": torch.tensor([[3, 4, 3]])}}
    exec(block, names)
    assert names["routes"].experts.shape == (1, 3, 2, 2)
    assert all(router.modules[0].get_parameter("weight").grad is not None for router in names["routers"].routers)
