"""A random state of one's own, so that sampling on the side never changes a training trajectory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["isolated_rng"]


@contextmanager
def isolated_rng(seed: int, *, device: torch.device | str = "cpu") -> Iterator[None]:
    """Seed torch inside the block and give the outer random state back, untouched, after it.

    Only the CPU generator and the generator of `device` are seeded and restored; the generators of other devices are
    neither read nor written. Python's and NumPy's random states are left alone.

    Args:
        seed: seed of both generators inside the block.
        device: device on which the block draws random numbers.

    Yields:
        Nothing; the block runs with the seeded generators.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> outer = torch.get_rng_state()
        >>> with isolated_rng(7):
        ...     inside = torch.rand(2)
        >>> bool((torch.get_rng_state() == outer).all())
        True
        >>> with isolated_rng(7):
        ...     bool((torch.rand(2) == inside).all())
        True
    """
    device = torch.device(device)
    if device.type == "cpu":
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            yield
        return
    backend = torch.get_device_module(device)
    index = backend.current_device() if device.index is None else device.index
    with torch.random.fork_rng(devices=[index], device_type=device.type), backend.device(index):
        torch.default_generator.manual_seed(seed)
        backend.manual_seed(seed)
        yield
