"""The classes that ``model_index.json`` names: which ones fit each component, and ours, imported on demand."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

from .checks import printable, shown
from .errors import CheckpointError
from .family import ALIASES, GLM_IMAGE, family_of

if TYPE_CHECKING:
    from .models.base import Model
    from .schedulers.base import Scheduler

LANGUAGE_MODELS = ("T5EncoderModel", "GlmImageForConditionalGeneration")
PROCESSORS = ("GlmImageProcessor",)
TOKENIZERS = ("T5Tokenizer", "T5TokenizerFast", "ByT5Tokenizer")
#: The modules of our classes.
_MODULES = {
    "PixArtTransformer2DModel": "models.pixart.model",
    "GlmImageTransformer2DModel": "models.glm_image.model",
    "AutoencoderKL": "models.autoencoder.model",
    "DPMSolverMultistepScheduler": "schedulers.dpm_solver",
    "DDIMScheduler": "schedulers.ddim",
    "DDPMScheduler": "schedulers.ddpm",
    "LCMScheduler": "schedulers.lcm",
    "FlowMatchEulerDiscreteScheduler": "schedulers.flow_match_euler",
}
#: The solvers of PixArt, by the names that commands and requests use.
SOLVERS = {
    "dpm++": "DPMSolverMultistepScheduler",
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "lcm": "LCMScheduler",
}
_ROLES = {
    "tokenizer": TOKENIZERS,
    "text_encoder": ("T5EncoderModel",),
    "processor": PROCESSORS,
    "vision_language_encoder": ("GlmImageForConditionalGeneration",),
    "vae": ("AutoencoderKL",),
    "scheduler": tuple(name for name in _MODULES if name.endswith("Scheduler")),
}
_PIXART = {**_ROLES, "transformer": ("PixArtTransformer2DModel", "Transformer2DModel")}
_GLM_IMAGE = {**_ROLES, "transformer": ("GlmImageTransformer2DModel",)}
#: Preprocessing: these components have no weights.
READERS = (*TOKENIZERS, *PROCESSORS)
_OF_TRANSFORMERS = (*LANGUAGE_MODELS, *READERS)


def class_of(name: str) -> type[Model] | type[Scheduler]:
    """Our model or scheduler class of this name.

    Raises:
        KeyError: there is none.
    """
    name = ALIASES.get(name, name)
    found: type[Model] | type[Scheduler] = getattr(import_module(f".{_MODULES[name]}", __package__), name)
    return found


def is_foreign(name: Any) -> bool:
    """Whether the class of a component is neither ours nor one that transformers loads."""
    return name not in _MODULES and name not in ALIASES and name not in _OF_TRANSFORMERS


#: The modules of our pipelines.
_PIPELINES = {
    "PixArtAlphaPipeline": "pixart",
    "PixArtSigmaPipeline": "pixart",
    "PixArtAlphaImg2ImgPipeline": "pixart_edits",
    "PixArtSigmaImg2ImgPipeline": "pixart_edits",
    "PixArtAlphaInpaintPipeline": "pixart_edits",
    "PixArtSigmaInpaintPipeline": "pixart_edits",
    "GlmImagePipeline": "glm_image",
}
#: What a pipeline makes of a prompt -> the part of its name that says so, and whether GLM-Image does it.
TASKS = {"text-to-image": ("", True), "image-to-image": ("Img2Img", True), "inpainting": ("Inpaint", False)}


def pipeline_class(stored: Any, task: str | None = None) -> Any:
    """Our pipeline class for a name in ``model_index.json``, or that of its family for a task.

    Raises:
        CheckpointError: there is none.
    """
    name = str(stored).replace("PAGPipeline", "Pipeline")
    if task is not None and name in _PIPELINES:
        infix, also_glm = TASKS[task]
        family = re.sub(r"(Img2Img|Inpaint)?Pipeline$", "", name)
        if family != "GlmImage":
            name = f"{family}{infix}Pipeline"
        elif not also_glm:
            raise CheckpointError(f"there is no {task} with {name}; it takes images as references: pipe(prompt, image)")
    if name not in _PIPELINES:
        known = ", ".join(_PIPELINES)
        raise CheckpointError(f"a {shown(stored)} is not one of the pipelines of this package, which are {known}")
    return getattr(import_module(f".pipelines.{_PIPELINES[name]}", __package__), name)


def accepted_classes(pipeline: str, component: str) -> tuple[str, ...]:
    """The classes that a pipeline accepts for a component; empty if it has no such component."""
    return (_GLM_IMAGE if family_of(pipeline) is GLM_IMAGE else _PIXART).get(component, ())


def check_role(pipeline: str, component: str, library_and_class: Any, folder: str) -> None:
    """Check that the class of a component in the index is one that the pipeline accepts.

    Raises:
        CheckpointError: it is not; the message explains how to pass a component of another library.
    """
    library, name = library_and_class
    accepted = accepted_classes(pipeline, component)
    libraries = ("transformers", "glm_image")  # diffusers writes the latter for classes whose module has that name
    if name in accepted and (library in libraries) == (name in _OF_TRANSFORMERS):
        return
    from .interop import fits_role

    if accepted and fits_role(component, library_and_class):
        return
    raise CheckpointError(
        f"{folder}: the {component} is a {shown(name)} of {shown(library)}, and a {pipeline} takes "
        f"{', '.join(accepted)}. Load it with its own library and pass it: "
        f"from_pretrained(..., {component}={printable(str(name)[:80])}.from_pretrained({folder!r}, "
        f"subfolder={component!r}))"
    )


def component_entries(path: Any, index: Mapping[str, Any]) -> dict[str, list[str | None]]:
    """The library and class of each component in ``model_index.json``; both None for one that is left out on purpose.

    Raises:
        CheckpointError: a component name that is not an identifier, or a malformed entry.
    """
    found = {}
    for name, value in index.items():
        if name.startswith("_") or not isinstance(value, list):  # options of other pipelines are not components
            continue
        if not name.isidentifier():
            raise CheckpointError(f"{path}: {shown(name)} is not a component name; do not trust this checkpoint")
        if len(value) != 2 or not all(isinstance(entry, str | None) for entry in value):
            raise CheckpointError(
                f"{path}: {name} should be [library, class], and is {shown(value)}; download it again"
            )
        found[name] = value
    return found
