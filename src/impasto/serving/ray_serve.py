"""Replicas of the server behind one endpoint, by Ray Serve.

serve run impasto.serving.ray_serve:application model=scenes=builtin:scenes replicas=2
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from ..checks import whole_number
from ..errors import InputError
from ..optional import require

#: Requests that a replica takes at once; others wait in front of it.
ONGOING = 64


def deploy(
    models: Mapping[str, str],
    replicas: int = 1,
    *,
    gpus: float = 0,
    cpus: float = 1,
    settings: Any = None,
    **options: Any,
) -> Any:
    """A server on several machines: an application for ``ray.serve.run``.

    Each replica has all models, a queue and batches of its own, and takes a request from its first byte to its last.
    A replica that is replaced finishes what it has accepted. What concerns other requests, such as A1111's progress
    and interrupt, is answered by any replica, so it is for one replica alone; stored images need a folder that all
    replicas see.

    Args:
        models: paths by name, as for ``Fleet``.
        replicas: how many there are.
        gpus, cpus: that each replica takes.
        settings: an ``HttpSettings``.
        options: further arguments of ``Fleet``: aliases, adapters, device, dtype, memory_budget, waiting.

    Raises:
        MissingDependencyError: Ray Serve is not installed.
        InputError: there is no model, or less than one replica.
    """
    whole_number("replicas", replicas, most=10_000)
    if not models:
        raise InputError("there is no model to serve; give one")
    serve = require("ray.serve", "a deployment", "impasto[ray-serve]")
    ingress = serve.ingress(builder(dict(models), settings, options))()
    actor = {"num_cpus": cpus, "num_gpus": gpus}
    deployment = serve.deployment(
        num_replicas=replicas, max_ongoing_requests=ONGOING, ray_actor_options=actor, graceful_shutdown_timeout_s=120
    )
    return deployment(ingress).bind()


def application(arguments: Mapping[str, str]) -> Any:
    """The same from the command line of Ray Serve, whose arguments are texts.

    Args:
        arguments: ``model``: NAME=PATH or PATH, several divided by commas; and replicas, gpus, cpus, device, dtype,
            memory_budget, and api_key_file: a file with one key a line, one of which requests then need.

    Raises:
        InputError: another argument, or none of a model.
        ConfigurationError: a file of keys that cannot be used.
    """
    known = ("model", "replicas", "gpus", "cpus", "device", "dtype", "memory_budget", "api_key_file")
    unknown = [name for name in arguments if name not in known]
    if unknown:
        raise InputError(f"there is no argument {unknown[0]!r}; there are {', '.join(known)}")
    models = {}
    for each in filter(None, arguments.get("model", "").split(",")):
        name, equals, path = each.rpartition("=")
        models[name if equals else path.rpartition(":")[2].rpartition("/")[2]] = path
    numbers: dict[str, Any] = {name: float(arguments[name]) for name in ("gpus", "cpus") if name in arguments}
    texts: dict[str, Any] = {
        name: arguments[name] for name in ("device", "dtype", "memory_budget") if name in arguments
    }
    if "api_key_file" in arguments:
        from .http.keys import read_keys
        from .http.settings import HttpSettings

        texts["settings"] = HttpSettings(keys=read_keys(Path(arguments["api_key_file"])))
    return deploy(models, int(arguments.get("replicas", "1")), **numbers, **texts)


def builder(models: dict[str, str], settings: Any, options: dict[str, Any]) -> Callable[[], Any]:
    """What makes the application in a replica, which begins and ends with it."""

    def build() -> Any:
        from impasto.serving.fleet import Fleet
        from impasto.serving.http.app import create_app
        from impasto.serving.served import bounded

        fleet = Fleet(models, **options)
        fleet.models = {name: bounded(model) for name, model in fleet.models.items()}
        app = create_app(fleet, settings)

        @asynccontextmanager
        async def life(_: Any) -> AsyncIterator[None]:
            await fleet.start()
            yield
            await fleet.drain()
            await fleet.close()

        app.router.lifespan_context = life
        return app

    return build
