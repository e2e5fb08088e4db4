"""Layerwise casting: weights stored in a narrow dtype such as float8, and cast when their layer is called."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ConfigurationError, InputError
from ..nn.changes import Change, Handle, of, refuse_conflicts, unwrapped
from ..nn.layers import PatchConvolution

#: Parts of names of layers that stay as they are: what depends most on the digits of its weights.
DEFAULT_SKIP_MODULES_PATTERN = ("pos_embed", "patch_embed", "norm", "^proj_in$", "^proj_out$")

#: The layers that are cast.
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding, PatchConvolution)


class CastLayer(Change):
    """What is called in place of a layer's ``forward``: the same with its weights cast for this call alone."""

    change = "stored in a narrow dtype"
    undo = "call its disable_layerwise_casting(), or remove() the handle of apply_layerwise_casting(),"
    conflicts: ClassVar = ("quantized", "stored in a narrow dtype")

    def __init__(self, layer: nn.Module, dtype: torch.dtype, non_blocking: bool):
        self.layer, self.dtype, self.non_blocking = layer, dtype, non_blocking
        self.stored = _dtype_of(layer)  # before this change

    def remove(self) -> None:
        """Call the layer's own ``forward`` again, with weights in their former dtype; no effect if it is removed."""
        if any(change is self for change in of(self.layer)):
            self.take(self.layer, "forward")
            self.layer.to(self.stored)

    def __call__(self, x: Tensor) -> Tensor:
        layer: Any = self.layer
        weight, bias = (
            None if p is None else p.to(self.dtype, non_blocking=self.non_blocking)
            for p in (layer.weight, layer._parameters.get("bias"))
        )
        if isinstance(layer, nn.Embedding):
            return F.embedding(x, weight, layer.padding_idx)  # type: ignore[arg-type]
        wide = x.to(self.dtype)
        out: Tensor = (
            F.linear(wide, weight, bias)  # type: ignore[arg-type]
            if isinstance(layer, nn.Linear)
            else layer._conv_forward(wide, weight, bias)
        )
        return out if x.dtype.itemsize == 1 else out.to(x.dtype)  # float8 of a caller that reads our weight's dtype


class LayerwiseCasting(Handle):
    """The handle of ``apply_layerwise_casting``: ``remove()`` casts the weights back; their lost digits stay lost."""

    def __init__(self, layers: Sequence[nn.Module], storage: torch.dtype, compute: torch.dtype, non_blocking: bool):
        self._calls = [CastLayer(layer, compute, non_blocking) for layer in layers]
        for call in self._calls:
            call.layer.to(storage)
            call.put(call.layer, "forward")

    def remove(self) -> None:
        for call in self._calls:
            call.remove()
        self._calls = []


def apply_layerwise_casting(
    module: nn.Module,
    storage_dtype: torch.dtype,
    compute_dtype: torch.dtype,
    skip_modules_pattern: str | Sequence[str] | None = "auto",
    skip_modules_classes: tuple[type[nn.Module], ...] | None = None,
    non_blocking: bool = False,
) -> LayerwiseCasting:
    """Store the weights of linear layers, convolutions and embeddings in a narrow dtype.

    Each layer's weights are cast for each call, so memory falls and time rises a little. They can be trained, and their
    gradients have the narrow dtype, too.

    Args:
        module: a model, or any module.
        storage_dtype: ``torch.float8_e4m3fn``, for example.
        compute_dtype: in which layers compute; what they return has the dtype of their input, unless that is narrow.
        skip_modules_pattern: regular expressions; layers inside of modules whose names contain one stay as they are.
            "auto": ``DEFAULT_SKIP_MODULES_PATTERN``, and what the model's class keeps in float32 because it would
            overflow (in T5, ``wo``); None: no layer is left out.
        skip_modules_classes: classes of modules that stay as they are, too.
        non_blocking: for the casts.

    Raises:
        InputError: no layer is left to be cast, or a dtype is not one of floating-point numbers.
        ConfigurationError: a layer is quantized or cast already.
    """
    module = unwrapped(module)
    for name, dtype in (("storage_dtype", storage_dtype), ("compute_dtype", compute_dtype)):
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise InputError(f"{name} must be a floating-point dtype, not {dtype!r}")
    if skip_modules_pattern == "auto":
        kept = getattr(module, "_keep_in_fp32_modules", None) or ()
        skip_modules_pattern = (*DEFAULT_SKIP_MODULES_PATTERN, *(rf"\b{re.escape(name)}\b" for name in kept))
    patterns = [skip_modules_pattern] if isinstance(skip_modules_pattern, str) else list(skip_modules_pattern or ())
    refuse_conflicts(module, CastLayer)
    layers = list(dict.fromkeys(_chosen(module, "", patterns, skip_modules_classes or ())))
    if any("forward" in vars(layer) for layer in layers):
        raise ConfigurationError("a layer has another forward (of an offloading hook, for example): undo that first")
    if not layers:
        raise InputError(f"apply_layerwise_casting: no layer of {type(module).__name__} is left to be cast")
    return LayerwiseCasting(layers, storage_dtype, compute_dtype, non_blocking)


def _dtype_of(layer: nn.Module) -> torch.dtype:
    return next(layer.parameters()).dtype


def _chosen(
    module: nn.Module, name: str, patterns: Sequence[str], classes: tuple[type[nn.Module], ...]
) -> Iterator[nn.Module]:
    if isinstance(module, classes) or any(re.search(pattern, name) for pattern in patterns):
        return
    if type(module) in _LAYERS:
        yield module
        return
    for key, child in module.named_children():
        yield from _chosen(child, f"{name}.{key}" if name else key, patterns, classes)
