"""Keep RL post-training of language models stable: composable losses for TRL, and a watch on what they do."""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlstab.trainers import Guard as Guard
    from rlstab.trainers import Watch as Watch
    from rlstab.trainers import watch as watch

try:
    __version__ = version("rlstab")
except PackageNotFoundError:  # a checkout that was never installed
    __version__ = "0+unknown"

__all__ = ["__version__"]

_OF_TRAINERS = frozenset({"Guard", "Watch", "watch"})  # found when asked for: their room loads trl


def __getattr__(name: str) -> Any:
    if name in _OF_TRAINERS:
        return vars(import_module("rlstab.trainers"))[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_OF_TRAINERS})
