"""Check the server's HTTP interface with Schemathesis, on a service without a model or on the bundled one.

    python scripts/check_api.py --examples 2000
    python scripts/check_api.py --examples 50 --real

All default checks run on every operation of the OpenAPI document; 400 is declared in place of 422. Valid data needs
images that can be decoded, which Schemathesis cannot invent: ``api_hooks`` gives it some.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import socket
import subprocess
import sys
import tempfile
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

from impasto.serving.fleet import Fleet
from impasto.serving.http.app import create_app
from impasto.serving.http.server import Server, bind, make_server
from impasto.serving.http.settings import HttpSettings
from impasto.serving.served import bounded
from impasto.serving.stub import SCENES, StubService


def main() -> int:
    """Run Schemathesis against a server in a thread; its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=100, help="per operation")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--real", action="store_true", help="with the bundled model: small images of up to 3 steps")
    parser.add_argument("rest", nargs="*", help="further options of schemathesis run, after --")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        service = bundled() if given.real else StubService(models=[replace(SCENES, most_side=128, most_pixels=128**2)])
        settings = HttpSettings(storage=Path(folder), max_steps=3 if given.real else HttpSettings.max_steps)
        bound = bind("127.0.0.1", 0)
        server = make_server(create_app(service, settings), service, settings)
        ready = threading.Event()
        thread = threading.Thread(target=lambda: asyncio.run(run(service, server, bound, ready)), daemon=True)
        thread.start()
        if not ready.wait(120):
            raise SystemExit("the model cannot be loaded")
        url = f"http://127.0.0.1:{bound.getsockname()[1]}/openapi.json"
        command = [sys.executable, "-m", "schemathesis.cli", "run", url, "--seed", str(given.seed)]
        command += ["--max-examples", str(given.examples), "--generation-database", "none"]
        command += ["--suppress-health-check", "too_slow", *given.rest]  # a loaded machine
        environment = os.environ | {"SCHEMATHESIS_HOOKS": "api_hooks", "PYTHONPATH": _path()}
        try:
            return subprocess.run(command, env=environment, cwd=folder, check=False).returncode
        finally:
            server.end()
            thread.join(30)


def bundled() -> Fleet:
    """The bundled model in an engine of its own."""
    fleet = Fleet({"scenes": "builtin:scenes"})
    fleet.models = {name: bounded(model, 128) for name, model in fleet.models.items()}
    return fleet


async def run(service: Any, server: Server, bound: socket.socket, ready: threading.Event) -> None:
    """Serve until the server is told to end."""
    if isinstance(service, Fleet):
        await service.start()
    ready.set()
    await server.serve(sockets=[bound])
    if isinstance(service, Fleet):
        await service.close()


def _path() -> str:
    here = Path(__file__).resolve().parent
    return os.pathsep.join([str(here), str(here.parent / "src"), os.environ.get("PYTHONPATH", "")])


if __name__ == "__main__":
    sys.exit(main())
