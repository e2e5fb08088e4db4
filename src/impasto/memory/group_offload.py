"""Group offloading of one model: its weights are on the host, and a group of blocks at a time is on the device."""

from __future__ import annotations

import functools
import inspect
import itertools
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..checks import whole_number
from ..errors import ConfigurationError, InputError
from ..files import plain_path
from ..nn.changes import Handle, is_managed_elsewhere, unwrapped
from ..nn.machine import check_device
from .streaming import WITHOUT_STREAMS, Stay, Visit, pin, to_disk

#: The methods in which models compute.
_METHODS = ("forward", "encode", "decode", "denoise", "encode_context", "encode_references", "modulate")
_MARK = "_group_offload"
#: The models whose weights are in files.
_writers: weakref.WeakValueDictionary[Path, nn.Module] = weakref.WeakValueDictionary()


def apply_group_offloading(
    module: nn.Module,
    onload_device: torch.device | str,
    offload_device: torch.device | str = "cpu",
    offload_type: str = "block_level",
    num_blocks_per_group: int | None = None,
    non_blocking: bool = False,
    use_stream: bool = False,
    record_stream: bool = False,
    low_cpu_mem_usage: bool = False,
    offload_to_disk_path: str | None = None,
    block_modules: Sequence[str] | None = None,
    exclude_kwargs: Sequence[str] | None = None,
) -> GroupOffload:
    """Keep a model's weights on the host, and bring a group of its blocks to a device when they are called.

    What is not in a list of blocks is there as long as a call lasts. Arguments of a call are moved to the device, too.

    Args:
        onload_device: where to compute.
        offload_device: only the CPU.
        offload_type: "block_level", or "leaf_level": one block at a time, the smallest group there is here.
        num_blocks_per_group: how many blocks are moved at once; required for "block_level".
        non_blocking: accepted without effect: copies from pinned memory never block.
        use_stream: copy the next group while one computes, so that two are on the device. The weights are pinned in
            host memory.
        record_stream: accepted without effect: the memory of copies is always kept until they have been used.
        low_cpu_mem_usage: do not pin the weights; the copies are then slower.
        offload_to_disk_path: a folder, in which a file of the weights is written, one for each model; they are read
            from it when they are needed, and take no memory of the host in between.
        block_modules: accepted without effect: lists of blocks are found.
        exclude_kwargs: names of arguments that are not moved.

    Returns:
        a handle: ``remove()`` undoes it, and so does leaving its ``with`` block.

    Raises:
        InputError: an argument cannot be used.
        ConfigurationError: the model is offloaded already, by this or by another library.
        ResourceError: the device does not exist.
        OutputError: the weights cannot be written to the disk.
    """
    if offload_type not in ("block_level", "leaf_level"):
        raise InputError(f"offload_type must be 'block_level' or 'leaf_level', not {offload_type!r}")
    if torch.device(offload_device).type != "cpu":
        raise InputError(f"offload_device is {str(offload_device)!r}; weights are kept on the host: use 'cpu'")
    if record_stream and not use_stream:
        raise InputError("record_stream=True needs use_stream=True")
    if offload_type == "block_level" and num_blocks_per_group is None:
        raise InputError("offload_type='block_level' needs num_blocks_per_group")
    blocks = 1 if offload_type == "leaf_level" else whole_number("num_blocks_per_group", num_blocks_per_group)
    module = unwrapped(module)
    if _MARK in vars(module) or is_managed_elsewhere(module) or hasattr(module, "_hf_hook"):
        raise ConfigurationError("the model is offloaded already; undo that first")
    device = check_device(onload_device)
    if offload_to_disk_path is not None:
        folder = plain_path(offload_to_disk_path)
        to_disk(module, folder, _name_of_file(module, folder))
    elif use_stream and not low_cpu_mem_usage and device.type not in WITHOUT_STREAMS:
        pin(module)
    return GroupOffload(module, device, Visit(blocks, use_stream), tuple(exclude_kwargs or ()))


class GroupOffload(Handle):
    """The handle of ``apply_group_offloading``."""

    def __init__(self, module: nn.Module, device: torch.device, visit: Visit, excluded: tuple[str, ...]):
        self.module, self.device, self.visit, self.excluded = module, device, visit, excluded
        self.before = {name: vars(module).get(name) for name in _METHODS if hasattr(module, name)}
        self._begin()
        vars(module).update({name: _Guard(self, name) for name in self.before})
        vars(module).update({_MARK: self, "_onload_device": device})

    def _begin(self) -> None:
        self.lock, self.depth = threading.RLock(), 0  # calls of several threads take turns
        self.stay: Stay | None = None

    def remove(self) -> None:
        """Leave the weights on the host, where calls compute again."""
        own = vars(self.module)
        if own.get(_MARK) is not self:
            return
        for name in (*self.before, _MARK, "_onload_device"):
            del own[name]
        own.update({name: before for name, before in self.before.items() if before is not None})

    def method(self, name: str) -> Any:
        """A method of the module as it is without offloading."""
        return self.before[name] or functools.partial(getattr(type(self.module), name), self.module)

    def call(self, name: str, args: Any, kwargs: Any) -> Any:
        """A method of the module, while its weights are on the device."""
        method = self.method(name)
        kept = {key: value for key, value in kwargs.items() if key in self.excluded}
        with self.lock:
            if self.depth == 0:
                self.stay = Stay(self.module, self.device, self.visit)
                self.stay.begin()
            self.depth += 1
            try:
                args, kwargs = pytree.tree_map_only(Tensor, lambda x: x.to(self.device), (args, kwargs))
                return method(*args, **{**kwargs, **kept})
            finally:
                self.depth -= 1
                if self.depth == 0 and self.stay is not None:
                    self.stay.end()
                    self.stay = None

    def __getstate__(self) -> dict[str, Any]:  # a copy of the model is offloaded, too
        return {name: value for name, value in vars(self).items() if name not in ("lock", "depth", "stay")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._begin()


class _Guard:
    """What is called in place of a method of an offloaded module."""

    def __init__(self, offload: GroupOffload, name: str):
        self.offload, self.name = offload, name

    @property
    def __signature__(self) -> inspect.Signature:
        """That of the method: transformers reads it, to find out what a model takes."""
        return inspect.signature(self.offload.method(self.name))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.offload.call(self.name, args, kwargs)


def _name_of_file(module: nn.Module, folder: Path) -> str:
    """A name for the file of a model's weights that no other model of this process has in a folder."""
    name = type(module).__name__
    names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    return next(name for name in names if _writers.setdefault((folder / name).resolve(), module) is module)
