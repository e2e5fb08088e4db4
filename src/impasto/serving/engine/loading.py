"""What an engine does before its first job: load a pipeline, measure its steps, find out how much fits its memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Generator

from ...checkpoints.foreign.from_transformers import class_of_transformers
from ...checkpoints.foreign.quiet import silence_transformers
from ...family import GLM_IMAGE, family_of
from ...memory.allocator import keep_freed_memory, limit_kernel_caches
from ...memory.estimate import Workload, base_memory
from ...memory.inspection import inspect_model
from ...memory.plan import Budget
from ...nn.machine import CPU, default_device, fast_dtype, free_memory, require_device
from ...pipelines.glm_image import GlyphEmbeds
from ...pipelines.pixart import PromptEmbeds
from ...pipelines.request import Schedule
from ...pipelines.sampling import Run, advance
from ...registry import pipeline_class
from ..job import Job
from .costs import StepCosts, measure
from .spec import EngineSpec
from .stages import Stages

#: Tokens of the text that steps are measured with.
TEXT_TOKENS = 20
#: The part of the free memory that a server without a budget uses.
SHARE_OF_FREE = 0.8
#: Height and width in pixels.
Size = tuple[int, int]


def prepare_memory(limited: bool) -> None:
    """Set how this process uses memory, before it computes: images of ever new sizes come, one step after the other.

    Args:
        limited: whether the engine has a memory budget, which freed memory would count against.
    """
    limit_kernel_caches()
    if not limited:
        keep_freed_memory()


def import_parts() -> None:
    """Import what the pipelines of all families load: more than half of the time until an engine is ready."""
    silence_transformers()
    for name in ("T5Config", "T5EncoderModel", "T5Tokenizer"):
        class_of_transformers(name)


def device_of(spec: EngineSpec) -> torch.device:
    """The device that was named, or CUDA if this machine has it, else the CPU."""
    if spec.device is not None:
        return require_device(spec.device)
    device = default_device()
    return device if device.type == "cuda" else CPU


def load_pipeline(spec: EngineSpec) -> Any:
    """The pipeline of a model for text to image, on its device."""
    silence_transformers()
    device = device_of(spec)
    dtype = None if spec.dtype is None else getattr(torch, spec.dtype)
    cls = pipeline_class(spec.class_name)
    if spec.limited and spec.budget is not None:
        pipe = cls.from_pretrained(spec.path, dtype=dtype, memory_budget=Budget(spec.budget, device))
    else:
        pipe = cls.from_pretrained(spec.path, dtype=dtype or fast_dtype(device))
        pipe.to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def memory_need(pipe: Any, spec: EngineSpec) -> tuple[Callable[[Job], int], int]:
    """Bytes that a job takes while it runs, and bytes for all that run, after the model is loaded."""
    found, device = inspect_model(spec.path), device_of(spec)
    names = {name: str(component.dtype).removeprefix("torch.") for name, component in _models(pipe).items()}

    stages = Stages(pipe)

    def need(generated: Size, asked: Size, references: tuple[Size, ...]) -> int:
        def work(name: str, size: Size) -> int:
            load = Workload(found, device, *size, references=references)
            return load.work(found.components[name], names[name], names[name])

        return work("transformer", generated) + max(work("vae", size) for size in {generated, asked})

    known: dict[tuple[Size, Size, tuple[Size, ...]], int] = {}

    def remembered(job: Job) -> int:
        generated, references = stages.size_of(job), tuple[Size, ...]()
        if job.given is not None and stages.family is GLM_IMAGE:
            references = tuple((image.height, image.width) for image in job.given.images)
        key = (generated, (job.height or generated[0], job.width or generated[1]), references)
        if key not in known:
            if len(known) > 4096:
                known.clear()
            known[key] = need(*key)
        return known[key]

    if spec.limited and spec.budget is not None:
        room = spec.budget - base_memory(device)
    else:
        room = int(SHARE_OF_FREE * free_memory(device))
        if spec.budget is not None:  # other models need the rest
            room = min(room, spec.budget)
        prior = pipe.components.get("vision_language_encoder")
        if prior is not None and device.type == "cpu":  # copies of its weights that are read faster
            room -= sum(weight.nbytes for weight in prior.parameters())
    return remembered, max(room, 0)


def _models(pipe: Any) -> dict[str, Any]:
    return {name: pipe.components[name] for name in ("transformer", "vae")}


# --- what steps cost ---


@torch.no_grad()
def measure_costs(pipe: Any, seconds: float, clock: Callable[[], float] = time.perf_counter) -> StepCosts:
    """Measure steps of images of the model's size, of a small one, and of smaller and larger ones packed with them."""
    config = pipe.transformer.config
    side = config["sample_size"] // config["patch_size"]
    even = 2 if family_of(type(pipe).__name__) is GLM_IMAGE else 1
    rows = (max(even, int(side * part) // even * even) for part in (0.5, 1.5, 0.75, 1.25, 1.0, 1.0))
    others = [(height, side) for height in rows]
    half = max(even, side // 2 // even * even)
    width = config["num_attention_heads"] * config["attention_head_dim"]
    kept: dict[tuple[int, tuple[int, int]], Run] = {}

    def step(batch: Sequence[tuple[int, int]]) -> Callable[[], None]:
        for place in enumerate(batch):
            if place not in kept or kept[place].index >= kept[place].end:
                kept[place] = dummy_run(pipe, *place[1])
        runs = [kept[place] for place in enumerate(batch)]

        def take() -> None:
            advance(runs)
            if pipe.device.type == "cuda":
                torch.cuda.synchronize(pipe.device)

        return take

    return measure(step, (half, half), (side, side), others, width, seconds=seconds, clock=clock)


def dummy_run(pipe: Any, rows: int, columns: int) -> Run:
    """The run of an unguided image of so many tokens, of noise and of a text that says nothing."""
    config, device = pipe.transformer.config, pipe.device
    size = [side * config["patch_size"] for side in (rows, columns)]
    noise = torch.randn(1, config["in_channels"], *size, generator=Generator().manual_seed(0))
    schedule = Schedule(20, None, None)
    if family_of(type(pipe).__name__) is GLM_IMAGE:
        text = torch.randn(1, TEXT_TOKENS, config["text_embed_dim"]).to(device, pipe.transformer.dtype)
        prior = torch.zeros(1, rows * columns, dtype=torch.long, device=device)
        with pipe.using("transformer"):
            run = pipe.begin(noise, GlyphEmbeds(text), prior, None, schedule, 1.0)
        assert isinstance(run, Run)
        return run
    channels = config.get("caption_channels") or config["cross_attention_dim"]
    text = torch.randn(1, TEXT_TOKENS, channels).to(device, pipe.transformer.dtype)
    mask = torch.ones(1, TEXT_TOKENS, dtype=torch.long, device=device)
    embeds = PromptEmbeds(text, mask)
    with pipe.using("transformer"):
        run = pipe.begin(noise, embeds, schedule, 1.0)
    assert isinstance(run, Run)
    return run
