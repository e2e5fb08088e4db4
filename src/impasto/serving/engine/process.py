"""An engine in a process of its own, and the messages between it and the server.

The process ends when the other end of its pipe is closed, so it never outlives the server.
"""

from __future__ import annotations

import atexit
import logging
import os
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from ...checks import QUOTES_PROMPT
from ...errors import ImpastoError
from ...memory.allocator import return_freed_memory
from ..job import Event, Failed, Job
from .costs import StepCosts
from .entries import Tally, reason_of
from .loading import load_pipeline, measure_costs, memory_need, prepare_memory
from .loop import Engine
from .spawning import Spawned, spawn
from .spec import EngineSpec

logger = logging.getLogger("impasto")

#: Seconds after which an engine without images returns the memory that it has freed.
REST = 1.0


# --- messages to an engine: a Job, or one of these ---


@dataclass(frozen=True)
class Cancel:
    id: str


# --- messages from an engine ---


@dataclass(frozen=True)
class Ready:
    """It is loaded."""

    costs: StepCosts


@dataclass(frozen=True)
class Broken:
    """It cannot be loaded; the process ends."""

    message: str


@dataclass(frozen=True)
class Turn:
    """What has happened in one turn."""

    events: list[Event]
    tally: Tally


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


# --- in the process ---


def without_prompts(record: logging.LogRecord) -> bool:
    """Refuse what quotes prompts, as logs of a server do not."""
    return not any(hasattr(record, mark) for mark in QUOTES_PROMPT)


def run_engine(connection: Connection, spec: EngineSpec) -> None:
    """Load a model and generate images with it until the connection is closed."""
    logger.addFilter(without_prompts)
    incoming: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(connection, incoming), daemon=True).start()
    try:
        engine = make_engine(spec)
    except Exception as error:
        if not isinstance(error, ImpastoError):
            logger.exception("%s cannot be loaded", spec.name)
        connection.send(Broken(str(error) or type(error).__name__))
        return
    connection.send(Ready(engine.costs))
    while True:
        messages = [_wait(incoming)] if engine.idle else []
        while not incoming.empty():
            messages.append(incoming.get())
        for message in messages:
            if isinstance(message, Job):
                try:
                    engine.add(message)
                except Exception as error:
                    logger.exception("job %s cannot be used", message.id)
                    connection.send(Turn([Failed(message.id, *reason_of(error))], Tally()))
            elif isinstance(message, Cancel):
                engine.cancel(message.id)
        if not engine.idle:
            connection.send(Turn(*engine.tick()))


def _wait(incoming: queue.SimpleQueue[Any]) -> Any:
    """The next message. Freed memory is returned if none comes for a while."""
    try:
        return incoming.get(timeout=REST)
    except queue.Empty:
        return_freed_memory()
        return incoming.get()


def _listen(connection: Connection, incoming: queue.SimpleQueue[Any]) -> None:
    while True:
        try:
            incoming.put(connection.recv())
        except (EOFError, OSError):  # the server has ended, or wants this to end
            os._exit(0)


def make_engine(spec: EngineSpec) -> Engine:
    """Load a model, and measure what its steps cost."""
    prepare_memory(spec.limited)
    pipe = load_pipeline(spec)
    costs = spec.costs or measure_costs(pipe, spec.seconds)
    need, room = memory_need(pipe, spec)
    return Engine(pipe, costs, need=need, room=room, most_running=spec.most_running)
