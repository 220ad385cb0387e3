"""The guard: snapshots of a healthy run, and the way back to one."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from rlstab.errors import ConfigError
from rlstab.trainers._taps import local
from rlstab.trainers._under import under

__all__ = ["Guard", "Snapshot", "restore", "take"]


@dataclass(frozen=True, kw_only=True)
class Guard:
    """How a run is guarded: snapshots while it is healthy, and going back to one when a rule asks for it.

    Going back restores, in place, the trained weights and buffers, the optimizer, the learning-rate schedule, the
    controllers of the objective, references that have moved, the detectors and the generators of random numbers. The
    data and the step count go forward, so that the batch that did the harm is not met again; rollouts in use or begun
    ahead of time are dropped, and the sampler gets the restored weights, verified as at every sync, before it samples
    again.

    A snapshot is taken every so many steps and after an evaluation, unless a rule is raised that skips steps, goes back
    or stops; a warning alone, which may stay open for long, does not keep one from being taken. The best one stays,
    however old it is: by held-out scores where they are known, else by the mean reward since the snapshot before. A
    rule that asks for going back says since when its signal is out of order, and the newest snapshot from before that
    is restored, which is used up unless it is the best.

    The ring of snapshots and the number of rollbacks left are part of every checkpoint. Where FSDP2 spreads the weights
    over ranks, each rank keeps its own shards.

    Args:
        every: optimizer steps between snapshots.
        keep: snapshots kept, the best one and the newest ones; each takes the memory of the trained weights, the
            optimizer and references that have moved.
        most: how often a run may go back and on; when a rule asks once more, it goes back and is stopped there.
        settle: steps after going back in which no rule is heard that asks for it again: a sampler may be that many
            updates behind, and hold weights that are gone.
        folder: where snapshots are kept instead of the CPU's memory, one file per process and snapshot; a file is whole
            or absent, whenever the process is killed. Those of an earlier run or attempt are removed.
        checkpoints: write the ring into checkpoints; without, a resumed run begins with a ring of its own.

    Raises:
        ConfigError: a number is below 1, or `settle` below 0.

    >>> Guard(every=10).keep
    4
    """

    every: int = 25
    keep: int = 4
    most: int = 3
    settle: int = 20
    folder: str | Path | None = None
    checkpoints: bool = True

    def __post_init__(self) -> None:
        for name, value in (("every", self.every), ("keep", self.keep), ("most", self.most)):
            if value < 1:
                raise ConfigError(f"Guard.{name}: expected at least 1, got {value}")
        if self.settle < 0:
            raise ConfigError(f"Guard.settle: expected at least 0, got {self.settle}")


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A run at the end of one optimizer step, of one rank; tensors are copies in the CPU's memory.

    Args:
        step: the step.
        tensors: by name: `weights/NAME`, `moments/GROUP/PLACE/KEY`, `generator/NAME`, `beside/NAME`.
        values: made of JSON's types: settings of the optimizer, the schedule, generators, and what else belongs to it.
    """

    step: int
    tensors: dict[str, Tensor]
    values: dict[str, Any]

    @property
    def extra(self) -> dict[str, Any]:
        """What the caller of `take` added."""
        extra: dict[str, Any] = self.values["extra"]
        return extra

    @property
    def beside(self) -> dict[str, Tensor]:
        """The tensors that the caller of `take` added."""
        return under("beside/", self.tensors)

    @property
    def scores(self) -> dict[str, float]:
        """How good the policy was, by schema key."""
        return dict(self.values["scores"])


@torch.no_grad()
def take(
    step: int,
    model: nn.Module,
    optimizer: Optimizer,
    scheduler: Any,
    extra: Mapping[str, Any],
    *,
    beside: Mapping[str, Tensor] = MappingProxyType({}),
    scores: Mapping[str, float] = MappingProxyType({}),
) -> Snapshot:
    """Copy the state of a run.

    Args:
        step: optimizer step it has finished.
        model: what is trained; frozen parameters are left out.
        optimizer: its moments and settings.
        scheduler: of the learning rate.
        extra: further state, made of JSON's types.
        beside: further tensors, on the CPU, that nobody writes to any more.
        scores: how good the policy is, by schema key.
    """
    tensors = {f"weights/{name}": tensor for name, tensor in _state_tensors(model).items()}
    moments = {f"moments/{place}/{key}": value for place, key, value in _moments(optimizer)}
    tensors |= {name: local(value) for name, value in moments.items() if isinstance(value, Tensor)}
    tensors |= {f"generator/{name}": state for name, state in _generators().items()}
    values = {
        "moments": {name: value for name, value in moments.items() if not isinstance(value, Tensor)},
        "devices": {name: str(value.device) for name, value in moments.items() if isinstance(value, Tensor)},
        "groups": [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups],
        "scheduler": scheduler.state_dict(),
        "python": random.getstate(),
        "extra": dict(extra),
        "scores": dict(scores),
    }
    held = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
    held |= {f"beside/{name}": tensor for name, tensor in beside.items()}
    return Snapshot(step=step, tensors=held, values=copy.deepcopy(values))


