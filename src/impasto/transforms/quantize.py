"""Quantization: linear layers whose weights, or weights and activations, are int8, float8 or 4-bit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import nn

from ..errors import ConfigurationError, InputError
from ..nn.changes import Handle, is_plain, refuse_conflicts, unwrapped
from .adapters.layers import record_of
from .quantized_linear import SCHEMES, QuantizedLinear, Scheme

Method = Literal["int8-weight-only", "int8-dynamic", "fp8", "nf4"]

#: Layers that are never quantized, by parts of their names, and why.
KEPT = {
    "adaln_single": "embeds the timestep and makes the modulation: a few rows per step, whose errors shift and scale "
    "every token of every block",
    "caption_projection": "runs once per prompt, on the text that every block reads",
    "pos_embed": "the patch embedding: everything depends on its output, and it is small (a convolution in PixArt)",
    "proj_out": "the last layer: its error goes straight into the prediction, and it is small",
    "time_condition_embed": "GLM-Image's adaln_single, before the modulation of each block",
    "norm1.linear": "that modulation: one row per step",
    "norm_out": "the modulation before the last layer",
    "image_projector": "the patch embedding of GLM-Image",
    "glyph_projector": "runs once per prompt; every block reads its output",
    "prior_projector": "runs once per image; every block reads its output",
    "visual": "the vision tower of GLM-Image's prior, which runs once per image: a wrong token stays wrong",
    "lm_head": "the last layer of the prior, which scores the tokens",
    "lora_A": "a factor of an adapter, which is small",
    "lora_B": "the other factor",
    "wo": "the last layer of each feed-forward of T5: its activations have outliers that overflow float16",
}


def quantize(
    module: Any,
    method: Method,
    *,
    skip: Sequence[str] = (),
    keep_originals: bool = True,
    device: torch.device | None = None,
) -> Quantization:
    """Replace the linear layers of a module, such as ``pipe.transformer``, by quantized ones. For inference only.

    - ``"int8-weight-only"``: half the memory of bfloat16 weights; products in the dtype of the activations.
    - ``"int8-dynamic"``: the same weights, and activations quantized to int8 at each call, with one scale per token;
      integer products.
    - ``"fp8"``: weights and activations in float8, on GPUs with float8 products.
    - ``"nf4"``: 4.5 bits per weight; products in the dtype of the activations.

    The first three are torchao's, whose GPU kernels reach their speed in compiled blocks; the last is bitsandbytes'.

    ``KEPT`` and, for each scheme, ``Scheme.kept`` list the layers that are not quantized, and why. Neither are layers
    of sizes that the products of a scheme do not support, nor convolutions.

    Saving writes the original weights, so a saved pipeline does not depend on quantization and loads anywhere. Weights
    that are loaded into the module are quantized too.

    Args:
        module: the module; not a linear layer itself.
        method: one of the four.
        skip: names of further layers not to quantize, or parts of names between dots: "ff.net.2",
            "transformer_blocks.0", "attn2".
        keep_originals: keep the original weights in host memory, so that quantization can be undone and the module
            saved. Without them host memory is saved too; the module can still be moved.
        device: of the quantized layers; that of their weights unless given. So a module in host memory never has to be
            on the device as a whole: quantize to the device, then move the rest there.

    Returns:
        a handle: ``remove()`` restores the original layers bit by bit, and so does leaving its ``with`` block.

    Raises:
        InputError: an argument that cannot be used.
        ConfigurationError: the module is quantized already, has fused projections or hooks on a layer, has no layer to
            quantize, or has weights of a dtype that the scheme does not support.
        ResourceError: the machine lacks what the scheme needs; the message names an alternative.
        MissingDependencyError: a library is missing: ``pip install 'impasto[quantize]'``.
    """
    if method not in SCHEMES:
        raise InputError(f"quantize: there is no method {method!r}; use one of {', '.join(SCHEMES)}")
    if isinstance(skip, str):
        raise InputError(f"quantize: skip is a list of names; write [{skip!r}]")
    module = unwrapped(module)
    if not isinstance(module, nn.Module) or type(module) is nn.Linear:
        raise InputError(
            f"quantize takes a module with linear layers inside, such as pipe.transformer, not {type(module).__name__}"
        )
    refuse_conflicts(module, QuantizedLinear)
    scheme = SCHEMES[method]()
    chosen = list(_chosen(module, scheme, skip))
    for target, dtype in {(device or layer.weight.device, layer.weight.dtype) for _, _, _, layer in chosen}:
        scheme.check(target, dtype)
    chosen = [place for place in chosen if all(size % scheme.multiple == 0 for size in place[3].weight.shape)]
    if not chosen:
        raise ConfigurationError(
            f"quantize: {type(module).__name__} has no linear layer that {method!r} supports and that is not skipped"
        )
    for name, parent, _, layer in chosen:
        if hasattr(parent, "lokr_w1") or hasattr(parent, "hada_w1_a"):
            raise ConfigurationError(
                f"quantize: {name} has a LoKr or LoHa adapter, which needs its weight; fuse it first"
            )
        if not is_plain(layer, nn.Linear):
            raise ConfigurationError(
                f"quantize: {name} has hooks, or a weight that another library has quantized or sharded, which would "
                f"be lost; undo that or skip it"
            )

    made: dict[nn.Linear, QuantizedLinear] = {}  # a layer in two places is one layer
    for _, parent, key, layer in chosen:
        if layer not in made:
            made[layer] = QuantizedLinear(layer, scheme, keep_originals, device)
        parent._modules[key] = made[layer]
    return Quantization(module, method, tuple(name for name, _, _, _ in chosen))


def dequantize(module: Any) -> None:
    """Undo ``quantize``: restore the original layers.

    Raises:
        ConfigurationError: the originals were not kept; nothing is changed then.
    """
    module = unwrapped(module)
    records = [record for inner in module.modules() if (record := record_of(inner)) is not None]
    aside = [place.layer for record in records for place in record.fused]  # where unfuse_lora() takes them from
    originals = [
        (parent, key, child.restored())
        for root in (module, *aside)
        for parent in root.modules()
        for key, child in parent._modules.items()
        if isinstance(child, QuantizedLinear)
    ]
    for parent, key, original in originals:
        parent._modules[key] = original


class Quantization(Handle):
    """The handle of ``quantize``; ``layers`` are the names of the quantized ones."""

    def __init__(self, module: nn.Module, method: Method, layers: tuple[str, ...]):
        self.module, self.method, self.layers = module, method, layers

    def remove(self) -> None:
        """Restore the original layers."""
        dequantize(self.module)


def _chosen(module: nn.Module, scheme: Scheme, skip: Sequence[str]) -> Iterator[tuple[str, nn.Module, str, nn.Linear]]:
    """The layers to quantize, also inside of adapters: the name, the module that has the layer, its name there."""
    for prefix, parent in module.named_modules():
        for key, layer in parent._modules.items():
            if type(layer) is not nn.Linear:
                continue
            name = f"{prefix}.{key}" if prefix else key
            kept = (*KEPT, *scheme.kept.get("", ()), *scheme.kept.get(layer.weight.device.type, ()), *skip)
            if not any(f".{words}." in f".{name}." for words in kept):
                yield name, parent, key, layer
