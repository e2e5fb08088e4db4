"""The state of a training run on disk: written whole or not at all, read without running code."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write tensors, numbers and dicts of them; an interrupted save leaves the last state as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        torch.save(state, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_state(path: Path) -> dict[str, Any]:
    """Read what ``save_state`` wrote."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes make the reader stumble in any way: IndexError, KeyError, ...
        raise CheckpointError(f"{path} is not a training state; delete it to start anew ({error})") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} is not a training state but a {type(state).__name__}; delete it to start anew")
    return state


def append_log(path: Path, **values: float) -> None:
    """Add one line to a JSONL log."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({name: round(float(value), 6) for name, value in values.items()}) + "\n")
