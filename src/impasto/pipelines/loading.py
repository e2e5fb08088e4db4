"""``model_index.json`` and the folders next to it <-> the components of a pipeline."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..checkpoints import hub
from ..checkpoints.config import read_json
from ..checkpoints.foreign import from_transformers
from ..checkpoints.layout import INDEX_NAME
from ..checks import printable, shown
from ..errors import CheckpointNotFoundError, InputError
from ..folders import reading
from ..models.base import parse_dtype
from ..registry import LANGUAGE_MODELS, READERS, accepted_classes, check_role, class_of, component_entries
from ..schedulers.base import Scheduler

logger = logging.getLogger("impasto")

DType = torch.dtype | str | None
DTypes = DType | Mapping[str, DType]


def dtype_of_each(names: Sequence[str], dtype: DTypes) -> dict[str, torch.dtype | None]:
    """The dtype of each component (None: as stored), from one for all or a dict with ``"default"``."""
    if not isinstance(dtype, Mapping):
        return dict.fromkeys(names, parse_dtype(dtype))
    unknown = [name for name in dtype if name not in (*names, "default")]
    if unknown:
        raise InputError(f"dtype names {shown(unknown[0])}, which is not a component; use default, {', '.join(names)}")
    return {name: parse_dtype(dtype.get(name, dtype.get("default"))) for name in names}


@dataclass(frozen=True)
class Source:
    """A folder or repository, and which of its files are wanted."""

    model: str | os.PathLike[str]
    subfolder: str | None
    variant: str | None
    use_safetensors: bool | None
    revision: str | None
    cache_dir: str | os.PathLike[str] | None
    local_files_only: bool
    token: str | bool | None

    @contextmanager
    def opened(self) -> Iterator[Source]:
        """This source, unchanged until the block ends; what a killed save left in a folder is finished first."""
        if not isinstance(self.model, str | os.PathLike) or not os.path.isdir(self.model):
            yield self
            return
        with reading(hub.inside(Path(self.model), self.subfolder)) as folder:
            yield replace(self, model=folder, subfolder=None)

    def _resolve(self, patterns: list[str]) -> Path:
        root = hub.resolve(
            self.model,
            allow_patterns=[f"{self.subfolder}/{pattern}" if self.subfolder else pattern for pattern in patterns],
            revision=self.revision,
            cache_dir=self.cache_dir,
            local_files_only=self.local_files_only,
            token=self.token,
        )
        return hub.inside(root, self.subfolder)

    def read_index(self, pipeline: str) -> dict[str, list[str | None]]:
        """Component name -> library and class name.

        Raises:
            CheckpointNotFoundError: there is no ``model_index.json``; the message says how to use what there is.
        """
        path = self._resolve([INDEX_NAME]) / INDEX_NAME
        if not path.is_file():
            transformer = accepted_classes(pipeline, "transformer")[0]
            raise CheckpointNotFoundError(
                f"{self.model} has no {INDEX_NAME}: it is not a whole pipeline. If it holds a transformer alone, "
                f"load that, and the other components from a whole pipeline: "
                f"{pipeline}.from_pretrained(WHOLE_PIPELINE, "
                f"transformer={transformer}.from_pretrained({os.fspath(self.model)!r}, "
                f"subfolder='transformer'))"
            )
        content = read_json(path)
        stored = content.get("_class_name")
        if stored != pipeline:
            logger.warning("%s was saved by %s and is loaded as %s", self.model, printable(str(stored)[:80]), pipeline)
        return component_entries(path, content)

    def fetch(self, index: Mapping[str, list[str | None]], names: list[str], pipeline: str) -> Path:
        """The folder that holds the components ``names``, downloaded where that is needed.

        Raises:
            CheckpointError: a class that does not fit its role.
            CheckpointNotFoundError: components are missing; the message names them.
        """
        stored = [name for name in names if index.get(name, [None, None])[1] is not None]
        for name in stored:
            check_role(pipeline, name, index[name], os.fspath(self.model))
        folder = self._fetch_files(stored, safetensors=self.use_safetensors is not False)
        without_weights = [name for name in stored if not _has_safetensors(folder / name)]
        if without_weights and self.use_safetensors is None:
            folder = self._fetch_files(without_weights, safetensors=False)
        # A component that the index lists as null is meant to be absent.
        lacking = [n for n in names if n not in index or (n in stored and not (folder / n).is_dir())]
        if lacking:
            given = ", ".join(f"{name}=base.{name}" for name in lacking)
            raise CheckpointNotFoundError(
                f"{self.model} lacks components of a pipeline: {', '.join(lacking)}. Take them from a whole pipeline: "
                f"base = {pipeline}.from_pretrained(WHOLE_PIPELINE), then "
                f"{pipeline}.from_pretrained({os.fspath(self.model)!r}, {given}). Or leave components out, as in "
                f"{lacking[0]}=None."
            )
        return folder

    def _fetch_files(self, names: list[str], safetensors: bool) -> Path:
        return self._resolve([INDEX_NAME, *(file for name in names for file in self._files(name, safetensors))])

    def _files(self, name: str, safetensors: bool) -> list[str]:
        """Names of a component's files in a repository, which may hold its weights in several forms."""
        suffix = "safetensors" if safetensors else "bin"
        middle = f".{self.variant}" if self.variant else ""
        weights = [
            f"{stem}{middle}{ending}.{suffix}"
            for stem in ("diffusion_pytorch_model", "model", "pytorch_model")
            for ending in ("", "-*-of-*")
        ]
        return [f"{name}/{file}" for file in ("*.json", "*.jinja", "*.model", "*.txt", *weights)]


def _has_safetensors(folder: Path) -> bool:
    """Whether the weights of a model are there; tokenizers and schedulers (without config.json) have none."""
    return not (folder / "config.json").is_file() or any(folder.glob("*.safetensors"))


def load_component(
    library_and_class: Sequence[str | None],
    folder: Path,
    dtype: torch.dtype | None,
    variant: str | None,
    use_safetensors: bool | None,
) -> Any:
    """Load one component, whose class was found to fit its role, from its folder.

    Raises:
        CheckpointError: files that are missing or damaged.
        MissingDependencyError: the installed transformers lacks a class.
    """
    name = str(library_and_class[1])
    if name in LANGUAGE_MODELS:
        return from_transformers.load_model(name, folder, dtype, variant, use_safetensors)
    if name in READERS:
        return from_transformers.load_reader(name, folder)
    found = class_of(name)
    if issubclass(found, Scheduler):
        stored = found.load_config(folder).get("_class_name", name)
        if stored != name:
            logger.warning(
                "%s is a %s in %s and a %s in %s; it is loaded as the former",
                folder.name,
                name,
                INDEX_NAME,
                shown(stored),
                found.config_name,
            )
        return found.from_pretrained(folder)
    return found.from_pretrained(folder, dtype=dtype or "auto", variant=variant, use_safetensors=use_safetensors)


def check_vocabularies(components: Mapping[str, Any]) -> None:
    """That no tokenizer has ids beyond the vocabulary of the model that reads them.

    Raises:
        CheckpointError: one has; the message names both components.
    """
    for reader, model in (("tokenizer", "text_encoder"), ("processor", "vision_language_encoder")):
        if components.get(reader) is not None and components.get(model) is not None:
            from_transformers.check_vocabulary(reader, components[reader], model, components[model])
