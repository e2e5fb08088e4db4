"""16-bit weights, float32 computation: for processors without native 16-bit products.

There a product in bfloat16 or float16 takes 7 to 300 times as long as in float32. So the weights stay as they are
stored, each is widened when it is used (``widening.py``), and activations are float32. Inputs and outputs of a
component have the dtype of its weights. The result is closer to the exact one than that of 16-bit arithmetic.
"""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import chain
from typing import Any, Literal, SupportsIndex

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from ..checks import shown
from ..errors import InputError
from .attention import chosen_backend, kernels
from .changes import Change, Handle, is_managed_elsewhere, register_methods, unwrapped
from .machine import is_autocast, is_native
from .widening import HALVES, Function, Widening, is_narrow

# --- when it is in force ---

_MODE = Widening()


class _Thread(threading.local):
    is_wide = False  # the mode is in force


_thread = _Thread()


@contextmanager
def in_float32() -> Iterator[None]:
    """Compute in float32 in this thread, also with 16-bit weights and under autocast."""
    if _thread.is_wide:
        yield
        return
    _thread.is_wide = True
    try:
        with without_autocast("cpu"), without_autocast("cuda"), _MODE:
            yield
    finally:
        _thread.is_wide = False


def without_autocast(device: torch.device | str) -> AbstractContextManager[Any]:
    """Compute in the dtypes of the arguments, on devices of one type, whether or not autocast is enabled."""
    device = torch.device(device)
    return torch.autocast(device.type, enabled=False) if is_autocast(device) else nullcontext()


def computing(module: nn.Module) -> AbstractContextManager[None]:
    """Compute in the precision of ``module``: for code that reads its weights directly."""
    return nullcontext() if _widened_dtype(module) is None else in_float32()


def computed(module: nn.Module, function: Function, *arguments: Any) -> Any:
    """``function(*arguments)`` in the precision of ``module``, whose weights it uses. Float32 results stay float32."""
    return _in_its_precision(lambda _, *given: function(*given), narrows=False)(module, *arguments)


def checkpointed(block: Function, *arguments: Any) -> Any:
    """Gradient checkpointing: the block is recomputed in the backward pass, in this precision and by these kernels."""
    wide, backend = _thread.is_wide, chosen_backend()
    if not wide and backend == "native":
        return checkpoint(block, *arguments, use_reentrant=False)
    return checkpoint(block, *arguments, use_reentrant=False, context_fn=lambda: (nullcontext(), _as(wide, backend)))


def checkpointed_by(function: Function, block: Function, *arguments: Any) -> Any:
    """As ``checkpointed``, by a caller's function, which is called as ``function(block, *arguments)``."""
    wide, backend = _thread.is_wide, chosen_backend()
    if not wide and backend == "native":
        return function(block, *arguments)
    return function(functools.partial(_computed_as, block, wide, backend), *arguments)


def _computed_as(block: Function, wide: bool, backend: str, *arguments: Any) -> Any:
    with _as(wide, backend):
        return block(*arguments)


@contextmanager
def _as(wide: bool, backend: str) -> Iterator[None]:
    with in_float32() if wide else nullcontext(), kernels(backend):
        yield


# --- modules ---

Choice = Literal["automatic", "float32", "as stored"]
_CHOICE = "_impasto_precision"
#: Methods in which models compute, and whether what they return is cast to the dtype of the weights. The results of our
#: intermediate stages stay float32.
_METHODS = {
    "__call__": True,
    "forward": True,
    "encode": True,
    "decode": True,
    "denoise": True,
    "encode_context": False,
    "encode_references": False,
    "modulate": False,
}


def adapt(module: nn.Module) -> None:
    """Let a module with 16-bit weights compute in float32 on devices that do not multiply them natively.

    Pipelines do this to every component that they use, and our models to themselves when they are loaded and later
    cast. Whether it is needed is decided at each call, so the module may be moved at any time. It stays an instance of
    its class, and is saved and pickled as one. If FSDP has sharded it, it may be called by stages from then on.
    """
    module = unwrapped(module)
    register_methods([module], *(name for name in _METHODS if name not in ("__call__", "forward")))
    if _narrow_weight(module) is not None:  # the class of the others stays exactly what it is
        _change_class(module)


def _change_class(module: nn.Module) -> None:
    if not isinstance(module, _Adapted | torch.jit.ScriptModule):
        cls: Any = type(module)
        module.__class__ = _adapted(cls)


def restore_class(module: nn.Module) -> None:
    """Undo ``adapt``, for other libraries that compare classes. The next use in a pipeline adapts the module again."""
    module.__class__ = class_of(module)


def class_of(module: nn.Module) -> type[nn.Module]:
    """The class of a module, whether or not it is adapted."""
    cls = type(module)
    return cls.__bases__[0] if issubclass(cls, _Adapted) else cls


