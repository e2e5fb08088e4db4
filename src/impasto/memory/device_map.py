"""Device maps: each component on a device of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..checks import parse_size
from ..errors import InputError
from ..nn.machine import CPU, require_device
from .moving import device_of, movable, move
from .placement import PerComponent
from .streaming import size_of

#: The share of a device's free memory that ``device_map`` gives to weights; the rest is for the computation.
SHARE = 0.85
DeviceMap = str | int | torch.device | Mapping[str, str | int | torch.device]


def place(
    components: Mapping[str, Any], device_map: DeviceMap, max_memory: Mapping[int | str, int | str] | None
) -> PerComponent:
    """Move each component to its device, where it stays.

    Args:
        device_map, max_memory: as ``Pipeline.from_pretrained`` documents them.

    Raises:
        InputError: a name that no component has, or not the name of a device.
        ResourceError: the device does not exist.
    """
    modules = movable(components)
    if isinstance(device_map, Mapping):
        unknown = [name for name in device_map if name not in components]
        if unknown:
            names = ", ".join(components)
            raise InputError(f"device_map names an unknown component {unknown[0]!r}; components: {names}")
        devices = {name: require_device(device_map.get(name, "cpu")) for name in modules}
    elif device_map in ("auto", "balanced"):
        devices = spread({name: size_of(module) for name, module in modules.items()}, str(device_map), max_memory)
    else:
        devices = dict.fromkeys(modules, require_device(device_map))
    for name, module in modules.items():
        move(module, devices[name], None)
    first = next((device_of(module) for module in components.values() if isinstance(module, nn.Module)), None)
    return PerComponent(devices.get("transformer", next(iter(devices.values()), first or CPU)))


def spread(
    sizes: Mapping[str, int], how: str, max_memory: Mapping[int | str, int | str] | None = None
) -> dict[str, torch.device]:
    """A device for each component, the largest first: an accelerator if it fits on one, or else the CPU.

    Args:
        sizes: bytes of the components by name.
        how: "auto" takes the first device that has room; "balanced" the one with the most.
        max_memory: bytes (or such as "4GB") that the components may take, by device index; devices that are not named
            are not used. By default, a share of the free memory of each device.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    room: dict[torch.device, int] = {}
    if accelerator is not None:
        for index in range(torch.accelerator.device_count()):
            device = torch.device(accelerator.type, index)
            if max_memory is None:
                room[device] = int(torch.accelerator.get_memory_info(device)[0] * SHARE)
            else:
                given = max_memory.get(index, max_memory.get(str(device)))
                room[device] = 0 if given is None else parse_size(given)
    found = dict.fromkeys(sizes, CPU)
    for name, size in sorted(sizes.items(), key=lambda item: -item[1]):
        fitting = [device for device in room if room[device] >= size]
        if fitting:
            found[name] = max(fitting, key=room.__getitem__) if how == "balanced" else fitting[0]
            room[found[name]] -= size
    return found
