"""Attention processors, with the interface of diffusers: objects that compute an attention in place of its own code.

An attention that has one is called as a module, on [B, N, D] and the projected and padded text: nothing is taken from
its layers in advance. The default processors stand for the model's own code, with all that makes it fast.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import InputError
from ...nn.attention import kernels
from ...nn.fused_linear import FusedLinear


class AttnProcessor2_0:
    """The default: the attention's own code, by whatever computes it fastest here."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        return attn.compute(hidden_states, encoder_hidden_states, attention_mask)


class AttnProcessor(AttnProcessor2_0):
    """The same as ``AttnProcessor2_0``."""


class _Call(threading.local):  # torch.compile traces it, unlike a ContextVar
    def __init__(self) -> None:
        #: What is given to processors in addition: ``cross_attention_kwargs`` of the model's call in progress here.
        self.given: Mapping[str, Any] = {}


_call = _Call()


class ProcessedAttention(nn.Module):
    """An attention with a processor, and what processors read of it.

    A subclass has ``compute``, its own code, with the arguments of ``forward``.
    """

    default_processor: ClassVar[Any] = AttnProcessor2_0()
    heads: int
    to_q: nn.Module
    to_k: nn.Module
    to_v: nn.Module
    to_out: nn.Sequential
    _backend: Any = None  # torch's kernel, if one was chosen
    _fused: FusedLinear | None = None  # the projections of one input as one product

    # What other attentions of diffusers have, and these do not.
    spatial_norm = norm_cross = norm_added_q = norm_added_k = None
    add_q_proj = add_k_proj = add_v_proj = to_add_out = added_kv_proj_dim = context_pre_only = None
    norm_q: Any = None
    norm_k: Any = None
    upcast_softmax = only_cross_attention = pre_only = is_causal = False
    residual_connection = False
    rescale_output_factor = 1.0
    scale_qk = added_proj_bias = True

    @property
    def processor(self) -> Any:
        """What computes this attention; assign another one to replace it."""
        own = self._modules if "processor" in self._modules else {"processor": vars(self).get("_processor")}
        return self.default_processor if own["processor"] is None else own["processor"]

    @processor.setter
    def processor(self, processor: Any) -> None:
        check_processor(processor)
        vars(self).pop("_processor", None)
        if type(processor) not in (AttnProcessor, AttnProcessor2_0, type(self.default_processor)):
            vars(self)["_processor"] = processor

    def set_processor(self, processor: Any) -> None:
        """Let a processor compute this attention; one that is a module becomes a submodule, with its weights."""
        check_processor(processor)
        self._modules.pop("processor", None)
        self.processor = processor

    def get_processor(self, return_deprecated_lora: bool = False) -> Any:
        """What computes this attention."""
        return None if return_deprecated_lora else self.processor

    @property
    def is_processed(self) -> bool:
        """Whether a processor other than the default one is set."""
        return "_processor" in vars(self) or "processor" in self._modules

    def compute(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Moving or casting gives every projection storage of its own again.
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self._fused is not None:
            self._fused = FusedLinear(self._fused.layers)
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with nullcontext() if self._backend is None else kernels(self._backend):
            return self.process(*args, **kwargs) if self.is_processed else self.compute(*args, **kwargs)

    def process(self, *args: Any, **kwargs: Any) -> Any:
        """``compute`` by the processor."""
        return self.call_processor(*args, **kwargs)

    def call_processor(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **more: Any,
    ) -> Any:
        """Call the processor with what it takes of the arguments.

        Args:
            attention_mask: a bias [B, M] or [B, 1 or N, M], as the processor of diffusers takes it: -10000 discards.
        """
        if attention_mask is not None:
            attention_mask = attention_mask.to(hidden_states.dtype).clamp(min=-10_000.0)
            attention_mask = attention_mask[:, None] if attention_mask.ndim == 2 else attention_mask
        taken = parameters_of(self.processor)
        more = {name: value for name, value in {**more, **_call.given}.items() if takes(taken, name)}
        return self.processor(
            self, hidden_states, encoder_hidden_states=encoder_hidden_states, attention_mask=attention_mask, **more
        )

    # What processors read and call

    @property
    def inner_dim(self) -> int:
        return int(self.to_q.out_features)  # type: ignore[arg-type]

    @property
    def scale(self) -> float:
        """Of the scores."""
        return float((self.inner_dim // self.heads) ** -0.5)

    @property
    def query_dim(self) -> int:
        return int(self.to_q.in_features)  # type: ignore[arg-type]

    @property
    def cross_attention_dim(self) -> int:
        return int(self.to_k.in_features)  # type: ignore[arg-type]

    inner_kv_dim = inner_dim
    out_dim = out_context_dim = query_dim
    sliceable_head_dim = property(lambda self: self.heads)
    use_bias = property(lambda self: self.to_q.bias is not None)
    dropout = property(lambda self: self.to_out[1].p)
    is_cross_attention = property(lambda self: getattr(self, "is_cross", False))
    upcast_attention = property(lambda self: getattr(self, "upcast", False))
    fused_projections = property(lambda self: getattr(self, "_fused", None) is not None)

    def head_to_batch_dim(self, tensor: Tensor, out_dim: int = 3) -> Tensor:
        """[B, N, D] -> [B * heads, N, head_dim]; with ``out_dim=4`` [B, heads, N, head_dim]."""
        split: Tensor = tensor.flatten(1, -2).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return split.flatten(0, 1) if out_dim == 3 else split

    def batch_to_head_dim(self, tensor: Tensor) -> Tensor:
        """[B * heads, N, head_dim] -> [B, N, D]."""
        joined: Tensor = tensor.unflatten(0, (-1, self.heads)).transpose(1, 2).flatten(2)
        return joined

    def get_attention_scores(self, query: Tensor, key: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """softmax(query keyᵀ · scale + mask): [B * heads, N, M], from [B * heads, N or M, head_dim]."""
        wide = torch.float32 if self.upcast_attention else query.dtype
        scores = query.to(wide) @ key.to(wide).transpose(-1, -2) * self.scale
        scores = scores if attention_mask is None else scores + attention_mask
        return scores.softmax(dim=-1).to(query.dtype)

    def prepare_attention_mask(
        self, attention_mask: Tensor | None, target_length: int, batch_size: int, out_dim: int = 3
    ) -> Tensor | None:
        """A bias [B, 1, M] for every head: [B * heads, 1, M]; with ``out_dim=4`` [B, heads, 1, M]."""
        if attention_mask is None:
            return None
        if attention_mask.shape[-1] != target_length:
            attention_mask = F.pad(attention_mask, (0, target_length), value=0.0)
        if out_dim == 4:
            return attention_mask.unsqueeze(1).repeat_interleave(self.heads, dim=1)
        whole = attention_mask.shape[0] >= batch_size * self.heads
        return attention_mask if whole else attention_mask.repeat_interleave(self.heads, dim=0)

    def norm_encoder_hidden_states(self, encoder_hidden_states: Tensor) -> Tensor:
        """The text as it is: these models do not normalize it."""
        return encoder_hidden_states

    def set_attention_slice(self, slice_size: int | None) -> None:
        """Accepted without effect: attention never holds all scores at once."""


def check_processor(processor: Any) -> None:
    """Raise InputError for what cannot be called."""
    if not callable(processor):
        raise InputError(f"an attention processor is called as processor(attn, hidden_states, ...): {processor!r}")


def parameters_of(processor: Any) -> Mapping[str, inspect.Parameter]:
    """The arguments that a processor takes, by name."""
    function = processor.forward if isinstance(processor, nn.Module) else processor
    return inspect.signature(function).parameters


def takes(parameters: Mapping[str, inspect.Parameter], name: str) -> bool:
    """Whether a processor takes an argument; ``scale``, which many would reject, only by its name."""
    collects = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    return name in parameters or (collects and name != "scale")


@contextmanager
def giving(arguments: Mapping[str, Any] | None, model: nn.Module, name: str) -> Iterator[None]:
    """Give a call's ``cross_attention_kwargs`` to the processors that take them.

    Raises:
        InputError: no processor takes one of them, apart from ``scale``, which is documented and ignored.
    """
    if not arguments:
        yield
        return
    processors = [m.processor for m in model.modules() if isinstance(m, ProcessedAttention) and m.is_processed]
    unknown = [n for n in arguments if n != "scale" and not any(takes(parameters_of(p), n) for p in processors)]
    if unknown:
        raise InputError(f"{name} {unknown}: this model's attention takes none of them")
    with _given(arguments):
        yield


@contextmanager
def _given(arguments: Mapping[str, Any]) -> Iterator[None]:
    before, _call.given = _call.given, arguments
    try:
        yield
    finally:
        _call.given = before


def giving_again(block: nn.Module) -> Callable[..., Any]:
    """A block whose processors are given the same when it is recomputed as in the call in progress."""
    given = _call.given
    if not given:
        return block

    def computed(*arguments: Any) -> Any:
        with _given(given):
            return block(*arguments)

    return computed


#: For ``isinstance``: the name of the class in diffusers.
Attention = ProcessedAttention
