"""Weights, or weights and activations, of few bits in place of a module's linear layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

from torch import nn

from ..errors import ConfigurationError, InputError
from ..nn.fused_linear import FusedLinear
from ..nn.handle import Handle
from .quantized_linear import SCHEMES, QuantizedLinear, Scheme

Method = Literal["int8-weight-only", "int8-dynamic", "fp8", "nf4"]

#: Layers that stay as they are in every scheme, by parts of their names, and why.
KEPT = {
    "adaln_single": "the timestep's embedding and the modulation: a few rows a step, and an error in them shifts and "
    "scales every token of every block",
    "caption_projection": "runs once a prompt, on the text that every block reads",
    "pos_embed": "the patch embedding: everything is made of its output; it is small (and a convolution in PixArt)",
    "proj_out": "the last layer: its error goes straight into the prediction; it is small",
    "time_condition_embed": "GLM-Image's adaln_single, before the modulation of each block",
    "norm1.linear": "that modulation: one row a step",
    "norm_out": "the modulation before the last layer",
    "image_projector": "the patch embedding of GLM-Image",
    "glyph_projector": "runs once a prompt, on what every block reads",
    "prior_projector": "runs once a picture, on what every block reads",
    "visual": "the vision tower of GLM-Image's prior, which runs once an image: one wrong token of it stays wrong",
    "lm_head": "the last layer of the prior, which chooses the token",
    "wo": "T5's output of each feed-forward: its activations have outliers that overflow float16, and few bits more so",
}


def quantize(
    module: Any,
    method: Method,
    *,
    skip: Sequence[str] = (),
    keep_originals: bool = True,
) -> Quantization:
    """Replace the linear layers of a module, such as ``pipe.transformer``, by quantised ones. For inference only.

    - ``"int8-weight-only"``: half the memory of bfloat16's weights; the products are those of the activations.
    - ``"int8-dynamic"``: the same weights, and activations in int8 too, with a factor for each token found as they
      come: products of integers.
    - ``"fp8"``: weights and activations in float8, on GPUs that multiply it.
    - ``"nf4"``: 4.5 bits a weight; the products are those of the activations.

    The first three are torchao's, whose GPU kernels show their speed when the blocks are compiled; the last is
    bitsandbytes'.

    Which layers stay as they are, and why, is in ``KEPT`` and, for each scheme, in ``Scheme.kept``. Layers whose sizes
    a scheme's products cannot take stay as well. Convolutions are not touched.

    Saving writes the original weights, so that a saved pipeline never depends on this and loads anywhere; what is
    loaded into the module is quantised in turn.

    Args:
        module: the module; not a linear layer itself.
        method: one of the four.
        skip: names of further layers to leave as they are, or parts of names between dots: "ff.net.2",
            "transformer_blocks.0", "attn2".
        keep_originals: keep the weights, in the memory of the CPU, to undo the quantisation, save or move the module.
            Without them memory is saved on the CPU too, and nothing of that can be done but move.

    Returns:
        a handle: ``remove()`` puts the original layers back, bit by bit, and so does leaving its ``with`` block.

    Raises:
        InputError: an argument that cannot be used.
        ConfigurationError: the module is quantised already, has fused projections or hooks in a layer, holds no
            layer to quantise, or has weights of a dtype that the scheme does not take.
        ResourceError: the machine lacks what the scheme needs; the message names another.
        MissingDependencyError: a library is missing: ``pip install 'impasto[quantize]'``.
    """
    if method not in SCHEMES:
        raise InputError(f"quantize: there is no method {method!r}; use one of {', '.join(SCHEMES)}")
    if isinstance(skip, str):
        raise InputError(f"quantize: skip is a list of names; write [{skip!r}]")
    module = getattr(module, "_orig_mod", module)
    if not isinstance(module, nn.Module) or type(module) is nn.Linear:
        raise InputError(
            f"quantize takes a module with linear layers inside, such as pipe.transformer, not {type(module).__name__}"
        )
    _refuse_unfit(module)
    scheme = SCHEMES[method]()
    named = [place for place in _places(module) if not _stays(scheme, place, skip)]
    for device, dtype in {(layer.weight.device, layer.weight.dtype) for _, _, _, layer in named}:
        scheme.check(device, dtype)
    chosen = [place for place in named if _fits(scheme, place[3])]
    if not chosen:
        raise ConfigurationError(
            f"quantize: {type(module).__name__} has no linear layer that {method!r} can take and that is not to stay"
        )
    for name, _, _, layer in chosen:
        if layer._forward_hooks or layer._forward_pre_hooks:
            raise ConfigurationError(f"quantize: {name} has hooks, which would be lost; remove them or skip it")

    made: dict[nn.Linear, QuantizedLinear] = {}  # a layer in two places is one layer
    for _, parent, key, layer in chosen:
        if layer not in made:
            made[layer] = QuantizedLinear(layer, scheme, keep_originals)
        parent._modules[key] = made[layer]
    return Quantization(module, method, tuple(name for name, _, _, _ in chosen))


def dequantize(module: Any) -> None:
    """Undo ``quantize``: put the original layers back. What is no quantised layer stays as it is.

    Raises:
        ConfigurationError: the originals were not kept; nothing is changed then.
    """
    module = getattr(module, "_orig_mod", module)
    found = [
        (parent, key, child)
        for parent in module.modules()
        for key, child in parent._modules.items()
        if isinstance(child, QuantizedLinear)
    ]
    originals = [layer.restored() for _, _, layer in found]
    for (parent, key, _), original in zip(found, originals):
        parent._modules[key] = original


class Quantization(Handle):
    """The handle of ``quantize``; ``layers`` are the names of those that were replaced."""

    def __init__(self, module: nn.Module, method: Method, layers: tuple[str, ...]):
        self.module, self.method, self.layers = module, method, layers

    def remove(self) -> None:
        """Put the original layers back."""
        dequantize(self.module)


def _refuse_unfit(module: nn.Module) -> None:
    for name, inner in module.named_modules():
        if isinstance(inner, QuantizedLinear):
            raise ConfigurationError(f"quantize: {name} is quantised already; dequantize() the module first")
        if any(isinstance(value, FusedLinear) for value in vars(inner).values()):
            raise ConfigurationError(
                f"quantize: {name} has fused projections; call unfuse_qkv_projections() on the model first"
            )


def _places(module: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Linear]]:
    """Every plain linear layer: its name, the module that holds it, the name there. Adapters around it stay."""
    for prefix, parent in module.named_modules():
        for key, child in parent._modules.items():
            if type(child) is nn.Linear:
                yield f"{prefix}.{key}" if prefix else key, parent, key, child


def _stays(scheme: Scheme, place: tuple[str, nn.Module, str, nn.Linear], skip: Sequence[str]) -> bool:
    name, _, _, layer = place
    kept = (*KEPT, *scheme.kept.get("", ()), *scheme.kept.get(layer.weight.device.type, ()), *skip)
    return any(f".{part}." in f".{name}." for part in kept)


def _fits(scheme: Scheme, layer: nn.Linear) -> bool:
    return not layer.in_features % scheme.multiple and not layer.out_features % scheme.multiple
