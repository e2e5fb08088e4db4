"""Calls of pipelines: what a callback reads of its own call, and what it sets for the steps that follow."""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor

#: Threads whose last call of a pipeline is remembered.
_MOST_THREADS = 64


class Call:
    """A call of a pipeline, or a loop that its caller drives. Each is known to its pipeline while it is in progress."""

    def __init__(self, pipe: Any, guidance_scale: float = 1.0, attention_kwargs: Mapping[str, Any] | None = None):
        self.pipe, self.thread = pipe, threading.get_ident()
        self.interrupted = False
        self.guidance_scale = guidance_scale  # of the next step
        self.attention_kwargs = attention_kwargs
        self.steps: int | None = None  # None before the loop begins
        self.timestep: Tensor | None = None  # of the step in progress

    @contextmanager
    def registered(self) -> Iterator[None]:
        """Be known to the pipeline until the block ends, and then to those who read what the last call was."""
        self.pipe.in_progress.append(self)
        try:
            yield
        finally:
            self.pipe.in_progress.remove(self)
            if self.steps is not None:
                remember(self)


#: The call of a pipeline that this thread is in. Loops that a caller drives are not calls.
calling: ContextVar[Call | None] = ContextVar("impasto_call", default=None)
#: What the last calls were, by pipeline and thread, the latest at the end. A pipeline itself keeps nothing of a call.
_ended: weakref.WeakKeyDictionary[Any, dict[int, Call]] = weakref.WeakKeyDictionary()
_remembering = threading.RLock()  # garbage collection may end a loop, and so a call, in the thread that holds it


def remember(call: Call) -> None:
    """Keep the facts of a call as the last one of its pipeline in its thread."""
    facts = copy.copy(call)
    facts.pipe = facts.timestep = None
    with _remembering:
        calls = _ended.setdefault(call.pipe, {})
        calls.pop(call.thread, None)
        calls[call.thread] = facts
        if len(calls) > _MOST_THREADS:
            del calls[next(iter(calls))]


def call_of(pipe: Any) -> Call | None:
    """The call or loop in progress of this thread, or its last one, or else one of another thread."""
    own, thread, running = calling.get(), threading.get_ident(), list(pipe.in_progress)
    if own is not None and own.pipe is pipe:
        return own
    with _remembering:
        ended = list(_ended.get(pipe, {}).values())
    by_preference = [*ended, *running, *(x for x in (*ended, *running) if x.thread == thread)]
    return by_preference[-1] if by_preference else None
