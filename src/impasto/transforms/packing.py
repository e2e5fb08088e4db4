"""Weights kept in the order in which a processor multiplies them: the same pictures, to the bit, for more memory."""

from __future__ import annotations

import weakref

import torch
from torch import nn

from ..errors import ConfigurationError, InputError, ResourceError
from ..nn.backends.onednn import KEPT, KeptWeight, check_kept_weights
from ..nn.handle import Handle
from ..nn.machine import has_onednn_products


def pack_weights(model: nn.Module) -> PackedWeights:
    """Keep packed copies of a model's weights, for inference in bfloat16 on the CPU.

    A copy is made when a layer is first called, and made anew where its weight was replaced, moved, loaded or trained
    since. Only what writes through ``weight.data`` (or into tensors of inference mode) can't be seen that way:
    pipelines look for it when a denoising loop begins, and after a callback. Who calls the model itself after such a
    change, or makes it while driving a loop, calls ``check()``.

    Args:
        model: a transformer; its linear layers are of ``nn.Linear``. Others are left as they are.

    Returns:
        a handle: ``remove()`` frees the copies, and so does leaving its ``with`` block.

    Raises:
        InputError: no model.
        ConfigurationError: the model's weights are packed already.
        ResourceError: the processor has no products of bfloat16.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"pack_weights takes a model such as pipe.transformer, not {type(model).__name__}")
    if not has_onednn_products(torch.bfloat16):
        raise ResourceError(
            "packed weights are for processors that multiply bfloat16 (AVX-512), and this one does not, or oneDNN is "
            "switched off; there is nothing to gain here"
        )
    layers = [module for module in model.modules() if type(module) is nn.Linear]
    if any(layer in KEPT for layer in layers):
        raise ConfigurationError("this model's weights are packed already; remove() the handle of that first")
    return PackedWeights(layers)


def multiplies_bfloat16(model: nn.Module) -> bool:
    """Whether a model's weights are worth packing: of bfloat16, on a processor that multiplies it."""
    return next(model.parameters()).dtype == torch.bfloat16 and has_onednn_products(torch.bfloat16)


class PackedWeights(Handle):
    """The handle of ``pack_weights``."""

    def __init__(self, layers: list[nn.Linear]):
        self._layers = weakref.WeakSet(layers)  # what is kept ends with its layer, whoever has this handle
        for layer in layers:
            KEPT[layer] = KeptWeight()

    def check(self) -> None:
        """Forget the copies of weights that have other numbers by now; reads all weights once."""
        for layer in self._layers:
            check_kept_weights(layer)

    def remove(self) -> None:
        """Free the copies."""
        for layer in self._layers:
            KEPT.pop(layer, None)
        self._layers.clear()
