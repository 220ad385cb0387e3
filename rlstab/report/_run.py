"""What every part of a report asks about a metric."""

from __future__ import annotations

from rlstab.errors import SchemaError
from rlstab.schema import Signal, signal


def known(key: str) -> Signal | None:
    """Return the signal of a metric key, None for one that the schema does not know."""
    try:
        return signal(key)
    except SchemaError:
        return None
