"""The loop of a training: float32 masters of models that compute in what is fast, Muon and AdamW, averages."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ..checks import whole_number
from ..errors import CheckpointError
from ..nn.machine import fast_dtype
from .ema import EMA
from .muon import Muon
from .state import (
    append_log,
    check_tensors,
    load_state,
    restore,
    restore_optimizers,
    save_state,
    section,
    steps_done,
    trim_log,
)


@dataclass(frozen=True)
class Recipe:
    """How long and how fast."""

    steps: int
    learning_rate: float = 2e-3
    warmup_steps: int = 200
    decay_share: float = 0.3  # of the steps, at the end: the rate falls linearly
    weight_decay: float = 0.01
    clip: float = 1.0
    ema_decay: float = 0.999
    log_every: int = 50
    save_every: int = 1000

    def rate(self, step: int) -> float:
        """The learning rate: a linear rise, a plateau, a linear fall."""
        rise = (step + 1) / self.warmup_steps
        fall = (self.steps - step) / (self.decay_share * self.steps)
        return self.learning_rate * min(1.0, rise, max(0.02, fall))


class Loss(NamedTuple):
    total: Tensor  # a single number
    parts: Mapping[str, Tensor]  # single numbers, for the log: the mean over the steps that have them


class Stateful(Protocol):
    """What changes in a training beside the parameters."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> Any: ...


class Masters:
    """Parameters in float32, which the optimizer changes, of a model that computes in ``dtype``."""

    def __init__(self, model: nn.Module, dtype: torch.dtype = torch.bfloat16):
        self.named = {name: p.detach().float().clone() for name, p in model.named_parameters()}
        for master in self.named.values():
            master.grad = torch.zeros_like(master)
        model.to(dtype)
        self.working = dict(model.named_parameters())

    def take_gradients(self) -> None:
        for name, parameter in self.working.items():
            master = self.named[name]
            assert master.grad is not None
            if parameter.grad is None:
                master.grad.zero_()
            else:
                master.grad.copy_(parameter.grad)
            parameter.grad = None

    @torch.no_grad()
    def publish(self, values: dict[str, Tensor] | None = None) -> None:
        """Give the model the masters' values, or others."""
        torch._foreach_copy_(list(self.working.values()), list((values or self.named).values()))


def make_optimizers(named: Mapping[str, Tensor], recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside of blocks, AdamW for all else."""
    matrices = {name for name, p in named.items() if _is_hidden_matrix(name, p)}
    rest = [p for name, p in named.items() if name not in matrices]
    return [
        Muon([p for name, p in named.items() if name in matrices], weight_decay=recipe.weight_decay),
        torch.optim.AdamW(
            [
                {"params": [p for p in rest if p.ndim >= 2], "weight_decay": recipe.weight_decay},
                {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
            ],
            betas=(0.9, 0.99),
            fused=True,
        ),
    ]


#: What the lists of blocks are called: ours, T5's, those of transformers' vision and language models.
_BLOCKS = (".transformer_blocks.", ".block.", ".blocks.", ".layers.")


def _is_hidden_matrix(name: str, parameter: Tensor) -> bool:
    """Whether it maps hidden states to hidden states; tables and the ways in and out do not."""
    inside = any(blocks in f".{name}" for blocks in _BLOCKS)
    return inside and parameter.ndim == 2 and name.endswith(".weight") and "relative_attention_bias" not in name


def train(
    models: nn.Module,
    loss: Callable[[int, torch.Generator], Loss],
    recipe: Recipe,
    folder: Path,
    on_save: Callable[[int], None] | None = None,
    blocks: Sequence[nn.Module] = (),
    thrown_away: str | None = None,
    beside: Stateful | None = None,
) -> None:
    """Train in place, resuming from ``folder/state.pt`` where there is one. The models end as their averages.

    Args:
        models: computes in ``fast_dtype`` meanwhile, and in float32 afterwards.
        loss: told the step and a generator of random numbers.
        on_save: called with the step after each save, while the models hold their averages (in ``fast_dtype``).
        blocks: those that are compiled.
        thrown_away: how names of parameters begin that a finished checkpoint may lack.
        beside: saved and loaded with them.
    """
    masters = Masters(models, fast_dtype(next(models.parameters()).device))
    optimizers = make_optimizers(masters.named, recipe)
    ema = EMA(masters.named, recipe.ema_decay)
    state_path, start = folder / "state.pt", 0
    if state_path.exists():
        state = load_state(state_path)
        start = steps_done(state_path, state)
        restore(state_path, section(state_path, state, "models"), masters.named, optional=thrown_away)
        if "optimizers" in state or thrown_away is None:  # a finished checkpoint has none
            restore_optimizers(state_path, optimizers, state.get("optimizers"))
        averages = section(state_path, state, "ema")
        whole_number(f"'updates' of {state_path}", averages.get("updates"), 0, error=CheckpointError)
        tensors = {name: value for name, value in averages.items() if name != "updates"}
        check_tensors(state_path, tensors, ema.shadow, optional=thrown_away)
        ema.load_state_dict(averages)
        if beside is not None:
            beside.load_state_dict(section(state_path, state, "beside"))
        masters.publish()
    trim_log(folder / "log.jsonl", start)
    for block in blocks:
        block.forward = torch.compile(block.forward, dynamic=False)  # without the hooks
    generator = torch.Generator().manual_seed(start)
    models.train()
    clock = time.monotonic()
    running: dict[str, list[Tensor]] = {}
    for step in range(start, recipe.steps):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = recipe.rate(step)
        total, parts = loss(step, generator)
        total.backward()
        masters.take_gradients()
        norm = torch.nn.utils.clip_grad_norm_(masters.named.values(), recipe.clip)
        for optimizer in optimizers:
            optimizer.step()
        masters.publish()
        ema.update()

        for name, value in {"loss": total, "norm": norm, **parts}.items():
            running.setdefault(name, []).append(value.detach())
        if (step + 1) % recipe.log_every == 0:
            values = {name: float(torch.stack(several).mean()) for name, several in running.items()}
            seconds = time.monotonic() - clock
            append_log(folder / "log.jsonl", step=step + 1, seconds=seconds, rate=recipe.rate(step), **values)
            running.clear()
        if (step + 1) % recipe.save_every == 0 or step + 1 == recipe.steps:
            saved: dict[str, Any] = {"models": masters.named, "ema": ema.state_dict(), "step": step + 1}
            saved["optimizers"] = [optimizer.state_dict() for optimizer in optimizers]
            if beside is not None:
                saved["beside"] = beside.state_dict()
            save_state(state_path, saved)
            if on_save is not None:
                models.eval()
                masters.publish(ema.shadow)
                with torch.no_grad(), torch.compiler.set_stance("force_eager"):
                    on_save(step + 1)
                masters.publish()
                models.train()
    for block in blocks:
        del block.forward
    models.float().eval()
    with torch.no_grad():
        for name, parameter in models.named_parameters():
            parameter.copy_(ema.shadow[name])
