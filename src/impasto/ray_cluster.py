"""A session on a Ray cluster, for jobs that outgrow one machine."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .errors import ResourceError
from .optional import require


def require_ray() -> Any:
    """The library.

    Raises:
        MissingDependencyError: it is not installed.
    """
    require("ray.data", "--ray", "impasto[ray]")
    return importlib.import_module("ray")


@contextmanager
def ray_session(address: str) -> Iterator[Any]:
    """The library, connected to a cluster for a ``with`` block, without progress bars.

    Args:
        address: of the cluster; "auto" finds a running one, "local" starts one, even if another one runs.

    Raises:
        MissingDependencyError: Ray is not installed.
        ResourceError: there is no cluster at the address, or an actor has failed.
    """
    ray = require_ray()
    try:
        ray.init(address=address, log_to_driver=False)
    except Exception as error:
        raise ResourceError(f"there is no Ray cluster at {address!r}: {type(error).__name__}: {error}") from error
    try:
        ray.data.DataContext.get_current().enable_progress_bars = False
        yield ray
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None) or error
        raise ResourceError(f"a Ray actor has failed: {type(cause).__name__}: {str(cause)[:600]}") from error
    finally:
        ray.shutdown()


def threads_of_an_actor(ray: Any, actors: int) -> int:
    """Its share of the cluster's cores, and no more than each machine has; those that lend no cores do not count."""
    cores = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    fewest = min((count for count in cores if count), default=1)
    return max(1, min(fewest, int(ray.cluster_resources().get("CPU", 1)) // actors))
