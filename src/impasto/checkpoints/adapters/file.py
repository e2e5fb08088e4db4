"""Read an adapter file, by any writer."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from safetensors import safe_open
from torch import Tensor

from ...checks import MAX_GUIDANCE, MAX_STEPS, finite, printable, shown, whole_number
from ...errors import CheckpointError, CheckpointNotFoundError
from ..config import read_json
from ..stored import describe, iterate_tensors, listing
from .parsing import FoundLayer, Settings, find_layers

logger = logging.getLogger("impasto")

#: The key of a safetensors header under which diffusers and we store peft's config.
METADATA = "lora_adapter_metadata"
#: That under which we store how to generate with the adapter.
DEFAULTS = "impasto_generation"
CONFIG_NAME = "adapter_config.json"
#: Adapters that come with the package, by name.
BUILTIN = {"builtin:scenes-lcm": "scenes/adapters/scenes-lcm.safetensors"}
#: The names of adapter files in folders, in the order in which they are looked for.
FILE_NAMES = (
    "pytorch_lora_weights.safetensors",
    "adapter_model.safetensors",
    "pytorch_lora_weights.bin",
    "adapter_model.bin",
)
#: The ends of the names of adapter files.
SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
#: Where a training run has what it has trained.
_OF_RUN = "result"


class Usual(Protocol):
    """A model, or a family of them, that says how to generate with it."""

    @property
    def steps(self) -> int: ...

    @property
    def guidance_scale(self) -> float: ...


@dataclass(frozen=True)
class AdapterDefaults:
    """How to generate with an adapter that was made for few steps; None where it does not say."""

    scheduler: str | None = None  # "lcm", as the command line names it
    steps: int | None = None
    guidance_scale: float | None = None

    @classmethod
    def first(cls, found: Iterable[AdapterDefaults]) -> AdapterDefaults:
        """Those of several adapters: of the first that says something."""
        return next((each for each in found if each != cls()), cls())

    def numbers(self, model: Usual, steps: int | None = None, guidance_scale: float | None = None) -> tuple[int, float]:
        """Steps and guidance scale: those that are asked for, else the adapter's, else the model's."""
        if steps is None:
            steps = model.steps if self.steps is None else self.steps
        if guidance_scale is None:
            guidance_scale = model.guidance_scale if self.guidance_scale is None else self.guidance_scale
        return steps, guidance_scale

    def checked(self, where: str) -> AdapterDefaults:
        """Raise CheckpointError for values that no call accepts."""
        if self.scheduler is not None and (not isinstance(self.scheduler, str) or len(self.scheduler) > 100):
            raise CheckpointError(f"{where}: the scheduler must be a name, not {shown(self.scheduler)}")
        if self.steps is not None:
            whole_number(f"{where}: steps", self.steps, most=MAX_STEPS, error=CheckpointError)
        if self.guidance_scale is not None:
            finite(f"{where}: guidance_scale", self.guidance_scale, -MAX_GUIDANCE, MAX_GUIDANCE, error=CheckpointError)
        return self


@dataclass(frozen=True)
class AdapterFile:
    """The contents of an adapter file, before it is compared with a model."""

    where: str  # the file, for messages
    layers: list[FoundLayer]
    settings: Mapping[str | None, Settings]  # peft's config by component; None: of all
    defaults: AdapterDefaults = AdapterDefaults()

    def of(self, component: str) -> Settings | None:
        """The config of a component."""
        return self.settings.get(component) or self.settings.get(None)


def read_adapter(path: Path) -> AdapterFile:
    """Read a file of tensors: ``.safetensors``, or ``.bin``, ``.pt`` and ``.pth`` with nothing but tensors inside.

    Raises:
        CheckpointNotFoundError: there is no such file.
        CheckpointError: it is damaged, no adapter, or has values that are not finite.
    """
    where = printable(str(path))
    if not path.is_file():
        raise CheckpointNotFoundError(f"there is no adapter file {where}")
    describe([path])  # a header is checked before tensors are read
    header = read_header(path)
    found = find_layers(iterate_tensors(path), where)
    settings = _settings(header, where) or _config_of_folder(path)
    return AdapterFile(where, found, settings, _defaults(header, where))


def from_tensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any] | None = None) -> AdapterFile:
    """An adapter from a state dict in memory, and peft's config, with or without prefixes."""
    where = "the state dict"
    settings = _by_component(metadata, "the metadata that was given") if metadata else {}
    return AdapterFile(where, find_layers(_checked_items(tensors), where), settings)


