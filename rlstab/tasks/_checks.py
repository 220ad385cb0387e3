"""Checks of arguments, with messages that name the class, the key, the value and what was expected."""

from collections.abc import Mapping

from rlstab.errors import ConfigError


def check_fields(owner: object, checks: Mapping[str, tuple[bool, str]]) -> None:
    """Raise `ConfigError` for the first field that does not hold.

    Args:
        owner: the object whose fields are checked.
        checks: field to whether it holds, and what was expected.

    >>> from rlstab.tasks import OverlongPenalty
    >>> OverlongPenalty(max_length=10, cache=20)
    Traceback (most recent call last):
    ...
    rlstab.errors.ConfigError: OverlongPenalty: cache 20; expected from 1 to max_length
    """
    for field, (holds, expected) in checks.items():
        if not holds:
            raise ConfigError(f"{type(owner).__name__}: {field} {vars(owner)[field]!r}; expected {expected}")
