"""A mode in which torch functions get float32 tensors in place of 16-bit ones.

Torch hands every function call to the mode in force (``TorchFunctionMode``), so no layer has to be replaced. Weights of
linear layers and convolutions are cast into one buffer per thread; other tensors are cast when they are used.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .changes import is_plain_tensor

HALVES = (torch.bfloat16, torch.float16)
#: How many elements of a weight are cast at a time. With few rows they stay in cache until they are multiplied, so a
#: product is faster than with float32 weights; with many rows, larger matrices are multiplied faster.
_FEW_ROWS, _FEW_ROWS_BLOCK, BLOCK = 64, 2**21, 2**23

Function = Callable[..., Any]
#: Calls a function in the mode, given the function and its arguments.
Rule = Callable[[Function, tuple[Any, ...], dict[str, Any]], Any]


class Widening(TorchFunctionMode):
    """Functions that compute get 16-bit tensors cast to float32; the ``dtype`` of such a tensor reads as float32."""

    def __torch_function__(
        self, func: Function, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if torch.compiler.is_compiling():  # compiled code would be invalidated by each new entry
            return _rule_for(func)(func, args, kwargs or {})
        rule = _known.get(func)
        if rule is None:
            rule = _known[func] = _rule_for(func)
        return rule(func, args, kwargs or {})


def is_narrow(x: Any) -> bool:
    """Whether ``x`` is a 16-bit tensor to widen. Quantized tensors of other libraries have their own products."""
    if not isinstance(x, Tensor) or x.dtype not in HALVES:
        return False
    return is_plain_tensor(x) or not is_traceable_wrapper_subclass(x)


def widened(x: Any) -> Any:
    if isinstance(x, Tensor):
        return x.float() if is_narrow(x) else x
    return type(x)(map(widened, x)) if type(x) in (list, tuple) else x


# --- what is done with each function ---


def _as_it_is(func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return func(*args, **kwargs)


def _widen(func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if "out" in kwargs:  # whose dtype counts: compiled code calls functions this way
        return func(*args, **kwargs)
    return func(*map(widened, args), **{name: widened(value) for name, value in kwargs.items()})


def _in_place(func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The first argument is modified and keeps its dtype."""
    if not args or is_narrow(args[0]):
        return func(*args, **kwargs)
    return _widen(func, args, kwargs)


def _dtype(func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return torch.float32 if is_narrow(args[0]) else func(*args)


def _to(func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A cast to the dtype of another tensor, as it reads in this mode."""
    return func(args[0], *map(widened, args[1:]), **{name: widened(x) for name, x in kwargs.items()})


def _unflatten(func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return torch.unflatten(*args, **kwargs)  # torch.compile cannot trace the method of a tensor in this mode


def _embedding(func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return widened(func(*args, **kwargs))  # only the rows that were looked up, not the table


def _weighted(func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A function of (input, weight, ...); the weight is cast as a whole."""
    if len(args) < 2 or not is_narrow(args[1]) or _is_read_later(args[1]):
        return _widen(func, args, kwargs)
    return _widen(func, (args[0], _copied(args[1]), *args[2:]), kwargs)


def _product(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear`` by blocks of the weight's rows."""
    x: Tensor = widened(input)
    bias = widened(bias)
    if not is_narrow(weight) or _is_read_later(weight):
        return F.linear(x, widened(weight), bias)
    features, width = weight.shape
    rows = x.numel() // width if width else 0
    blocks = -(-weight.numel() // (_FEW_ROWS_BLOCK if rows <= _FEW_ROWS else BLOCK))
    if blocks <= 1:
        return F.linear(x, _copied(weight), bias)
    size = -(-features // (16 * blocks)) * 16
    flat, out = x.reshape(-1, width), x.new_empty(rows, features)
    for start in range(0, features, size):
        block = slice(start, start + size)
        factor = _copied(weight[block]).t()
        if bias is None:
            torch.mm(flat, factor, out=out[:, block])
        else:
            torch.addmm(bias[block], flat, factor, out=out[:, block])
    return out.view(*x.shape[:-1], features)


def _is_read_later(weight: Tensor) -> bool:
    """Whether a weight may be read after the call: in a backward pass, by a graph being traced, or on a GPU."""
    if torch.is_grad_enabled() or weight.device.type != "cpu":
        return True
    return torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]


class _Buffer(threading.local):
    """Memory that weights are cast into, one after the other: allocating it each time takes longer than the cast."""

    memory: Tensor | None = None


_buffer = _Buffer()


def _copied(weight: Tensor) -> Tensor:
    """A weight in float32, until the next call."""
    memory, count = _buffer.memory, weight.numel()
    if memory is None or memory.numel() < count or memory.device != weight.device:
        with torch.inference_mode(False):  # inference tensors cannot be written to outside of it
            memory = _buffer.memory = torch.empty(count, dtype=torch.float32, device=weight.device)
    wide = memory[:count].view(weight.shape)
    if weight.ndim == 4 and not weight.is_contiguous() and weight.is_contiguous(memory_format=torch.channels_last):
        wide = memory[:count].as_strided(weight.shape, weight.stride())
    return wide.copy_(weight.detach())


#: Functions that return their tensors rearranged, or read their metadata: 16-bit tensors stay 16-bit.
_PLAIN = """
    view view_as reshape reshape_as flatten ravel transpose t permute expand expand_as broadcast_to
    chunk split split_with_sizes tensor_split unbind narrow select squeeze unsqueeze movedim moveaxis swapaxes swapdims
    unfold diagonal as_strided detach contiguous clone repeat repeat_interleave tile roll flip
    __getitem__ index_select gather take cat concat concatenate stack hstack vstack
    size stride dim ndimension numel nelement element_size data_ptr storage untyped_storage storage_offset get_device
    register_hook requires_grad_ retain_grad backward __len__ __hash__ __deepcopy__ __reduce_ex__ __repr__ __format__
    float half bfloat16 double type cpu cuda pin_memory item tolist numpy __array__ __get__ __set__ __delete__
"""
_IN_PLACE = "__setitem__ __iadd__ __isub__ __imul__ __itruediv__ __ifloordiv__ __ipow__"
_CONVOLUTIONS = ("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
_RULES: dict[Function, Rule] = {
    torch.Tensor.dtype.__get__: _dtype,  # type: ignore[attr-defined]
    torch.Tensor.to: _to,
    F.linear: lambda _, args, kwargs: _product(*args, **kwargs),
    F.embedding: _embedding,
    **{function: _weighted for name in _CONVOLUTIONS for function in (getattr(F, name), getattr(torch, name))},
}

#: The rules of the functions that were called.
_known: dict[Function, Rule] = {}


def _rule_for(func: Function) -> Rule:
    if func in _RULES:
        return _RULES[func]
    name = str(getattr(func, "__name__", ""))
    if name == "unflatten":
        return _unflatten
    if name in _PLAIN.split() or name.startswith("is_"):
        return _as_it_is
    if name in _IN_PLACE.split() or (name.endswith("_") and not name.endswith("__")):
        return _in_place
    return _weighted if name == "_linear_pointwise.default" else _widen  # oneDNN's linear layer, with an activation
