"""A training loop of its own, and snapshots of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from rlstab.trainers._guard import Snapshot, take
from rlstab.trainers._weights import Copies

__all__ = ["Loop", "snapshot_at"]


class Loop:
    """A training loop whose every step draws random numbers."""

    def __init__(self, make: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW, **arguments: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1))
        self.model[0].bias.requires_grad_(False)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = make([{"params": trained[:2]}, {"params": trained[2:], "lr": 0.05}], lr=0.1, **arguments)
        self.scheduler = LambdaLR(self.optimizer, lambda step: 1 / (1 + step))

    def run(self, steps: int) -> list[float]:
        losses = []
        for _ in range(steps):
            self.optimizer.zero_grad()
            loss = self.model(torch.randn(16, 4)).square().mean()
            loss.backward()
            self.optimizer.step()
            self.scheduler.step()
            losses.append(loss.item())
        return losses

    def state(self) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in self.model.state_dict().items()}


def snapshot_at(step: int, scores: Mapping[str, float] = MappingProxyType({})) -> Snapshot:
    run = Loop()
    run.run(1)
    return take(
        step,
        Copies(run.model, run.optimizer),
        run.optimizer,
        run.scheduler,
        {"products": {"learning_rate": 0.5}},
        scores=scores,
    )
