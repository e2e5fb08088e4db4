"""Engines in this process, driven to the end, with the exact pixels of their images."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
from torch import Tensor

from impasto.serving.engine import stages
from impasto.serving.engine.costs import StepCosts
from impasto.serving.engine.loop import Engine
from impasto.serving.job import Event, Failed, Finished, Job, RawImage

#: A step costs 10 ms and 0.1 ms for each token.
COSTS = StepCosts(((10, 0.011), (1010, 0.111)), ((10, 0.011), (1010, 0.111)))


class ExactImage(RawImage):
    """Pixels before they are rounded to 8 bits."""

    exact: Tensor


def keep_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    original = stages.as_raw

    def as_raw(image: Tensor) -> ExactImage:
        raw = original(image)
        exact = ExactImage(raw.width, raw.height, raw.pixels)
        object.__setattr__(exact, "exact", image)
        return exact

    monkeypatch.setattr(stages, "as_raw", as_raw)


def make_engine(pipe: Any, **options: Any) -> Engine:
    return Engine(pipe, COSTS, **options)


def run(engine: Engine, jobs: Iterable[Job] = (), between: Callable[[int], Any] = lambda turn: None) -> list[Event]:
    """All events until the engine is idle.

    Args:
        between: called before each turn with its number.
    """
    for job in jobs:
        engine.add(job)
    events: list[Event] = []
    for turn in range(10_000):
        between(turn)
        if engine.idle:
            return events
        events += engine.tick()[0]
    raise AssertionError("the engine does not end")


def images(events: Iterable[Event]) -> dict[str, RawImage]:
    failed = [event for event in events if isinstance(event, Failed)]
    assert not failed
    return {event.id: event.image for event in events if isinstance(event, Finished)}
