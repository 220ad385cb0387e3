"""Ray on this machine alone, where no cluster is given: on the loopback address, without dashboard or reports."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

from rlstab.errors import ConfigError

__all__ = ["reach_ray"]

STATISTICS = "RAY_USAGE_STATS_ENABLED"
NICENESS = "RAY_worker_niceness"
"""How far actors stand back for other processes: Ray's default is 15, and a trainer would leave them little."""
CLUSTERS = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""A Ray without clusters takes the loopback address for its own."""

LOOPBACK = {"127.0.0.1", "::1"}


def reach_ray() -> bool:
    """Connect to Ray, or start it here if nobody has: nothing then listens beyond the loopback address.

    A cluster is one that the caller has connected to (`ray.init`), or that `RAY_ADDRESS` names.

    Returns:
        Whether the connection was made here, and is the caller's to end.

    Raises:
        ConfigError: if Ray is not installed, or would listen on another address.
    """
    if find_spec("ray") is None:
        raise ConfigError("RayEnginePool: Ray is not installed: pip install 'rlstab[ray]'")
    os.environ.setdefault(STATISTICS, "0")
    import ray

    if ray.is_initialized():
        return False
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    if "RAY_ADDRESS" in os.environ:
        ray.init(**quiet)
        return True
    os.environ.setdefault(NICENESS, "0")
    with _without_clusters():
        ray.init(include_dashboard=False, **quiet)
    if (address := ray.util.get_node_ip_address()) not in LOOPBACK:
        ray.shutdown()
        raise ConfigError(
            f"RayEnginePool: Ray would listen on {address}; expected the loopback address: set {CLUSTERS}=0 before the "
            "program starts, or connect to a cluster of yours (ray.init)"
        )
    return True


@contextmanager
def _without_clusters() -> Iterator[None]:
    """Start Ray for this machine alone, in this process and in those that it starts."""
    from ray._private import ray_constants

    set_before = os.environ.get(CLUSTERS)
    os.environ[CLUSTERS] = "0"
    # Read from the environment when Ray was first imported, perhaps long ago by another library.
    before, ray_constants.ENABLE_RAY_CLUSTER = ray_constants.ENABLE_RAY_CLUSTER, False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before
        if set_before is not None:
            os.environ[CLUSTERS] = set_before
        else:
            del os.environ[CLUSTERS]