def _checked_items(tensors: Mapping[str, Tensor]) -> Iterable[tuple[str, Tensor]]:
    if not isinstance(tensors, Mapping) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in tensors.items()
    ):
        raise CheckpointError("an adapter is a dict of tensors by name")
    return tensors.items()


def read_header(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file; empty for others."""
    if path.suffix != ".safetensors":
        return {}
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata() or {})


def adapter_defaults(path: Path) -> AdapterDefaults:
    """How to generate with an adapter, from its header alone.

    Raises:
        CheckpointError: the file is damaged or says something that cannot be used.
    """
    describe([path])
    return _defaults(read_header(path), printable(str(path)))


def _defaults(header: Mapping[str, str], where: str) -> AdapterDefaults:
    content = _json(header.get(DEFAULTS), DEFAULTS, where)
    known = AdapterDefaults.__dataclass_fields__
    for name in [name for name in content if name not in known]:
        logger.warning("%s: %s is not a setting of generation, and has no effect", where, shown(name))
    return AdapterDefaults(**{name: value for name, value in content.items() if name in known}).checked(where)


def _settings(header: Mapping[str, str], where: str) -> dict[str | None, Settings]:
    content = _json(header.get(METADATA), METADATA, where)
    return _by_component(content, f"{METADATA} in the file") if content else {}


def _by_component(content: Mapping[str, Any], source: str) -> dict[str | None, Settings]:
    """diffusers joins the configs of the components, with their names before those of the settings."""
    found: dict[str | None, dict[str, Any]] = {}
    for key, value in content.items():
        component, dot, name = str(key).partition(".")
        if dot:
            found.setdefault(component, {})[name] = value
        else:
            found.setdefault(None, {})[str(key)] = value
    return {component: Settings(source, settings) for component, settings in found.items()}


def _config_of_folder(path: Path) -> dict[str | None, Settings]:
    """peft's config, next to the file or, as the original scripts write it, in the folder above."""
    for folder in (path.parent, path.parent.parent):
        config = folder / CONFIG_NAME
        if config.is_file():
            return {None: Settings(printable(str(config)), read_json(config))}
    return {}


def _json(value: str | None, key: str, where: str) -> dict[str, Any]:
    if value is None:
        return {}
    try:
        content = json.loads(value)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: {key} in its header is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{where}: {key} in its header is not an object, but {shown(content)}")
    return content


def find_adapter_file(folder: Path, weight_name: str | None = None) -> Path:
    """The adapter file in a folder.

    Args:
        weight_name: of the file; if None, the usual names are looked for, also in the ``result`` of a training run,
            then a single ``.safetensors``.

    Raises:
        CheckpointNotFoundError: there is none, or several that could be meant.
    """
    if weight_name is not None:
        chosen = folder / weight_name
        if not chosen.is_file():
            raise CheckpointNotFoundError(f"there is no adapter file {printable(str(chosen))}")
        return chosen
    for place in (folder, folder / _OF_RUN):
        for name in FILE_NAMES:
            if (place / name).is_file():
                return place / name
    files = sorted(folder.glob("*.safetensors"))
    if len(files) == 1:
        return files[0]
    seen = listing(file.name for file in files) or "nothing"
    raise CheckpointNotFoundError(
        f"{printable(str(folder))} has no adapter file: expected {FILE_NAMES[0]}, found {seen}; give weight_name"
    )
