"""What probes have in common: their turn, the positions they look at, and their hooks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from rlstab.errors import ConfigError

POSITIONS = 64
Item = TypeVar("Item")


class Probe(ABC):
    """A measurement inside a model. It looks at the first forward with gradient after `arm`, and only at that.

    Hooks read what passes and give nothing back, so that outputs and gradients stay what they are, bit for bit.
    """

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []
        self._armed = False
        self._rows: Tensor | None = None
        self._found: dict[str, Tensor] = {}

    @abstractmethod
    def hook(self, model: nn.Module) -> list[RemovableHandle]:
        """Place the hooks on a model.

        Raises:
            ConfigError: the model has nothing that this probe can look at.
        """

    @abstractmethod
    def summary(self, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The signals, 0-dim tensors by schema key, from what the hooks kept by name."""

    def attach(self, model: nn.Module) -> None:
        """Begin to look at a model; an earlier one is left."""
        self.detach()
        stack = next(iter(decoder_layers(model)), "").rpartition(".")[0]
        backbone = model.get_submodule(stack.rpartition(".")[0])
        self._handles = [backbone.register_forward_pre_hook(self._see_call, with_kwargs=True), *self.hook(model)]

    def detach(self) -> None:
        """Take all hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def arm(self) -> None:
        """Look at the next forward with gradient."""
        self._armed, self._rows, self._found = True, None, {}

    def collect(self) -> dict[str, Tensor]:
        """What was seen since `arm`, on its device; nothing if nothing was."""
        found, self._found, self._armed = self._found, {}, False
        return self.summary(found) if found else {}

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on; made of JSON's types."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027
        """Go on from a saved state."""

    def _see_call(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Choose the positions: real ones, evenly over the micro-batch, without waiting for the device."""
        if not self._armed or self._rows is not None or not torch.is_grad_enabled():
            return
        given = next(v for v in (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args) if isinstance(v, Tensor))
        mask: Any = kwargs.get("attention_mask")
        grid = given.shape[:2]
        known = isinstance(mask, Tensor) and mask.shape == grid
        self._rows = spread(mask if known else torch.ones(grid, device=given.device), POSITIONS)

    def _wants(self, name: str) -> bool:
        """Whether the named place is to be looked at now; once, though checkpointing runs a layer twice."""
        return self._armed and self._rows is not None and name not in self._found and torch.is_grad_enabled()

    def _sampled(self, hidden: Tensor) -> Tensor:
        """The chosen positions of `[B, T, D]` as `[N, D]`, in fp32, without gradient."""
        assert self._rows is not None
        return hidden.detach().reshape(-1, hidden.shape[-1])[self._rows].float()


def spread(mask: Tensor, count: int) -> Tensor:
    """Flat indices of `count` positions that a mask keeps, evenly spaced; some twice where it keeps fewer.

    >>> spread(torch.tensor([[0, 1, 1], [0, 0, 1]]), 3)
    tensor([1, 2, 5])
    """
    flat = mask.reshape(-1).bool()
    order = flat.to(torch.uint8).argsort(descending=True, stable=True)
    return order[torch.arange(count, device=mask.device) * flat.sum() // count]


def decoder_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers of a transformer, by name: the longest list of modules in it.

    Raises:
        ConfigError: there is none.

    >>> model = nn.Module()
    >>> model.layers = nn.ModuleList([nn.Linear(1, 1), nn.Linear(1, 1)])
    >>> list(decoder_layers(model))
    ['layers.0', 'layers.1']
    """
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    if not lists:
        raise ConfigError(f"{type(model).__name__} has no list of layers: this probe looks at transformers only")
    name = max(lists, key=lambda name: len(lists[name]))
    return {f"{name}.{i}": layer for i, layer in enumerate(lists[name])}


def evenly(items: list[Item], count: int) -> list[Item]:
    """At most `count` of the items, the first and the last among them.

    >>> evenly([0, 1, 2, 3, 4], 3)
    [0, 2, 4]
    """
    if len(items) <= count:
        return items
    return [items[round(i * (len(items) - 1) / max(count - 1, 1))] for i in range(count)]
