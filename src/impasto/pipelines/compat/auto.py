"""Classes that choose a class: pipelines by task, models by what their config names."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, ClassVar

from ...checkpoints import hub
from ...checkpoints.config import read_json
from ...checkpoints.keywords import settle
from ...checks import shown
from ...errors import CheckpointError, InputError
from ...registry import LANGUAGE_MODELS, class_of, pipeline_class
from .configs import stored_class


class _AutoPipeline:
    """A pipeline for a task, of the family of a checkpoint or of another pipeline."""

    task: ClassVar[str]

    def __init__(self) -> None:
        raise InputError(f"{type(self).__name__} has no instances; use its from_pretrained or from_pipe")

    @classmethod
    def from_pretrained(cls, pretrained_model_or_path: str | os.PathLike[str], **options: Any) -> Any:
        """Load a pipeline for this task; ``options`` are those of its class.

        Raises:
            CheckpointError: the checkpoint is of no family of this package, or there is no such task for it.
        """
        settle(cls.__name__, {"enable_pag": options.pop("enable_pag", None)})
        found = pipeline_class(stored_class(pretrained_model_or_path, options), cls.task)
        return found.from_pretrained(pretrained_model_or_path, **options)

    @classmethod
    def from_pipe(cls, pipeline: Any, **options: Any) -> Any:
        """A pipeline for this task that shares the components of another one, ours or of diffusers."""
        settle(cls.__name__, {"enable_pag": options.pop("enable_pag", None)})
        return pipeline_class(type(pipeline).__name__, cls.task).from_pipe(pipeline, **options)


class AutoPipelineForText2Image(_AutoPipeline):
    """Text to image, with the class of the checkpoint's family."""

    task = "text-to-image"


class AutoPipelineForImage2Image(_AutoPipeline):
    """Image to image, with the class of the checkpoint's family."""

    task = "image-to-image"


class AutoPipelineForInpainting(_AutoPipeline):
    """Inpainting, with the class of the checkpoint's family."""

    task = "inpainting"


class AutoModel:
    """A model or scheduler of the class that its config names."""

    def __init__(self) -> None:
        raise InputError("AutoModel has no instances; use its from_pretrained")

    @classmethod
    def from_pretrained(
        cls, pretrained_model_or_path: str | os.PathLike[str], subfolder: str | None = None, **options: Any
    ) -> Any:
        """Load a model, a scheduler, or a text encoder; ``options`` are those of its class.

        Raises:
            CheckpointError: there is no config, or it names a class that this package does not have.
        """
        of_hub = {name: options[name] for name in hub.OPTIONS if options.get(name) is not None}
        files = ("config.json", "scheduler_config.json")
        patterns = [f"{subfolder}/{file}" if subfolder else file for file in files]
        folder = hub.inside(hub.resolve(pretrained_model_or_path, allow_patterns=patterns, **of_hub), subfolder)
        content = read_json(folder / next((file for file in files if (folder / file).is_file()), files[0]))
        name = content.get("_class_name") or next(iter(content.get("architectures") or []), None)
        if name in LANGUAGE_MODELS:
            form: Any = {key: options.get(key) for key in ("variant", "use_safetensors")}
            root, _ = hub.fetch(pretrained_model_or_path, [subfolder or ""], **form, **of_hub)
            return _language_model(name, hub.inside(root, subfolder), options)
        try:
            found: Any = class_of(str(name))
        except (KeyError, TypeError):
            raise CheckpointError(
                f"{folder} holds a {shown(name)}, which is not a class of this package; load it with its own library"
            ) from None
        return found.from_pretrained(pretrained_model_or_path, subfolder=subfolder, **options)


def _language_model(name: str, folder: Path, options: dict[str, Any]) -> Any:
    from ...checkpoints.foreign.from_transformers import load_model
    from ...models.dtypes import parse_dtype

    dtype = parse_dtype(options.pop("dtype", None) or options.pop("torch_dtype", None))
    given = [options.pop(key, None) for key in ("variant", "use_safetensors", "quantization_config")]
    for key in (*hub.OPTIONS, "torch_dtype"):
        options.pop(key, None)
    settle(name, options)
    return load_model(name, folder, dtype, *given)
