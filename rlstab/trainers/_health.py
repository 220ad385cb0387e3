"""What the host and its optimizer know already: logged metrics as they come, and the state of Adam's updates."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from rlstab.errors import SchemaError
from rlstab.schema import signal
from rlstab.trainers._taps import local
from rlstab.trainers._watch_host import TrlTrainer

__all__ = ["HostMetrics", "adam_health", "schema_key"]

RENAMED = {"entropy": "policy/entropy"}
EVALUATION = "eval_"
TENSORS, ELEMENTS = 16, 4096


@cache
def schema_key(host_key: str) -> str | None:
    """The schema's key of a metric of the host; None for one that the schema does not know.

    >>> schema_key("reward"), schema_key("eval_reward"), schema_key("rewards/chosen/of/mine")
    ('train/reward', 'eval/reward', None)
    """
    key = RENAMED.get(host_key, host_key if "/" in host_key else f"train/{host_key}")
    if host_key.startswith(EVALUATION):
        key = f"eval/{host_key.removeprefix(EVALUATION)}"
    try:
        return signal(key).key
    except SchemaError:
        return None


class HostMetrics:
    """Metrics that a trainer of TRL has appended since the step began; they are those of all ranks already."""

    def __init__(self, trainer: Any) -> None:
        self._logged: Mapping[str, list[float]] = trainer._metrics["train"] if isinstance(trainer, TrlTrainer) else {}
        self._before: dict[str, int] = {}

    def open_step(self) -> None:
        """Note what is there."""
        self._before = {key: len(values) for key, values in self._logged.items()}

    def collect(self) -> dict[str, float]:
        """Means of what the step's micro-batches appended, by schema key."""
        named = {key: values[self._before.get(key, 0) :] for key, values in self._logged.items()}
        return {ours: sum(new) / len(new) for key, new in named.items() if new and (ours := schema_key(key))}


@torch.no_grad()
def adam_health(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Size, shape and direction of Adam's last update, from its moments; nothing for other optimizers.

    u = m̂ / (√v̂ + ε) at ≤ 4096 elements, evenly spaced, of ≤ 16 tensors, evenly spaced. To be called after the step of
    the optimizer and before its gradients are set to zero.

    Returns:
        0-dim tensors by schema key (`optimizer/...`).

    >>> weight = torch.nn.Parameter(torch.zeros(4))
    >>> adam = torch.optim.Adam([weight])
    >>> weight.grad = torch.ones(4)
    >>> adam.step()
    >>> round(float(adam_health(adam)["optimizer/rms_update"]), 4)
    1.0
    """
    held = [
        (group, parameter)
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter.grad is not None and "exp_avg_sq" in optimizer.state.get(parameter, {})
    ]
    if not held:
        return {}
    sampled = islice(held, 0, None, -(-len(held) // TENSORS))
    parts = [_adam_update(group, parameter, optimizer.state[parameter]) for group, parameter in sampled]
    u, g, below = (torch.cat(column) for column in zip(*parts, strict=True))
    centred = u - u.mean()
    variance = centred.square().mean()
    skewness = centred.pow(3).mean() / variance.pow(1.5)
    kurtosis = centred.pow(4).mean() / variance.square()
    return {
        "optimizer/rms_update": u.square().mean().sqrt(),
        "optimizer/below_eps": below.float().mean(),
        "optimizer/bimodality": (skewness.square() + 1) / kurtosis,
        "optimizer/cosine": torch.nn.functional.cosine_similarity(u, g, dim=0),
    }


def _adam_update(group: Mapping[str, Any], parameter: Tensor, state: Mapping[str, Any]) -> tuple[Tensor, ...]:
    """Update, gradient, and whether ε shrinks the update, at sampled elements."""
    assert parameter.grad is not None
    stride = -(-local(parameter).numel() // ELEMENTS)
    flat = (local(t).reshape(-1)[::stride].float() for t in (state["exp_avg"], state["exp_avg_sq"], parameter.grad))
    first, second, gradient = flat
    step = torch.as_tensor(state["step"], dtype=torch.float32, device=first.device)
    beta1, beta2 = group["betas"]
    root = (second / (1 - beta2**step)).sqrt()
    return first / (1 - beta1**step) / (root + group["eps"]), gradient, root < 10 * group["eps"]
