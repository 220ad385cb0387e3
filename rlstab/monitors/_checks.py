"""Checks of arguments; this room has no tensors, so it does not take those of the losses."""

from rlstab.errors import ConfigError


def check(holds: bool, key: str, expected: str, value: object) -> None:
    """Raise `ConfigError` unless the condition holds.

    >>> check(False, "Spike.window", "at least 10", 3)
    Traceback (most recent call last):
    ...
    rlstab.errors.ConfigError: Spike.window: expected at least 10, got 3
    """
    if not holds:
        raise ConfigError(f"{key}: expected {expected}, got {value!r}")
