"""What the host's checkpoint lacks for an exact resume: the generation in use, counters, samplers and controllers."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlstab.errors import RecordError

__all__ = ["TrainerState", "latest_checkpoint", "load_state", "save_state"]


@dataclass
class TrainerState:
    """Tensors by name and plain values, of one rank."""

    values: dict[str, Any]
    buffer: list[dict[str, Any]] | None = None
    tensors: dict[str, Tensor] = field(default_factory=dict)


def _paths(checkpoint: str | Path, rank: int) -> tuple[Path, Path]:
    base = Path(checkpoint) / f"rlstab_state_{rank}"
    return base.with_suffix(".safetensors"), base.with_suffix(".json")


def save_state(checkpoint: str | Path, rank: int, state: TrainerState) -> None:
    """Write the state of one rank; the JSON file, written last and in one piece, marks the checkpoint as complete."""
    tensor_file, value_file = _paths(checkpoint, rank)
    tensors = dict(state.tensors)
    rest: list[dict[str, Any]] = []
    for i, batch in enumerate(state.buffer or []):
        tensors |= {f"buffer/{i}/{k}": v for k, v in batch.items() if isinstance(v, Tensor)}
        rest.append({k: v for k, v in batch.items() if not isinstance(v, Tensor)})
    save_file({name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}, tensor_file)
    text = json.dumps({"values": state.values, "buffer": rest if state.buffer is not None else None})
    partial = value_file.with_suffix(".partial")
    partial.write_text(text)
    os.replace(partial, value_file)


def load_state(checkpoint: str | Path, rank: int, device: torch.device) -> TrainerState | None:
    """The state of one rank, or None where the checkpoint was not written by rlstab.

    Raises:
        RecordError: if the files cannot be read.
    """
    tensor_file, value_file = _paths(checkpoint, rank)
    if not value_file.exists():
        return None
    try:
        saved: Mapping[str, Any] = json.loads(value_file.read_text())
        tensors = load_file(tensor_file)
    except (OSError, ValueError) as error:
        raise RecordError(f"{value_file.parent}: the trainer state cannot be read ({error}); resume from an older checkpoint") from error
    buffer: list[dict[str, Any]] | None = None
    if saved["buffer"] is not None:
        buffer = [dict(batch) for batch in saved["buffer"]]
        for name in [name for name in tensors if name.startswith("buffer/")]:
            _, i, key = name.split("/", 2)
            buffer[int(i)][key] = tensors.pop(name).to(device)
    return TrainerState(values=saved["values"], buffer=buffer, tensors=tensors)


def latest_checkpoint(output_dir: str | Path) -> Path | None:
    """The newest complete checkpoint below `output_dir`, or None.

    A checkpoint that was being written when the process died lacks its last file and is passed over.

    >>> import tempfile
    >>> latest_checkpoint(tempfile.mkdtemp()) is None
    True
    """
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
    complete = [path for path in folders if _paths(path, 0)[1].exists()]
    return max(complete, key=lambda path: int(path.name.rpartition("-")[2]), default=None)
