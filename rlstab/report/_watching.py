"""The door to the live view, which needs an extra."""

from __future__ import annotations

from importlib.util import find_spec

from rlstab.errors import ConfigError
from rlstab.record import RunFolder


def watch_run(folder: RunFolder) -> None:
    """Show a run in the terminal while it runs, or after: reward, drift, mismatch, entropy, cause, events, samples.

    Works over SSH and in 80 × 24 characters, needs no server, and only reads the folder. `q` ends it.

    Args:
        folder: The run.

    Raises:
        ConfigError: textual is not installed.
        RecordError: A file of the folder cannot be read.

    Example:
        ```python
        watch_run(RunFolder.open("runs/a"))
        ```
    """
    if find_spec("textual") is None:
        raise ConfigError("the live view needs textual, which is not installed: pip install 'rlstab[watch]'")
    from rlstab.report._textual_app import LiveView

    LiveView(folder).run()
