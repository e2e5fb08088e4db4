"""The loop of every training: float32 masters of models that compute in what is fast, optimizers, averages, saves.

A run's state is the number of its steps and tensors: data and random numbers are functions of the step. A run that was
killed continues as if nothing had happened, bit for bit on the same machine with the same number of threads.
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
    """How long, how fast and by which optimizer.

    Attributes:
        optimizer: ``muon`` for the matrices inside of blocks and AdamW for all else, or ``adamw`` for everything.
        schedule: of the learning rate, after a linear rise: ``trapezoid``, a plateau and a linear fall over the last
            ``decay_share`` of the steps, or ``cosine``, half a cosine.
        floor: what the rate falls to, as a share of the highest.
        ema_decay: of the averages of the parameters, with which the models end; 0 for none.
        compile_blocks: where the objective names blocks.
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
    parts: Mapping[str, Tensor]  # single numbers, for the log: the mean over the steps that have them


class Masters:
    """Parameters in float32, which the optimizer changes, of a model that computes in ``dtype``.

    Layers with buffers, such as batch normalization, compute in float32 themselves. Where the model computes in
    float32, its parameters are the masters: there is no copy.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype):
        self.working = dict(model.float().named_parameters())
        self.named = {name: parameter.detach() for name, parameter in self.working.items()}
        for module in model.modules():
            if not list(module.buffers(recurse=False)):
                for parameter in module.parameters(recurse=False):
                    parameter.data = parameter.data.to(dtype)

    def take_gradients(self) -> None:
        """Move them from the model to the masters; a parameter that took no part has a gradient of zero."""
        for name, parameter in self.working.items():
            master, gradient = self.named[name], parameter.grad
            master.grad = torch.zeros_like(master) if gradient is None else gradient.float()
            parameter.grad = None

    @torch.no_grad()
    def publish(self) -> None:
        """Give the model the masters' values."""
        cast = [(p, self.named[name]) for name, p in self.working.items() if p.dtype != torch.float32]
        if cast:
            torch._foreach_copy_([p for p, _ in cast], [master for _, master in cast])

    @contextlib.contextmanager
    def replaced_by(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        """Meanwhile the model holds other values in float32: these tensors themselves, which are not copied."""
        kept = {name: parameter.data for name, parameter in self.working.items()}
        try:
            for name, parameter in self.working.items():
                parameter.data = values[name]
            yield
        finally:
            for name, parameter in self.working.items():
                parameter.data = kept[name]


def make_optimizers(named: Mapping[str, Tensor], recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon, if the recipe has it, for the matrices inside of blocks; AdamW for all else, without decay of vectors."""
    matrices = {name for name, p in named.items() if recipe.optimizer == "muon" and _is_hidden_matrix(name, p)}
    rest = [p for name, p in named.items() if name not in matrices]
    groups = [
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": recipe.weight_decay},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, betas=recipe.betas, fused=True)
    hidden = [p for name, p in named.items() if name in matrices]
    return [Muon(hidden, weight_decay=recipe.weight_decay), adamw] if hidden else [adamw]


#: What the lists of blocks are called: ours, T5's, those of transformers' vision and language models.
_BLOCKS = (".transformer_blocks.", ".block.", ".blocks.", ".layers.")


def _is_hidden_matrix(name: str, parameter: Tensor) -> bool:
    """Whether it maps hidden states to hidden states; tables and input and output layers do not."""
    inside = any(blocks in f".{name}" for blocks in _BLOCKS)
    return inside and parameter.ndim == 2 and name.endswith(".weight") and "relative_attention_bias" not in name


class Run:
    """What a training changes. The models compute in ``fast_dtype`` from here on."""

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
        """Write the state after so many steps."""
        optimizers = [optimizer.state_dict() for optimizer in self.optimizers]
        save_state(path, {"models": self._tensors(), "ema": self.ema.shadow, "optimizers": optimizers, "step": step})

    def load(self, path: Path) -> int:
        """Read a state, and return how many steps it has done.

        Raises:
            CheckpointError: it is damaged, or of another training.
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
    """Train in place, resuming from ``folder/state.pt`` if it exists. The models end as their averages, in float32.

    Args:
        models: computes in ``fast_dtype`` meanwhile.
        loss: a function of the step and its random numbers, and of nothing that the last step left but ``models``.
        check: called before each save with the number of steps done, while the models hold their averages; what it
            returns is logged.
        blocks: those that may be compiled.

    Raises:
        CheckpointError: the state is damaged, or of another training.
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
            if saves or (step + 1) % recipe.log_every == 0:  # a save ends the window, which is no part of the state
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
