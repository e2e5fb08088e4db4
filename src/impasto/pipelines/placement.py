"""Where a pipeline's weights live, and when they move.

A pipeline says which part it needs (``with self.using("transformer") as transformer:``), and the placement in
force brings that part to the device of the computation. The parts know nothing of it, and nothing is left in them
when a placement is replaced.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

import torch
from torch import nn

from ..errors import InputError, ResourceError
from ..nn.devices import as_device
from ..nn.module import parse_size
from .moving import Stay, Visit, device_of, is_settled

#: The share of a device's free memory that ``device_map`` gives to weights; the rest is for the computation.
SHARE = 0.85


# --- policies ---


class Placement(Protocol):
    """The policy that moves weights."""

    @property
    def device(self) -> torch.device | None:
        """Where the parts compute; None: each where its weights are."""

    def using(self, part: nn.Module) -> AbstractContextManager[None]:
        """Have ``part`` on the device as long as the context is open."""


class Resident:
    """Every part stays where it was put."""

    device: torch.device | None = None

    def using(self, part: nn.Module) -> AbstractContextManager[None]:
        return nullcontext()


class PerPart:
    """Every part stays on a device of its own (``device_map``) and computes there.

    Args:
        default: where to put what belongs to no part, such as noise.
    """

    def __init__(self, default: torch.device):
        self.default = default
        self._in_use: list[nn.Module] = []

    @property
    def device(self) -> torch.device:
        """That of the part in use, or else the default."""
        return device_of(self._in_use[-1]) or self.default if self._in_use else self.default

    @contextmanager
    def using(self, part: nn.Module) -> Iterator[None]:
        self._in_use.append(part)
        try:
            yield
        finally:
            _remove_last(self._in_use, part)


class OneAtATime:
    """The part in use is on ``device``, whole or a few blocks at a time; the others wait in the memory of the CPU.

    The device then needs room for the largest part, or for a few of its blocks, and not for the sum. A part that is
    needed while another is in use, such as the autoencoder for a preview, takes the other's place until it is done.

    Args:
        visit: how parts come to the device.
        visits: how some of them come otherwise.
    """

    def __init__(
        self, device: torch.device | str, visit: Visit | None = None, visits: Mapping[nn.Module, Visit] | None = None
    ):
        self.device: torch.device | None = torch.device(device)
        self._visit = visit or Visit()
        # Weak keys: a part that nobody else holds is freed.
        self._visits: weakref.WeakKeyDictionary[nn.Module, Visit] = weakref.WeakKeyDictionary(visits or {})
        self._in_use: list[nn.Module] = []  # the last one is on the device
        self._stay: Stay | None = None

    def visit_of(self, part: nn.Module) -> Visit:
        return self._visits.get(part, self._visit)

    @contextmanager
    def using(self, part: nn.Module) -> Iterator[None]:
        self._swap(self._in_use[-1] if self._in_use else None, part)
        self._in_use.append(part)
        try:
            yield
        finally:
            before = self._in_use[-1]
            # From the end, and not always the end itself: two loops may be run in turns, and end in any order.
            _remove_last(self._in_use, part)
            self._swap(before, self._in_use[-1] if self._in_use else None)

    def _swap(self, old: nn.Module | None, new: nn.Module | None) -> None:
        if old is new:
            return
        if self._stay is not None:
            self._stay.end()
            self._stay = None
        if new is not None and not is_settled(new):
            assert self.device is not None
            stay = Stay(new, self.device, self.visit_of(new))
            try:
                stay.begin()
            except BaseException:  # too little memory, say: what has come goes again
                stay.end()
                raise
            self._stay = stay


def _remove_last(parts: list[nn.Module], part: nn.Module) -> None:
    del parts[max(i for i, other in enumerate(parts) if other is part)]


# --- device maps ---


def spread(
    sizes: Mapping[str, int], how: str, max_memory: Mapping[int | str, int | str] | None = None
) -> dict[str, torch.device]:
    """A device for each part: accelerators where there is room, the CPU for the others.

    Args:
        sizes: bytes of the parts by name.
        how: "auto" fills one device after the other, "balanced" puts each part, the largest first, where most room
            is left.
        max_memory: bytes (or such as "4GB") that the parts may take, by number of the device; what is not named
            is not used. By default a share of what is free on each.
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


# --- devices and dtypes ---


def check_dtype(dtype: torch.dtype | None, device: torch.device | None) -> None:
    """Refuse what plain layers do not compute in.

    Raises:
        ResourceError: the message names a dtype that works.
    """
    if dtype is None:
        return
    if dtype.itemsize == 1:
        raise ResourceError(
            f"layers cannot compute in {dtype}, which only stores; use bfloat16 or float16, or quantise the part"
        )
    if dtype == torch.float64 and device is not None and device.type == "mps":
        raise ResourceError("mps has no float64; use float32, bfloat16 or float16 there, or the CPU")


def offload_device(gpu_id: int | None, device: torch.device | str | None) -> torch.device:
    """The device to compute on, from the arguments of ``enable_model_cpu_offload``.

    Raises:
        InputError: ``gpu_id`` and the number in ``device`` contradict each other.
        ResourceError: a numbered device was asked for and there is no accelerator.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    chosen = as_device(device) if device is not None else accelerator or torch.device("cpu")
    if gpu_id is None:
        return chosen
    if chosen.index is not None and chosen.index != gpu_id:
        raise InputError(f"device={str(chosen)!r} and gpu_id={gpu_id} contradict each other; give one of them")
    if chosen.type == "cpu":
        raise ResourceError(f"gpu_id={gpu_id} was asked for, and this machine has no accelerator; leave gpu_id out")
    return torch.device(chosen.type, gpu_id)
