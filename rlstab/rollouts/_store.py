"""Rollouts in files: tensors in safetensors, everything else in its JSON header."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rlstab.errors import RecordError
from rlstab.rollouts._kept import KeptSets
from rlstab.rollouts._rollout import Rollout, Timing, Turn

__all__ = ["load_rollouts", "save_rollouts"]

_FORMAT = "rlstab.rollouts/1"
_COLUMNS = ("prompt_ids", "token_ids", "loss_mask", "logprobs", "weight_versions")


def save_rollouts(path: str | os.PathLike[str], rollouts: Sequence[Rollout]) -> None:
    """Write rollouts to one file, for `load_rollouts` to read back unchanged.

    The file appears whole: a process killed while it writes leaves the old file, or none. A tensor that several
    rollouts share (the image of a prompt) is written once.

    Args:
        path: the file; replaced if it exists.
        rollouts: any number.

    Raises:
        RecordError: if the file cannot be written.

    Example:
        >>> import tempfile
        >>> save_rollouts(Path(tempfile.mkdtemp()) / "step_1.safetensors", [])
    """
    target = Path(path)
    tensors = {name: _joined([vars(rollout)[name] for rollout in rollouts]) for name in _COLUMNS}
    places: dict[int, str] = {}

    def put(tensor: Tensor) -> str:
        place = places.setdefault(id(tensor), str(len(places)))
        if place not in tensors:
            tensors[place] = tensor.contiguous().clone()
        return place

    header = {"format": _FORMAT, "rollouts": json.dumps([_entry(rollout, put) for rollout in rollouts])}
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        save_file(tensors, partial, header)
        partial.replace(target)
    except (OSError, SafetensorError) as error:
        raise RecordError(f"cannot write rollouts to {target}: {error}; choose a folder with space") from error
    finally:
        partial.unlink(missing_ok=True)


def load_rollouts(path: str | os.PathLike[str]) -> list[Rollout]:
    """Read the rollouts of a file that `save_rollouts` wrote.

    Args:
        path: the file.

    Returns:
        The rollouts in the order in which they were saved, equal to them.

    Raises:
        RecordError: if the file cannot be read, or is none of rollouts.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "step_1.safetensors"
        >>> save_rollouts(file, [])
        >>> load_rollouts(file)
        []
    """
    try:
        with safe_open(path, framework="pt") as file:
            header: Mapping[str, str] = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
    except (OSError, SafetensorError) as error:
        raise RecordError(f"cannot read rollouts from {path}: {error}") from error
    if header.get("format") != _FORMAT:
        raise RecordError(f"{path} holds no rollouts of format {_FORMAT}: its format is {header.get('format')}")
    try:
        entries: list[dict[str, Any]] = json.loads(header["rollouts"])
        columns = _split(tensors, entries)
        return [
            _rollout(entry, {name: columns[name][row] for name in _COLUMNS}, tensors)
            for row, entry in enumerate(entries)
        ]
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise RecordError(f"{path} is damaged: {error!r}") from error


def _joined(vectors: Sequence[Tensor]) -> Tensor:
    return torch.cat([*vectors]) if vectors else torch.empty(0)


def _split(tensors: Mapping[str, Tensor], entries: Sequence[Mapping[str, Any]]) -> dict[str, tuple[Tensor, ...]]:
    sizes = {name: [entry["tokens"] for entry in entries] for name in _COLUMNS}
    sizes["prompt_ids"] = [entry["prompt_tokens"] for entry in entries]
    return {name: tensors[name].split(sizes[name]) for name in _COLUMNS}


def _entry(rollout: Rollout, put: Callable[[Tensor], str]) -> dict[str, Any]:
    kept, routes = rollout.kept, rollout.routed_experts
    return {
        "prompt_tokens": len(rollout.prompt_ids),
        "tokens": len(rollout.token_ids),
        "turns": [[turn.author, turn.start, turn.stop] for turn in rollout.turns],
        "finish_reason": rollout.finish_reason,
        "engine": rollout.engine,
        "timing": vars(rollout.timing),
        "kept": None if kept is None else [put(kept.token_ids), put(kept.counts)],
        "routed_experts": None if routes is None else put(routes),
        "images": [put(image) for image in rollout.images],
        "features": {name: put(tensor) for name, tensor in rollout.features.items()},
    }


def _rollout(entry: Mapping[str, Any], columns: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> Rollout:
    kept, routes = entry["kept"], entry["routed_experts"]
    return Rollout(
        **{name: tensor.clone() for name, tensor in columns.items()},
        turns=tuple(Turn(*turn) for turn in entry["turns"]),
        finish_reason=entry["finish_reason"],
        engine=entry["engine"],
        timing=Timing(**entry["timing"]),
        kept=None if kept is None else KeptSets(*(tensors[place] for place in kept)),
        routed_experts=None if routes is None else tensors[routes],
        images=tuple(tensors[place] for place in entry["images"]),
        features={name: tensors[place] for name, place in entry["features"].items()},
    )
