"""What an engine's process does."""

from __future__ import annotations

import logging
import os
import queue
import threading
from multiprocessing.connection import Connection
from typing import Any

from ...checks import QUOTES_PROMPT
from ...errors import ImpastoError
from ...memory.allocator import return_freed_memory
from ..job import Failed, Job
from .entries import Tally, reason_of
from .loading import load_pipeline, measure_costs, memory_need, prepare_memory
from .loop import Engine
from .messages import Broken, Cancel, Ready, Turn
from .spec import EngineSpec

logger = logging.getLogger("impasto")

#: Seconds after which an engine without images returns the memory that it has freed.
REST = 1.0


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
