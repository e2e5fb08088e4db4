"""Which classes fit each role in a pipeline, by the names that ``model_index.json`` gives them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..checks import printable, shown
from ..errors import CheckpointError

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
