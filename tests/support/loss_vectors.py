"""Worked examples of policy losses: inputs, hyperparameters and expected numbers (`tests/vectors`)."""

import json
from pathlib import Path
from typing import Any

import torch

FILE = Path(__file__).parents[1] / "vectors" / "policy_losses.json"


def vectors(method: str) -> list[dict[str, Any]]:
    """The examples of one method."""
    found = [v for v in json.loads(FILE.read_text())["vectors"] if v["method"] == method]
    assert found, method
    return found


def double(value: Any) -> torch.Tensor:
    """Numbers as float64."""
    return torch.as_tensor(value, dtype=torch.float64)


def row_mask(lengths: list[int]) -> torch.Tensor:
    """The mask of right-padded rows."""
    return torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(-1)
