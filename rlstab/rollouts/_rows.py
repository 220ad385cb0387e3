"""A key-value cache whose rows come and go: finished sequences leave it, new ones join."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer


class RowLayer(DynamicLayer):
    """Keys and values of one layer. Once there is room, a token is written in place instead of copying the past.

    The whole past is kept, of a sliding window too: the model's mask hides what lies outside the window.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._room: tuple[Tensor, Tensor] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Append columns, and return all of them."""
        if self._room is None:
            return super().update(key_states, value_states)
        start = self.get_seq_length()
        stop = start + key_states.shape[-2]
        for room, states in zip(self._room, (key_states, value_states), strict=True):
            room[:, :, start:stop] = states
        return self._show(self._room, stop)

    def past(self) -> tuple[Tensor, Tensor]:
        """Keys and values so far."""
        if self.keys is None or self.values is None:
            raise ValueError("a layer without rows has no past")
        return self.keys, self.values

    def take(self, parts: Sequence[tuple[RowLayer, Tensor, int]], *, width: int, capacity: int) -> None:
        """Fill an empty layer with rows of others, right-aligned in the first `width` columns of `capacity`."""
        keys, values = parts[0][0].past()
        self.lazy_initialization(keys, values)
        rows = sum(len(chosen) for _, chosen, _ in parts)
        key_room, value_room = (
            states.new_zeros(rows, states.shape[1], capacity, states.shape[3]) for states in (keys, values)
        )
        start = 0
        for layer, chosen, columns in parts:
            stop = start + len(chosen)
            for room, states in zip((key_room, value_room), layer.past(), strict=True):
                room[start:stop, :, width - columns : width] = states[chosen, :, states.shape[-2] - columns :]
            start = stop
        self._room = key_room, value_room
        self._show(self._room, width)

    def _show(self, room: tuple[Tensor, Tensor], columns: int) -> tuple[Tensor, Tensor]:
        self.keys, self.values = past = room[0][:, :, :columns], room[1][:, :, :columns]
        return past


class RowCache(Cache):
    """The layers of one batch."""

    def __init__(self, rows: Sequence[RowLayer]) -> None:
        super().__init__(layers=list(rows))
        self.rows = tuple(rows)

    @property
    def column_size(self) -> int:
        """How many numbers one token of one row takes."""
        return sum(states.shape[1] * states.shape[3] for layer in self.rows for states in layer.past())


class Rows(NamedTuple):
    """Rows to be taken over from a cache: which ones, and how many of the last columns hold their tokens."""

    cache: RowCache
    chosen: Tensor
    width: int


def holds_rows(config: PreTrainedConfig) -> bool:
    """Are all layers of the model plain attention, full or sliding, so that `RowLayer` can stand for them?"""
    layers = DynamicCache(config=config).layers
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)


def empty_cache(config: PreTrainedConfig) -> RowCache:
    """A cache without rows, to be filled by one forward of the model."""
    return RowCache([RowLayer() for _ in DynamicCache(config=config).layers])


def join_rows(parts: Sequence[Rows], *, capacity: int) -> RowCache:
    """A cache of the rows of several, all right-aligned at the widest, with room for `capacity` columns."""
    width = max(part.width for part in parts)
    layers = [RowLayer() for _ in parts[0].cache.rows]
    for place, layer in enumerate(layers):
        sources = [(part.cache.rows[place], part.chosen, part.width) for part in parts]
        layer.take(sources, width=width, capacity=capacity)
    return RowCache(layers)
