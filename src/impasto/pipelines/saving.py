"""The components of a pipeline -> their folders and ``model_index.json``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ..checkpoints.layout import INDEX_NAME, superseded
from ..checkpoints.stored import with_variant
from ..checkpoints.weights import disk_errors
from ..folders import saving
from ..models.base import Model
from ..schedulers.base import Scheduler

#: The version of diffusers whose format is written.
FORMAT_VERSION = "0.42.1"


def library_and_class(component: Any) -> list[str]:
    """What ``model_index.json`` says of a component; ours have the names of their namesakes in diffusers."""
    cls = type(component)
    library = "diffusers" if isinstance(component, Model | Scheduler) else cls.__module__.split(".")[0]
    return [library, cls.__name__]


def save_components(
    components: Mapping[str, Any], root: Path, pipeline: str, variant: str | None, max_shard_bytes: int
) -> None:
    """Write every component into its folder, and the index: all of them replace those of an earlier save together.

    Raises:
        InputError: a variant that cannot be in the name of a file.
        OutputError: the folder cannot be written. It is then as it was.
    """
    with_variant(".safetensors", variant)  # refused before anything is written
    index: dict[str, Any] = {"_class_name": pipeline, "_diffusers_version": FORMAT_VERSION}
    with saving(root, superseded) as staging, disk_errors():
        for name, component in components.items():
            index[name] = [None, None] if component is None else library_and_class(component)
            if component is not None:
                # Models of transformers and diffusers have these options too; what else there is has no weights.
                weighty = isinstance(component, nn.Module)
                options = {"variant": variant, "max_shard_size": max_shard_bytes} if weighty else {}
                component.save_pretrained(staging / name, **options)
        (staging / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
