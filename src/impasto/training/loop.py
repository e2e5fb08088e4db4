"""The training loop: gradients of an objective, optimizers, averages, checkpoints.

Data and random numbers are functions of the step, so the state of a run is its step number and tensors. A run that was
killed continues bit for bit, on the same machine with the same number of threads.
"""

from __future__ import annotations

import contextlib
import functools
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoints.config import read_json
from ..checks import shown, whole_number
from ..errors import CheckpointError
from ..files import write_file
from . import checkpoints
from .checkpoints import append_log, load_state, restore, restore_optimizers, save_state, section, trim_log
from .config import Settings, differences
from .ema import EMA
from .masters import Masters, working_dtype
from .objectives.base import AnyBatch, Data, Objective
from .optimizers import make_optimizers
from .randomness import Randomness, seed_torch

#: Settings that may change when a run goes on.
MAY_CHANGE = frozenset(
    {
        "steps", "log_every", "checkpoints", "micro_batch", "compile", "output", "validation", "samples", "checks",
        "export", "data.workers", "data.max_broken",
    }
)  # fmt: skip


class Run:
    """The mutable state of a training run. From here on, what is trained computes in the precision of ``settings``."""

    def __init__(self, objective: Objective, settings: Settings):
        self.objective, self.settings = objective, settings
        self.device = next(objective.parameters()).device
        self.masters = Masters(objective, working_dtype(settings.precision, self.device))
        self.optimizers = make_optimizers(self.masters.named, settings.optimizer)
        self.ema = EMA(self.masters.named, settings.ema)

    def gradients(self, batch: AnyBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Add the gradients of the mean loss over the global batch to those of the masters; return the loss and parts.

        Of several processes, each has its share of the sum.
        """
        total = torch.zeros((), device=self.device)
        parts: dict[str, list[Tensor]] = {}
        for part in batch.split(self.settings.micro_batch or max(1, len(batch))):
            seed_torch(self.settings.seed, batch.step, self.device, part.first)
            loss = self.objective(part, Randomness(self.settings.seed, batch.step, part.first, batch.count))
            mean = (weights(part, loss.each) * loss.each).sum() / batch.count
            mean.backward()
            self.masters.take_gradients()
            total += mean.detach()
            for name, value in loss.parts.items():
                parts.setdefault(name, []).append(value.detach().float().flatten())
        return total, {name: torch.cat(several) for name, several in parts.items()}

    def update(self, step: int) -> Tensor:
        """One step of the optimizers; returns the norm of the gradient before clipping."""
        clip = self.settings.clip or torch.inf
        norm = torch.nn.utils.clip_grad_norm_(self.masters.named.values(), clip)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * self.settings.share(step)
            optimizer.step()
            optimizer.zero_grad()
        self.masters.publish()
        self.ema.update(step + 1)
        self.objective.after_step(step + 1)
        return norm

    def checked(self, check: Callable[[int], Mapping[str, float]], step: int) -> Mapping[str, float]:
        """The result of a check, for which what is trained holds its averages."""
        self.objective.eval()
        eager = torch.compiler.set_stance("force_eager")
        with torch.no_grad(), self.masters.replaced_by(self.ema.shadow), eager:
            values = check(step)
        self.objective.train()
        return values

    def _tensors(self) -> dict[str, Tensor]:
        return {**self.masters.named, **self.objective.state_buffers()}

    def save(self, folder: Path, step: int) -> None:
        """Write the state after ``step`` steps into a folder."""
        optimizers = [{"state": optimizer.state_dict()["state"]} for optimizer in self.optimizers]
        state = {"models": self._tensors(), "ema": self.ema.shadow, "optimizers": optimizers, "step": step}
        save_state(folder / "state.pt", state)
        write_file(folder / "settings.json", json.dumps(self.settings.model_dump(mode="json"), indent=1) + "\n")

    def load(self, folder: Path) -> int:
        """Load a state and return its number of steps.

        Raises:
            CheckpointError: a file is damaged or belongs to another training run.
        """
        self._compare(read_json(folder / "settings.json"), folder)
        path = folder / "state.pt"
        state = load_state(path)
        step = whole_number(f"'step' of {path}", state.get("step"), least=0, error=CheckpointError)
        restore(path, section(path, state, "models"), self._tensors())
        restore(path, section(path, state, "ema"), self.ema.shadow)
        restore_optimizers(path, self.optimizers, state.get("optimizers"))
        self.masters.publish()
        return step

    def _compare(self, stored: Mapping[str, Any], folder: Path) -> None:
        """Refuse to continue a run with other settings than those that may change."""
        other = differences(stored, self.settings.model_dump(mode="json"))
        for key, (before, now) in other.items():
            if not any(key == free or key.startswith(f"{free}.") for free in MAY_CHANGE):
                raise CheckpointError(
                    f"{folder} is of a run with {key}={shown(before)}, and here it is {shown(now)}; keep the setting, "
                    f"or start another run in another folder"
                )


def weights(batch: AnyBatch, like: Tensor) -> Tensor:
    """The weights [B] of the samples of a batch."""
    samples = getattr(batch, "samples", None)
    return torch.ones_like(like) if samples is None else like.new_tensor([sample.weight for sample in samples])


class Means:
    """Means of logged values over samples and steps."""

    def __init__(self) -> None:
        self.sums: dict[str, tuple[Tensor, Tensor]] = {}

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Add values [B], or single numbers, of which NaN do not count."""
        for name, value in values.items():
            value = value.detach().float()
            there = ~value.isnan()
            total, number = value.nan_to_num(0.0, torch.inf, -torch.inf).sum(), there.sum()
            before = self.sums.get(name)
            self.sums[name] = (total, number) if before is None else (before[0] + total, before[1] + number)

    def take(self) -> dict[str, float]:
        """The means; from here on, new ones."""
        means = {name: float(total / number) for name, (total, number) in self.sums.items() if number}
        self.sums.clear()
        return means


def train(
    objective: Objective,
    data: Data,
    settings: Settings,
    folder: Path,
    check: Callable[[int], Mapping[str, float]] | None = None,
) -> None:
    """Train in place, resuming from the last checkpoint in ``folder`` if there is one.

    The result is the averages, in float32.

    Args:
        objective: what it trains computes in ``settings.precision`` meanwhile.
        check: called before each checkpoint with the number of steps done, while what is trained holds its averages;
            its result is logged.

    Raises:
        CheckpointError: the state is damaged or belongs to another training run.
        OutputError: a checkpoint or the log cannot be written.
    """
    run = Run(objective, settings)
    last = checkpoints.latest(folder)
    start = 0 if last is None else run.load(last)
    log = folder / "log.jsonl"
    trim_log(log, start)
    keep = settings.checkpoints
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng([run.device] if run.device.type == "cuda" else []))
        for block in objective.blocks if settings.compile else ():
            block.forward = torch.compile(block.forward, dynamic=False)  # without the hooks
            stack.callback(delattr, block, "forward")
        objective.train()
        clock = time.monotonic()
        means = Means()
        for step in range(start, settings.steps):
            total, parts = run.gradients(data.batch(step, 0, 1))
            norm = run.update(step)
            means.add({"loss": total, "norm": norm, **parts})

            saves = (step + 1) % keep.every == 0 or step + 1 == settings.steps
            if saves or (step + 1) % settings.log_every == 0:  # the window is not part of the state
                values = means.take()
                if saves and check is not None:
                    values |= run.checked(check, step + 1)
                seconds = round(time.monotonic() - clock, 3)
                rate = settings.optimizer.rate * settings.share(step)
                append_log(log, step=step + 1, seconds=seconds, rate=rate, **values)
            if saves:
                checkpoints.save(folder, step + 1, functools.partial(run.save, step=step + 1), keep.keep)
    for name, parameter in run.masters.working.items():
        parameter.data = run.ema.shadow[name]
    objective.eval()
