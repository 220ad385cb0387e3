"""The ring of a guard's snapshots: in memory or in files, in checkpoints, and which one to go back to."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rlstab.errors import ConfigError, RecordError
from rlstab.trainers._guard import Snapshot
from rlstab.trainers._standing import best_of
from rlstab.trainers._weights import WEIGHTS, weights_folder

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
        ranks: how many there are; each reads what as many have written.
    """

    def __init__(self, keep: int, *, folder: str | Path | None = None, rank: int = 0, ranks: int = 1) -> None:
        self._keep, self._rank = keep, rank
        self._of = f"{rank}-of-{ranks}"
        self._folder = Path(folder) if folder is not None else None
        self._entries: list[_Entry] = []
        self._out: list[_Entry] = []

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
        self._remove(goes)

    def before(self, step: int, *, best: bool = False) -> Snapshot:
        """Take out the newest snapshot from before a step, and those after it: who comes again goes further back.

        The oldest stays, whatever its step, and one whose score is the best so far: it is not the one to blame. Files
        are there until `sweep`.

        Args:
            step: the one.
            best: take the best from before it instead, where a score is known.
        """
        healthy = [entry for entry in self._entries if entry.step < step] or self._entries[:1]
        place = best_of([entry.scores for entry in healthy]) if best else None
        healthy = healthy if place is None else healthy[: place + 1]
        snapshot = healthy[-1].load()
        proved = best_of([entry.scores for entry in healthy]) == len(healthy) - 1
        stays = healthy if proved else healthy[:-1] or healthy
        self._out += [entry for entry in self._entries if entry not in stays]
        self._entries = stays
        return snapshot

    def sweep(self) -> None:
        """Remove the files of snapshots that were taken out, once the run has gone back."""
        self._remove(self._out)
        self._out = []

    def save(self, checkpoint: str | Path) -> None:
        """Write the ring into the folder of a checkpoint; files are linked where the disk allows it."""
        folder = Path(checkpoint) / IN_CHECKPOINT
        self._clear(folder)
        for entry in self._entries:
            if isinstance(entry.held, Path):
                self._link(entry.step, entry.held.parent, folder)
            else:
                write(entry.held, folder / self._name(entry.step))

    def load(self, checkpoint: str | Path | None) -> bool:
        """Take up the ring of a checkpoint; one of another run or attempt is forgotten.

        Returns:
            Whether the checkpoint holds any.
        """
        self._remove(self._entries)
        if self._folder is not None:
            self._clear(self._folder)
        saved = self._files(Path(checkpoint) / IN_CHECKPOINT) if checkpoint is not None else []
        self._entries = [self._take_up(path) for path in saved]
        self._remove(self._entries[: -self._keep])  # a ring that was larger
        self._entries = self._entries[-self._keep :]
        return bool(saved)

    def _take_up(self, path: Path) -> _Entry:
        if self._folder is None:
            return _Entry.of(read(path))
        entry = _Entry.of(path)
        self._link(entry.step, path.parent, self._folder)
        return replace(entry, held=self._folder / path.name)

    # ------------------------------------------------------------------ files, and what all processes have written

    def _name(self, step: int) -> str:
        return f"step-{step:08d}.{self._of}.safetensors"

    def _files(self, folder: Path) -> list[Path]:
        mine = re.compile(rf"step-\d{{8}}\.{self._of}\.safetensors")
        return sorted(path for path in folder.glob("step-*") if mine.fullmatch(path.name))

    def _link(self, step: int, source: Path, target: Path) -> None:
        """Have a snapshot in another folder too; the first process cares for what belongs to all of them."""
        shared = weights_folder(source, step)
        if self._rank == 0 and shared.is_dir():
            new = target / f"new.{shared.name}"
            shutil.copytree(shared, new, copy_function=_link_or_copy)
            new.rename(target / shared.name)
        path = target / self._name(step)
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_name(f"new.{path.name}")
        new.unlink(missing_ok=True)
        _link_or_copy(source / path.name, new)
        new.replace(path)

    def _remove(self, entries: list[_Entry]) -> None:
        for entry in entries:
            if isinstance(entry.held, Path):
                entry.held.unlink(missing_ok=True)
                self._remove_folders([weights_folder(entry.held.parent, entry.step)])

    def _clear(self, folder: Path) -> None:
        for path in self._files(folder):
            path.unlink()
        self._remove_folders(folder.glob(f"*{WEIGHTS}"))

    def _remove_folders(self, folders: Iterable[Path]) -> None:
        for folder in folders if self._rank == 0 else ():
            if folder.is_dir():
                going = folder.rename(folder.with_name(f"old.{folder.name}"))
                shutil.rmtree(going)


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


def _link_or_copy(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another disk, or one without links
        shutil.copyfile(source, target)