def compute_in_float32(module: nn.Module) -> Precision:
    """Let a module with 16-bit weights compute in float32 on every machine and device.

    For example an autoencoder that overflows in float16. Its weights stay as they are, and its outputs have their
    dtype. The choice made last counts.

    Returns:
        a handle: ``remove()`` restores what was before, and so does leaving its ``with`` block.
    """
    return Precision(module, "float32")


def compute_as_stored(module: nn.Module) -> Precision:
    """Let a module compute in the dtype of its weights, even where that is slow. Returns as ``compute_in_float32``."""
    return Precision(module, "as stored")


def precision_of(module: nn.Module) -> Choice:
    """The choice in force: "automatic" is float32 for 16-bit weights on devices without native 16-bit products."""
    return _choice(module) if isinstance(module, _Adapted) else "as stored"


class Precision(Handle, Change):
    """The handle of ``compute_in_float32`` and ``compute_as_stored``."""

    change = "of a chosen precision"
    undo = "remove() the handle of that"

    def __init__(self, module: nn.Module, choice: Choice):
        if not isinstance(module, nn.Module):
            raise InputError(f"a precision is chosen for a module such as pipe.vae, not for {shown(module)}")
        self.module, self.choice = unwrapped(module), choice
        adapt(self.module)
        _change_class(self.module)  # whatever its weights are cast to
        self.put(self.module, _CHOICE)

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        _change_class(self.module)  # a pickle holds the original class

    def remove(self) -> None:
        self.take(self.module, _CHOICE)


def _choice(module: nn.Module) -> Choice:
    chosen: Precision | None = vars(module).get(_CHOICE)
    return "automatic" if chosen is None else chosen.choice


def _widened_dtype(module: nn.Module) -> torch.dtype | None:
    """The dtype of a module's 16-bit weights if it should compute in float32 with them; else None."""
    choice = _choice(module)
    weight = None if _thread.is_wide or choice == "as stored" else _narrow_weight(module)
    if weight is None or (choice == "automatic" and (weight.device.type != "cpu" or is_native(weight.dtype))):
        return None
    return None if _is_left_alone(module) else weight.dtype


def _narrow_weight(module: nn.Module) -> Tensor | None:
    """A 16-bit parameter of a module. Of each child only the first is looked at, since this runs at each call."""
    firsts = (next(child.parameters(), None) for child in module.children())
    return next(filter(is_narrow, chain(module._parameters.values(), firsts)), None)


def _is_left_alone(module: nn.Module) -> bool:
    """Whether another library has quantized or placed a module, or will recompute its blocks in a backward pass."""
    if is_managed_elsewhere(module):
        return True
    recomputing = (m for m in module.modules() if getattr(m, "gradient_checkpointing", False))
    return torch.is_grad_enabled() and any(hasattr(m, "_gradient_checkpointing_func") for m in recomputing)


class _Adapted:
    """The base that the classes of adapted modules share."""


@functools.cache
def _adapted(cls: Any) -> type[nn.Module]:
    """A class that differs only in the precision of its methods."""

    def reduced(module: nn.Module, protocol: SupportsIndex) -> Any:
        """Pickles hold the original class."""
        return object.__new__, (cls,), module.__getstate__()

    def copied(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
        new = memo[id(module)] = adapted.__new__(adapted)
        new.__setstate__(copy.deepcopy(module.__getstate__(), memo))
        return new

    def current(name: str) -> Function:
        """A method of the class as it is when it is called: others may replace it at any time."""

        @functools.wraps(getattr(cls, name))
        def method(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return getattr(cls, name)(module, *args, **kwargs)

        return method

    body = {name: _in_its_precision(current(name), narrow) for name, narrow in _METHODS.items() if hasattr(cls, name)}
    body |= {"__reduce_ex__": reduced, "__deepcopy__": copied}
    body |= {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
    adapted: type[nn.Module] = type(cls.__name__, (cls, _Adapted), body)
    return adapted


def _in_its_precision(method: Function, narrows: bool) -> Function:
    @functools.wraps(method)
    def compute(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        dtype = _widened_dtype(module)
        if dtype is None:
            return method(module, *args, **kwargs)
        args, kwargs = _cast((args, kwargs), HALVES, torch.float32)
        with in_float32():
            out = method(module, *args, **kwargs)
        return _cast(out, (torch.float32,), dtype) if narrows else out

    return compute


def _cast(values: Any, old: Sequence[torch.dtype], new: torch.dtype) -> Any:
    """Nested values with their tensors of some dtypes cast to another."""

    def cast(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return leaf.to(new) if leaf.dtype in old else leaf
        if type(leaf).__name__ == "DiagonalGaussianDistribution":  # ours or that of diffusers
            return type(leaf)(cast(leaf.parameters), leaf.deterministic)
        return leaf

    return pytree.tree_map(cast, values)
