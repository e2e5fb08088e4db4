"""Components of a pipeline: which of them can be moved, and moving them to a device and a dtype."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
from torch import nn

from ..checks import shown
from ..errors import InputError
from ..models.dtypes import parse_dtype
from ..nn.changes import is_managed_elsewhere, is_plain_tensor, unwrapped
from ..nn.machine import as_device, check_device, check_dtype


def is_settled(component: nn.Module) -> bool:
    """Whether another library has quantized or placed a component, which is then used as it is and never moved."""
    from ..transforms.quantized_linear import QuantizedLinear

    component = unwrapped(component)
    if is_managed_elsewhere(component):
        return True
    others = (module for module in component.modules() if not isinstance(module, QuantizedLinear))  # can be moved
    return any(not is_plain_tensor(p) for module in others for p in module._parameters.values() if p is not None)


def device_of(component: nn.Module) -> torch.device | None:
    onload: torch.device | None = vars(component).get("_onload_device")  # of a model that is offloaded by itself
    return onload or next((tensor.device for tensor in chain(component.parameters(), component.buffers())), None)


def stays_float32(component: nn.Module, name: str, dtype: torch.dtype | None) -> bool:
    """Whether a parameter stays float32 when the others have this dtype."""
    # Models of transformers name the layers that overflow in float16: in T5 the last one of each feed-forward.
    sensitive = getattr(unwrapped(component), "_keep_in_fp32_modules", None) or ()
    return dtype == torch.float16 and any(layer in name.split(".") for layer in sensitive)


def movable(components: Mapping[str, Any]) -> dict[str, nn.Module]:
    """The components with weights, without those that another library has placed or quantized."""
    return {n: m for n, m in components.items() if isinstance(m, nn.Module) and not is_settled(m)}


def read_target(
    args: tuple[Any, ...], device: torch.device | str | int | None, dtype: torch.dtype | None
) -> tuple[torch.device | None, torch.dtype | None]:
    """The device and dtype that ``Pipeline.to`` was given, by position or by name.

    Raises:
        InputError: an argument of another kind, or one that was given twice.
        ResourceError: the device does not exist, or does not compute in this dtype.
    """
    given = [arg for arg in args if arg is not None]
    if len(args) > 2 or sum(isinstance(arg, torch.dtype) for arg in given) > 1:
        raise InputError(f"to takes a device, a dtype, or a device and then a dtype, not {shown(args)}")
    for arg in given:
        name, first = ("dtype", dtype) if isinstance(arg, torch.dtype) else ("device", device)
        if first is not None:
            raise InputError(f"to was given two values for {name}: {arg} and {first}")
        if isinstance(arg, torch.dtype):
            dtype = arg
        else:
            device = arg
    dtype = None if dtype is None else parse_dtype(dtype)
    target = None if device is None else as_device(device)
    check_dtype(dtype, target)
    return None if target is None else check_device(target), dtype


def move(module: nn.Module, device: torch.device | None, dtype: torch.dtype | None) -> None:
    """``module.to``, except for what stays float32: some parameters, and tables that no checkpoint holds."""
    kept = {name: p.data.float() for name, p in module.named_parameters() if stays_float32(module, name, dtype)}
    tables = [
        (child, name, table)
        for child in module.modules()
        for name in child._non_persistent_buffers_set
        if (table := getattr(child, name, None)) is not None and table.is_floating_point()
    ]
    module.to(device=device, dtype=dtype)
    for child, name, table in tables:  # such as rotary frequencies, which rounding would shift
        setattr(child, name, table.to(getattr(child, name).device))
    for name, parameter in module.named_parameters():
        if name in kept:
            parameter.data = kept[name].to(parameter.device)


def check_on_host(components: Mapping[str, Any]) -> None:
    """Refuse to offload components that are already on a device.

    Raises:
        InputError: the message names the component and the device.
    """
    for name, module in movable(components).items():
        device = device_of(module)
        if device is not None and device.type != "cpu":
            raise InputError(
                f"the {name} is already on {device}, and offloading keeps weights on the host until they are used: "
                f"call it right after loading instead of pipe.to({str(device)!r}), or call pipe.to('cpu') first"
            )
