"""Where a pipeline's weights live, and when they move.

A pipeline says which part it needs (``with self.using("transformer") as transformer:``), and the placement in
force brings that part to the device of the computation. The parts know nothing of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

import torch
from torch import nn

from ..errors import InputError, ResourceError


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


class OneAtATime:
    """The part in use is on ``device``; the others wait in the memory of the CPU.

    The device then needs room for the largest part and not for their sum. A part that is needed while another is
    in use, such as the autoencoder for a preview, takes the other's place until it is done.
    """

    def __init__(self, device: torch.device | str):
        self.device: torch.device | None = torch.device(device)
        self.home = torch.device("cpu")
        self._in_use: list[nn.Module] = []  # the last one is on the device

    @contextmanager
    def using(self, part: nn.Module) -> Iterator[None]:
        self._swap(self._in_use[-1] if self._in_use else None, part)
        self._in_use.append(part)
        try:
            yield
        finally:
            before = self._in_use[-1]
            # From the end, and not always the end itself: two loops may be run in turns, and end in any order.
            del self._in_use[max(i for i, other in enumerate(self._in_use) if other is part)]
            self._swap(before, self._in_use[-1] if self._in_use else None)

    def _swap(self, old: nn.Module | None, new: nn.Module | None) -> None:
        if old is new:
            return
        if old is not None:
            old.to(self.home)
        if new is not None:
            new.to(self.device)


def offload_device(gpu_id: int | None, device: torch.device | str | None) -> torch.device:
    """The device to compute on, from the arguments of ``enable_model_cpu_offload``.

    Raises:
        InputError: ``gpu_id`` and the number in ``device`` contradict each other.
        ResourceError: a numbered device was asked for and there is no accelerator.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    chosen = torch.device(device) if device is not None else accelerator or torch.device("cpu")
    if gpu_id is None:
        return chosen
    if chosen.index is not None and chosen.index != gpu_id:
        raise InputError(f"device={str(chosen)!r} and gpu_id={gpu_id} contradict each other; give one of them")
    if chosen.type == "cpu":
        raise ResourceError(f"gpu_id={gpu_id} was asked for, and this machine has no accelerator; leave gpu_id out")
    return torch.device(chosen.type, gpu_id)
