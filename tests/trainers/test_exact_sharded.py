"""Two processes whose models FSDP2 has sharded: heads are gathered, and gradients are those of whole models."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from equality import gradient_distance

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What both have found."""
    folder = tmp_path_factory.mktemp("sharded")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), str(HERE)])}
    ended = subprocess.run(
        [*command, str(HERE / "sharded_ranks.py"), str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-4000:]
    return [torch.load(folder / f"sharded-{rank}.pt", weights_only=False) for rank in (0, 1)]


@pytest.mark.parametrize("head", ["tied", "untied", "adapter"])
def test_the_gradient_is_that_of_whole_models(ranks: list[Any], head: str) -> None:
    for found in ranks:
        ours, whole = found[head]
        assert gradient_distance(ours, whole) <= 1e-5
        assert any(gradient.any() for gradient in whole.values())
