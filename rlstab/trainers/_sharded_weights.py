"""Weights that only their owner can put back: FSDP1's and DeepSpeed's go through a checkpoint of its own."""

from __future__ import annotations

import shutil
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import DistributedType, PartialState
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from rlstab.errors import ConfigError, RecordError
from rlstab.trainers._weights import Held, Weights, weights_folder

__all__ = ["in_place", "shards_of"]

TAG = "all"  # a folder of DeepSpeed's holds checkpoints by name, ours a single one


def in_place(model: nn.Module) -> bool:
    """Whether each process can put back what it holds of the weights, as without sharding and under FSDP2.

    Args:
        model: what is trained, once it is prepared.
    """
    kind = AcceleratorState().distributed_type
    fsdp2 = any(isinstance(parameter, DTensor) for parameter in model.parameters())
    return kind != DistributedType.DEEPSPEED and (kind != DistributedType.FSDP or fsdp2)


def shards_of(model: nn.Module, optimizer: Optimizer, trainer: Any, folder: Path) -> Weights:
    """How snapshots hold weights that cannot be put back in place.

    Args:
        model: what is trained, once it is prepared.
        optimizer: likewise.
        trainer: whose they are; None where nothing is attached to one.
        folder: of the snapshots.

    Raises:
        ConfigError: nothing is attached to the trainer, and only it knows DeepSpeed's engine.
    """
    if AcceleratorState().distributed_type == DistributedType.FSDP:
        return FlatShards(model, optimizer, folder)
    if trainer is None:
        raise ConfigError(
            "guard: a plain callback is not shown DeepSpeed's engine, which alone can put weights back: attach the "
            "watch with rlstab.watch(trainer, guard=...)"
        )
    return EngineShards(trainer.model_wrapped, folder)


class Shards(Weights):
    """Weights in a folder that all processes write and read together; it is whole or absent, whenever one is killed.

    Args:
        folder: of the snapshots, one that all processes see.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @abstractmethod
    def write(self, path: Path) -> dict[str, Any]:
        """Write a checkpoint into an empty folder; returns what goes into the snapshot, made of JSON's types."""

    @abstractmethod
    def read(self, path: Path, values: Mapping[str, Any]) -> None:
        """Load one, with what `write` returned."""

    def take(self, step: int) -> Held:
        """Write them beside, and rename the folder once all processes are done."""
        state, path = PartialState(), weights_folder(self._folder, step)
        new = path.with_name(f"new.{path.name}")
        if state.is_main_process:
            for old in (path, new):
                shutil.rmtree(old, ignore_errors=True)
            new.mkdir(parents=True)
        state.wait_for_everyone()
        self._check_seen(new)
        values = self.write(new)
        state.wait_for_everyone()
        if state.is_main_process:
            new.rename(path)
        state.wait_for_everyone()
        return Held({}, values)

    def put_back(self, step: int, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Load the checkpoint of a step; nobody goes on, and drops it, before all have."""
        path = weights_folder(self._folder, step)
        self._check_seen(path)
        self.read(path, values)
        PartialState().wait_for_everyone()

    def _check_seen(self, path: Path) -> None:
        if not path.is_dir():
            raise ConfigError(
                f"Guard.folder: process {PartialState().process_index} does not see {path}: expected a folder that "
                "all processes share, as the one for checkpoints"
            )


class FlatShards(Shards):
    """Weights that FSDP1 has made flat and split: by name in the checkpoint, each process its part.

    Args:
        model: what is trained; frozen parameters are left out.
        optimizer: its moments.
        folder: of the snapshots.
    """

    OPTIONS = StateDictOptions(cpu_offload=True, ignore_frozen_params=True, strict=False)

    def __init__(self, model: nn.Module, optimizer: Optimizer, folder: Path) -> None:
        super().__init__(folder)
        self._model, self._optimizer = model, optimizer

    def write(self, path: Path) -> dict[str, Any]:
        """Write weights, and moments if there are any: to ask for them would make some."""
        moments = bool(self._optimizer.state)
        save(self._state(moments=moments), checkpoint_id=path)
        return {"moments": moments}

    def read(self, path: Path, values: Mapping[str, Any]) -> None:
        """Load them into tensors of the same split, and those into the run."""
        state = self._state(moments=values["moments"])
        load(state, checkpoint_id=path)
        set_model_state_dict(self._model, state["model"], options=self.OPTIONS)
        if values["moments"]:
            set_optimizer_state_dict(self._model, self._optimizer, state["optimizer"], options=self.OPTIONS)
        else:
            self._optimizer.state.clear()

    def _state(self, *, moments: bool) -> dict[str, Any]:
        state: dict[str, Any] = {"model": get_model_state_dict(self._model, options=self.OPTIONS)}
        if moments:
            state["optimizer"] = get_optimizer_state_dict(self._model, self._optimizer, options=self.OPTIONS)
        return state


class EngineShards(Shards):
    """Weights, master weights and moments that an engine of DeepSpeed holds, in a checkpoint of that engine.

    Args:
        engine: what the host trains with.
        folder: of the snapshots.
    """

    def __init__(self, engine: Any, folder: Path) -> None:
        super().__init__(folder)
        self._engine = engine

    def write(self, path: Path) -> dict[str, Any]:
        """Let the engine write what is trained."""
        self._engine.save_checkpoint(str(path), tag=TAG, save_latest=False, exclude_frozen_parameters=True)
        return {}

    def read(self, path: Path, values: Mapping[str, Any]) -> None:
        """Let the engine load it; the schedule is the host's.

        Raises:
            RecordError: the engine finds nothing there.
        """
        found, _ = self._engine.load_checkpoint(
            str(path), tag=TAG, load_module_strict=False, load_lr_scheduler_states=False
        )
        if found is None:
            raise RecordError(f"{path}: DeepSpeed finds no checkpoint there, resume from an older one")
