"""TRL announces that `rollout_func` is experimental, and asks the network who uses it: both off."""

import gc
import os
from collections.abc import Iterator

import pytest

os.environ.update(TRL_EXPERIMENTAL_SILENCE="1", HF_HUB_DISABLE_TELEMETRY="1")


@pytest.fixture(scope="session", autouse=True)
def _imports_are_no_garbage() -> Iterator[None]:
    """Every `train` collects garbage: half of its time here, if it has to look through all that was imported."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
