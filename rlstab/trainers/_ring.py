"""The ring of a guard's snapshots: in memory or in files, in checkpoints, and which one to go back to."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rlstab.errors import ConfigError, RecordError
from rlstab.trainers._guard import Snapshot
from rlstab.trainers._standing import best_of

__all__ = ["Ring"]

IN_CHECKPOINT = "rlstab_ring"
VALUES = "rlstab"


@dataclass(frozen=True)
class _Entry:
    """A snapshot in memory, or the file that holds it."""

    step: int
    held: Snapshot | Path
    scores: Mapping[str, float]

    @classmethod
    def of(cls, held: Snapshot | Path) -> Self:
        """An entry for a snapshot or for the file of one."""
        if isinstance(held, Snapshot):
            return cls(held.step, held, held.scores)
        values = _values(held)
        return cls(values["step"], held, values["scores"])

    def load(self) -> Snapshot:
        return read(self.held) if isinstance(self.held, Path) else self.held


class Ring:
    """The best and the newest snapshots of a healthy run, of one rank.

    Args:
        keep: how many; a single one is the newest.
        folder: where files are kept; None for the CPU's memory.
        rank: which process this is.
    """

    def __init__(self, keep: int, *, folder: str | Path | None = None, rank: int = 0) -> None:
        self._keep, self._rank = keep, rank
        self._folder = Path(folder) if folder is not None else None
        self._entries: list[_Entry] = []

    @property
    def steps(self) -> list[int]:
        """The steps of the snapshots, oldest first."""
        return [entry.step for entry in self._entries]

    def add(self, snapshot: Snapshot) -> None:
        """Keep one more; where that is one too many, the oldest goes that is not the best."""
        held: Snapshot | Path = snapshot
        if self._folder is not None:
            held = self._folder / self._name(snapshot.step)
            write(snapshot, held)
        same = [entry for entry in self._entries if entry.step != snapshot.step]
        entries = [*same, _Entry(snapshot.step, held, snapshot.scores)]
        goes = entries[:1] if len(entries) > self._keep else []
        if goes and self._keep > 1 and best_of([entry.scores for entry in entries]) == 0:
            goes = entries[1:2]
        self._entries = [entry for entry in entries if entry not in goes]
        _remove(goes)

    def before(self, step: int) -> Snapshot:
        """Take out the newest snapshot from before a step, and those after it: who comes again goes further back.

        The oldest stays, whatever its step, and one whose score is the best so far: it is not the one to blame.
        """
        healthy = [entry for entry in self._entries if entry.step < step] or self._entries[:1]
        snapshot = healthy[-1].load()
        proved = best_of([entry.scores for entry in healthy]) == len(healthy) - 1
        stays = healthy if proved else healthy[:-1] or healthy
        _remove([entry for entry in self._entries if entry not in stays])
        self._entries = stays
        return snapshot

    def save(self, checkpoint: str | Path) -> None:
        """Write the ring into the folder of a checkpoint; files are linked where the disk allows it."""
        folder = Path(checkpoint) / IN_CHECKPOINT
        for path in self._files(folder):
            path.unlink()
        for entry in self._entries:
            target = folder / self._name(entry.step)
            if isinstance(entry.held, Path):
                _link(entry.held, target)
            else:
                write(entry.held, target)

    def load(self, checkpoint: str | Path | None) -> bool:
        """Take up the ring of a checkpoint; one of another run or attempt is forgotten.

        Returns:
            Whether the checkpoint holds any.
        """
        _remove(self._entries)
        if self._folder is not None:
            for path in self._files(self._folder):
                path.unlink()
        saved = self._files(Path(checkpoint) / IN_CHECKPOINT) if checkpoint is not None else []
        self._entries = []
        for path in saved:
            held: Snapshot | Path = read(path) if self._folder is None else self._folder / path.name
            if isinstance(held, Path):
                _link(path, held)
            self._entries.append(_Entry.of(held))
        _remove(self._entries[: -self._keep])  # a ring that was larger
        self._entries = self._entries[-self._keep :]
        return bool(saved)

    def _name(self, step: int) -> str:
        return f"step-{step:08d}.rank{self._rank}.safetensors"

    def _files(self, folder: Path) -> list[Path]:
        mine = re.compile(rf"step-\d{{8}}\.rank{self._rank}\.safetensors")
        return sorted(path for path in folder.glob("step-*") if mine.fullmatch(path.name))


def write(snapshot: Snapshot, path: Path) -> None:
    """Write a snapshot; the file is whole or absent, whenever the process is killed.

    Raises:
        ConfigError: something of the run's state cannot be written as text.
    """
    try:
        values = json.dumps({"step": snapshot.step, **snapshot.values})
    except TypeError as error:
        raise ConfigError(
            f"Guard: the state of this run cannot be written to a file ({error}): leave Guard.folder unset and set "
            "Guard.checkpoints=False, so that snapshots stay in memory"
        ) from error
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"new.{path.name}")
    save_file({name: tensor.contiguous() for name, tensor in snapshot.tensors.items()}, new, metadata={VALUES: values})
    with new.open("rb") as file:
        os.fsync(file.fileno())
    new.replace(path)


def read(path: Path) -> Snapshot:
    """Read a snapshot.

    Raises:
        RecordError: it is not whole.
    """
    values = _values(path)
    try:
        with safe_open(path, framework="pt") as file:
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise _unreadable(path, error) from error
    return Snapshot(step=values.pop("step"), tensors=tensors, values=values)


def _values(path: Path) -> dict[str, Any]:
    """What a file says beside its tensors."""
    try:
        with safe_open(path, framework="pt") as file:
            values: dict[str, Any] = json.loads(file.metadata()[VALUES])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise _unreadable(path, error) from error
    return values


def _unreadable(path: Path, error: Exception) -> RecordError:
    return RecordError(f"{path} cannot be read ({error}): resume from an older checkpoint")


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    new = target.with_name(f"new.{target.name}")
    new.unlink(missing_ok=True)
    try:
        os.link(source, new)
    except OSError:  # another disk, or one without links
        shutil.copyfile(source, new)
    new.replace(target)


def _remove(entries: list[_Entry]) -> None:
    for entry in entries:
        if isinstance(entry.held, Path):
            entry.held.unlink(missing_ok=True)
