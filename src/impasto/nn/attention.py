"""The only entry to every backend that computes attention."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..checks import nearest
from ..errors import InputError
from .backends.tiles import tiled_attention, tiled_attention_in_graphs
from .backends.training import products, recomputed_products
from .backends.varlen import runs_varlen, varlen_attention
from .machine import processor_has
from .tokens import Layout, is_tracing

#: Above so many scores the plain products, which store them for the backward pass, would take too much memory.
_MAX_SCORES_STORED = 2**25
#: The keys of a short text, for which storing the scores takes less time and little memory.
_FEW_KEYS = 64
#: Of a head. With no more, the exponentials take longer than the products.
_FEW_CHANNELS = 32
_NARROW = (torch.bfloat16, torch.float16)


#: Names of backends in diffusers -> torch's kernels, the preferred one first; None: whatever is fastest.
_FALLBACKS = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
_FLASH = [SDPBackend.FLASH_ATTENTION, *_FALLBACKS]
_FLASH_NAMES = ("flash", "flash_hub", "flash_4_hub", "_flash_3", "_flash_3_hub", "_native_flash")
BACKENDS: dict[str, list[SDPBackend] | None] = {
    "native": None,
    "_native_math": [SDPBackend.MATH],
    "_native_efficient": _FALLBACKS,
    "xformers": _FALLBACKS,
    "_native_cudnn": [SDPBackend.CUDNN_ATTENTION, *_FALLBACKS],
    **dict.fromkeys(_FLASH_NAMES, _FLASH),
}


def check_backend(name: str) -> str:
    """The name of a backend in lower case.

    Raises:
        InputError: it is none of ``BACKENDS``.
    """
    name = str(getattr(name, "value", name)).lower()
    if name not in BACKENDS:
        hint = nearest(name, BACKENDS)
        raise InputError(f"there is no attention backend {name!r} here; there are {', '.join(BACKENDS)}{hint}")
    return name


@contextmanager
def kernels(name: str) -> Iterator[None]:
    """Let ``attention`` prefer the kernels of a backend here; where they cannot compute a call, others do.

    Other threads and tasks keep theirs.
    """
    if torch.compiler.is_compiling():
        before, _thread.backend = _thread.backend, name
        try:
            yield
        finally:
            _thread.backend = before
        return
    token = _chosen.set(name)
    _thread.enter(name)
    try:
        yield
    finally:
        _thread.leave(name)
        _chosen.reset(token)


#: The backend in force, by name.
_chosen: ContextVar[str] = ContextVar("impasto_attention_backend", default="native")


class _Thread(threading.local):
    """The same for compiled code, which cannot read a ContextVar."""

    def __init__(self) -> None:
        self.entered = ["native"]
        self.backend = "native"

    def enter(self, name: str) -> None:
        self.entered.append(name)
        self.backend = name

    def leave(self, name: str) -> None:
        """Forget the last of this name, which need not be the last of all: tasks of one thread take turns."""
        del self.entered[len(self.entered) - 1 - self.entered[::-1].index(name)]
        self.backend = self.entered[-1]


_thread = _Thread()
#: torch's choice of kernels is the whole process's.
_flags = threading.RLock()


def chosen_backend() -> str:
    """The name of the backend in force here."""
    return _thread.backend if torch.compiler.is_compiling() else _chosen.get()


def _torch_attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float | None) -> Tensor:
    """torch's, by the kernels in force."""
    chosen = BACKENDS[chosen_backend()]
    if chosen is None:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale)
    if torch.compiler.is_compiling():
        with sdpa_kernel(chosen, set_priority=True):
            return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale)
    with _flags, sdpa_kernel(chosen, set_priority=True):
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale)


def attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """softmax(query keyᵀ · scale + bias) value (Vaswani et al. 2017, eq. 1).

    Args:
        query: [B, heads, N, head_dim].
        key, value: [B, heads, M, head_dim].
        bias: added to the scores, broadcastable to [B, heads, N, M]. A row of -inf only gives zeros, not NaN.
        scale: head_dim ** -0.5 unless given.

    Returns:
        [B, heads, N, head_dim] in the dtype of ``query``.
    """
    if bias is not None:
        bias = bias.to(query.dtype)
    if _trains_on_cpu(query, key, value):
        many = bias is None and key.shape[2] > _FEW_KEYS
        if many and query.dtype in _NARROW and not is_tracing():
            return recomputed_products(query, key, value, scale)
        # In float32 torch's attention is the faster one with many keys, backward pass included.
        if not (many and query.dtype == torch.float32) and _scores(query, key) <= _MAX_SCORES_STORED:
            return products(query, key, value, bias, scale)
    if bias is None and _tiles_are_faster(query, key, value):
        tiled = tiled_attention_in_graphs if torch.compiler.is_compiling() else tiled_attention
        return tiled(query, key, value, scale)
    return _torch_attention(query, key, value, bias, scale)


def attention_by_image(query: Tensor, key: Tensor, value: Tensor, layout: Layout) -> Tensor:
    """Attention of the tokens of a mixed batch, each image's to its own.

    Args:
        query, key, value: [T, heads, head_dim].

    Returns:
        [T, heads, head_dim]
    """
    if runs_varlen(query, key, value):
        return varlen_attention(query, key, value, layout)
    if layout.compares:
        bias = layout.own_bias(query.dtype)  # [1, 1, T, T]
        whole = [x.transpose(0, 1)[None] for x in (query, key, value)]  # [1, heads, T, head_dim] each
        return attention(whole[0], whole[1], whole[2], bias)[0].transpose(0, 1)
    results = []
    for group in zip(*(layout.grouped(x) for x in (query, key, value)), strict=True):
        q, k, v = (x.transpose(1, 2) for x in group)  # [b, heads, N, head_dim] each
        results.append(attention(q, k, v).transpose(1, 2).flatten(0, 1))  # [b * N, heads, head_dim]
    return torch.cat(results)


def _trains_on_cpu(query: Tensor, key: Tensor, value: Tensor) -> bool:
    if query.device.type != "cpu" or not torch.is_grad_enabled():
        return False
    return any(x.requires_grad for x in (query, key, value))


def _scores(query: Tensor, key: Tensor) -> int:
    return query.shape[0] * query.shape[1] * query.shape[2] * key.shape[2]


def _tiles_are_faster(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """torch's CPU attention multiplies 16-bit matrices at a fraction of oneDNN's rate, except where there is AMX.

    With few keys, or few channels, that hardly matters (benchmarks/attention.py).
    """
    if query.dtype != key.dtype or torch.is_autocast_enabled("cpu"):
        return False
    if query.device.type != "cpu" or query.dtype not in _NARROW:
        return False
    if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
        return False
    few = _FEW_KEYS if key.shape[3] > _FEW_CHANNELS else 4 * _FEW_KEYS
    if 0 in query.shape or key.shape[2] <= few:  # torch's takes one call instead of ten
        return False
    return not processor_has("amx_tile")


def attention_formula(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """The same in plain float64: what every backend is compared with."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = query.double() @ key.double().transpose(-2, -1) * scale
    if bias is not None:
        scores = scores + bias.double()
    return torch.nan_to_num(torch.softmax(scores, dim=-1)) @ value.double()
