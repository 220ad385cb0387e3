"""Worked examples of policy losses: inputs, hyperparameters and expected numbers (`tests/vectors`)."""

import json
from pathlib import Path
from typing import Any

import torch

from rlstab.batch import TokenBatch
from rlstab.losses import Objective

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


def vector_batch(inputs: dict[str, Any], **changes: Any) -> tuple[TokenBatch, torch.Tensor]:
    """The batch of a worked example, and the policy's log-probs to take the gradient with respect to."""
    logp = double(inputs["logp"]).requires_grad_()
    sources = {"old_logp": "old", "ref_logp": "initial", "rollout_logp": "sampler"}
    logps = {source: double(inputs[key]) for key, source in sources.items() if key in inputs}
    fields: dict[str, Any] = {"mask": torch.tensor(inputs["mask"]), "logps": {"policy": logp, **logps}}
    if "advantages" in inputs:
        fields["advantages"] = double(inputs["advantages"])
    return TokenBatch(**{**fields, **changes}), logp


def check_vector(objective: Objective, vector: dict[str, Any], **changes: Any) -> None:
    """Assert that the objective has the loss and the gradient of a worked example."""
    batch, logp = vector_batch(vector["inputs"], **changes)
    loss = objective(batch).loss
    loss.backward()
    torch.testing.assert_close(loss.detach(), double(vector["expected"]["loss"]), rtol=0, atol=1e-12)
    torch.testing.assert_close(logp.grad, double(vector["expected"]["grad"]), rtol=0, atol=1e-12)
