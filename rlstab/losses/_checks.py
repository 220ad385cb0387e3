"""Checks of arguments, with messages that name the key, the value and what was expected."""

import math
from inspect import isclass
from numbers import Real

from rlstab.errors import ConfigError
from rlstab.losses._parts import Part


def check_number(key: str, value: object) -> None:
    """Raise `ConfigError` unless `value` is a finite number.

    >>> check_number("KL.coef", "0.1")
    Traceback (most recent call last):
    ...
    rlstab.errors.ConfigError: KL.coef: expected a finite number, got '0.1'
    """
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise ConfigError(f"{key}: expected a finite number, got {described(value)}")


def check_part(key: str, value: object, kind: type[Part], example: str) -> None:
    """Raise `ConfigError` unless `value` is a part of this kind: an instance, not its class.

    >>> from rlstab.losses import Ratio, TokenRatio
    >>> check_part("KL.ratio", TokenRatio, Ratio, "TokenRatio()")
    Traceback (most recent call last):
    ...
    rlstab.errors.ConfigError: KL.ratio: expected TokenRatio() or another Ratio, got the class TokenRatio: call it
    """
    if not isinstance(value, kind):
        raise ConfigError(f"{key}: expected {example} or another {kind.__name__}, got {described(value)}")


def described(value: object) -> str:
    """A value as messages show it: a class is told from an instance, and what is long is named by its type.

    >>> described("abc"), described([1] * 99)
    ("'abc'", 'a list')
    """
    if isclass(value):
        return f"the class {value.__name__}: call it"
    shown = repr(value)
    return shown if len(shown) <= 60 and "\n" not in shown else f"a {type(value).__name__}"


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
