"""The state of a training run: what a step changes, and what a checkpoint holds."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...checks import shown, whole_number
from ...errors import CheckpointError, ConfigurationError, InputError
from ..distributed.parallel import chosen, gather, replicated, shard, synchronize, whole
from ..distributed.processes import ALONE, Processes
from ..distributed.shards import clip_norm
from ..distributed.storage import read_state, read_tensors, write_tensors
from ..objectives.base import AnyBatch, Objective
from ..optimizers import check_shardable, make_optimizers
from ..optimizers.state import group_numbers, restore_group_numbers, set_rate, start_state, state_tensors
from ..settings.config import Settings, differences
from .ema import EMA
from .guard import Guard
from .masters import Masters, working_dtype
from .randomness import Randomness, seed_torch

logger = logging.getLogger("impasto")

#: Settings that may change when a run goes on.
MAY_CHANGE = frozenset(
    {
        "steps", "log_every", "checkpoints", "guard", "report", "micro_batch", "compile", "parallel", "hsdp_shards",
        "output", "validation", "samples", "checks", "export", "data.workers", "data.max_broken",
        "objective.standardize",
    }
)  # fmt: skip


class Run:
    """The mutable state of a training run. From here on, what is trained computes in the precision of ``settings``.

    Of several processes, each has this state, or with FSDP its shards of the tensors.

    Args:
        data: the fingerprint of the order of the data, which may not change within a run; "" if there is none.
    """

    def __init__(self, objective: Objective, settings: Settings, processes: Processes = ALONE, data: str = ""):
        self.objective, self.settings, self.processes, self.data = objective, settings, processes, data
        self.device = next(objective.parameters()).device
        dtype = working_dtype(settings.precision, self.device)
        processes.parallel = chosen(objective, processes)
        synchronize(objective, processes)
        if processes.shards_parameters:
            check_shardable(settings.optimizer)
            if dtype == torch.float16:
                raise ConfigurationError("precision float16 is not supported with shards of parameters; use bfloat16")
            shard(objective, objective.blocks, processes, dtype)
        self.masters = Masters(objective, torch.float32 if processes.shards_parameters else dtype)
        self.loss: nn.Module = replicated(objective, processes) if processes.parallel == "ddp" else objective
        self.optimizers = make_optimizers(self.masters.named, settings.optimizer)
        self.ema = EMA(self.masters.named, settings.ema)
        self.guard = Guard(settings.guard)
        # Gradients underflow in float16: the loss is scaled up, and the gradient down again.
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=dtype == torch.float16)
        self.best_step: int | None = None
        self.best_value = 0.0
        self.measures: Mapping[str, float] | None = None  # of the last checkpoint
        #: The line of the log of a checkpoint that is saved and not yet measured.
        self.unchecked: dict[str, float] | None = None

    def gradients(self, batch: AnyBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Add the gradients of the mean loss over the global batch to those of the masters; return the loss and parts.

        Of several processes, each has the parts of its samples.
        """
        total = torch.zeros((), device=self.device)
        parts: dict[str, list[Tensor]] = {}
        for part in batch.split(self.settings.micro_batch):
            seed_torch(self.settings.seed, batch.step, self.device, part.first)
            loss = self.loss(part, Randomness(self.settings.seed, batch.step, part.first, batch.count))
            weight = weights(part, loss.each)
            mean = (weight * loss.each).sum() / batch.count
            self.scaler.scale(mean).backward()
            self.masters.take_gradients()
            total += mean.detach()
            for name, value in loss.parts.items():
                logged = value.detach().float().flatten()
                if len(logged) == len(weight):  # a sample without weight only fills its place
                    logged = logged.masked_fill(weight == 0, torch.nan)
                parts.setdefault(name, []).append(logged)
        return self.processes.sum(total), {name: torch.cat(several) for name, several in parts.items()}

    def update(self, step: int, loss: Tensor) -> Tensor:
        """One step of the optimizers, unless the guard refuses it; returns the gradient's norm before clipping."""
        for optimizer in self.optimizers if self.scaler.is_enabled() else ():
            self.scaler.unscale_(optimizer)
        norm = clip_norm(self.masters.named.values(), self.settings.clip)
        accepted = self.guard.accepts(step, float(loss), float(norm))
        for optimizer in self.optimizers:
            if accepted:
                for group in optimizer.param_groups:
                    set_rate(group, group["peak"] * self.settings.share(step))
                optimizer.step()
            optimizer.zero_grad()
        if self.scaler.is_enabled():
            self.scaler.update()
        if accepted:
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
        if self.processes.parallel == "ddp":  # a parameter that was of another dtype has lost the hooks of DDP
            self.loss = replicated(self.objective, self.processes)
        return values

    def note_best(self, step: int, values: Mapping[str, float]) -> None:
        """Remember the step with the best value so far, if one is wanted. NaN and infinity are not."""
        wanted = self.settings.checkpoints
        self.measures = values
        value = values.get(wanted.best or "", math.nan)
        if not math.isfinite(value):
            return
        better = value < self.best_value if wanted.best_is == "lowest" else value > self.best_value
        if self.best_step is None or better:
            self.best_step, self.best_value = step, value

    def require_best(self) -> None:
        """Check that the value is measured by which a checkpoint is the best.

        Raises:
            InputError: it is not.
        """
        best, measures = self.settings.checkpoints.best, self.measures
        if best is not None and measures is not None and best not in measures:
            raise InputError(
                f"checkpoints.best: there is no value {best!r}; there are {', '.join(measures)}. The checkpoint is "
                f"saved: resume with another one"
            )

    def take_best(self, path: Callable[[int], Path]) -> None:
        """Take the tensors of the best checkpoint.

        Args:
            path: of the checkpoint of a step.

        Raises:
            CheckpointError: it is missing or damaged.
        """
        if self.best_step is None:
            best = self.settings.checkpoints.best
            logger.warning("no checkpoint has a finite %s: the result is the last state", best)
            return
        read_tensors(path(self.best_step), self._tensors())
        self.masters.publish()

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

    def state(self, step: int) -> dict[str, Any]:
        """The state after ``step`` steps without its tensors, as JSON can hold it."""
        return {
            "step": step,
            "data": self.data,
            "guard": self.guard.state(),
            "scaler": self.scaler.state_dict(),
            "best": None if self.best_step is None else [self.best_step, self.best_value],
            "optimizers": group_numbers(self.optimizers),
            "settings": self.settings.model_dump(mode="json"),
            "unchecked": self.unchecked,
        }

    def save(self, folder: Path, step: int) -> None:
        """Write the state after ``step`` steps into a folder."""
        write_tensors(folder, self._tensors(), self.state(step), self.processes)

    def load(self, folder: Path) -> int:
        """Load a state and return its number of steps.

        Raises:
            CheckpointError: a file is damaged or belongs to another training run.
        """
        state = read_state(folder)
        step = whole_number(f"'step' of {folder}", state.get("step"), least=0, error=CheckpointError)
        self._compare(state.get("settings"), folder)
        if state.get("data") != self.data:
            raise CheckpointError(
                f"the data is not that of {folder}: samples were added, removed, renamed or resized, or others are "
                f"held out (validation.count); restore them, or start another run in another folder"
            )
        self.guard.restore(state.get("guard"))
        try:
            same = _measure(state["settings"]) == _measure(self.settings.model_dump(mode="json"))
            best = state["best"] if same else None
            if state["best"] is not None and not same:
                logger.warning("%s: its best checkpoint does not count, as it was measured in another way", folder)
            self.best_step, self.best_value = (None, 0.0) if best is None else (int(best[0]), float(best[1]))
            unchecked = state["unchecked"]
            self.unchecked = None if unchecked is None else {str(k): float(v) for k, v in unchecked.items()}
            if self.scaler.is_enabled():
                self.scaler.load_state_dict(state["scaler"])
        except (KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError) as error:
            raise CheckpointError(
                f"{folder} is damaged ({error}); delete it to continue from the one before"
            ) from error
        start_state(self.optimizers)
        try:
            restore_group_numbers(self.optimizers, state.get("optimizers"))
        except (TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{folder} is damaged ({error}); delete it to use the one before") from error
        read_tensors(folder, self._tensors())
        self.masters.publish()
        return step

    def _compare(self, stored: Any, folder: Path) -> None:
        """Refuse to continue a run with other settings than those that may change."""
        if not isinstance(stored, dict):
            raise CheckpointError(f"{folder} is damaged: it has no settings; delete it to use the one before")
        for key, (before, now) in differences(stored, self.settings.model_dump(mode="json")).items():
            if not any(key == free or key.startswith(f"{free}.") for free in MAY_CHANGE):
                raise CheckpointError(
                    f"{folder} is of a run with {key}={shown(before)}, and here it is {shown(now)}; keep the setting, "
                    f"or start another run in another folder"
                )


def _measure(settings: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a best value depends on: one that was measured in another way cannot be compared with it."""
    wanted, validation = settings["checkpoints"], settings.get("validation")
    measured = None if validation is None else {**validation, "batch_size": None}  # it changes the rounding alone
    return wanted["best"], wanted["best_is"], measured, settings.get("checks")


def weights(batch: AnyBatch, like: Tensor) -> Tensor:
    """The weights [B] of the samples of a batch."""
    samples = getattr(batch, "samples", None)
    return torch.ones_like(like) if samples is None else like.new_tensor([sample.weight for sample in samples])
