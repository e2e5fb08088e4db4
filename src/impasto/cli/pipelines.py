"""Pipelines for the commands: find, load and run one. Heavy imports are inside the functions."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checks import shown
from ..errors import CheckpointError, ResourceError
from ..memory.inspection import resolve_pipeline
from ..registry import SOLVERS
from .options import DType, Solver

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from ..checkpoints.adapters.file import AdapterDefaults
    from ..memory.plan import Budget
    from ..pipelines.adapters import ChosenAdapter
    from ..training.distributed.processes import Processes

PIPELINES = ("PixArtAlphaPipeline", "PixArtSigmaPipeline", "GlmImagePipeline")


def resolve(model: str) -> tuple[Path, str]:
    """The folder of a pipeline that the commands can run, and the name of its class."""
    folder, name = resolve_pipeline(model)
    if name not in PIPELINES:
        raise CheckpointError(f"{model} is a {shown(name)}; known pipelines are {', '.join(PIPELINES)}")
    return folder, name


def choose_device(name: str | None) -> torch.device:
    """The device of this name; if not given, CUDA if this machine has it, else the CPU."""
    from ..nn.machine import CPU, default_device, require_device

    if name is None:
        device = default_device()
        return device if device.type == "cuda" else CPU
    device = require_device(name)
    if device.type == "meta":
        raise ResourceError("the device meta computes nothing; choose cpu or cuda")
    return device


@contextmanager
def processes(device: str | None) -> Iterator[Processes | None]:
    """The processes that torchrun has started; None if this one is alone."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield None
        return
    from ..training.distributed.processes import joined

    with joined("auto", device) as together:
        yield together


def choose_dtype(name: DType, device: torch.device) -> torch.dtype:
    """``auto`` is the dtype in which the device computes fastest."""
    import torch

    from ..nn.machine import fast_dtype

    if name is DType.AUTO:
        return fast_dtype(device)
    chosen: torch.dtype = getattr(torch, name.value)
    return chosen


def load(
    model: str,
    class_name: str,
    device: torch.device,
    dtype: torch.dtype | None,
    solver: Solver | None = None,
    budget: Budget | None = None,
) -> Any:
    """Load a pipeline, without the progress bars and messages of transformers."""
    import impasto

    from ..checkpoints.foreign.quiet import silence_transformers

    silence_transformers()
    cls: Any = getattr(impasto, class_name)
    pipe = cls.from_pretrained(model, dtype=dtype, memory_budget=budget)
    if budget is None:
        pipe.to(device)
    if solver is not None:
        pipe.scheduler = getattr(impasto, SOLVERS[solver.value]).from_config(pipe.scheduler.config)
    return pipe


def solver_name(scheduler: Any) -> str:
    """The value of ``--scheduler`` for a scheduler; the name of its class if there is none."""
    name = type(scheduler).__name__
    return next((solver for solver, class_name in SOLVERS.items() if class_name == name), name)


def choose_adapters(given: list[str]) -> tuple[list[ChosenAdapter], AdapterDefaults]:
    """The adapters of ``--lora``, and how to generate with them."""
    from ..checkpoints.adapters.file import AdapterDefaults

    if not given:
        return [], AdapterDefaults()
    from ..pipelines.adapters import ChosenAdapter, adapter_defaults

    chosen = [ChosenAdapter.parse(text) for text in given]
    return chosen, adapter_defaults(chosen)


def solver_of(name: str | None) -> Solver | None:
    """The value of ``--scheduler`` that an adapter asks for; None if it asks for none, or for one that is not here."""
    return next((solver for solver in Solver if solver.value == name), None)


def apply(pipe: Any, chosen: list[ChosenAdapter]) -> None:
    """Load and fuse adapters."""
    from ..pipelines.adapters import apply_adapters

    apply_adapters(pipe, chosen)


def run(pipe: Any, prompts: list[str], seed: int, **options: Any) -> list[Image.Image]:
    """Generate an image of each prompt.

    Image i has a CPU generator of its own with ``seed + i``: it depends neither on the batch nor on the device.
    """
    import torch

    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]
    (images,) = pipe(prompts, generator=generators, return_dict=False, **options)
    assert isinstance(images, list)
    return images


def version() -> str:
    """The program and its version, as files and reports record them."""
    from .. import __version__

    return f"impasto {__version__}"
