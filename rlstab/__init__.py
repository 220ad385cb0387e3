"""Keep RL post-training of language models stable: composable losses for TRL, and a watch on what they do."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("rlstab")
except PackageNotFoundError:  # a checkout that was never installed
    __version__ = "0+unknown"

__all__ = ["__version__"]
