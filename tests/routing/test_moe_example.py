"""The example and the benchmark of routing run, and print what they promise."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from running import ROOT, output_of

from rlstab.models import tiny_moe, tiny_tokenizer


def test_example() -> None:
    text = output_of("examples/moe_replay.py", "2")
    lines = [line.strip() for line in text.splitlines() if line.startswith(("replay=", "  "))]
    assert [line for line in lines if line.startswith("replay=")] == ["replay=None", "replay=R3"]
    flips = [line.split()[1] for line in lines if line.startswith("routes/flip_share")]
    assert flips[1] == "0.0e+00"


def test_benchmark(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    sizes = ["--models", "gentle", "--seeds", "1", "--prompts", "8", "--warmup", "2"]
    text = output_of("benchmarks/moe_mismatch.py", "--parts", "static", *sizes, "--json", str(file))
    assert "router noise 0.3" in text
    rows = json.loads(file.read_text())["static"]
    flips = {row["engine"]: row["flips_native"] for row in rows}
    assert all(row["flips_replayed"] == 0 for row in rows)
    assert all(0 <= row["on_worst"] < row["on_reached"] <= 1 for row in rows if row["flips_native"] > 0.1)
    assert flips["router's inputs in bf16"] < flips["router noise 0.01"] < flips["router noise 0.1"]
    assert 0.1 < flips["router noise 0.1"] < flips["router noise 0.3"] < flips["router noise 1"]


def test_benchmark_of_the_recipes_goes_on_where_it_was(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    curves = {"reward": [0.5], "k3": [0.1], "flips": [0.2], "clipped": [0.3]}
    known = {"setting": "stale", "arm": "GRPO", "seed": 0, "pass_at_1": 0.125, "curves": curves}
    file.write_text(json.dumps({"runs": [known]}))
    sizes = ["--settings", "stale", "--seeds", "1", "--steps", "2", "--rows", "16", "--warmup", "2"]
    arms = ["--arms", "GRPO", "GRPO + R2"]
    text = output_of("benchmarks/moe_recipes.py", *sizes, *arms, "--json", str(file), "--plot", str(tmp_path / "a.png"))
    assert "0.12" in text
    first, second = json.loads(file.read_text())["runs"]
    assert first == known
    assert second["curves"]["flips"] == [0.0, 0.0]
    assert len(second["curves"]["own_flips"]) == 2
    assert (tmp_path / "a.png").stat().st_size > 10_000


def test_the_guide_replays_outside_a_trainer() -> None:
    text = (ROOT / "docs/guide/moe.md").read_text()
    (block,) = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    model = tiny_moe(tiny_tokenizer("01"))
    names: dict[str, Any] = {"model": model, "batch": {"input_ids": torch.tensor([[3, 4, 3]])}}
    exec(block, names)
    assert names["routes"].experts.shape == (1, 3, 2, 2)
    assert all(router.modules[0].get_parameter("weight").grad is not None for router in names["routers"].routers)
