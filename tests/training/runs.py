"""Small runs for tests."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn

from impasto.training.objectives.base import ByStep, Loss, Objective, Tensors
from impasto.training.running import checkpoints
from impasto.training.running.randomness import Randomness
from impasto.training.settings.config import Settings


def rows(folder: Path) -> list[dict[str, float]]:
    """The log of a run."""
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def values(folder: Path) -> list[dict[str, float]]:
    """The log of a run without its times."""
    times = ("seconds", "images_per_second", "utilization")
    return [{name: value for name, value in row.items() if name not in times} for row in rows(folder)]


def settings(steps: int, **changes: Any) -> Settings:
    """Muon and a plateau, unless changed."""
    given: dict[str, Any] = {
        "optimizer": {"name": "muon", "rate": 2e-3, "betas": (0.9, 0.99)},
        "schedule": {"kind": "trapezoid", "warmup": 2, "decay_share": 0.3, "floor": 0.02},
        "ema": 0.999,
        "log_every": 50,
        "checkpoints": {"every": 1000},
    }
    for name, value in changes.items():
        given[name] = (
            {**given[name], **value} if isinstance(value, dict) and isinstance(given.get(name), dict) else value
        )
    return Settings(steps=steps, **given)


def stored(folder: Path) -> dict[str, Tensor]:
    """The tensors of the last checkpoint of a run of one process."""
    last = checkpoints.latest(folder)
    assert last is not None
    (file,) = last.glob("*.safetensors")
    return load_file(file)


class Of(Objective):
    """An objective of a function of the step, its random numbers and a module."""

    def __init__(self, module: nn.Module, function: Callable[[int, Randomness], Loss | Tensor]):
        super().__init__()
        self.module, self.function = module, function

    def forward(self, batch: Tensors, random: Randomness) -> Loss:
        loss = self.function(batch.step, random)
        return loss if isinstance(loss, Loss) else Loss(loss.reshape(-1))


def steps_alone(size: int = 1) -> ByStep:
    """Data without any samples."""
    return ByStep(lambda step: None, size)
