"""How snapshots hold weights and moments: each process copies of its own, or all together a checkpoint."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from rlstab.trainers._taps import local
from rlstab.trainers._under import under

__all__ = ["WEIGHTS", "Copies", "Held", "Weights", "weights_folder"]

WEIGHTS = ".weights"


class Held(NamedTuple):
    """What goes into the snapshot itself: tensors in the CPU's memory, and values made of JSON's types."""

    tensors: dict[str, Tensor]
    values: dict[str, Any]


class Weights(ABC):
    """The trained weights, the buffers and the optimizer's moments of a run, as its snapshots hold them."""

    @abstractmethod
    def take(self, step: int) -> Held:
        """Hold them as they are at the end of a step, on all processes at once."""

    @abstractmethod
    def put_back(self, step: int, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Bring them back to what a step ended with, on all processes at once.

        Args:
            step: the step.
            tensors: those of the snapshot, with what `take` gave.
            values: likewise.
        """


class Copies(Weights):
    """Copies of what this process has, put back in place: every tensor of the run stays the object it is.

    Args:
        model: what is trained; frozen parameters are left out.
        optimizer: its moments.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        self._model, self._optimizer = model, optimizer

    def take(self, step: int) -> Held:
        """Copy them."""
        tensors = {f"weights/{name}": tensor for name, tensor in _state_tensors(self._model).items()}
        moments = {f"moments/{place}/{key}": value for place, key, value in _moments(self._optimizer)}
        tensors |= {name: local(value) for name, value in moments.items() if isinstance(value, Tensor)}
        values = {
            "moments": {name: value for name, value in moments.items() if not isinstance(value, Tensor)},
            "devices": {name: str(value.device) for name, value in moments.items() if isinstance(value, Tensor)},
        }
        return Held({name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}, values)

    def put_back(self, step: int, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Fill the run's own tensors with the copies."""
        for name, tensor in _state_tensors(self._model).items():
            tensor.copy_(tensors[f"weights/{name}"])
        _restore_moments(self._optimizer, {**tensors, **values["moments"]}, values["devices"])


def weights_folder(folder: Path, step: int) -> Path:
    """Where the weights of a snapshot stand that all processes have written together, beside the file of each."""
    return folder / f"step-{step:08d}{WEIGHTS}"


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
