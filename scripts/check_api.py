"""Check the server's HTTP interface with Schemathesis, on a service without a model.

    python scripts/check_api.py --examples 2000

All default checks run on every operation of the OpenAPI document; 400 is declared in place of 422. Valid data needs
images that can be decoded, which Schemathesis cannot invent: ``api_hooks`` gives it some.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
import sys
import tempfile
import threading
from dataclasses import replace
from pathlib import Path

from impasto.serving.http.app import create_app
from impasto.serving.http.server import bind, make_server
from impasto.serving.http.settings import HttpSettings
from impasto.serving.stub import SCENES, StubService


def main() -> int:
    """Run Schemathesis against a server in a thread; its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=100, help="per operation")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("rest", nargs="*", help="further options of schemathesis run, after --")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        service = StubService(models=[replace(SCENES, most_side=128, most_pixels=128**2)])
        settings = HttpSettings(storage=Path(folder))
        bound = bind("127.0.0.1", 0)
        server = make_server(create_app(service, settings), service, settings)
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[bound])), daemon=True)
        thread.start()
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


def _path() -> str:
    here = Path(__file__).resolve().parent
    return os.pathsep.join([str(here), str(here.parent / "src"), os.environ.get("PYTHONPATH", "")])


if __name__ == "__main__":
    sys.exit(main())
