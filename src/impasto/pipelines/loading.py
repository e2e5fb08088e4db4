"""``model_index.json`` and the folders next to it <-> the components of a pipeline."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..checkpoints import hub
from ..checkpoints.config import read_json
from ..checkpoints.frozen import FORMAT_VERSION
from ..checkpoints.layout import INDEX_NAME, holds_weights
from ..checkpoints.upload import files_in
from ..checks import printable, shown
from ..errors import CheckpointNotFoundError, InputError
from ..folders import reading
from ..models.dtypes import parse_dtype
from ..nn.changes import refuse_unsaveable
from ..nn.machine import check_device, check_dtype
from ..registry import LANGUAGE_MODELS, READERS, accepted_classes, check_role, class_of, component_entries, is_foreign

if TYPE_CHECKING:
    from ..memory.plan import Budget, MemoryPlan

logger = logging.getLogger("impasto")

DType = torch.dtype | str | None
DTypes = DType | Mapping[str, DType]


@dataclass(frozen=True)
class Source:
    """A folder or repository, and which of its files to load."""

    model: str | os.PathLike[str]
    subfolder: str | None
    variant: str | None
    use_safetensors: bool | None
    download: Mapping[str, Any]  # options of ``hub.resolve``

    @classmethod
    def of(cls, model: str | os.PathLike[str], options: Mapping[str, Any]) -> Source:
        """Of arguments of ``from_pretrained`` by name, among others."""
        download = {name: options[name] for name in hub.OPTIONS if options.get(name) is not None}
        return cls(model, options.get("subfolder"), options.get("variant"), options.get("use_safetensors"), download)

    @contextmanager
    def opened(self) -> Iterator[Source]:
        """This source, unchanged until the block ends; what a killed save left in a folder is finished first."""
        if not isinstance(self.model, str | os.PathLike) or not os.path.isdir(self.model):
            yield self
            return
        with reading(hub.inside(Path(self.model), self.subfolder)) as folder:
            yield replace(self, model=folder, subfolder=None)

    def _inside(self, path: str) -> str:
        return f"{self.subfolder}/{path}" if self.subfolder else path

    def read_content(self) -> tuple[Path, dict[str, Any]]:
        """The path and contents of the index; the latter are empty without one."""
        root = hub.resolve(self.model, allow_patterns=[self._inside(INDEX_NAME)], **self.download)
        path = hub.inside(root, self.subfolder) / INDEX_NAME
        return path, read_json(path) if path.is_file() else {}

    def read_index(self, pipeline: str) -> dict[str, list[str | None]]:
        """Component name -> library and class name."""
        path, content = self.read_content()
        if not path.is_file():
            transformer = accepted_classes(pipeline, "transformer")[0]
            raise CheckpointNotFoundError(
                f"{self.model} has no {INDEX_NAME}: it is not a whole pipeline. If it holds a transformer alone, "
                f"load that, and the other components from a whole pipeline: "
                f"{pipeline}.from_pretrained(WHOLE_PIPELINE, "
                f"transformer={transformer}.from_pretrained({os.fspath(self.model)!r}, "
                f"subfolder='transformer'))"
            )
        stored = content.get("_class_name")
        if stored != pipeline:
            logger.warning("%s was saved by %s and is loaded as %s", self.model, printable(str(stored)[:80]), pipeline)
        return component_entries(path, content)

    def fetch(self, index: Mapping[str, list[str | None]], names: list[str], pipeline: str) -> Path:
        """The folder that holds the components ``names``, downloaded if needed."""
        stored = [name for name in names if index.get(name, [None, None])[1] is not None]
        for name in stored:
            check_role(pipeline, name, index[name], os.fspath(self.model))
        folder, left = self._fetch(stored, self.variant)
        if self.variant is not None and left:
            with_weights = [name for name in stored if (folder / name / "config.json").is_file()]
            if len(left) == len(with_weights):
                raise CheckpointNotFoundError(
                    f"{self.model} holds no weights of the variant {self.variant!r}: none of {', '.join(left)} has any"
                    f". Leave variant out to load those that it has."
                )
            folder, _ = self._fetch(left, None)
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

    def _fetch(self, names: Sequence[str], variant: str | None) -> tuple[Path, list[str]]:
        """The folder with these components, downloaded if needed, and the names of those that lack their weights."""
        root, left = hub.fetch(
            self.model,
            [self._inside(name) for name in names],
            variant=variant,
            use_safetensors=self.use_safetensors,
            others=[self._inside(INDEX_NAME)],
            **self.download,
        )
        return hub.inside(root, self.subfolder), [path.rpartition("/")[2] for path in left]


def load_components(
    source: Source,
    pipeline: str,
    names: Sequence[str],
    given: Mapping[str, Any],
    dtype: DTypes,
    memory_budget: int | str | Budget | None,
    quantization_config: Any = None,
) -> tuple[dict[str, Any], MemoryPlan | None, Path]:
    """The components of a pipeline by name, the plan for the memory budget, and the folder that they came from.

    Args:
        pipeline: the name of the pipeline's class.
        names: of the components, in order.
        given: components in place of the stored ones, which are not read.
        quantization_config: for the whole pipeline, or a dict of configs by component.
    """
    dtypes, quantized, asked = _read_dtypes(dtype, names, planned=memory_budget is not None)
    plan = None
    with source.opened() as opened:
        index = opened.read_index(pipeline)
        wanted = [name for name in names if name not in given]
        quantization: Mapping[str, Any] = {}
        if quantization_config is not None:
            from ..transforms.quantization_configs import configs_of

            classes = {name: str(index[name][1]) for name in wanted if index.get(name, [None, None])[1] is not None}
            models = [name for name, cls in classes.items() if cls not in READERS and name != "scheduler"]
            ours = {name: classes[name] not in LANGUAGE_MODELS for name in models}
            quantization = configs_of(quantization_config, ours)
        folder = opened.fetch(index, wanted, pipeline)
        if memory_budget is not None:
            from ..memory import inspection
            from ..memory import plan as planner

            entries = {name: index[name] for name in wanted}
            found = inspection.inspect_components(folder, pipeline, entries, opened.variant)
            requested = {name: _dtype_name(dtypes[name]) for name in wanted if name in asked}
            budget = memory_budget if isinstance(memory_budget, planner.Budget) else planner.Budget(memory_budget)
            if budget.device is not None:
                check_device(budget.device)
            plan = planner.plan_memory(found, budget, requested | quantized)
            planner.check_libraries(plan)
            dtypes |= planner.load_dtypes(plan)
        loaded = {
            name: load_component(
                index[name],
                folder / name,
                dtypes[name],
                opened.variant if holds_weights(folder / name, opened.variant) else None,
                opened.use_safetensors,
                quantization.get(name),
            )
            for name in wanted
            if index[name][1] is not None
        }
        check_vocabularies(loaded)
    if opened is not source:  # a temporary view of a folder that cannot be written, perhaps
        folder = Path(source.model, source.subfolder or "")
    return {**dict.fromkeys(names), **loaded, **given}, plan, folder


def _read_dtypes(
    dtype: DTypes, names: Sequence[str], planned: bool
) -> tuple[dict[str, torch.dtype | None], dict[str, str], set[str]]:
    """The dtype of each component (None: as stored), the format of each to be quantized, and whose dtype is given."""
    given = dtype if isinstance(dtype, Mapping) else {"default": dtype}
    quantized: dict[str, str] = {}
    if any(isinstance(value, str) for value in given.values()):
        from ..memory.estimate import QUANTIZED

        quantized = {name: str(value) for name, value in given.items() if value in QUANTIZED}
        for name, value in quantized.items():
            if name not in names:
                raise InputError(
                    f"dtype={value!r} must be given by component name, as in dtype={{'transformer': {value!r}}}; "
                    f"{name!r} is none of {', '.join(names)}"
                )
            if not planned:
                raise InputError(
                    f"dtype={value!r} of the {name} needs a memory_budget; without one, load it and call "
                    f"quantize(pipe.{name}, {QUANTIZED[value][0]!r})"
                )
    plain = {name: value for name, value in given.items() if name not in quantized}
    for name in plain:
        if name not in (*names, "default"):
            raise InputError(f"dtype names {shown(name)}, which is not a component; use default, {', '.join(names)}")
    values = {name: plain.get(name, plain.get("default")) for name in names}
    dtypes = {name: parse_dtype(value) for name, value in values.items()}
    for each in dtypes.values():
        check_dtype(each, None)
    return dtypes, quantized, {name for name, value in values.items() if value is not None}


def _dtype_name(dtype: torch.dtype | None) -> str:
    return "auto" if dtype is None else str(dtype).removeprefix("torch.")


def load_component(
    library_and_class: Sequence[str | None],
    folder: Path,
    dtype: torch.dtype | None,
    variant: str | None,
    use_safetensors: bool | None,
    quantization_config: Any = None,
) -> Any:
    """Load one component, whose class was found to fit its role, from its folder."""
    name = str(library_and_class[1])
    if name in LANGUAGE_MODELS or name in READERS:
        from ..checkpoints.foreign import from_transformers

        if name in READERS:
            return from_transformers.load_reader(name, folder)
        return from_transformers.load_model(name, folder, dtype, variant, use_safetensors, quantization_config)
    if is_foreign(name):
        from ..interop import load_component as load_foreign

        return load_foreign(folder.name, name, folder, dtype, variant, use_safetensors)
    from ..schedulers.base import Scheduler

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
    options = {"variant": variant, "use_safetensors": use_safetensors, "quantization_config": quantization_config}
    return found.from_pretrained(folder, dtype=dtype or "auto", **options)


def check_vocabularies(components: Mapping[str, Any]) -> None:
    """Raise CheckpointError if a tokenizer has ids beyond the vocabulary of the model that reads them."""
    from ..checkpoints.foreign import from_transformers

    for reader, model in (("tokenizer", "text_encoder"), ("processor", "vision_language_encoder")):
        if components.get(reader) is not None and components.get(model) is not None:
            from_transformers.check_vocabulary(reader, components[reader], model, components[model])


# --- saving ---


def index_entry(component: Any) -> list[str | None]:
    """Library and class of a component in ``model_index.json``; ours have the names that diffusers gives them."""
    if component is None:
        return [None, None]
    from ..models.base import Model
    from ..schedulers.base import Scheduler

    cls = type(component)
    library = "diffusers" if isinstance(component, Model | Scheduler) else cls.__module__.split(".")[0]
    return [library, cls.__name__]


def check_saveable(name: str, component: Any) -> None:
    """Refuse to save a component that could not be loaded again, before anything is written.

    Raises:
        ConfigurationError: adapters wrap its layers, or they are cast; the message says what to do.
    """
    from ..models.base import Model

    if isinstance(component, Model):
        component.check_saveable(name)
    elif isinstance(component, nn.Module):
        refuse_unsaveable(name, component)


def save_components(
    components: Mapping[str, Any], root: Path, pipeline: str, variant: str | None, max_shard_bytes: int
) -> list[str]:
    """Write each component into its own folder, and the index; together they replace what an earlier save wrote.

    Returns:
        the files, relative to ``root``.
    """
    from ..checkpoints.layout import superseded
    from ..checkpoints.stored import with_variant
    from ..checkpoints.weights import disk_errors
    from ..folders import saving

    with_variant(".safetensors", variant)  # refused before anything is written
    for name, component in components.items():
        check_saveable(name, component)
    index: dict[str, Any] = {"_class_name": pipeline, "_diffusers_version": FORMAT_VERSION}
    with saving(root, superseded) as staging, disk_errors():
        for name, component in components.items():
            index[name] = index_entry(component)
            if component is not None:
                # Only components with weights have these options, also those of transformers and diffusers.
                has_weights = isinstance(component, nn.Module)
                options = {"variant": variant, "max_shard_size": max_shard_bytes} if has_weights else {}
                component.save_pretrained(staging / name, **options)
        (staging / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        return files_in(staging)
