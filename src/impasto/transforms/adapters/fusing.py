"""Adapters fused into the weights: then a module is as fast as without any, and its layers are plain ones."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn

from ...errors import CheckpointError, ConfigurationError
from ...nn.changes import of, unwrapped
from ...nn.layers import PatchConvolution
from ..layerwise_casting import CastLayer
from ..quantized_linear import QuantizedLinear
from .layers import (
    ATTRIBUTE,
    Adapters,
    Place,
    active,
    adapters_in,
    nested,
    peft,
    quiet,
    record_of,
    require_adapters,
    tuners,
)


def fuse(module: nn.Module, scale: float = 1.0, check: bool = False, names: Sequence[str] | None = None) -> list[str]:
    """Put layers with changed weights in place of those with adapters, which are kept aside for ``unfuse``.

    Args:
        scale: multiplies the weights of the adapters.
        check: raise CheckpointError if a changed weight has NaN or infinite values.
        names: the adapters; by default those that are active. If others are active too, they stop to act.

    Returns:
        the names of the adapters that were fused.

    Raises:
        InputError: there is no adapter, or none of such a name.
        ConfigurationError: adapters are fused already, or a layer is quantized and its original weight was not kept, or
            stored in a narrow dtype.
    """
    module = unwrapped(module)
    require_adapters(module)
    chosen = active(module) if names is None else require_adapters(module, list(names))
    record = record_of(module)
    if record is None:  # peft has put the adapters in
        record = Adapters([])
        record.put(module, ATTRIBUTE)
    if record.fused:
        raise ConfigurationError(f"{', '.join(record.fused_names)} is fused already; call unfuse_lora() first")
    found, done = tuners(module), 0
    try:
        for place in found:
            layer = _fused_layer(place, chosen, scale, check)
            place.parent._modules[place.key] = layer
            done += 1
            if place.layer.get_base_layer().weight.device.type not in ("cpu", "meta"):
                place.layer.to("cpu")  # there the original needs no memory of the accelerator
    except Exception:
        _put_back(found[:done])
        raise
    record.fused, record.fused_names = found, chosen
    # Else transformers' models save their adapters alone.
    module._hf_peft_config_loaded = False  # type: ignore[assignment]
    return chosen


def unfuse(module: nn.Module) -> None:
    """Put the layers with adapters back; the weights are bit by bit what they were."""
    module = unwrapped(module)
    record = record_of(module)
    if record is None or not record.fused:
        return
    _put_back(record.fused)
    record.fused, record.fused_names = [], []
    module._hf_peft_config_loaded = True  # type: ignore[assignment]


def _put_back(places: Sequence[Place]) -> None:
    """Put layers of peft in place of fused ones, on their devices and in their dtypes."""
    for place in places:
        now = cast(Any, place.parent._modules[place.key])
        base = place.layer.get_base_layer()
        dtype = _own_dtype(now)
        if base.weight.device != now.weight.device or _own_dtype(base) != dtype:
            place.layer.to(now.weight.device, dtype if dtype.is_floating_point else None)
        place.layer.train(now.training)
        place.parent._modules[place.key] = place.layer


def _own_dtype(layer: Any) -> torch.dtype:
    """The dtype of a layer's weight, or of the weight that quantization or layerwise casting has replaced."""
    if isinstance(layer, QuantizedLinear):
        return layer.dtype
    casts = (change.stored for change in of(layer) if isinstance(change, CastLayer))
    return next(casts, cast(torch.dtype, layer.weight.dtype))


def fused_size(module: nn.Module) -> int:
    """Bytes of the layers that ``fuse`` makes."""
    return sum(place.layer.get_base_layer().weight.nbytes for place in tuners(unwrapped(module)))


def fused_names(module: nn.Module) -> list[str]:
    """The adapters that are fused into a module's weights."""
    record = record_of(module)
    return [] if record is None or not record.fused else list(record.fused_names)


def _fused_layer(place: Place, names: Sequence[str], scale: float, check: bool) -> nn.Module:
    """A layer as peft merges it, of other memory than the present one."""
    base = place.layer.get_base_layer()
    layer = _copied(base, place.name)
    holder = [*nested(place.layer)][-1]
    own = {tuner: dict(tuner.scaling) for tuner in nested(place.layer)}
    holder.base_layer = layer
    try:
        for tuner in nested(place.layer):
            for name in names:
                if name in adapters_in(tuner):
                    tuner.scaling[name] *= scale
            present = [name for name in names if name in adapters_in(tuner)]
            with quiet(), torch.no_grad():
                _merge_method(tuner)(tuner, safe_merge=check, adapter_names=present)
    except ValueError as error:  # peft's check of the result
        raise CheckpointError(f"the adapter was not fused: {place.name} would have NaN or infinite weights") from error
    finally:
        holder.base_layer = base
        for tuner, scaling in own.items():
            tuner.scaling.update(scaling)
            tuner.merged_adapters.clear()
            getattr(tuner, "_caches", {}).clear()
    if isinstance(base, QuantizedLinear):
        return QuantizedLinear(cast(nn.Linear, layer), base.scheme, keep=True)
    return layer


def _merge_method(tuner: Any) -> Any:
    """peft's way to merge an adapter into an ordinary layer, in place of its ways for quantized ones."""
    ordinary = peft().tuners.lora.layer.Linear
    return ordinary.merge if isinstance(tuner, ordinary) else type(tuner).merge


def _copied(base: Any, name: str) -> nn.Module:
    """A copy of a layer whose weight may be written to; of a quantized one its original."""
    if isinstance(base, QuantizedLinear):
        if base.original is None:
            raise ConfigurationError(
                f"{name} is quantized and its original weight was not kept (keep_originals=False): leave the adapter "
                f"as it is, or fuse it before the model is quantized"
            )
        layer = copy.deepcopy(base.original).to(base.weight.device, base.dtype)
        return layer.requires_grad_(False).train(base.training)
    if any(isinstance(change, CastLayer) for change in of(base)):
        raise ConfigurationError(
            f"{name} is {CastLayer.change}, which has too few digits for the adapter: leave the adapter as it is, or "
            f"{CastLayer.undo} first"
        )
    if type(base) not in (nn.Linear, nn.Conv2d, PatchConvolution) or type(base.weight) is not nn.Parameter:
        raise ConfigurationError(
            f"{name} is quantized by another library (a {type(base).__name__}): leave the adapter as it is, or fuse it "
            f"before the model is quantized"
        )
    return cast(nn.Module, copy.deepcopy(base))  # memory-mapped weights too
