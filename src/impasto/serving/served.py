"""The models that are served: what interfaces need to know of them, read from their checkpoints without the weights."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

from ..checks import MAX_SIDE
from ..errors import CheckpointError, InputError, ResourceError
from ..family import ALPHA, GLM_IMAGE, PRIOR_PIXELS, SIGMA, family_of
from ..memory.inspection import image_size, inspect_model, resolve_pipeline
from ..pipelines.resolution import bins_for, nearest_bin
from ..registry import SOLVERS
from .job import Job

#: The scheduler of GLM-Image, which takes no other one.
FLOW = "flow"
#: Reference images of an edit by GLM-Image.
MOST_REFERENCES = 4
#: Pixels of an image, whatever the memory: PixArt's 4K.
MOST_PIXELS = 4096 * 4096


@dataclass(frozen=True)
class ServedModel:
    """What interfaces need to know of a model.

    Attributes:
        family: "PixArt-α", "PixArt-Σ" or "GLM-Image".
        width, height: of an image if the request does not say, in pixels.
        multiple: sides are multiples of it; others are generated at the nearest size and resized.
        unit: pixels per token of the transformer along a side.
        most_pixels: of an image.
        steps, guidance_scale: if the request does not say.
        scheduler: its own, by the names of ``Job.scheduler``.
        schedulers: the names that it takes.
        edits, masks: whether it takes images to edit, and masks.
        created: Unix time.
        most_side: the longest side of an image, in pixels; 0: twice that of the largest square.
        most_images: how many images an edit takes.
        trained_side: of the square images that it was trained on, in pixels, by which bins are chosen; 0: the width.
    """

    name: str
    family: str
    width: int
    height: int
    multiple: int
    unit: int
    most_pixels: int
    steps: int
    guidance_scale: float
    scheduler: str
    schedulers: tuple[str, ...]
    edits: bool
    masks: bool
    created: int
    most_side: int = 0
    most_images: int = 1
    trained_side: int = 0

    def tokens(self, width: int, height: int, binning: bool = False) -> int:
        """Of an image of this size, at the size that is generated."""
        bins = bins_for(self.trained_side or self.width) if binning and self.family != GLM_IMAGE.name else None
        if bins is not None:
            height, width = nearest_bin(height, width, bins)
        return max(1, width // self.unit) * max(1, height // self.unit)


@dataclass(frozen=True)
class Inspected:
    """A model that can be served, and what its engine needs to know.

    Attributes:
        class_name: of its pipeline.
        need: bytes that an engine takes for one image of the model's size; 0 without a budget.
    """

    served: ServedModel
    path: str
    class_name: str
    need: int

    def tokens(self, job: Job) -> int:
        """Of a job's image."""
        return self.served.tokens(job.width or self.served.width, job.height or self.served.height, job.binning)


def look_at(name: str, path: str, device: Any, dtype: str | None, budget: int | None) -> Inspected:
    """Read what a model is and what it needs; no weights are loaded.

    Args:
        device: where it will compute.
        budget: bytes; None: what is free.

    Raises:
        CheckpointError: it cannot be served.
        ResourceError: the budget is too small for an image of its size.
    """
    _, class_name = resolve_pipeline(path)
    found = inspect_model(path)
    family = family_of(class_name)
    if family not in (ALPHA, SIGMA, GLM_IMAGE) or not class_name.startswith(("PixArt", "GlmImage")):
        raise CheckpointError(f"{path} is a {class_name}, which cannot be served")
    missing = [part for part in ("transformer", "vae", "text_encoder") if part not in found.components]
    if missing:
        raise CheckpointError(f"{path} lacks {', '.join(missing)}, and cannot be served without")
    side, unit = image_size(found.components["transformer"].config, found.components["vae"].config)
    scheduler = FLOW
    if family is not GLM_IMAGE:
        own = _scheduler_class(found.folder)
        scheduler = next((solver for solver, cls in SOLVERS.items() if cls == own), "dpm++")
    need, most = _memory(found, device, dtype, budget, side)
    served = ServedModel(
        name=name,
        family=family.name,
        width=side,
        height=side,
        multiple=PRIOR_PIXELS if family is GLM_IMAGE else unit,
        unit=unit,
        most_pixels=most,
        steps=family.steps,
        guidance_scale=family.guidance_scale,
        scheduler=scheduler,
        schedulers=(FLOW,) if family is GLM_IMAGE else tuple(SOLVERS),
        edits=True,
        masks=family is not GLM_IMAGE,
        most_images=MOST_REFERENCES if family is GLM_IMAGE else 1,
        trained_side=side,
        created=int((found.folder / "model_index.json").stat().st_mtime),
    )
    return Inspected(served, path, class_name, need)


def bounded(model: ServedModel, most_side: int | None = None) -> ServedModel:
    """The model with its largest and its usual image bounded along a side: so, or to four times its own size."""
    side = min(MAX_SIDE, most_side or 4 * max(model.width, model.height))
    width, height, most = min(model.width, side), min(model.height, side), min(model.most_pixels, side * side)
    return replace(model, width=width, height=height, most_side=side, most_pixels=most)


def _scheduler_class(folder: Any) -> str | None:
    path = folder / "scheduler" / "scheduler_config.json"
    try:
        return str(json.loads(path.read_text()).get("_class_name"))
    except (OSError, ValueError):
        return None


def _memory(found: Any, device: Any, dtype: str | None, budget: int | None, side: int) -> tuple[int, int]:
    """Bytes for an image of the model's size, and the pixels of the largest image within the budget."""
    from ..memory.estimate import PROCESS
    from ..memory.plan import Budget, plan_memory
    from ..nn.machine import free_memory, process_memory
    from .engine.loading import SHARE_OF_FREE

    size = int(SHARE_OF_FREE * free_memory(device)) if budget is None else budget
    if device.type == "cpu":
        size += max(0, process_memory() - PROCESS)  # of this process: the plan is for another one
    dtypes = {} if dtype is None else dict.fromkeys(found.components, dtype)

    def peak(side: int) -> int | None:
        """None: it does not fit."""
        try:
            return plan_memory(found, Budget(size, device, side, side), dtypes).peak
        except (ResourceError, InputError):
            return None

    need = peak(side)
    if need is None:
        if budget is None:  # the machine is busy; the model decides when it is loaded
            return 0, min(side * side, MOST_PIXELS)
        plan_memory(found, Budget(size, device, side, side), dtypes)  # says what would fit
        raise ResourceError(f"{found.model} does not fit a budget of {size:,} bytes")
    most = side
    while most * 2 <= min(MAX_SIDE, int(MOST_PIXELS**0.5)) and peak(most * 2) is not None:
        most *= 2
    for quarter in (7, 6, 5):  # up to a quarter of the next doubling
        larger = most * quarter // 4
        if most < 4096 and larger <= 4096 and peak(larger) is not None:
            most = larger
            break
    return need, most * most
