"""Adapters of a pipeline's components, by the names and arguments of diffusers' ``SD3LoraLoaderMixin``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from ...checks import shown
from ...errors import InputError
from ...nn.machine import check_device
from .adapter_files import LoraFiles


class LoraMethods(LoraFiles):
    """Which adapters are active, with which weights, and whether they are fused."""

    #: Accepted by diffusers' own methods; the weights of ``set_adapters`` count here.
    lora_scale: ClassVar[float] = 1.0

    def _having(self, names: str | Sequence[str] | None = None) -> dict[str, tuple[nn.Module, list[str]]]:
        """The components with adapters, and which of the named ones each has.

        Raises:
            InputError: a name that no component has an adapter of, or none is loaded.
        """
        from ...transforms import adapters

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
        from ...transforms import adapters

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
        from ...transforms import adapters

        active = [name for module in self._loadable().values() for name in adapters.active(module)]
        return list(dict.fromkeys(active))

    def get_list_adapters(self) -> dict[str, list[str]]:
        """The adapters of each component that has some."""
        from ...transforms import adapters

        found = {name: list(adapters.configs_of(module)) for name, module in self._loadable().items()}
        return {name: names for name, names in found.items() if names}

    def disable_lora(self) -> None:
        """Compute without adapters, until ``enable_lora``."""
        from ...transforms import adapters

        for module, _ in self._having().values():
            adapters.enable(module, False)

    def enable_lora(self) -> None:
        """Let the active adapters act again."""
        from ...transforms import adapters

        for module, _ in self._having().values():
            adapters.enable(module, True)

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """Remove adapters from all components; a layer without any is a plain one again.

        The active ones that are left stay active; if there is none, the first of the others becomes active.
        """
        from ...transforms import adapters

        before = self.get_active_adapters()
        for module, own in self._having(adapter_names).values():
            if own:
                adapters.delete(module, own)
        left = list(dict.fromkeys(name for names in self.get_list_adapters().values() for name in names))
        kept = [name for name in before if name in left]
        if left and kept != before:  # each component has chosen by itself
            for module, own in self._having(kept or left[0]).values():
                adapters.activate(module, own)

    def unload_lora_weights(self) -> None:
        """Remove all adapters: images are bit by bit what they were. Weights into which some are fused stay so."""
        from ...transforms import adapters

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
        from ...transforms import adapters

        _refuse_others(kwargs)
        self._check_components(components)
        having = self._having(adapter_names)
        for component, (module, own) in having.items():
            if component in components and own:
                adapters.fuse(module, lora_scale, safe_fusing, None if adapter_names is None else own)

    def unfuse_lora(self, components: Sequence[str] = ("transformer", "text_encoder"), **kwargs: Any) -> None:
        """Undo ``fuse_lora``, bit by bit."""
        from ...transforms import adapters

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
        from ...transforms import adapters

        return {name for module in self._loadable().values() for name in adapters.fused_names(module)}

    @property
    def num_fused_loras(self) -> int:
        """How many adapters are fused."""
        return len(self.fused_loras)

    def set_lora_device(self, adapter_names: str | Sequence[str], device: torch.device | str | int) -> None:
        """Move adapters to a device, for example to free memory of one that is not active."""
        from ...transforms import adapters

        target = check_device(torch.device("cuda", device) if isinstance(device, int) else device)
        for module, own in self._having(adapter_names).values():
            adapters.move(module, own, target)

    def enable_lora_hotswap(self, target_rank: int = 128, check_compiled: str = "error") -> None:
        """Prepare all components for ``load_lora_weights(..., hotswap=True)``; see the transformer's method."""
        from ...transforms import adapters

        self._require("transformer")
        for module in self._loadable().values():
            adapters.prepare_swapping(module, target_rank, check_compiled)


def _refuse_others(keywords: Mapping[str, Any]) -> None:
    """Deprecated keywords of diffusers have no effect; others are mistakes."""
    for name in keywords:
        if name.removeprefix("un") not in ("fuse_unet", "fuse_transformer", "fuse_text_encoder"):
            raise InputError(f"fusing takes no argument {name!r}; choose with components and adapter_names")
