"""Write an adapter file that peft, diffusers and ComfyUI read."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as serialize
from torch import Tensor

from ...checks import printable, shown
from ...errors import InputError
from ...files import make_folder, plain_path, write_file
from ..config import write_json
from .file import CONFIG_NAME, DEFAULTS, METADATA, AdapterDefaults
from .layer import AdapterLayer

logger = logging.getLogger("impasto")

WEIGHT_NAME = "pytorch_lora_weights.safetensors"
#: A file of this name is written as peft does: with its prefix, and its config in a file next to it.
PEFT_NAME = "adapter_model.safetensors"
#: What ComfyUI reads before the names of a component's layers, where that is not the component's name.
_COMFYUI = {"text_encoder": "text_encoders.t5xxl.transformer."}
_LORA = {"A": "lora_A.weight", "B": "lora_B.weight", "mid": "lora_mid.weight"}


def write_adapter(
    folder: Path | str,
    components: Mapping[str, Mapping[str, AdapterLayer]],
    configs: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    weight_name: str | None = None,
    dtype: torch.dtype | None = None,
    defaults: AdapterDefaults | None = None,
    comfyui: bool = False,
) -> Path:
    """Write the adapters of components to one file, with ``.alpha`` of every layer and peft's configs.

    Args:
        folder: created if it does not exist.
        components: by name ("transformer", "text_encoder"), and of each the adapters of its layers.
        configs: of peft, by component.
        weight_name: of the file, ``pytorch_lora_weights.safetensors`` by default. ``adapter_model.safetensors``, for
            one component, is written in peft's form, with ``adapter_config.json``; ComfyUI reads that of a transformer.
        dtype: of the tensors; None: as they are.
        defaults: how to generate with the adapter.
        comfyui: name the layers of a text encoder (T5) as ComfyUI does, and not as diffusers does. Those of a
            transformer have names that both read.

    Returns:
        the file.

    Raises:
        InputError: the name is not one of a safetensors file, or peft's form cannot hold the components.
        OutputError: it cannot be written; a file of this name is still the old one.
    """
    name = WEIGHT_NAME if weight_name is None else weight_name
    if not isinstance(name, str) or not name.endswith(".safetensors") or "/" in name or "\\" in name:
        raise InputError(
            f"weight_name must be the name of a .safetensors file, not {shown(name)}: pickles are read, never written"
        )
    if not any(components.values()):
        raise InputError("there is no adapter to save: give the layers of at least one component")
    peft_form = name == PEFT_NAME
    if peft_form and len(components) > 1:
        raise InputError(f"{PEFT_NAME} is peft's form, for one component; save {', '.join(components)} one by one")
    if peft_form and comfyui and any(component in _COMFYUI for component in components):
        raise InputError(f"{PEFT_NAME} is peft's form, which ComfyUI reads for transformers only; give another name")
    prefixes = _COMFYUI if comfyui else {}
    tensors: dict[str, Tensor] = {}
    for component, layers in components.items():
        prefix = "base_model.model." if peft_form else prefixes.get(component, f"{component}.")
        for layer_name, layer in layers.items():
            for ending, tensor in stored(layer).items():
                changed = tensor if dtype is None or ending == "alpha" else tensor.to(dtype)
                tensors[f"{prefix}{layer_name}.{ending}"] = changed.detach().cpu().contiguous().clone()
    plain = {component: _plain(config) for component, config in (configs or {}).items() if config}
    metadata = {"format": "pt"}
    if plain:
        joined = {f"{component}.{key}": value for component, config in plain.items() for key, value in config.items()}
        metadata[METADATA] = json.dumps(joined, indent=2, sort_keys=True)
    if defaults is not None:
        given = {key: value for key, value in asdict(defaults.checked("the defaults")).items() if value is not None}
        metadata[DEFAULTS] = json.dumps(given, sort_keys=True)
    target = plain_path(folder) / name
    make_folder(target.parent)
    write_file(target, serialize(tensors, metadata))
    if not comfyui and any(component in _COMFYUI for component in components):
        logger.info("%s: ComfyUI reads the text encoder's layers only if they are saved with comfyui=True", target)
    if peft_form and plain:
        component, config = next(iter(plain.items()))
        write_json(target.parent / CONFIG_NAME, _without_scale(config, components[component]))
    return target


def _without_scale(config: dict[str, Any], layers: Mapping[str, AdapterLayer]) -> dict[str, Any]:
    """peft's config, in which alpha equals the rank for layers whose scale is in their matrices; see ``stored``."""
    ranks = config.get("rank_pattern") or {}
    scaled = {name: ranks.get(name, config["r"]) for name, layer in layers.items() if _has_scale_inside(layer)}
    return {**config, "alpha_pattern": {**(config.get("alpha_pattern") or {}), **scaled}} if scaled else config


def _has_scale_inside(layer: AdapterLayer) -> bool:
    return layer.kind == "lokr" and layer.rank is None  # whole matrices: readers take no alpha


def stored(layer: AdapterLayer) -> dict[str, Tensor]:
    """The tensors of a layer's adapter, by the ends of their names in files."""
    tensors = dict(layer.tensors)
    magnitude = tensors.pop("magnitude", None)
    rank, scale = layer.rank, layer.scale
    if _has_scale_inside(layer):
        tensors["w1"], rank, scale = tensors["w1"] * scale, 1, 1.0
    prefix = {"lokr": "lokr_", "loha": "hada_"}.get(layer.kind, "")
    found = {_LORA[part] if layer.kind == "lora" else prefix + part: tensor for part, tensor in tensors.items()}
    if magnitude is not None:  # the former for peft, the latter for ComfyUI
        if layer.magnitude_is_by_row:
            is_convolution = layer.kind == "lora" and layer.tensors["A"].ndim == 4
            found["lora_magnitude_vector"] = magnitude.reshape(1, -1, 1, 1) if is_convolution else magnitude.flatten()
        found["dora_scale"] = magnitude
    return {**found, "alpha": torch.tensor(scale * (rank or 1), dtype=torch.float32)}


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config of peft as JSON has it."""
    return {key: _json(value) for key, value in config.items()}


def _json(value: Any) -> Any:
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    if isinstance(value, Mapping):
        return {str(key): _json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json(item) for item in value]
    if isinstance(value, str):
        return str(getattr(value, "value", value))  # peft's enumerations are texts
    return value if isinstance(value, bool | int | float) or value is None else printable(str(value))
