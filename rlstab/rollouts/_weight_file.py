"""Weights on their way to another process: which tensors, of which shapes, in a file of shared memory."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig

from rlstab.errors import WeightSyncError
from rlstab.rollouts._weights import WeightSource

__all__ = ["check_shapes", "shapes_of", "shapes_of_config", "unique_tensors", "weight_file"]

SHARED_MEMORY = Path("/dev/shm")

Shapes = Mapping[str, tuple[int, ...]]


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def shapes_of_config(config: PretrainedConfig) -> dict[str, tuple[int, ...]]:
    """The shapes of the weights that a model of this configuration has, without making it."""
    with torch.device("meta"):
        return shapes_of(AutoModelForCausalLM.from_config(config).state_dict())


def check_shapes(engine: str, expected: Shapes, found: Shapes) -> None:
    """Refuse weights that are not those of the engine's model."""
    if differing := sorted(set(expected.items()) ^ set(found.items())):
        name = differing[0][0]
        raise WeightSyncError(
            f"{engine}: weights do not fit: {name} has shape {expected.get(name, 'none')} in the engine and "
            f"{found.get(name, 'none')} in the source; sync from the model that the engine was made from"
        )


def unique_tensors(source: WeightSource) -> dict[str, Tensor]:
    """The tensors of a source; one that stands under several names (tied weights) under the first only."""
    unique: dict[str, Tensor] = {}
    places: set[tuple[int, tuple[int, ...]]] = set()
    for name, tensor in source.named_tensors():
        place = (tensor.data_ptr(), tuple(tensor.shape))
        if tensor.numel() and place in places:
            continue
        places.add(place)
        unique[name] = tensor
    return unique


@contextmanager
def weight_file(tensors: Mapping[str, Tensor], directory: Path | None = None) -> Iterator[Path]:
    """A safetensors file that lives as long as the block, in shared memory where there is room.

    Args:
        tensors: what it holds.
        directory: where to put it instead, such as a folder that several machines see.
    """
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    with tempfile.TemporaryDirectory(prefix="rlstab-weights-", dir=directory or _roomy(size)) as folder:
        path = Path(folder) / "weights.safetensors"
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)
        yield path


def _roomy(size: int) -> Path | None:
    if SHARED_MEMORY.is_dir() and shutil.disk_usage(SHARED_MEMORY).free > 2 * size:
        return SHARED_MEMORY
    return None
