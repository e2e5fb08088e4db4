"""The server's end of an engine, which has a process of its own.

The process ends when the other end of its pipe is closed, so it never outlives the server.
"""

from __future__ import annotations

import atexit
import logging
import queue
import threading
from collections.abc import Callable
from typing import Any

from ..job import Job
from .messages import Cancel
from .spawning import Spawned, spawn
from .spec import EngineSpec

logger = logging.getLogger("impasto")


class EngineProcess:
    """The server's end of an engine.

    Args:
        receive: called with each message, and with None once the process has ended, in a thread.
        spawned: a process that was started before; None: start one.
    """

    def __init__(self, spec: EngineSpec, receive: Callable[[EngineProcess, Any], None], spawned: Spawned | None = None):
        spawned = spawned or spawn()
        self.spec, self.receive = spec, receive
        self.process, self.connection = spawned.process, spawned.connection
        # The pipe may be full while the engine computes: nobody waits for it but this thread.
        self.outgoing: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.outgoing.put(spec)
        threading.Thread(target=self._send, name=f"to {spec.name}", daemon=True).start()
        threading.Thread(target=self._receive, name=f"from {spec.name}", daemon=True).start()

    @property
    def pid(self) -> int:
        pid = self.process.pid
        assert pid is not None
        return pid

    def send(self, message: Job | Cancel) -> None:
        self.outgoing.put(message)

    def kill(self) -> None:
        """End it now; ``receive`` is called with None."""
        self.process.kill()

    def _send(self) -> None:
        while (message := self.outgoing.get()) is not None:
            try:
                self.connection.send(message)
            except OSError:  # it has ended, which the other thread sees
                return

    def _receive(self) -> None:
        while True:
            try:
                message = self.connection.recv()
            except (EOFError, OSError):
                break
            except Exception as error:  # half a message of a process that was killed
                logger.error("a message of the engine of %s cannot be read: %s", self.spec.name, error)
                self.process.kill()
                break
            self.receive(self, message)
        self.process.join()
        atexit.unregister(self.process.kill)
        self.outgoing.put(None)
        self.connection.close()
        self.receive(self, None)


def starting_with(spawned: Spawned) -> Callable[[EngineSpec, Callable[[Any, Any], None]], EngineProcess]:
    """What makes engines, the first of them of a process that was started before."""
    first = [spawned]
    return lambda spec, receive: EngineProcess(spec, receive, first.pop() if first else None)
