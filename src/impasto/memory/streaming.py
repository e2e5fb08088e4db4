"""Weights that are copied to a device while they are needed there: a whole component, or a few blocks at a time.

The copies are dropped, never copied back, and nothing remains in the component.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ..errors import ConfigurationError
from ..family import BLOCK_LISTS
from ..nn.changes import is_plain_tensor, unwrapped

#: Devices that cannot copy and compute at the same time.
WITHOUT_STREAMS = ("cpu", "mps", "meta")


@dataclass(frozen=True)
class Visit:
    """How a component is moved to the device."""

    blocks: int | None = None  # the number of blocks on the device at a time; None: all
    ahead: bool = False  # copy the next blocks while these compute


class Slot(NamedTuple):
    """A parameter or buffer of a component, and the module that has it."""

    owner: nn.Module
    key: str
    name: str  # in the component
    parameter: nn.Parameter | None  # None for a buffer

    def read(self) -> Tensor:
        if self.parameter is not None and is_plain_tensor(self.parameter):
            return self.parameter.data
        return cast(Tensor, (self.owner._buffers if self.parameter is None else self.owner._parameters)[self.key])

    def write(self, tensor: Tensor) -> None:
        if self.parameter is None:
            self.owner._buffers[self.key] = tensor
        elif is_plain_tensor(self.parameter):  # it stays the same object for everything that refers to it
            self.parameter.data = tensor
        else:
            self.owner._parameters[self.key] = nn.Parameter(tensor, requires_grad=False)


def slots_of(component: nn.Module) -> list[Slot]:
    """All parameters and buffers; shared ones only once."""
    found: dict[int, Slot] = {}
    for prefix, module in component.named_modules():
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                name = f"{prefix}.{key}" if prefix else key
                found.setdefault(id(tensor), Slot(module, key, name, module._parameters.get(key)))
    return list(found.values())


class Group:
    """Tensors that are moved to the device and removed from it together."""

    def __init__(self, slots: list[Slot], device: torch.device):
        self._slots, self._device = slots, device
        self._copies: list[Tensor] | None = None
        self._ready: torch.Event | None = None  # on another stream: when the copies may be read
        self._on_host: list[tuple[Slot, Tensor]] = []

    def fetch(self, stream: torch.Stream | None = None) -> None:
        """Start copying to the device, on ``stream`` if given."""
        if self._copies is not None:
            return
        with torch.inference_mode(False), torch.no_grad(), stream or nullcontext():
            self._copies = [self._copy(slot) for slot in self._slots]
        self._ready = None if stream is None else stream.record_event()

    def _copy(self, slot: Slot) -> Tensor:
        tensor = slot.read()
        pinned = tensor.device.type == "cpu" and self._device.type not in WITHOUT_STREAMS and tensor.is_pinned()
        return tensor.to(self._device, non_blocking=pinned)

    def bring(self) -> None:
        """Replace the modules' tensors by the copies."""
        self.fetch()
        assert self._copies is not None
        if self._ready is not None:
            torch.accelerator.current_stream(self._device).wait_event(self._ready)
        with torch.inference_mode(False), torch.no_grad():
            for slot, copy in zip(self._slots, self._copies, strict=True):
                host = slot.read()
                if not _is_the_same(copy, host):
                    self._on_host.append((slot, host))
                    slot.write(copy)

    def leave(self, stream: torch.Stream | None = None) -> None:
        """Give the modules their tensors on the host back, and drop the copies, which were made on ``stream``."""
        if self._copies is None:
            return
        if stream is not None:  # it waits for their use, since it owns their memory
            stream.wait_event(torch.accelerator.current_stream(self._device).record_event())
        with torch.inference_mode(False), torch.no_grad():
            for slot, host in self._on_host:
                slot.write(host)
        self._on_host, self._copies, self._ready = [], None, None


