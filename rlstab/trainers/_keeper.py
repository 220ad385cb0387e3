"""The guard at work: keeps snapshots of a healthy run, brings it back to one, and counts how often."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import nn

from rlstab.errors import ConfigError
from rlstab.trainers._belongings import belongings_of, put_back
from rlstab.trainers._grpo import StableGRPOTrainer
from rlstab.trainers._guard import Guard, Snapshot, restore, take
from rlstab.trainers._ring import Ring
from rlstab.trainers._sharded_weights import in_place, shards_of
from rlstab.trainers._standing import Standing
from rlstab.trainers._watch_host import GeneratingTrainer
from rlstab.trainers._weights import Copies, Weights

__all__ = ["Keeper", "Run"]

PASSING = "rlstab_guard"  # in the folder of a run's checkpoints, for as long as the run lasts


class Run(NamedTuple):
    """What the host hands to a callback, as far as actions need it."""

    control: Any
    model: nn.Module
    optimizer: Any
    scheduler: Any

    @classmethod
    def of(cls, control: Any, given: Mapping[str, Any]) -> Self:
        """From the arguments of a callback."""
        return cls(control, given["model"], given["optimizer"], given["lr_scheduler"])


class Keeper:
    """Snapshots of one run, by one rank; every rank does the same at the same step.

    Args:
        guard: how the run is guarded; None for not at all.
    """

    def __init__(self, guard: Guard | None) -> None:
        self._guard = guard
        self.ring = Ring(1)
        self.standing = Standing()
        self.rollbacks = 0
        self.last_back: int | None = None
        self._resumed: str | None = None
        self._ranks = 1
        self._weights: Weights | None = None
        self._passing: Path | None = None

    def begin(self, args: Any, step: int, run: Run, trainer: Any) -> bool:
        """Open the ring, with the snapshots of the checkpoint that is resumed from; whether there were any.

        Raises:
            ConfigError: the weights of this run cannot be put back as the watch is attached.
        """
        if self._guard is None:
            return False
        self._ranks = args.world_size
        folder = self._hold(args, run, trainer, self._guard.folder)
        self.ring = Ring(self._guard.keep, folder=folder, rank=args.process_index, ranks=self._ranks)
        resumed, self._resumed = self._resumed or _checkpoint_at(args, step), None
        found = self.ring.load(resumed if step > 0 and self._guard.checkpoints else None)
        PartialState().wait_for_everyone()
        return found

    def _hold(self, args: Any, run: Run, trainer: Any, folder: str | Path | None) -> str | Path | None:
        """Decide how weights are held; returns the folder of the snapshots, None for the CPU's memory."""
        if in_place(run.model):
            self._weights = Copies(run.model, run.optimizer)
            return folder
        if folder is None:
            folder = self._passing = Path(args.output_dir) / PASSING
        self._weights = shards_of(run.model, run.optimizer, trainer, Path(folder))
        return folder

    def close(self) -> None:
        """Remove what no longer serves when the run has ended."""
        passing, self._passing = self._passing, None
        if passing is not None:
            PartialState().wait_for_everyone()
            if PartialState().is_main_process:
                shutil.rmtree(passing)

    def resumes(self, checkpoint: str) -> None:
        """Note which checkpoint the host resumes from."""
        self._resumed = checkpoint

    def save(self, checkpoint: str) -> None:
        """Write the ring into a checkpoint."""
        if self._guard is not None and self._guard.checkpoints:
            self.ring.save(checkpoint)

    def is_time(self, step: int) -> bool:
        """Whether a snapshot is due, if the run is healthy."""
        return self._guard is not None and step % self._guard.every == 0

    @property
    def evaluated(self) -> bool:
        """Whether held-out scores have come since the last snapshot, so that it is time for one of their own."""
        return self._guard is not None and self.standing.evaluated

    def keep(self, step: int, run: Run, trainer: Any, extra: Mapping[str, Any]) -> None:
        """Take a snapshot; of a trainer that is attached to, with what else belongs to it."""
        if self._weights is not None:
            beside, values = belongings_of(trainer)
            held = {**extra, **values}
            scores = self.standing.take()
            parts = (self._weights, run.optimizer, run.scheduler)
            self.ring.add(take(step, *parts, held, beside=beside, scores=scores))

    @property
    def used_up(self) -> bool:
        """Whether the run may not go back once more."""
        return self._guard is None or self.rollbacks >= self._guard.most

    def settles(self, step: int) -> bool:
        """Whether the run went back so shortly before that it may not do so again."""
        if self._guard is None or self.last_back is None:
            return False
        return step - self.last_back <= self._guard.settle

    def go_back(self, step: int, before: int, run: Run, trainer: Any, *, best: bool = False) -> Snapshot:
        """Bring weights, optimizer, schedule, random numbers and belongings back to before a step, on all ranks alike.

        Args:
            step: the one that has ended.
            before: the one that is gone back to before.
            best: go back to the best snapshot from before it, not the newest.
            run: what is brought back.
            trainer: whose belongings; None where nothing is attached to one.

        Raises:
            ConfigError: the ranks do not hold the same snapshots.
        """
        assert self._weights is not None
        self.rollbacks, self.last_back = self.rollbacks + 1, step
        snapshot = self.ring.before(before, best=best)
        if self._ranks > 1:
            agreed = [snapshot.step]
            broadcast_object_list(agreed)
            if agreed != [snapshot.step]:
                raise ConfigError(
                    f"guard: the first process goes back to step {agreed[0]}, this one has {snapshot.step}: the rings "
                    "are not of one run, resume all processes from the same checkpoint"
                )
        restore(snapshot, self._weights, run.optimizer, run.scheduler)
        put_back(trainer, snapshot)
        self.ring.sweep()
        self.standing.take()  # what the policy that is gone has shown
        return snapshot


def drop_rollouts(trainer: Any) -> None:
    """Forget rollouts of weights that are gone: those in use, and those that an engine has begun ahead of time.

    The next generation starts with a sync, which is verified as any other.
    """
    if isinstance(trainer, GeneratingTrainer):
        trainer._buffered_inputs = None
    if isinstance(trainer, StableGRPOTrainer) and trainer._generation is not None:
        trainer._generation.engine.drop()


def _checkpoint_at(args: Any, step: int) -> str:
    """Where the host writes the checkpoint of a step."""
    return str(Path(args.output_dir) / f"checkpoint-{step}")
