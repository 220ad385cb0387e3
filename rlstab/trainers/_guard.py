"""The guard: snapshots of a healthy run in memory, and the way back to one."""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rlstab.errors import ConfigError

__all__ = ["Guard", "Ring", "Snapshot", "restore", "take"]


@dataclass(frozen=True, kw_only=True)
class Guard:
    """How a run is guarded: snapshots while it is healthy, and going back to one when a rule asks for it.

    Going back restores, in place, the trained weights and buffers, the optimizer, the learning-rate schedule, the
    controllers of the objective, the detectors and the generators of random numbers. The data and the step count go
    forward, so that the batch that did the harm is not met again; rollouts in use are dropped.

    Args:
        every: optimizer steps between snapshots.
        keep: snapshots kept, the newest ones; each takes the memory of the trained weights and the optimizer, in the
            CPU's memory.
        most: how often a run may go back; when a rule asks once more, the run is stopped.

    Raises:
        ConfigError: a number is below 1.

    >>> Guard(every=10).keep
    3
    """

    every: int = 25
    keep: int = 3
    most: int = 3

    def __post_init__(self) -> None:
        for name, value in (("every", self.every), ("keep", self.keep), ("most", self.most)):
            if value < 1:
                raise ConfigError(f"Guard.{name}: expected at least 1, got {value}")


class _Moment(NamedTuple):
    """A copy of one entry of the optimizer's state, and the device it belongs on; None for what is no tensor."""

    value: Any
    device: torch.device | None


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A run at the end of one optimizer step; tensors are copies in the CPU's memory."""

    step: int
    weights: dict[str, Tensor]
    moments: list[tuple[Tensor, dict[str, _Moment]]]
    groups: list[dict[str, Any]]
    scheduler: dict[str, Any]
    generators: dict[str, Any]
    extra: dict[str, Any]


@torch.no_grad()
def take(step: int, model: nn.Module, optimizer: Optimizer, scheduler: Any, extra: Mapping[str, Any]) -> Snapshot:
    """Copy the state of a run.

    Args:
        step: optimizer step it has finished.
        model: what is trained; frozen parameters are left out.
        optimizer: its moments and settings.
        scheduler: of the learning rate.
        extra: further state, copied deeply.
    """
    return Snapshot(
        step=step,
        weights={name: tensor.detach().to("cpu", copy=True) for name, tensor in _state_tensors(model).items()},
        moments=[(parameter, {k: _moment(v) for k, v in held.items()}) for parameter, held in optimizer.state.items()],
        groups=[copy.deepcopy({k: v for k, v in group.items() if k != "params"}) for group in optimizer.param_groups],
        scheduler=copy.deepcopy(scheduler.state_dict()),
        generators=_generators(),
        extra=copy.deepcopy(dict(extra)),
    )


@torch.no_grad()
def restore(snapshot: Snapshot, model: nn.Module, optimizer: Optimizer, scheduler: Any) -> None:
    """Put a run back, in place: every tensor stays the object it is. What `extra` holds is for the caller."""
    for name, tensor in _state_tensors(model).items():
        tensor.copy_(snapshot.weights[name])
    optimizer.state.clear()
    for parameter, state in snapshot.moments:
        optimizer.state[parameter] = {key: _back(moment) for key, moment in state.items()}
    for group, saved in zip(optimizer.param_groups, snapshot.groups, strict=True):
        group.update(copy.deepcopy(saved))
    scheduler.load_state_dict(copy.deepcopy(snapshot.scheduler))
    _set_generators(snapshot.generators)


class Ring:
    """The newest snapshots of a healthy run."""

    def __init__(self, keep: int) -> None:
        self._keep = keep
        self._snapshots: list[Snapshot] = []

    @property
    def steps(self) -> list[int]:
        """The steps of the snapshots, oldest first."""
        return [snapshot.step for snapshot in self._snapshots]

    def add(self, snapshot: Snapshot) -> None:
        """Keep one more, and let the oldest go."""
        self._snapshots = [*self._snapshots, snapshot][-self._keep :]

    def before(self, step: int) -> Snapshot:
        """Take out the newest snapshot from before a step, and those after it: who comes again goes further back.

        The oldest stays, whatever its step.
        """
        healthy = [snapshot for snapshot in self._snapshots if snapshot.step < step] or self._snapshots[:1]
        self._snapshots = healthy[:-1] or healthy
        return healthy[-1]


def _state_tensors(model: nn.Module) -> dict[str, Tensor]:
    trained = {name: p.data for name, p in model.named_parameters() if p.requires_grad}
    return trained | dict(model.named_buffers())


def _moment(value: Any) -> _Moment:
    if isinstance(value, Tensor):
        return _Moment(value.detach().to("cpu", copy=True), value.device)
    return _Moment(copy.deepcopy(value), None)


def _back(moment: _Moment) -> Any:
    value, device = moment
    return copy.deepcopy(value) if device is None else value.to(device, copy=True)


def _generators() -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),  # the one that libraries draw from
        "torch": torch.get_rng_state(),
        "cuda": cuda,
    }


def _set_generators(state: Mapping[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
