"""Adapter files and the components of a pipeline, by the names and arguments of diffusers' ``SD3LoraLoaderMixin``."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ...errors import InputError
from ...nn.changes import unwrapped
from ..components import Components

if TYPE_CHECKING:
    from ...checkpoints.adapters.file import AdapterDefaults

logger = logging.getLogger("impasto")

Layers = Mapping[str, Tensor | nn.Module] | nn.Module
_PICKLE = "safe_serialization=False would write a pickle: pickles are read, never written"


class LoraFiles(Components):
    """Loading and saving of adapters. An adapter has one name in all components that it adapts."""

    _lora_loadable_modules: ClassVar[list[str]] = ["transformer", "text_encoder"]
    transformer_name: ClassVar[str] = "transformer"
    text_encoder_name: ClassVar[str] = "text_encoder"

    def _loadable(self) -> dict[str, nn.Module]:
        """The components that may have adapters."""
        found = {name: vars(self).get(name) for name in self._lora_loadable_modules}
        return {name: unwrapped(module) for name, module in found.items() if isinstance(module, nn.Module)}

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | os.PathLike[str] | Mapping[str, Tensor],
        adapter_name: str | None = None,
        hotswap: bool = False,
        **kwargs: Any,
    ) -> None:
        """Load an adapter of any writer into the components that it is for, and make it the active one there.

        Args:
            pretrained_model_name_or_path_or_dict: a file, a folder, a hub id, ``builtin:NAME``, or a state dict.
            adapter_name: "default_0" and so on if None.
            hotswap: replace the numbers of the adapter of this name in place, so that compiled code stays valid.
            kwargs: ``weight_name`` of the file in a folder; ``alpha`` (or ``network_alphas``), one number or one by
                layer, in place of what the file says; ``metadata``, a config of peft; ``subfolder`` and options of the
                download.

        Raises:
            WeightsMismatchError: the adapter does not fit; the message names the layers. Nothing is changed.
            CheckpointError: the file is damaged, or not an adapter.
            InputError: an argument that cannot be used.
            MissingDependencyError: peft is not installed.
        """
        from ...transforms import adapters

        request = adapters.Request.read(type(self).__name__, {"adapter_name": adapter_name, **kwargs}, hotswap=hotswap)
        components = self._loadable()
        absent = [name for name in self._lora_loadable_modules if name not in components]
        adapters.load_into(components, pretrained_model_name_or_path_or_dict, request, others=absent)

    @classmethod
    def lora_state_dict(
        cls, pretrained_model_name_or_path_or_dict: str | os.PathLike[str] | Mapping[str, Tensor], **kwargs: Any
    ) -> Any:
        """The tensors of an adapter file by the names in it; with ``return_lora_metadata=True`` its metadata too."""
        from ...checkpoints.adapters.file import read_header
        from ...checkpoints.stored import iterate_tensors
        from ...transforms import adapters

        request = adapters.Request.read(cls.__name__, kwargs)
        source = pretrained_model_name_or_path_or_dict
        if isinstance(source, Mapping):
            tensors, header = dict(source), {}
        else:
            file = adapters.locate(source, request)
            adapters.open_adapter(file)  # checked, as for loading
            tensors, header = dict(iterate_tensors(file)), read_header(file)
        return (tensors, header) if kwargs.get("return_lora_metadata") else tensors

    @classmethod
    def load_lora_into_transformer(
        cls,
        state_dict: Mapping[str, Tensor],
        transformer: nn.Module,
        adapter_name: str | None = None,
        _pipeline: Any = None,
        low_cpu_mem_usage: bool = False,
        hotswap: bool = False,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        """Load what a state dict has for the transformer."""
        cls._load_part("transformer", transformer, state_dict, adapter_name, hotswap, metadata, None)

    @classmethod
    def load_lora_into_text_encoder(
        cls,
        state_dict: Mapping[str, Tensor],
        network_alphas: Mapping[str, float] | None,
        text_encoder: nn.Module,
        prefix: str | None = None,
        lora_scale: float = 1.0,
        adapter_name: str | None = None,
        _pipeline: Any = None,
        low_cpu_mem_usage: bool = False,
        hotswap: bool = False,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        """Load what a state dict has for the text encoder; ``lora_scale`` is the weight of the adapter."""
        from ...transforms import adapters

        name = cls._load_part("text_encoder", text_encoder, state_dict, adapter_name, hotswap, metadata, network_alphas)
        if name is not None and lora_scale != 1.0:
            adapters.weigh(text_encoder, name, lora_scale)

    @classmethod
    def _load_part(
        cls,
        component: str,
        module: nn.Module,
        state_dict: Mapping[str, Tensor],
        name: str | None,
        hotswap: bool,
        metadata: Mapping[str, Any] | None,
        alphas: Mapping[str, float] | None,
    ) -> str | None:
        from ...transforms import adapters

        request = adapters.Request(adapter_name=name, hotswap=hotswap, metadata=metadata, alpha=alphas)
        others = [other for other in cls._lora_loadable_modules if other != component]
        return adapters.load_into({component: module}, state_dict, request, others=others, required=False)

    @classmethod
    def save_lora_weights(
        cls,
        save_directory: str | os.PathLike[str],
        transformer_lora_layers: Layers | None = None,
        text_encoder_lora_layers: Layers | None = None,
        is_main_process: bool = True,
        weight_name: str | None = None,
        save_function: Any = None,
        safe_serialization: bool = True,
        transformer_lora_adapter_metadata: Mapping[str, Any] | None = None,
        text_encoder_lora_adapter_metadata: Mapping[str, Any] | None = None,
        defaults: AdapterDefaults | None = None,
    ) -> None:
        """Write adapters, as from peft's ``get_peft_model_state_dict``, to ``pytorch_lora_weights.safetensors``.

        ``save_adapter`` does so for an adapter of the pipeline.

        Args:
            is_main_process: False writes nothing: another process does.
            weight_name: of the file. ``adapter_model.safetensors``, for one component, is written as peft does.
            save_function: accepted without effect.
            safe_serialization: only True: pickles are read but never written.
            transformer_lora_adapter_metadata, text_encoder_lora_adapter_metadata: the configs of peft, which have the
                alphas; without them they are taken to be the ranks.
            defaults: how to generate with the adapter; see ``AdapterDefaults``.

        Raises:
            InputError: no layers are given, or an argument cannot be used.
            OutputError: the file cannot be written.
        """
        from ...checkpoints.adapters.file import from_tensors
        from ...checkpoints.adapters.parsing import scaled
        from ...checkpoints.adapters.write import write_adapter

        if not safe_serialization:
            raise InputError(_PICKLE)
        given = {"transformer": transformer_lora_layers, "text_encoder": text_encoder_lora_layers}
        configs = {
            "transformer": transformer_lora_adapter_metadata or {},
            "text_encoder": text_encoder_lora_adapter_metadata or {},
        }
        components = {}
        for component, layers in given.items():
            if layers:
                tensors = layers.state_dict() if isinstance(layers, nn.Module) else _tensors(layers)
                file = from_tensors(tensors, configs[component])
                if not configs[component]:
                    logger.warning("the alpha of the %s's adapter is unknown and taken to be its rank", component)
                components[component] = {
                    found.name: scaled(found, None, file.of(component), file.where)[0] for found in file.layers
                }
        if is_main_process:
            used = {component: configs[component] for component in components}
            write_adapter(Path(save_directory), components, used, weight_name=weight_name, defaults=defaults)

    def save_adapter(
        self,
        save_directory: str | os.PathLike[str],
        adapter_name: str | None = None,
        weight_name: str | None = None,
        dtype: torch.dtype | None = None,
        defaults: AdapterDefaults | None = None,
        comfyui: bool = False,
    ) -> Path:
        """Write an adapter of the pipeline, of all components that it adapts, to one file.

        Args:
            adapter_name: the only active one if None.
            weight_name: of the file, ``pytorch_lora_weights.safetensors`` by default.
            dtype: of the tensors; None: as they are.
            defaults: how to generate with it.
            comfyui: name the layers of the text encoder as ComfyUI does, and not as diffusers does.

        Returns:
            the file.
        """
        from ...transforms import adapters

        active = list(dict.fromkeys(name for module in self._loadable().values() for name in adapters.active(module)))
        if adapter_name is None and len(active) != 1:
            raise InputError(f"give the adapter_name of the one to save: {', '.join(active) or 'none'} are active")
        name = active[0] if adapter_name is None else adapter_name
        given: dict[str, Any] = {"weight_name": weight_name, "dtype": dtype, "defaults": defaults, "comfyui": comfyui}
        return adapters.save(Path(save_directory), self._loadable(), name, **given)


def _tensors(layers: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tensors by name, of a dict that may have modules in place of some."""
    found: dict[str, Tensor] = {}
    for name, value in layers.items():
        if isinstance(value, nn.Module):
            found |= {f"{name}.{key}": tensor for key, tensor in value.state_dict().items()}
        else:
            found[name] = value
    return found
