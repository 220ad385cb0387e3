"""The part of a mapping that stands under one prefix."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

__all__ = ["under"]

V = TypeVar("V")


def under(prefix: str, named: Mapping[str, V]) -> dict[str, V]:
    """What begins with a prefix, named without it.

    >>> under("old/", {"old/weight": 1, "new/weight": 2})
    {'weight': 1}
    """
    return {name.removeprefix(prefix): value for name, value in named.items() if name.startswith(prefix)}