@torch.no_grad()
def restore(snapshot: Snapshot, model: nn.Module, optimizer: Optimizer, scheduler: Any) -> None:
    """Put a run back, in place: every tensor of it stays the object it is. What `extra` holds is for the caller."""
    tensors, values = snapshot.tensors, copy.deepcopy(snapshot.values)
    for name, tensor in _state_tensors(model).items():
        tensor.copy_(tensors[f"weights/{name}"])
    _restore_moments(optimizer, {**tensors, **values["moments"]}, values["devices"])
    for group, saved in zip(optimizer.param_groups, values["groups"], strict=True):
        group.update({key: tuple(v) if isinstance(group.get(key), tuple) else v for key, v in saved.items()})
    scheduler.load_state_dict(values["scheduler"])
    _set_generators(values["python"], under("generator/", tensors))


def _state_tensors(model: nn.Module) -> dict[str, Tensor]:
    trained = {name: local(p.data) for name, p in model.named_parameters() if p.requires_grad}
    return trained | {name: local(buffer) for name, buffer in model.named_buffers()}


def _places(optimizer: Optimizer) -> Iterator[tuple[str, Tensor]]:
    for i, group in enumerate(optimizer.param_groups):
        for j, parameter in enumerate(group["params"]):
            yield f"{i}/{j}", parameter


def _moments(optimizer: Optimizer) -> Iterator[tuple[str, str, Any]]:
    for place, parameter in _places(optimizer):
        for key, value in optimizer.state.get(parameter, {}).items():
            yield place, key, value


def _restore_moments(optimizer: Optimizer, saved: Mapping[str, Any], devices: Mapping[str, str]) -> None:
    by_place: dict[str, dict[str, Any]] = {}
    for name, value in under("moments/", saved).items():
        place, key = name.rsplit("/", 1)
        by_place.setdefault(place, {})[key] = value
    for place, parameter in _places(optimizer):
        held = optimizer.state.pop(parameter, {})
        if place in by_place:
            optimizer.state[parameter] = {
                key: _filled(held.get(key), value, parameter, devices.get(f"moments/{place}/{key}", "cpu"))
                for key, value in by_place[place].items()
            }


def _filled(held: Any, value: Any, parameter: Tensor, device: str) -> Any:
    """A moment: the tensor that is there, filled; else one made on its device, sharded as the parameter is."""
    if not isinstance(value, Tensor):
        return value
    if isinstance(held, Tensor) and local(held).shape == value.shape:
        local(held).copy_(value)
        return held
    made = value.to(device, copy=True)
    if isinstance(parameter, DTensor) and value.shape == parameter.to_local().shape:
        return DTensor.from_local(made, parameter.device_mesh, parameter.placements)
    return made


def _generators() -> dict[str, Tensor]:
    _, keys, *rest = np.random.get_state()  # the one that libraries draw from
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {
        "numpy": torch.tensor([*np.asarray(keys).tolist(), *rest[:2]], dtype=torch.int64),
        "numpy_spare": torch.tensor(rest[2], dtype=torch.float64),
        "torch": torch.get_rng_state(),
        **{f"cuda/{i}": state for i, state in enumerate(cuda)},
    }


def _set_generators(python: Sequence[Any], tensors: Mapping[str, Tensor]) -> None:
    version, internal, spare = python
    random.setstate((version, tuple(internal), spare))
    *keys, position, has_spare = tensors["numpy"].tolist()
    state = ("MT19937", np.array(keys, dtype=np.uint32), position, has_spare, float(tensors["numpy_spare"]))
    np.random.set_state(state)
    torch.set_rng_state(tensors["torch"])
    if cuda := [tensors[name] for name in sorted(tensors, key=_place) if name.startswith("cuda/")]:
        torch.cuda.set_rng_state_all(cuda)


def _place(name: str) -> int:
    last = name.rpartition("/")[2]
    return int(last) if last.isdigit() else -1
