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
from torch import Tensor, nn

from ..checkpoints.config import read_json
from ..checks import shown, whole_number
from ..errors import CheckpointError
from ..files import write_file
from . import checkpoints
from .checkpoints import append_log, trim_log
from .config import Settings, differences
from .distributed.parallel import chosen, gather, replicated, shard, synchronize, whole
from .distributed.processes import ALONE, Processes
from .distributed.shards import clip_norm
from .distributed.storage import read_state, read_tensors, write_tensors
from .ema import EMA
from .masters import Masters, working_dtype
from .objectives.base import AnyBatch, Data, Objective
from .optimizers import check_shardable, make_optimizers
from .optimizers.state import set_rate, start_state, state_tensors
from .randomness import Randomness, seed_torch

#: Settings that may change when a run goes on.
MAY_CHANGE = frozenset(
    {
        "steps", "log_every", "checkpoints", "micro_batch", "compile", "output", "validation", "samples", "checks",
        "export", "parallel", "data.workers", "data.max_broken",
    }
)  # fmt: skip


class Run:
    """The mutable state of a training run. From here on, what is trained computes in the precision of ``settings``.

    Of several processes, each has this state, or with FSDP its shards of the tensors.
    """

    def __init__(self, objective: Objective, settings: Settings, processes: Processes = ALONE):
        self.objective, self.settings, self.processes = objective, settings, processes
        self.device = next(objective.parameters()).device
        dtype = working_dtype(settings.precision, self.device)
        processes.parallel = chosen(objective, processes)
        synchronize(objective, processes)
        if processes.shards_parameters:
            check_shardable(settings.optimizer)
            shard(objective, objective.blocks, processes, dtype)
        self.masters = Masters(objective, torch.float32 if processes.shards_parameters else dtype)
        self.loss: nn.Module = replicated(objective, processes) if processes.parallel == "ddp" else objective
        self.optimizers = make_optimizers(self.masters.named, settings.optimizer)
        self.ema = EMA(self.masters.named, settings.ema)

    def gradients(self, batch: AnyBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Add the gradients of the mean loss over the global batch to those of the masters; return the loss and parts.

        Of several processes, each has the parts of its samples.
        """
        total = torch.zeros((), device=self.device)
        parts: dict[str, list[Tensor]] = {}
        for part in batch.split(self.settings.micro_batch):
            seed_torch(self.settings.seed, batch.step, self.device, part.first)
            loss = self.loss(part, Randomness(self.settings.seed, batch.step, part.first, batch.count))
            weight = weights(part, loss.each)  # [B]
            mean = (weight * loss.each).sum() / batch.count
            mean.backward()
            self.masters.take_gradients()
            total += mean.detach()
            for name, value in loss.parts.items():
                parts.setdefault(name, []).append(counted(value.detach().float(), weight))
        return self.processes.sum(total), {name: torch.cat(several) for name, several in parts.items()}

    def update(self, step: int) -> Tensor:
        """One step of the optimizers; returns the norm of the gradient before clipping."""
        norm = clip_norm(self.masters.named.values(), self.settings.clip)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                set_rate(group, group["peak"] * self.settings.share(step))
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
        averages = self.masters.replaced_by(self.ema.shadow)
        with torch.no_grad(), averages, whole(self.objective), eager:
            values = check(step)
        self.objective.train()
        return values

    def finish(self) -> None:
        """Leave the averages in what was trained; with FSDP, whole ones in the main process alone."""
        if self.processes.shards_parameters:
            gather(self.objective, self.ema.shadow, self.processes)
            return
        for name, parameter in self.masters.working.items():
            parameter.data = self.ema.shadow[name]

    def _tensors(self) -> dict[str, Tensor]:
        averages = self.ema.shadow if self.settings.ema else {}
        found = {f"models.{name}": tensor for name, tensor in self.masters.named.items()}
        found |= {f"models.{name}": tensor for name, tensor in self.objective.state_buffers().items()}
        found |= {f"ema.{name}": tensor for name, tensor in averages.items()}
        return found | state_tensors(self.optimizers, self.masters.named)

    def save(self, folder: Path, step: int) -> None:
        """Write the state after ``step`` steps into a folder."""
        write_tensors(folder, self._tensors(), {"step": step}, self.processes)
        if self.processes.is_main:
            write_file(folder / "settings.json", json.dumps(self.settings.model_dump(mode="json"), indent=1) + "\n")

    def load(self, folder: Path) -> int:
        """Load a state and return its number of steps.

        Raises:
            CheckpointError: a file is damaged or belongs to another training run.
        """
        self._compare(read_json(folder / "settings.json"), folder)
        state = read_state(folder)
        step = whole_number(f"'step' of {folder}", state.get("step"), least=0, error=CheckpointError)
        start_state(self.optimizers)
        read_tensors(folder, self._tensors())
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


def counted(values: Tensor, weight: Tensor) -> Tensor:
    """Values [B], or a single number, for the log: NaN, which does not count, for samples with a weight [B] of 0."""
    if values.numel() == 1:
        return values.flatten() if weight.any() else values.new_full((1,), torch.nan)
    return values.masked_fill(weight == 0, torch.nan)


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

    def take(self, processes: Processes) -> dict[str, float]:
        """The means over all processes; from here on, new ones."""
        sums = processes.merged({name: (float(total), float(number)) for name, (total, number) in self.sums.items()})
        self.sums.clear()
        return {name: total / number for name, (total, number) in sums.items() if number}


def train(
    objective: Objective,
    data: Data,
    settings: Settings,
    folder: Path,
    check: Callable[[int], Mapping[str, float]] | None = None,
    processes: Processes = ALONE,
) -> None:
    """Train in place, resuming from the last checkpoint in ``folder`` if there is one.

    The result is the averages, in float32.

    Args:
        objective: what it trains computes in ``settings.precision`` meanwhile.
        check: called before each checkpoint with the number of steps done, while what is trained holds its averages;
            its result is logged. All processes call it, with the same result.
        processes: all of which call this, with the same objective.

    Raises:
        CheckpointError: the state is damaged or belongs to another training run.
        OutputError: a checkpoint or the log cannot be written.
    """
    run = Run(objective, settings, processes)
    last = processes.shared(checkpoints.latest(folder))
    start = 0 if last is None else run.load(last)
    log = folder / "log.jsonl"
    if processes.is_main:
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
            total, parts = run.gradients(data.batch(step, processes.rank, processes.count))
            norm = run.update(step)
            means.add({"loss": total, "norm": norm, **parts})

            saves = (step + 1) % keep.every == 0 or step + 1 == settings.steps
            if saves or (step + 1) % settings.log_every == 0:  # the window is not part of the state
                values = means.take(processes)
                if saves and check is not None:
                    values |= run.checked(check, step + 1)
                seconds = round(time.monotonic() - clock, 3)
                rate = settings.optimizer.rate * settings.share(step)
                if processes.is_main:
                    append_log(log, step=step + 1, seconds=seconds, rate=rate, **values)
            if saves:
                write = functools.partial(run.save, step=step + 1)
                checkpoints.save(folder, step + 1, write, keep.keep, processes=processes)
    run.finish()
    objective.eval()
