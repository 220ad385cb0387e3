"""Checks of arguments, with messages that name the key, the value and what was expected."""

import math

from rlstab.errors import ConfigError


def check_range(key: str, value: float, low: float = -math.inf, high: float = math.inf) -> None:
    """Raise `ConfigError` unless `low <= value <= high`.

    >>> check_range("ClippedSurrogate.low", 1.5, 0, 1)
    Traceback (most recent call last):
    ...
    rlstab.errors.ConfigError: ClippedSurrogate.low: expected a number from 0 to 1, got 1.5
    """
    if not low <= value <= high:
        expected = f"a number from {low} to {high}" if high < math.inf else f"a number of at least {low}"
        raise ConfigError(f"{key}: expected {expected}, got {value!r}")


def check_positive(key: str, value: float) -> None:
    """Raise `ConfigError` unless `0 < value < inf`."""
    if not 0 < value < math.inf:
        raise ConfigError(f"{key}: expected a number > 0, got {value!r}")


def check_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise `ConfigError` unless `value` is one of `choices`."""
    if value not in choices:
        raise ConfigError(f"{key}: expected one of {', '.join(map(repr, choices))}, got {value!r}")


def check_bounds(name: str, low: float | None, high: float | None) -> None:
    """Raise `ConfigError` unless there is a bound, and `0 <= min < max` where both are given."""
    if low is None and high is None:
        raise ConfigError(f"{name}: expected min or max or both, got neither")
    if not (low or 0.0) >= 0:
        raise ConfigError(f"{name}.min: expected a ratio of at least 0, got {low!r}")
    if high is not None and not (low or 0.0) < high:
        raise ConfigError(f"{name}.max: expected a ratio above {low or 0.0}, got {high!r}")
