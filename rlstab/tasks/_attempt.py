"""Running what users wrote, such that a failure can be told with its sample."""

from types import TracebackType
from typing import Self

from rlstab.errors import ConfigError, RewardError

SHOWN = 80


class Attempt:
    """Keeps whatever is raised inside it, but for a mistake in the configuration and for what is no `Exception`.

    >>> with Attempt() as attempt:
    ...     _ = 1 / 0
    >>> described(attempt.error)
    'ZeroDivisionError: division by zero'
    """

    def __init__(self) -> None:
        self.error: Exception | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if not isinstance(error, Exception) or isinstance(error, ConfigError):
            return False
        self.error = error
        return True


def described(error: Exception | None) -> str:
    """What went wrong; an error of one's own speaks for itself."""
    return str(error) if isinstance(error, RewardError) else f"{type(error).__name__}: {error}"


def shown(completion: object) -> str:
    """A completion as messages show it, cut if it is long."""
    text = repr(completion)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
