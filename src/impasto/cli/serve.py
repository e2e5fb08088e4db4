"""``impasto serve``: images over HTTP, for OpenAI's clients and others, and a page for people."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..checks import MAX_SIDE, MAX_STEPS, nearest, parse_size, shown, whole_number
from ..errors import ConfigurationError, InputError
from . import pipelines
from .entry import say
from .options import DType

if TYPE_CHECKING:
    import socket

    from ..serving.fleet import Fleet
    from ..serving.http.server import Server
    from ..serving.http.settings import HttpSettings

DEFAULT_MODEL = "scenes=builtin:scenes"
_FILES = (".safetensors", ".pth", ".pt", ".bin")  # no part of a name, unlike the ".5" of a folder sigma-0.5


def serve(
    model: Annotated[
        list[str] | None,
        typer.Option("--model", metavar="NAME=MODEL", help=f"A model and its name; {DEFAULT_MODEL} by default."),
    ] = None,
    alias: Annotated[
        list[str] | None, typer.Option("--alias", metavar="OTHER=NAME", help="Another name, as in dall-e-3=scenes.")
    ] = None,
    lora: Annotated[
        list[str] | None, typer.Option("--lora", metavar="NAME=FILE", help="An adapter that requests may name.")
    ] = None,
    host: Annotated[str, typer.Option(metavar="HOST", help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(metavar="N", help="0: a free one.")] = 8000,
    api_key_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Keys, one a line; requests need one of them.")
    ] = None,
    allow_anyone: Annotated[
        bool, typer.Option("--allow-anyone", help="Listen on a public address without keys.")
    ] = False,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option("--allow-origin", metavar="ORIGIN", help="A web origin whose pages may call the server."),
    ] = None,
    public_url: Annotated[
        str | None, typer.Option(metavar="URL", help="Its address for others, for links to images.")
    ] = None,
    memory_budget: Annotated[
        str | None, typer.Option(metavar="SIZE", help="For all loaded models, such as 8GB; what is free by default.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(metavar="NAME", help="cpu, cuda, ...; cuda by default, else cpu.")
    ] = None,
    dtype: Annotated[DType, typer.Option(metavar="NAME", help="auto, float32, bfloat16 or float16.")] = DType.AUTO,
    queue: Annotated[int, typer.Option(metavar="N", help="Images that may be unfinished at once.")] = 256,
    max_side: Annotated[
        int | None, typer.Option(metavar="PX", help="Of an image; four times the model's own by default.")
    ] = None,
    max_steps: Annotated[int, typer.Option(metavar="N", help="Denoising steps of an image.")] = 200,
    max_body: Annotated[str, typer.Option(metavar="SIZE", help="Of a request.")] = "64MiB",
    timeout: Annotated[float, typer.Option(metavar="SECONDS", help="How long a request may take.")] = 900.0,
    drain: Annotated[
        float, typer.Option(metavar="SECONDS", help="How long accepted images are finished after SIGTERM.")
    ] = 120.0,
    storage: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Keep images there, for links to them.")
    ] = None,
    storage_limit: Annotated[
        str, typer.Option(metavar="SIZE", help="The oldest images are removed beyond it.")
    ] = "10GB",
    no_settings: Annotated[
        bool, typer.Option("--no-settings", help="Do not write prompts and settings into images.")
    ] = False,
    c2pa_cert: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Sign images with this certificate chain (PEM).")
    ] = None,
    c2pa_key: Annotated[Path | None, typer.Option(metavar="FILE", help="Its private key (PEM).")] = None,
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="Show prompts in the log.")] = False,
) -> None:
    """Serve models to OpenAI's clients, to tools that speak A1111's interface, and to people at a page.

    SIGTERM and Ctrl-C end it when it has finished what it has accepted.
    """
    models = pairs("--model", model or [DEFAULT_MODEL])
    aliases, adapters = pairs("--alias", alias or []), pairs("--lora", lora or [])
    for other, name in aliases.items():
        if other in models:
            raise InputError(f"--alias {other}: a model has this name already; choose another")
        if name not in models:
            hint = nearest(name, models, f"there is {', '.join(models)}")
            raise InputError(f"--alias {other}={name}: no --model has the name {shown(name)}{hint}")
    whole_number("--port", port, 0, 65535)
    whole_number("--queue", queue, most=100_000)
    whole_number("--max-steps", max_steps, most=MAX_STEPS)
    if max_side is not None:
        whole_number("--max-side", max_side, most=MAX_SIDE)
    if not (timeout > 0 and drain >= 0):
        raise InputError("--timeout must be above 0, and --drain 0 or more seconds")
    if (c2pa_cert is None) != (c2pa_key is None):
        raise InputError("--c2pa-cert and --c2pa-key belong together; give both")

    from ..serving.engine.spawning import spawn

    with spawn() as first:  # it imports for seconds, as this process does
        from ..serving.engine.process import starting_with
        from ..serving.fleet import Fleet
        from ..serving.http.app import create_app
        from ..serving.http.keys import read_keys
        from ..serving.http.provenance import make_signer
        from ..serving.http.server import bind, make_server
        from ..serving.http.settings import HttpSettings
        from ..serving.served import bounded

        keys = () if api_key_file is None else read_keys(api_key_file)
        signer = None
        if c2pa_cert is not None and c2pa_key is not None:
            signer = make_signer(c2pa_cert, c2pa_key, pipelines.version())
        with bind(host, port) as bound:
            hosts = allowed_hosts(host, bound, bool(keys), allow_anyone)
            settings = HttpSettings(
                keys=keys,
                origins=tuple(allow_origin or ()),
                hosts=hosts,
                max_body=parse_size(max_body),
                max_buffered=max(HttpSettings.max_buffered, 4 * parse_size(max_body)),
                max_steps=max_steps,
                deadline_seconds=timeout,
                storage=storage,
                storage_bytes=parse_size(storage_limit),
                public_url=public_url,
                settings_in_images=not no_settings,
                signer=signer,
                log_prompts=log_prompts,
            )
            check_adapters(adapters)
            chosen_dtype = None if dtype is DType.AUTO else dtype.value
            fleet = Fleet(
                models, aliases, adapters, device, chosen_dtype, memory_budget, queue, process=starting_with(first)
            )
            fleet.models = {name: bounded(one, max_side) for name, one in fleet.models.items()}
            server = make_server(create_app(fleet, settings), fleet, settings, drain)
            logging.getLogger("impasto.serve").setLevel(logging.INFO)
            asyncio.run(run(fleet, server, bound, announcement(models, bound, settings, api_key_file)))


async def run(fleet: Fleet, server: Server, bound: socket.socket, ready: Sequence[str]) -> None:
    """Serve until a signal ends it. Requests are answered while the default model is loaded: not yet."""
    serving = asyncio.ensure_future(server.serve(sockets=[bound]))
    loading = asyncio.ensure_future(fleet.start())
    try:
        await asyncio.wait({serving, loading}, return_when=asyncio.FIRST_COMPLETED)
        if loading.done() and not serving.done():
            try:
                loading.result()
            except BaseException:
                server.end()
                raise
            for line in ready:
                say(line)
        await serving
    finally:
        loading.cancel()
        await fleet.close()
        await asyncio.gather(serving, loading, return_exceptions=True)


def pairs(option: str, given: Sequence[str]) -> dict[str, str]:
    """``NAME=VALUE`` of an option that may be repeated; a value alone is named by the file or folder."""
    found: dict[str, str] = {}
    for one in given:
        name, equals, value = one.partition("=")
        if not equals:
            path = Path(one.rpartition(":")[2])
            name, value = path.stem if path.suffix in _FILES else path.name, one
        if not value or not re.fullmatch(r"[\w.+@-][\w.+@ -]{0,99}", name):
            raise InputError(f"{option} {shown(one)} is not understood; write it like NAME=VALUE, with a plain name")
        if name in found:
            raise InputError(f"{option}: the name {shown(name)} is given twice")
        found[name] = value
    return found


def allowed_hosts(host: str, bound: socket.socket, has_keys: bool, allow_anyone: bool) -> tuple[str, ...] | None:
    """The names by which a server without keys may be addressed; None: any.

    Raises:
        ConfigurationError: it would listen on a public address without keys.
    """
    address = ipaddress.ip_address(str(bound.getsockname()[0]).partition("%")[0])
    if address.is_loopback:
        return None if has_keys else ("localhost", "127.0.0.1", "::1", host.lower(), str(address))
    if not has_keys and not allow_anyone:
        raise ConfigurationError(
            f"--host {host} lets others reach this server; give --api-key-file, or --allow-anyone if that is meant"
        )
    return None


def check_adapters(adapters: dict[str, str]) -> None:
    """Refuse adapters that cannot be read before models are loaded. Raises CheckpointError."""
    from ..pipelines.adapters import ChosenAdapter, adapter_defaults

    for file in adapters.values():
        adapter_defaults([ChosenAdapter(file)])


def announcement(
    models: dict[str, str], bound: socket.socket, settings: HttpSettings, key_file: Path | None
) -> list[str]:
    """What is printed when the server is ready: address, page and a command that generates an image."""
    address, port = bound.getsockname()[:2]
    name = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(address, f"[{address}]" if ":" in address else address)
    url = f"http://{name}:{port}"
    first_key = f"grep -m1 '^[^#]' {shlex.quote(str(key_file))}"
    key = f' -H "Authorization: Bearer $({first_key})"' if settings.keys else ""
    body = '{"prompt": "a red cube on a blue sphere"}'
    return [
        f"{pipelines.version()} serves {', '.join(models)} at {url}/v1",
        f"page: {url}/",
        f"curl -s {url}/v1/images/generations{key} -H 'Content-Type: application/json' -d '{body}'"
        """ | sed 's/.*"b64_json":"\\([^"]*\\)".*/\\1/' | base64 -d > image.png""",
    ]
