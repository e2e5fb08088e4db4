"""The messages between a server and an engine's process; to an engine also a ``Job``."""

from __future__ import annotations

from dataclasses import dataclass

from ..job import Event
from .costs import StepCosts
from .entries import Tally

# --- to an engine ---


@dataclass(frozen=True)
class Cancel:
    id: str


# --- from an engine ---


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
