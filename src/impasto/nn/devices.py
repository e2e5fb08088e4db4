"""Names of devices: which there are, and a clear refusal of the others."""

from __future__ import annotations

import torch

from ..checks import shown
from ..errors import InputError, ResourceError


def as_device(device: torch.device | str | int) -> torch.device:
    """The device of this name or number, on this machine or not.

    Raises:
        InputError: no name of a device.
        ResourceError: no device has this number.
    """
    try:
        return torch.device(device)
    except (RuntimeError, TypeError, ValueError, OverflowError) as problem:
        error = ResourceError if isinstance(device, int) else InputError
        raise error(f"there is no device {shown(device)}; this machine has {', '.join(_devices())}") from problem


def require_device(device: torch.device | str | int) -> torch.device:
    """The device, if this machine has it.

    Raises:
        InputError: no name of a device.
        ResourceError: it is not there.
    """
    chosen = as_device(device)
    if chosen.type not in ("cpu", "meta") and f"{chosen.type}:{chosen.index or 0}" not in _devices():
        raise ResourceError(f"the device {chosen} is not available; this machine has {', '.join(_devices())}")
    return chosen


def _devices() -> list[str]:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return ["cpu"]
    return ["cpu", *(f"{accelerator.type}:{i}" for i in range(torch.accelerator.device_count()))]


def check_device(device: torch.device | str | int) -> torch.device:
    """The device, unless it is an accelerator that is not there: a check before anything is computed or moved.

    Raises:
        InputError: no name of a device.
        ResourceError: it is not there; the message lists what is.
    """
    chosen = as_device(device)
    return require_device(chosen) if chosen.type in ("cuda", "mps", "xpu") else chosen  # others come with libraries
