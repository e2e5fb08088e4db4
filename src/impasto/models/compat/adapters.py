"""Adapters of a model, by the names and arguments of diffusers' ``PeftAdapterMixin``; see ``transforms/adapters``."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn

from ...errors import InputError

if TYPE_CHECKING:
    from ...checkpoints.adapters.file import AdapterDefaults


class AdapterMethods:
    """What models with adapters have."""

    #: The component whose layers an adapter file has for this model, and the prefix of their names.
    adapter_component: ClassVar[str] = "transformer"

    # --- training one, loading, saving ---

    def add_adapter(self, adapter_config: Any, adapter_name: str = "default") -> None:
        """Put a new adapter into the model and make it the active one; the model's own parameters are frozen.

        Args:
            adapter_config: of peft: ``LoraConfig``, ``LoKrConfig``, ``LoHaConfig``, ...

        Raises:
            InputError: a name that is in use, or a config that does not fit the model.
            MissingDependencyError: peft is not installed.
        """
        from ...transforms.adapters import add

        add(cast(nn.Module, self), adapter_config, adapter_name)

    def load_lora_adapter(
        self,
        pretrained_model_name_or_path_or_dict: str | os.PathLike[str] | Mapping[str, Tensor],
        prefix: str | None = "transformer",
        hotswap: bool = False,
        **kwargs: Any,
    ) -> None:
        """Load an adapter from a file, a folder, the hub or a state dict of any writer, and make it the active one.

        Args:
            prefix: accepted without effect: names show which component they are for.
            hotswap: replace the numbers of the adapter ``adapter_name`` in place, so that compiled code stays valid.
            kwargs: ``adapter_name``; ``weight_name`` of the file in a folder; ``alpha`` (or ``network_alphas``), one
                number or one by layer, in place of what the file says; ``metadata``, a config of peft; options of the
                download.

        Raises:
            WeightsMismatchError: the adapter does not fit; the message names the layers. Nothing is changed.
            CheckpointError: the file is damaged, or not an adapter.
            InputError: an argument that cannot be used.
        """
        from ...transforms.adapters import Request, load_into

        request = Request.read(type(self).__name__, kwargs, hotswap=hotswap)
        model, component = cast(nn.Module, self), self.adapter_component
        other = "text_encoder" if component == "transformer" else "transformer"
        load_into({component: model}, pretrained_model_name_or_path_or_dict, request, others=(other,))

    def save_lora_adapter(
        self,
        save_directory: str | os.PathLike[str],
        adapter_name: str = "default",
        upcast_before_saving: bool = False,
        safe_serialization: bool = True,
        weight_name: str | None = None,
        defaults: AdapterDefaults | None = None,
    ) -> None:
        """Write an adapter to ``pytorch_lora_weights.safetensors``, for this package, diffusers and ComfyUI.

        Args:
            upcast_before_saving: in float32.
            safe_serialization: only True: pickles are read but never written.
            weight_name: of the file. ``adapter_model.safetensors`` is written as peft does, with its config.
            defaults: how to generate with it; see ``AdapterDefaults``.

        Raises:
            InputError: there is no such adapter, or the name is not that of a safetensors file.
            OutputError: the file cannot be written.
        """
        from ...transforms.adapters import save

        if not safe_serialization:
            raise InputError("safe_serialization=False would write a pickle: pickles are read, never written")
        dtype = torch.float32 if upcast_before_saving else None
        models = {self.adapter_component: cast(nn.Module, self)}
        save(Path(save_directory), models, adapter_name, weight_name=weight_name, dtype=dtype, defaults=defaults)

    # --- which are active ---

    def set_adapter(self, adapter_name: str | Sequence[str]) -> None:
        """Let exactly these adapters act."""
        from ...transforms.adapters import activate

        activate(cast(nn.Module, self), adapter_name)

    def set_adapters(self, adapter_names: str | Sequence[str], weights: Any = None) -> None:
        """Let exactly these adapters act, each with a weight.

        Args:
            weights: one number for all or one each; None is 1; a dict has numbers by part of a layer's name.

        Raises:
            InputError: an unknown adapter, or another number of weights.
            ConfigurationError: adapters are fused.
        """
        from ...transforms.adapters import weigh

        weigh(cast(nn.Module, self), adapter_names, weights)

    def active_adapters(self) -> list[str]:
        """The active adapters."""
        from ...transforms.adapters import active, require_adapters

        require_adapters(cast(nn.Module, self))
        return active(cast(nn.Module, self))

    def disable_adapters(self) -> None:
        """Compute without adapters, until ``enable_adapters``."""
        from ...transforms.adapters import enable

        enable(cast(nn.Module, self), False)

    def enable_adapters(self) -> None:
        """Let the active adapters act again."""
        from ...transforms.adapters import enable

        enable(cast(nn.Module, self), True)

    disable_lora, enable_lora = disable_adapters, enable_adapters

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """Remove adapters; a layer without any is a plain one again."""
        from ...transforms.adapters import delete

        delete(cast(nn.Module, self), adapter_names)

    def unload_lora(self) -> None:
        """Remove all adapters: the model is bit by bit what it was. Weights into which some are fused stay so."""
        from ...transforms.adapters import unload

        unload(cast(nn.Module, self))

    # --- speed ---

    def fuse_lora(
        self, lora_scale: float = 1.0, safe_fusing: bool = False, adapter_names: Sequence[str] | None = None
    ) -> None:
        """Put the adapters into the weights: the model is as fast as without any. The originals are kept.

        Args:
            lora_scale: multiplies the weights of the adapters.
            safe_fusing: refuse weights with NaN or infinite values.
            adapter_names: those to fuse; the active ones if None.

        Raises:
            ConfigurationError: adapters are fused already, or a layer is quantized without its original weight.
        """
        from ...transforms.adapters import fuse

        fuse(cast(nn.Module, self), lora_scale, safe_fusing, adapter_names)

    def unfuse_lora(self) -> None:
        """Undo ``fuse_lora``, bit by bit."""
        from ...transforms.adapters import unfuse

        unfuse(cast(nn.Module, self))

    def enable_lora_hotswap(self, target_rank: int = 128, check_compiled: str = "error") -> None:
        """Prepare for ``load_lora_adapter(..., hotswap=True)``: adapters are filled up to a rank with zeros.

        Args:
            target_rank: the highest rank of those that will be loaded.
            check_compiled: what to do if the model is compiled already: "error", "warn" or "ignore".

        Raises:
            ConfigurationError: there is an adapter already, or the model is compiled.
        """
        from ...transforms.adapters import prepare_swapping

        prepare_swapping(cast(nn.Module, self), target_rank, check_compiled)
