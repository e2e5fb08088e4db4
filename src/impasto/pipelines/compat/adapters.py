"""Adapters of a pipeline's components, by the names and arguments of diffusers' ``SD3LoraLoaderMixin``."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...checkpoints.adapters.file import AdapterDefaults, from_tensors, read_header
from ...checkpoints.adapters.parsing import scaled
from ...checkpoints.adapters.write import write_adapter
from ...checkpoints.stored import iterate_tensors
from ...checks import shown
from ...errors import InputError
from ...nn.changes import unwrapped
from ...nn.machine import check_device
from ...transforms import adapters
from ..components import Components

logger = logging.getLogger("impasto")

Layers = Mapping[str, Tensor | nn.Module] | nn.Module
_PICKLE = "safe_serialization=False would write a pickle: pickles are read, never written"


class LoraMethods(Components):
    """What pipelines with adapters have. An adapter has one name in all components that it adapts."""

    _lora_loadable_modules: ClassVar[list[str]] = ["transformer", "text_encoder"]
    transformer_name: ClassVar[str] = "transformer"
    text_encoder_name: ClassVar[str] = "text_encoder"
    #: Accepted by diffusers' own methods; the weights of ``set_adapters`` count here.
    lora_scale: ClassVar[float] = 1.0

    def _loadable(self) -> dict[str, nn.Module]:
        """The components that may have adapters."""
        found = {name: vars(self).get(name) for name in self._lora_loadable_modules}
        return {name: unwrapped(module) for name, module in found.items() if isinstance(module, nn.Module)}

    def _having(self, names: str | Sequence[str] | None = None) -> dict[str, tuple[nn.Module, list[str]]]:
        """The components with adapters, and which of the named ones each has.

        Raises:
            InputError: a name that no component has an adapter of, or none is loaded.
        """
        having = {name: (module, list(adapters.configs_of(module))) for name, module in self._loadable().items()}
        having = {name: entry for name, entry in having.items() if entry[1]}
        known = list(dict.fromkeys(adapter for _, found in having.values() for adapter in found))
        if not known:
            raise InputError("the pipeline has no adapter; load one with load_lora_weights()")
        if names is None:
            return having
        asked = [names] if isinstance(names, str) else list(names)
        for name in asked:
            if name not in known:
                raise InputError(f"the pipeline has no adapter {shown(name)}; it has {', '.join(known)}")
        return {c: (module, [name for name in asked if name in found]) for c, (module, found) in having.items()}

    # --- loading and saving ---

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | os.PathLike[str] | Mapping[str, Tensor],
        adapter_name: str | None = None,
        hotswap: bool = False,
        **kwargs: Any,
    ) -> None:
        """Load an adapter, whoever wrote it, into the components that it is for, and make it the active one there.

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
        request = adapters.Request.read(type(self).__name__, {"adapter_name": adapter_name, **kwargs}, hotswap=hotswap)
        components = self._loadable()
        absent = [name for name in self._lora_loadable_modules if name not in components]
        adapters.load_into(components, pretrained_model_name_or_path_or_dict, request, others=absent)

    @classmethod
    def lora_state_dict(
        cls, pretrained_model_name_or_path_or_dict: str | os.PathLike[str] | Mapping[str, Tensor], **kwargs: Any
    ) -> Any:
        """The tensors of an adapter file by the names in it; with ``return_lora_metadata=True`` its metadata too."""
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
    ) -> Path:
        """Write an adapter of the pipeline, of all components that it adapts, to one file.

        Args:
            adapter_name: the only active one if None.
            weight_name: of the file, ``pytorch_lora_weights.safetensors`` by default.
            dtype: of the tensors; None: as they are.
            defaults: how to generate with it.

        Returns:
            the file.
        """
        active = self.get_active_adapters()
        if adapter_name is None and len(active) != 1:
            raise InputError(f"give the adapter_name of the one to save: {', '.join(active) or 'none'} are active")
        name = active[0] if adapter_name is None else adapter_name
        return adapters.save(
            Path(save_directory), self._loadable(), name, weight_name=weight_name, dtype=dtype, defaults=defaults
        )

    # --- which are active ---

    def set_adapters(self, adapter_names: str | Sequence[str], adapter_weights: Any = None) -> None:
        """Let exactly these adapters act, each with a weight.

        Args:
            adapter_weights: one for all or one each: a number, None for 1, or a dict with a weight by component:
                ``{"transformer": 0.8, "text_encoder": 0.0}``; that of a component may be a dict by part of a layer's
                name.

        Raises:
            InputError: an unknown adapter or component, or another number of weights.
            ConfigurationError: adapters are fused.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        listed = list(adapter_weights) if isinstance(adapter_weights, list | tuple) else [adapter_weights] * len(names)
        if len(listed) != len(names):
            raise InputError(f"{len(names)} adapters and {len(listed)} weights are given; give one weight each")
        by_name = dict(zip(names, listed))
        for name, weight in by_name.items():
            unknown = [c for c in weight if c not in self._lora_loadable_modules] if isinstance(weight, Mapping) else []
            if unknown:
                parts = ", ".join(self._lora_loadable_modules)
                raise InputError(
                    f"the weights of adapter {name} are by component ({parts}), not for {shown(unknown[0])}"
                )
        for component, (module, own) in self._having(names).items():
            weights = [by_name[name] for name in own]
            adapters.weigh(module, own, [w.get(component) if isinstance(w, Mapping) else w for w in weights])

    def get_active_adapters(self) -> list[str]:
        """The adapters that are active in any component."""
        active = [name for module in self._loadable().values() for name in adapters.active(module)]
        return list(dict.fromkeys(active))

    def get_list_adapters(self) -> dict[str, list[str]]:
        """The adapters of each component that has some."""
        found = {name: list(adapters.configs_of(module)) for name, module in self._loadable().items()}
        return {name: names for name, names in found.items() if names}

    def disable_lora(self) -> None:
        """Compute without adapters, until ``enable_lora``."""
        for module, _ in self._having().values():
            adapters.enable(module, False)

    def enable_lora(self) -> None:
        """Let the active adapters act again."""
        for module, _ in self._having().values():
            adapters.enable(module, True)

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """Remove adapters from all components; a layer without any is a plain one again."""
        for module, own in self._having(adapter_names).values():
            if own:
                adapters.delete(module, own)

    def unload_lora_weights(self) -> None:
        """Remove all adapters: images are bit by bit what they were. Weights into which some are fused stay so."""
        for module in self._loadable().values():
            if adapters.configs_of(module):
                adapters.unload(module)

    # --- speed and memory ---

    def fuse_lora(
        self,
        components: Sequence[str] = ("transformer", "text_encoder"),
        lora_scale: float = 1.0,
        safe_fusing: bool = False,
        adapter_names: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Put adapters into the weights: the pipeline is as fast as without any. The originals are kept.

        ``unload_lora_weights()`` after it keeps the fused weights and frees the originals.

        Args:
            components: those whose adapters are fused.
            lora_scale: multiplies the weights of the adapters.
            safe_fusing: refuse weights with NaN or infinite values.
            adapter_names: those to fuse; the active ones if None.

        Raises:
            InputError: there is no adapter, or no such component.
            ConfigurationError: adapters are fused already, or a layer is quantized without its original weight.
        """
        _refuse_others(kwargs)
        self._check_components(components)
        having = self._having(adapter_names)
        for component, (module, own) in having.items():
            if component in components and own:
                adapters.fuse(module, lora_scale, safe_fusing, None if adapter_names is None else own)

    def unfuse_lora(self, components: Sequence[str] = ("transformer", "text_encoder"), **kwargs: Any) -> None:
        """Undo ``fuse_lora``, bit by bit."""
        _refuse_others(kwargs)
        self._check_components(components)
        for component, module in self._loadable().items():
            if component in components:
                adapters.unfuse(module)

    def _check_components(self, components: Sequence[str]) -> None:
        known = ", ".join(self._lora_loadable_modules)
        if isinstance(components, str) or not components:
            raise InputError(f"components is a list of some of {known}")
        for component in components:
            if component not in self._lora_loadable_modules:
                raise InputError(f"adapters are in {known}, not in {shown(component)}")

    @property
    def fused_loras(self) -> set[str]:
        """The names of the adapters that are fused in any component."""
        return {name for module in self._loadable().values() for name in adapters.fused_names(module)}

    @property
    def num_fused_loras(self) -> int:
        """How many adapters are fused."""
        return len(self.fused_loras)

    def set_lora_device(self, adapter_names: str | Sequence[str], device: torch.device | str | int) -> None:
        """Move adapters to a device, for example to free memory of one that is not active."""
        target = check_device(torch.device("cuda", device) if isinstance(device, int) else device)
        for module, own in self._having(adapter_names).values():
            adapters.move(module, own, target)

    def enable_lora_hotswap(self, target_rank: int = 128, check_compiled: str = "error") -> None:
        """Prepare for ``load_lora_weights(..., hotswap=True)``; see the transformer's method of this name."""
        adapters.prepare_swapping(self._require("transformer"), target_rank, check_compiled)


def _tensors(layers: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tensors by name, of a dict that may have modules in place of some."""
    found: dict[str, Tensor] = {}
    for name, value in layers.items():
        if isinstance(value, nn.Module):
            found |= {f"{name}.{key}": tensor for key, tensor in value.state_dict().items()}
        else:
            found[name] = value
    return found


def _refuse_others(keywords: Mapping[str, Any]) -> None:
    """Deprecated keywords of diffusers have no effect; others are mistakes."""
    for name in keywords:
        if name.removeprefix("un") not in ("fuse_unet", "fuse_transformer", "fuse_text_encoder"):
            raise InputError(f"fusing takes no argument {name!r}; choose with components and adapter_names")
