"""The training loop: float32 master weights of models that compute in a faster dtype, optimizers, averages, saving.

Data and random numbers are functions of the step, so the state of a run is its step number and tensors. A run that was
killed continues bit for bit, on the same machine with the same number of threads.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..checks import whole_number
from ..errors import CheckpointError
from ..nn.machine import fast_dtype
from .ema import EMA
from .muon import Muon
from .randomness import Randomness, seed_torch
from .state import append_log, load_state, restore, restore_optimizers, save_state, section, trim_log


@dataclass(frozen=True)
class Recipe:
    """The training recipe: steps, learning rate, optimizer.

    Attributes:
        optimizer: ``muon`` for the matrices inside blocks and AdamW for the rest, or ``adamw`` for everything.
        schedule: of the learning rate, after a linear warm-up: ``trapezoid``, a plateau and a linear decay over the
            last ``decay_share`` of the steps, or ``cosine``, half a cosine.
        floor: the final learning rate, as a share of the highest.
        ema_decay: of the moving averages of the parameters, which are the result; 0 for none.
        compile_blocks: compile the blocks given to ``train``.
    """

    steps: int
    seed: int = 0
    optimizer: Literal["muon", "adamw"] = "muon"
    learning_rate: float = 2e-3
    schedule: Literal["trapezoid", "cosine"] = "trapezoid"
    warmup_steps: int = 200
    decay_share: float = 0.3
    floor: float = 0.02
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.01
    clip: float = 1.0
    ema_decay: float = 0.999
    compile_blocks: bool = True
    log_every: int = 50
    save_every: int = 1000

    def rate(self, step: int) -> float:
        """The learning rate of a step."""
        rise = (step + 1) / self.warmup_steps
        if self.schedule == "cosine":
            progress = max(0.0, (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps))
            fall = self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        else:
            fall = max(self.floor, (self.steps - step) / (self.decay_share * self.steps))
        return self.learning_rate * min(1.0, rise, fall)


class Loss(NamedTuple):
    total: Tensor  # a single number
    parts: Mapping[str, Tensor]  # single numbers for the log, averaged over the steps that have them


class Masters:
    """Float32 master weights, which the optimizer updates, of a model that computes in ``dtype``.

    Layers with buffers, such as batch normalization, stay in float32. If the model computes in float32, its parameters
    are the masters, without a copy.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype):
        self.working = dict(model.float().named_parameters())
        self.named = {name: parameter.detach() for name, parameter in self.working.items()}
        for module in model.modules():
            if not list(module.buffers(recurse=False)):
                for parameter in module.parameters(recurse=False):
                    parameter.data = parameter.data.to(dtype)

    def take_gradients(self) -> None:
        """Move the gradients from the model to the masters; unused parameters have a gradient of zero."""
        for name, parameter in self.working.items():
            master, gradient = self.named[name], parameter.grad
            master.grad = torch.zeros_like(master) if gradient is None else gradient.float()
            parameter.grad = None

    @torch.no_grad()
    def publish(self) -> None:
        """Copy the masters' values into the model."""
        cast = [(p, self.named[name]) for name, p in self.working.items() if p.dtype != torch.float32]
        if cast:
            torch._foreach_copy_([p for p, _ in cast], [master for _, master in cast])

    @contextlib.contextmanager
    def replaced_by(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        """Within the block, the model holds these float32 tensors themselves as its parameters."""
        kept = {name: parameter.data for name, parameter in self.working.items()}
        try:
            for name, parameter in self.working.items():
                parameter.data = values[name]
            yield
        finally:
            for name, parameter in self.working.items():
                parameter.data = kept[name]


def make_optimizers(named: Mapping[str, Tensor], recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon, if the recipe says so, for matrices inside blocks; AdamW for the rest, without weight decay of vectors."""
    hidden: list[Tensor] = []
    rest: list[Tensor] = []
    for name, parameter in named.items():
        (hidden if recipe.optimizer == "muon" and _is_hidden_matrix(name, parameter) else rest).append(parameter)
    groups = [
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": recipe.weight_decay},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, betas=recipe.betas, fused=True)
    return [Muon(hidden, weight_decay=recipe.weight_decay), adamw] if hidden else [adamw]


#: The names of lists of blocks: ours, T5's, those of transformers' vision and language models.
_BLOCKS = (".transformer_blocks.", ".block.", ".blocks.", ".layers.")


def _is_hidden_matrix(name: str, parameter: Tensor) -> bool:
    """Whether it maps hidden states to hidden states, unlike embeddings, input and output layers."""
    inside = any(blocks in f".{name}" for blocks in _BLOCKS)
    return inside and parameter.ndim == 2 and name.endswith(".weight") and "relative_attention_bias" not in name


class Run:
    """The mutable state of a training run. From here on, the models compute in ``fast_dtype``."""

    def __init__(self, models: nn.Module, recipe: Recipe):
        self.models, self.device = models, next(models.parameters()).device
        fast = fast_dtype(self.device)
        # Gradients underflow in float16.
        self.masters = Masters(models, torch.float32 if fast == torch.float16 else fast)
        self.optimizers = make_optimizers(self.masters.named, recipe)
        self.ema = EMA(self.masters.named, recipe.ema_decay)

    def _tensors(self) -> dict[str, Tensor]:
        kept = self.models.state_dict().keys()
        buffers = {name: buffer for name, buffer in self.models.named_buffers() if name in kept}
        return {**self.masters.named, **buffers}

    def save(self, path: Path, step: int) -> None:
        """Write the state after ``step`` steps."""
        optimizers = [optimizer.state_dict() for optimizer in self.optimizers]
        save_state(path, {"models": self._tensors(), "ema": self.ema.shadow, "optimizers": optimizers, "step": step})

    def load(self, path: Path) -> int:
        """Load a state and return its number of steps.

        Raises:
            CheckpointError: the file is damaged or belongs to another training run.
        """
        state = load_state(path)
        step = whole_number(f"'step' of {path}", state.get("step"), least=0, error=CheckpointError)
        restore(path, section(path, state, "models"), self._tensors())
        restore(path, section(path, state, "ema"), self.ema.shadow)
        restore_optimizers(path, self.optimizers, state.get("optimizers"))
        self.masters.publish()
        return step


def train(
    models: nn.Module,
    loss: Callable[[int, Randomness], Loss],
    recipe: Recipe,
    folder: Path,
    check: Callable[[int], Mapping[str, float]] | None = None,
    blocks: Sequence[nn.Module] = (),
) -> None:
    """Train in place, resuming from ``folder/state.pt`` if it exists. The result is the averages, in float32.

    Args:
        models: compute in ``fast_dtype`` during training.
        loss: a function of the step, its random numbers and ``models``, and of nothing else that changes.
        check: called before each save with the number of steps done, while the models hold their averages; its result
            is logged.
        blocks: modules that may be compiled.

    Raises:
        CheckpointError: the state is damaged or belongs to another training run.
        OutputError: the state or the log cannot be written.
    """
    blocks = blocks if recipe.compile_blocks else ()
    log, state = folder / "log.jsonl", folder / "state.pt"
    run = Run(models, recipe)
    start = run.load(state) if state.exists() else 0
    trim_log(log, start)
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng([run.device] if run.device.type == "cuda" else []))
        for block in blocks:
            block.forward = torch.compile(block.forward, dynamic=False)  # without the hooks
            stack.callback(delattr, block, "forward")
        models.train()
        clock = time.monotonic()
        window: dict[str, list[Tensor]] = {}
        for step in range(start, recipe.steps):
            seed_torch(recipe.seed, step, run.device)
            total, parts = loss(step, Randomness(recipe.seed, step))
            total.backward()
            run.masters.take_gradients()
            norm = torch.nn.utils.clip_grad_norm_(run.masters.named.values(), recipe.clip)
            for optimizer in run.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = recipe.rate(step)
                optimizer.step()
                optimizer.zero_grad()
            run.masters.publish()
            run.ema.update(step + 1)

            for name, value in {"loss": total, "norm": norm, **parts}.items():
                window.setdefault(name, []).append(value.detach())
            saves = (step + 1) % recipe.save_every == 0 or step + 1 == recipe.steps
            if saves or (step + 1) % recipe.log_every == 0:  # the window is not part of the state
                values = {name: float(torch.stack(several).mean()) for name, several in window.items()}
                window.clear()
                if saves and check is not None:
                    models.eval()
                    eager = torch.compiler.set_stance("force_eager")
                    with torch.no_grad(), run.masters.replaced_by(run.ema.shadow), eager:
                        values |= check(step + 1)
                    models.train()
                seconds = round(time.monotonic() - clock, 3)
                append_log(log, step=step + 1, seconds=seconds, rate=recipe.rate(step), **values)
            if saves:
                run.save(state, step + 1)
    for name, parameter in run.masters.working.items():
        parameter.data = run.ema.shadow[name]
    models.eval()
