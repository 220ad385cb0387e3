"""The guard: snapshots of a healthy run, and the way back to one."""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from rlstab.errors import ConfigError
from rlstab.trainers._under import under
from rlstab.trainers._weights import Weights

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
    over ranks, each rank keeps its own shards. What FSDP1 and DeepSpeed hold only they can put back: weights and
    moments go through a checkpoint there, which all ranks write together.

    Args:
        every: optimizer steps between snapshots.
        keep: snapshots kept, the best one and the newest ones; each takes the memory of the trained weights, the
            optimizer and references that have moved, under FSDP1 and DeepSpeed the room on disk.
        most: how often a run may go back and on; when a rule asks once more, it goes back to the best snapshot from
            before the evidence, and is stopped there.
        settle: steps after going back in which no rule is heard that asks for it again: a sampler may be that many
            updates behind, and hold weights that are gone.
        folder: where snapshots are kept instead of the CPU's memory, one file per process and snapshot; a file is whole
            or absent, whenever the process is killed. Those of an earlier run or attempt are removed. Under FSDP1 and
            DeepSpeed a folder that all processes share; default there: one in `output_dir`, while the run lasts.
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
    weights: Weights,
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
        weights: how its weights and moments are held.
        optimizer: its settings.
        scheduler: of the learning rate.
        extra: further state, made of JSON's types.
        beside: further tensors, on the CPU, that nobody writes to any more.
        scores: how good the policy is, by schema key.
    """
    held = weights.take(step)
    tensors = {f"generator/{name}": state for name, state in _generators().items()}
    tensors |= {f"beside/{name}": tensor for name, tensor in beside.items()}
    values = {
        "groups": [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups],
        "scheduler": scheduler.state_dict(),
        "python": random.getstate(),
        "extra": dict(extra),
        "scores": dict(scores),
    }
    return Snapshot(step=step, tensors=held.tensors | tensors, values=copy.deepcopy(held.values | values))


@torch.no_grad()
def restore(snapshot: Snapshot, weights: Weights, optimizer: Optimizer, scheduler: Any) -> None:
    """Put a run back. What `extra` and `beside` hold is for the caller."""
    tensors, values = snapshot.tensors, copy.deepcopy(snapshot.values)
    weights.put_back(snapshot.step, tensors, values)
    for group, saved in zip(optimizer.param_groups, values["groups"], strict=True):
        group.update({key: tuple(v) if isinstance(group.get(key), tuple) else v for key, v in saved.items()})
    scheduler.load_state_dict(values["scheduler"])
    _set_generators(values["python"], under("generator/", tensors))


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
