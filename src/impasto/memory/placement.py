"""Where a pipeline's weights live, and when they move.

A pipeline specifies the component that it needs (``with self.using("transformer") as transformer:``), and its placement
moves that component to the device. The components know nothing of it.
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
from ..nn.machine import as_device, default_device
from .moving import device_of, is_settled

if TYPE_CHECKING:
    from .streaming import Stay, Visit


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

    If another one is needed meanwhile, such as the autoencoder for a preview, it takes the place of the first until it
    is done.

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
        self._present: nn.Module | None = None  # what is on the device; None also if bringing it failed
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
            try:
                self._bring(component)
            except BaseException:  # a caller that catches it goes on with the component before
                self._bring_last()
                raise
            self._in_use.append(component)
        try:
            yield
        finally:
            with self._lock:
                # The last occurrence, which need not be the last entry: loops that take turns may end in any order.
                del self._in_use[max(i for i, other in enumerate(self._in_use) if other is component)]
                self._bring_last()

    def _bring_last(self) -> None:
        self._bring(self._in_use[-1] if self._in_use else None)

    def _bring(self, new: nn.Module | None) -> None:
        """Move a component to the device, in place of the one that is there."""
        from .streaming import Stay

        if new is self._present:
            return
        if self._stay is not None:
            self._stay.end()
        self._present = self._stay = None
        if new is not None and not is_settled(new):
            stay = Stay(new, self.device, self.visit_of(new))
            try:
                stay.begin()
            except BaseException:  # such as out of memory: undo what was moved
                stay.end()
                raise
            self._stay = stay
        self._present = new


def offload_device(gpu_id: int | None, device: torch.device | str | None) -> torch.device:
    """The device to compute on, from the arguments of ``enable_model_cpu_offload``.

    Raises:
        InputError: ``gpu_id`` and the number in ``device`` contradict each other.
        ResourceError: ``gpu_id`` was given and there is no accelerator.
    """
    chosen = default_device() if device is None else as_device(device)
    if gpu_id is None:
        return chosen
    if chosen.index is not None and chosen.index != gpu_id:
        raise InputError(f"device={str(chosen)!r} and gpu_id={gpu_id} contradict each other; give one of them")
    if chosen.type == "cpu":
        raise ResourceError(f"gpu_id={gpu_id} was given, but this machine has no accelerator; leave gpu_id out")
    return torch.device(chosen.type, gpu_id)
