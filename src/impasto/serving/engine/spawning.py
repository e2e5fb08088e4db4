"""The process of an engine before it has a model: it imports what it needs while the server does the same.

This module imports next to nothing, so that the process is started first of all.
"""

from __future__ import annotations

import atexit
import multiprocessing
import signal
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

from ...errors import ImpastoError


@dataclass(frozen=True)
class Spawned:
    """A process that waits for an ``EngineSpec`` at the other end of its connection. Leaving its context ends it."""

    process: BaseProcess
    connection: Connection

    def __enter__(self) -> Spawned:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()


def spawn() -> Spawned:
    """Start a process, which ends when the connection is closed."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_run, args=(theirs,), name="impasto engine", daemon=True)
    process.start()
    theirs.close()
    atexit.register(process.kill)  # before multiprocessing waits for it: it ignores the signal that asks it to end
    return Spawned(process, ours)


def _run(connection: Connection) -> None:
    """The program of the process."""
    # Both come to the whole group of processes when the server is to end. It decides when the engine does.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    from .loading import import_parts
    from .program import run_engine

    with suppress(ImportError, ImpastoError):  # loading a model will say it
        import_parts()
    try:
        spec = connection.recv()
    except (EOFError, OSError):  # the server has ended
        return
    run_engine(connection, spec)
