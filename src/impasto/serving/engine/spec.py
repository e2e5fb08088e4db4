"""What an engine serves, and within what."""

from __future__ import annotations

from dataclasses import dataclass

from .costs import StepCosts


@dataclass(frozen=True)
class EngineSpec:
    """A model, and how it is loaded.

    Attributes:
        path: a folder, a hub id, or the id of a bundled model.
        class_name: of its pipeline.
        device, dtype: names; None: CUDA or the CPU, and the dtype in which it computes fastest.
        budget: bytes that the engine may take; it chooses dtypes and placement.
        limited: whether that is a limit that was given, or what is free.
        costs: recorded ones; None: they are measured.
        seconds: of measuring, about.
    """

    name: str
    path: str
    class_name: str
    device: str | None = None
    dtype: str | None = None
    budget: int | None = None
    limited: bool = False
    costs: StepCosts | None = None
    seconds: float = 2.0
    most_running: int = 64
