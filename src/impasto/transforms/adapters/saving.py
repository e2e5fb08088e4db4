"""Save an adapter of models to one file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...checkpoints.adapters.file import AdapterDefaults
from ...checkpoints.adapters.write import PEFT_NAME, write_adapter
from ...errors import InputError
from .injection import collect
from .layers import configs_of, record_of


def save(
    folder: Path,
    components: Mapping[str, nn.Module],
    name: str = "default",
    *,
    weight_name: str | None = None,
    dtype: torch.dtype | None = None,
    defaults: AdapterDefaults | None = None,
    comfyui: bool = False,
) -> Path:
    """Write the adapter of this name in all components that have it to one file.

    Args:
        components: by the names that they have in a pipeline.
        weight_name, dtype, defaults, comfyui: as for ``write_adapter``.

    Returns:
        the file.

    Raises:
        InputError: no component has it, or peft's form is asked for and cannot hold it.
        OutputError: the file cannot be written.
    """
    having = {component: module for component, module in components.items() if name in configs_of(module)}
    if not having:
        known = sorted({found for module in components.values() for found in configs_of(module)})
        raise InputError(
            f"there is no adapter {name!r} in {', '.join(components)}; there are: {', '.join(known) or '-'}"
        )
    if weight_name == PEFT_NAME and any(
        (record := record_of(module)) is not None and name in record.unlike_config for module in having.values()
    ):
        raise InputError(
            f"adapter {name} has matrices of other shapes than peft makes, which would not load {PEFT_NAME}: give "
            f"another weight_name, for a file that Impasto and ComfyUI read"
        )
    layers = {component: collect(module, name) for component, module in having.items()}
    configs: dict[str, Any] = {c: configs_of(module)[name].to_dict() for c, module in having.items()}
    return write_adapter(
        folder, layers, configs, weight_name=weight_name, dtype=dtype, defaults=defaults, comfyui=comfyui
    )