class Stay:
    """A component on the device from ``begin`` to ``end``: whole, or its blocks in turn and the rest of it whole."""

    def __init__(self, component: nn.Module, device: torch.device, visit: Visit):
        inner = unwrapped(component)
        lists = [] if visit.blocks is None else block_lists(inner)
        if lists and inner is not component:
            raise ConfigurationError(
                f"a {type(inner).__name__} that torch.compile has wrapped cannot be moved block by block: its graph "
                f"needs all weights at once. Use enable_model_cpu_offload(), or compile its blocks one by one "
                f"(`for block in blocks: block.compile()`)."
            )
        named = [(f"{path}.{i}.", block) for path, blocks in lists for i, block in enumerate(blocks)]
        size = visit.blocks or 1
        slots = slots_of(inner)

        def group(prefixes: tuple[str, ...], inside: bool = True) -> Group:
            return Group([slot for slot in slots if slot.name.startswith(prefixes) == inside], device)

        prefixes = tuple(prefix for prefix, _ in named)
        self._groups = [group(prefixes[start : start + size]) for start in range(0, len(named), size)]
        self._rest = group(prefixes, inside=False)
        self._blocks = [(block, i // size) for i, (_, block) in enumerate(named)]  # and the group of each
        self._ahead = visit.ahead and len(self._groups) > 1
        self._stream = torch.Stream(device) if self._ahead and device.type not in WITHOUT_STREAMS else None
        self._present: int | None = None
        self._guarded: list[tuple[nn.Module, str, Any]] = []  # a block, a method, and its entry in __dict__ before

    def begin(self) -> None:
        self._rest.bring()
        for block, index in self._blocks:
            for name in methods_of(block):
                self._guarded.append((block, name, block.__dict__.get(name)))
                block.__dict__[name] = self._guard(getattr(block, name), index)

    def _guard(self, method: Callable[..., Any], index: int) -> Callable[..., Any]:
        @functools.wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            self._enter(index)
            return method(*args, **kwargs)

        return call

    def _enter(self, index: int) -> None:
        if self._present == index:
            return
        following = (index + 1) % len(self._groups) if self._ahead else index
        for i, group in enumerate(self._groups):  # also those fetched in vain, if blocks are not used in order
            if i == self._present or i not in (index, following):
                group.leave(self._stream)
        self._present = index
        self._groups[index].fetch(self._stream)
        self._groups[index].bring()
        self._groups[following].fetch(self._stream)

    def end(self) -> None:
        for block, name, before in reversed(self._guarded):
            if before is None:
                del block.__dict__[name]
            else:
                block.__dict__[name] = before
        self._guarded = []
        for group in self._groups:
            group.leave(self._stream)
        self._rest.leave()
        self._present = None


def block_lists(component: nn.Module) -> list[tuple[str, nn.ModuleList]]:
    """The outermost lists of repeated blocks and their names; none in convolutional components."""
    found: list[tuple[str, nn.ModuleList]] = []
    for name, module in component.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer, _ in found)
        if isinstance(module, nn.ModuleList) and name.rpartition(".")[2] in BLOCK_LISTS and not inside:
            found.append((name, module))
    return found


def methods_of(block: nn.Module) -> list[str]:
    """The methods in which a block reads its weights: all public ones that its classes add to ``nn.Module``."""
    names = {
        name
        for cls in type(block).__mro__
        if issubclass(cls, nn.Module) and cls is not nn.Module
        for name, value in vars(cls).items()
        if isinstance(value, FunctionType) and not name.startswith("_")
    }
    if getattr(block, "_compiled_call_impl", None) is not None:  # by block.compile(): guarded from outside its graph
        names = names - {"forward"} | {"_compiled_call_impl"}
    return sorted(names)


def pin(component: nn.Module) -> None:
    """Put a component's weights on the host into memory from which a GPU can copy while it computes."""
    for slot in slots_of(unwrapped(component)):
        tensor = slot.read()
        if tensor.device.type == "cpu" and not tensor.is_pinned():
            slot.write(tensor.pin_memory())


def to_disk(component: nn.Module, folder: str | os.PathLike[str], name: str) -> None:
    """Write a component's weights to ``name.safetensors`` in a folder, and memory-map them from there.

    Raises:
        OutputError: the disk is full, or the file cannot be written. The weights are where they were.
    """
    from safetensors import safe_open
    from safetensors.torch import save_file

    from ..checkpoints.weights import disk_errors
    from ..files import HAS_LOCKS, make_folder, plain_path, write_file

    # Files hold plain tensors: those that a library has packed stay in memory.
    plain = (slot for slot in slots_of(unwrapped(component)) if is_plain_tensor(slot.read()))
    slots = [slot for slot in plain if slot.read().device.type != "meta"]
    path = plain_path(folder) / f"{name}.safetensors"
    make_folder(path.parent)
    mapped: list[Tensor] = []

    def read(path: Path) -> None:
        with safe_open(path, "pt") as file:
            mapped.extend(file.get_tensor(slot.name) for slot in slots)

    def write(new: Path) -> None:
        with disk_errors():
            save_file({slot.name: slot.read().cpu().contiguous() for slot in slots}, new)
            if HAS_LOCKS:  # before another process can replace it
                read(new)

    with torch.inference_mode(False), torch.no_grad():
        write_file(path, write, durable=False)  # a file that is mapped already does not change
        if not HAS_LOCKS:  # Windows renames no file that is mapped
            read(path)
        for slot, tensor in zip(slots, mapped, strict=True):
            slot.write(tensor)


def size_of(component: nn.Module) -> int:
    """Bytes of the weights."""
    return sum(slot.read().nbytes for slot in slots_of(unwrapped(component)))


def _is_the_same(copy: Tensor, host: Tensor) -> bool:
    """Whether nothing had to be copied."""
    return copy is host or (copy.device == host.device and is_plain_tensor(copy) and copy.data_ptr() == host.data_ptr())
