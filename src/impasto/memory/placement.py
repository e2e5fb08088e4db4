"""Where a pipeline's weights live, and when they move.

A pipeline specifies the component that it needs (``with self.using("transformer") as transformer:``), and the active
placement moves that component to the device of the computation. The components know nothing of it, and replacing a
placement leaves no trace in them.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import InputError, ResourceError
from ..models.base import parse_size
from ..nn.machine import as_device, require_device
from .moving import device_of, is_settled, movable, move

if TYPE_CHECKING:
    from .streaming import Stay, Visit

#: The share of a device's free memory that ``device_map`` gives to weights; the rest is for the computation.
SHARE = 0.85


# --- policies ---


class Resident:
    """Every component stays where it was put."""

    @property
    def device(self) -> torch.device | None:
        """Where the components compute; None: each on the device of its weights."""
        return None

    def using(self, component: nn.Module) -> AbstractContextManager[None]:
        """Keep ``component`` on the device while the context is open. The thread that opened it must close it."""
        return nullcontext()

    def keeping(self, component: nn.Module) -> AbstractContextManager[None]:
        """Expect repeated uses of ``component``; between them others may take its place."""
        return nullcontext()

    def calling(self) -> AbstractContextManager[Any]:
        """A call of the pipeline. If components take turns, so do calls."""
        return nullcontext()


#: The placements and components that this thread uses, the innermost last.
_in_use: ContextVar[tuple[tuple[Resident, nn.Module], ...]] = ContextVar("impasto_in_use", default=())


class PerComponent(Resident):
    """Every component stays on its own device (``device_map``) and computes there.

    Args:
        default: the device for what belongs to no component, such as noise.
    """

    def __init__(self, default: torch.device):
        self.default = default

    @property
    def device(self) -> torch.device:
        """That of the component that this thread uses, or else the default."""
        mine = [component for placement, component in _in_use.get() if placement is self]
        return device_of(mine[-1]) or self.default if mine else self.default

    @contextmanager
    def using(self, component: nn.Module) -> Iterator[None]:
        token = _in_use.set((*_in_use.get(), (self, component)))
        try:
            yield
        finally:
            _in_use.reset(token)


class OneAtATime(Resident):
    """The component in use is on ``device``, whole or a few blocks at a time; the others wait on the host.

    The device then needs memory for the largest component, or for a few of its blocks, and not for the sum. If another
    one is needed meanwhile, such as the autoencoder for a preview, it takes the place of the first until it is done.

    Args:
        visit: how components are moved to the device.
        visits: exceptions for individual components.
    """

    def __init__(
        self, device: torch.device | str, visit: Visit | None = None, visits: Mapping[nn.Module, Visit] | None = None
    ):
        from .streaming import Visit

        self._device = torch.device(device)
        self._visit = visit or Visit()
        # Weak keys: a component without other references is freed.
        self._visits: weakref.WeakKeyDictionary[nn.Module, Visit] = weakref.WeakKeyDictionary(visits or {})
        self._in_use: list[nn.Module] = []  # the last one is on the device
        self._stay: Stay | None = None
        self._lock = threading.RLock()

    @property
    def device(self) -> torch.device:
        return self._device

    def visit_of(self, component: nn.Module) -> Visit:
        return self._visits.get(component, self._visit)

    @contextmanager
    def using(self, component: nn.Module) -> Iterator[None]:
        with self._lock, self.keeping(component):
            yield

    def calling(self) -> AbstractContextManager[Any]:
        return self._lock

    @contextmanager
    def keeping(self, component: nn.Module) -> Iterator[None]:
        with self._lock:
            self._swap(self._in_use[-1] if self._in_use else None, component)
            self._in_use.append(component)
        try:
            yield
        finally:
            with self._lock:
                before = self._in_use[-1]
                # The last occurrence, which need not be the last entry: loops that take turns may end in any order.
                del self._in_use[max(i for i, other in enumerate(self._in_use) if other is component)]
                self._swap(before, self._in_use[-1] if self._in_use else None)

    def _swap(self, old: nn.Module | None, new: nn.Module | None) -> None:
        if old is new:
            return
        if self._stay is not None:
            self._stay.end()
            self._stay = None
        if new is not None and not is_settled(new):
            from .streaming import Stay

            stay = Stay(new, self.device, self.visit_of(new))
            try:
                stay.begin()
            except BaseException:  # such as out of memory: undo what was moved
                stay.end()
                raise
            self._stay = stay


# --- device maps ---

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
    from .streaming import size_of

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
    elsewhere = (device_of(m) for m in components.values() if isinstance(m, nn.Module))
    fallback = next(elsewhere, None) or torch.device("cpu")
    return PerComponent(devices.get("transformer", next(iter(devices.values()), fallback)))


def spread(
    sizes: Mapping[str, int], how: str, max_memory: Mapping[int | str, int | str] | None = None
) -> dict[str, torch.device]:
    """A device for each component: an accelerator if it fits on one, or else the CPU.

    Args:
        sizes: bytes of the components by name.
        how: "auto" fills one device after the other; "balanced" puts each component, the largest first, on the device
            with the most free memory.
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
                given = next((max_memory[key] for key in (index, str(device)) if key in max_memory), None)
                room[device] = 0 if given is None else parse_size(given)
    found: dict[str, torch.device] = {}
    for name, size in sorted(sizes.items(), key=lambda item: -item[1]):
        fitting = [device for device in room if room[device] >= size]
        if not fitting:
            found[name] = torch.device("cpu")
            continue
        device = max(fitting, key=lambda device: room[device]) if how == "balanced" else fitting[0]
        room[device] -= size
        found[name] = device
    return {name: found[name] for name in sizes}


def offload_device(gpu_id: int | None, device: torch.device | str | None) -> torch.device:
    """The device to compute on, from the arguments of ``enable_model_cpu_offload``.

    Raises:
        InputError: ``gpu_id`` and the number in ``device`` contradict each other.
        ResourceError: ``gpu_id`` was given and there is no accelerator.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    chosen = as_device(device) if device is not None else accelerator or torch.device("cpu")
    if gpu_id is None:
        return chosen
    if chosen.index is not None and chosen.index != gpu_id:
        raise InputError(f"device={str(chosen)!r} and gpu_id={gpu_id} contradict each other; give one of them")
    if chosen.type == "cpu":
        raise ResourceError(f"gpu_id={gpu_id} was given, but this machine has no accelerator; leave gpu_id out")
    return torch.device(chosen.type, gpu_id)
