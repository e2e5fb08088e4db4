"""Load an adapter from a file, a folder, the hub or a state dict into models: all of it or nothing."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from torch import Tensor, nn

from ...checkpoints import hub
from ...checkpoints.adapters.file import (
    BUILTIN,
    CONFIG_NAME,
    FILE_NAMES,
    SUFFIXES,
    AdapterFile,
    find_adapter_file,
    from_tensors,
    read_adapter,
)
from ...checks import nearest, shown
from ...errors import CheckpointNotFoundError, InputError, WeightsMismatchError
from ...nn.changes import unwrapped
from .binding import bind
from .injection import load, next_name, swapping
from .layers import configs_of, delete, enable, refuse_fused

#: Keywords of diffusers that need nothing here.
_IGNORED = ("proxies", "low_cpu_mem_usage", "_pipeline", "user_agent", "return_lora_metadata", "lora_scale")
_KNOWN = (
    *("adapter_name", "weight_name", "subfolder", "use_safetensors", "metadata", "alpha", "network_alphas"),
    *hub.OPTIONS,
    *_IGNORED,
)

Source = str | os.PathLike[str] | Mapping[str, Tensor]


@dataclass
class Request:
    """The keywords with which an adapter is loaded."""

    adapter_name: str | None = None
    weight_name: str | None = None
    subfolder: str | None = None
    use_safetensors: bool | None = None
    metadata: Mapping[str, Any] | None = None
    alpha: float | Mapping[str, float] | None = None
    hotswap: bool = False
    download: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, owner: str, keywords: Mapping[str, Any], *, hotswap: bool = False) -> Self:
        """The keywords of a method of ``owner``.

        Raises:
            InputError: an unknown one; the message has the nearest.
        """
        for name in [name for name in keywords if name not in _KNOWN]:
            hint = nearest(name, _KNOWN, f"it takes {', '.join(_KNOWN[:7])}")
            raise InputError(f"loading an adapter into a {owner} takes no argument {name!r}{hint}")
        given = {name: value for name, value in keywords.items() if value is not None}
        if "alpha" in given and "network_alphas" in given:
            raise InputError("alpha and network_alphas are two names of one argument; give one of them")
        return cls(
            adapter_name=given.get("adapter_name"),
            weight_name=given.get("weight_name"),
            subfolder=given.get("subfolder"),
            use_safetensors=given.get("use_safetensors"),
            metadata=given.get("metadata"),
            alpha=given.get("alpha", given.get("network_alphas")),
            hotswap=bool(hotswap),
            download={name: given[name] for name in hub.OPTIONS if name in given},
        )


def open_adapter(source: Source, request: Request | None = None) -> AdapterFile:
    """Read the adapter at a place.

    Args:
        source: a file, a folder, ``builtin:NAME``, a hub id, or a state dict.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    request = request or Request()
    if isinstance(source, Mapping):
        return from_tensors(source, request.metadata)
    return read_adapter(locate(source, request))


def locate(source: str | os.PathLike[str], request: Request | None = None) -> Path:
    """The file of an adapter, downloaded if needed."""
    request = request or Request()
    if not isinstance(source, str | os.PathLike):
        raise InputError(f"an adapter is a file, a folder, a hub id or a dict of tensors, not {shown(source)}")
    name = os.fspath(source)
    if name in BUILTIN:
        file = hub.package_file(BUILTIN[name])
        if not file.is_file():
            raise CheckpointNotFoundError(f"this version of the package comes without the adapter {name}")
        return file
    if name.startswith("builtin:"):
        raise CheckpointNotFoundError(f"there is no bundled adapter {shown(name)}; bundled: {', '.join(BUILTIN)}")
    if os.path.isfile(name):
        return Path(name)
    wanted = [request.weight_name] if request.weight_name else [*FILE_NAMES]
    inside = f"{request.subfolder}/" if request.subfolder else ""
    patterns = [
        f"{inside}{file}" for file in (*wanted, CONFIG_NAME, *(() if request.weight_name else ("*.safetensors",)))
    ]
    try:
        if name.endswith(SUFFIXES) and not os.path.isdir(name):  # a file that is not there, and no hub id
            raise CheckpointNotFoundError("there is no such file")
        folder = hub.resolve(source, allow_patterns=patterns, **request.download)
    except CheckpointNotFoundError as error:
        raise CheckpointNotFoundError(
            f"there is no adapter {shown(name, 200)}: it is no file, no folder, and no hub id that can be found. Give "
            f"one of these, or {', '.join(BUILTIN)}."
        ) from error
    return find_adapter_file(hub.inside(folder, request.subfolder), request.weight_name)


def load_into(
    components: Mapping[str, nn.Module],
    source: Source,
    request: Request,
    *,
    others: Sequence[str] = (),
    required: bool = True,
) -> str | None:
    """Load an adapter into those components that it has layers for, and make it the active one in them.

    Args:
        others: components that are not there: what the adapter has for them is left out, with a warning.
        required: raise if it has nothing for the components.

    Returns:
        the adapter's name; None if it has nothing for the components.

    Raises:
        as ``bind`` and ``load``; no component is changed then.
    """
    file = open_adapter(source, request)
    bound = bind(file, components, others=others, alpha=request.alpha)
    if not bound and not required:
        return None
    if not bound:
        raise WeightsMismatchError(f"{file.where} has no layers for {', '.join(components)}; nothing was loaded")
    if request.hotswap:
        if request.adapter_name is None:
            raise InputError("hotswap replaces an adapter: give its adapter_name")
        name = request.adapter_name
        # What the new one has nothing for may have the old one.
        having = [c for c, module in components.items() if c in bound or name in configs_of(module)]
        for swap in [swapping(components[c], bound.get(c, {}), name) for c in having]:
            swap()
        return name
    name = request.adapter_name or next_name(*components.values())
    for component in bound:
        refuse_fused(components[component], "an adapter cannot be loaded")
    done: list[str] = []
    try:
        for component, layers in bound.items():
            load(components[component], layers, name)
            done.append(component)
    except Exception:
        for component in done:
            if name in configs_of(unwrapped(components[component])):
                delete(components[component], name)
        raise
    for module in components.values():  # after disable_lora(), all of a pipeline's adapters act again, not some
        if configs_of(module):
            enable(module, True)
    return name
