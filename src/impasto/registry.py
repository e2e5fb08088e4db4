"""The classes that ``model_index.json`` names: which fit each role in a pipeline, and ours, imported when asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .checks import printable, shown
from .errors import CheckpointError

if TYPE_CHECKING:
    from .models.base import Model
    from .schedulers.base import Scheduler

LANGUAGE_MODELS = ("T5EncoderModel", "GlmImageForConditionalGeneration")
PROCESSORS = ("GlmImageProcessor",)
TOKENIZERS = ("T5Tokenizer", "T5TokenizerFast", "ByT5Tokenizer")
SCHEDULERS = (
    "DPMSolverMultistepScheduler",
    "DDIMScheduler",
    "DDPMScheduler",
    "LCMScheduler",
    "FlowMatchEulerDiscreteScheduler",
)
_ROLES = {
    "tokenizer": TOKENIZERS,
    "text_encoder": ("T5EncoderModel",),
    "processor": PROCESSORS,
    "vision_language_encoder": ("GlmImageForConditionalGeneration",),
    "vae": ("AutoencoderKL",),
    "scheduler": SCHEDULERS,
}
#: Early PixArt repositories have the name of a base class.
_PIXART = {**_ROLES, "transformer": ("PixArtTransformer2DModel", "Transformer2DModel")}
_GLM_IMAGE = {**_ROLES, "transformer": ("GlmImageTransformer2DModel",)}
#: What turns prompts and images into numbers.
READERS = (*TOKENIZERS, *PROCESSORS)
_OF_TRANSFORMERS = (*LANGUAGE_MODELS, *READERS)

#: Early PixArt repositories have the name of a base class.
_ALIASES = {"Transformer2DModel": "PixArtTransformer2DModel"}


def class_of(name: str) -> type[Model] | type[Scheduler]:
    """Our class of this name, of a model or a scheduler.

    Raises:
        KeyError: there is none.
    """
    match _ALIASES.get(name, name):
        case "PixArtTransformer2DModel":
            from .models.pixart.model import PixArtTransformer2DModel

            return PixArtTransformer2DModel
        case "GlmImageTransformer2DModel":
            from .models.glm_image.model import GlmImageTransformer2DModel

            return GlmImageTransformer2DModel
        case "AutoencoderKL":
            from .models.autoencoder.model import AutoencoderKL

            return AutoencoderKL
        case "DPMSolverMultistepScheduler":
            from .schedulers.dpm_solver import DPMSolverMultistepScheduler

            return DPMSolverMultistepScheduler
        case "DDIMScheduler":
            from .schedulers.ddim import DDIMScheduler

            return DDIMScheduler
        case "DDPMScheduler":
            from .schedulers.ddpm import DDPMScheduler

            return DDPMScheduler
        case "LCMScheduler":
            from .schedulers.lcm import LCMScheduler

            return LCMScheduler
        case "FlowMatchEulerDiscreteScheduler":
            from .schedulers.flow_match_euler import FlowMatchEulerDiscreteScheduler

            return FlowMatchEulerDiscreteScheduler
    raise KeyError(name)


def accepted_classes(pipeline: str, component: str) -> tuple[str, ...]:
    """The classes that a component of a pipeline may have; none if the pipeline has no such component."""
    return (_GLM_IMAGE if pipeline.startswith("Glm") else _PIXART).get(component, ())


def check_role(pipeline: str, component: str, library_and_class: Any, folder: str) -> None:
    """That the index gives a component a class that fits its role.

    Raises:
        CheckpointError: it does not; the message says how a foreign component is passed.
    """
    library, name = library_and_class
    accepted = accepted_classes(pipeline, component)
    if name in accepted and (library == "transformers") == (name in _OF_TRANSFORMERS):
        return
    raise CheckpointError(
        f"{folder}: the {component} is a {shown(name)} of {shown(library)}, and a {pipeline} takes "
        f"{', '.join(accepted)}. Load it with its own library and pass it: "
        f"from_pretrained(..., {component}={printable(str(name)[:80])}.from_pretrained({folder!r}, "
        f"subfolder={component!r}))"
    )


def component_entries(path: Any, index: Mapping[str, Any]) -> dict[str, list[str | None]]:
    """Component -> library and class, of the content of ``model_index.json``; null for both: meant to be absent.

    Raises:
        CheckpointError: a name that is not a plain name, or an entry of another form.
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
