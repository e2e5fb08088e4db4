"""A quantized linear layer, and the quantization schemes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ConfigurationError, ResourceError
from ..nn.changes import Change
from ..nn.machine import multiplies_int8_exactly
from ..optional import require

#: Weights that share one scale in NF4.
NF4_BLOCK = 64


def _library(name: str) -> Any:
    return require(name, "quantization", "impasto[quantize]")


class Scheme:
    """How weights are quantized and multiplied. One object serves all layers; it holds no tensors."""

    name: ClassVar[str]
    #: Names of further layers that are not quantized, by device type ("" is any).
    kept: ClassVar[dict[str, Sequence[str]]] = {}
    #: Both sizes of a layer must be multiples of this.
    multiple: ClassVar[int] = 1

    def check(self, device: torch.device, dtype: torch.dtype) -> None:
        """Raise if the machine, the dtype or a library is not suitable."""
        raise NotImplementedError

    def pack(self, weight: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """A weight [out, in] -> the quantized weight, and further tensors by name."""
        raise NotImplementedError

    def multiply(self, x: Tensor, layer: QuantizedLinear) -> Tensor:
        """[..., in] -> [..., out]."""
        return F.linear(x, layer.weight, layer.bias)

    def unpack(self, layer: QuantizedLinear, dtype: torch.dtype) -> Tensor:
        """The weight [out, in] that a layer multiplies by."""
        weight: Tensor = cast(Any, layer.weight).dequantize()
        return weight.to(dtype)


class _TorchAO(Scheme):
    """Tensors of torchao, which implement their own product."""

    config: ClassVar[str]

    def _options(self, api: Any) -> dict[str, Any]:
        # Compiler settings are those of the whole process, and not ours to change.
        return {"set_inductor_config": False}

    def check(self, device: torch.device, dtype: torch.dtype) -> None:
        _library("torchao.quantization")

    def pack(self, weight: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        api = _library("torchao.quantization")
        carrier = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        carrier.weight = nn.Parameter(weight, requires_grad=False)
        api.quantize_(carrier, getattr(api, self.config)(**self._options(api)))
        return carrier.weight, {}


class Int8WeightOnly(_TorchAO):
    """Weights in int8 with one scale per output; products in the dtype of the activations."""

    name = "int8-weight-only"
    config = "Int8WeightOnlyConfig"


class Int8Dynamic(_TorchAO):
    """Weights in int8 with one scale per output, activations with one per token; integer products."""

    name = "int8-dynamic"
    config = "Int8DynamicActivationInt8WeightConfig"
    # The projections of the text run once per prompt, on few rows. On the CPU a short text is absorbed into the other
    # projections of cross-attention, which is less work than any product with them and needs plain layers.
    kept: ClassVar[dict[str, Sequence[str]]] = {"": ("attn2.to_k", "attn2.to_v"), "cpu": ("attn2",)}
    multiple = 8

    def check(self, device: torch.device, dtype: torch.dtype) -> None:
        if device.type == "cpu" and not multiplies_int8_exactly():
            raise ResourceError(
                "int8-dynamic needs exact products of int8, and ONEDNN_MAX_CPU_ISA hides the instructions that make "
                "them; unset it, or use 'int8-weight-only'"
            )
        super().check(device, dtype)


class Float8(_TorchAO):
    """Weights and activations in float8 (e4m3), with one scale per output and per token."""

    name = "fp8"
    config = "Float8DynamicActivationFloat8WeightConfig"
    kept: ClassVar[dict[str, Sequence[str]]] = {"": ("attn2.to_k", "attn2.to_v")}
    multiple = 16

    def _options(self, api: Any) -> dict[str, Any]:
        return {"granularity": api.PerRow(), **super()._options(api)}

    def check(self, device: torch.device, dtype: torch.dtype) -> None:
        if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
            raise ResourceError(
                f"fp8 needs a GPU of compute capability 8.9 or higher (Ada, Hopper, Blackwell), and the weights are on "
                f"{device}. Use 'int8-dynamic', which works everywhere, or move the pipeline to such a GPU first."
            )
        if dtype != torch.bfloat16:
            raise ConfigurationError(
                f"fp8 quantizes bfloat16 weights, and these are {dtype}; call pipe.to(torch.bfloat16) first"
            )
        super().check(device, dtype)


class NF4(Scheme):
    """4-bit weights, quantiles of the normal distribution (QLoRA, 2305.14314), with one scale per 64 weights.

    The weight of a layer is dequantized for each product and dropped after it.
    """

    name = "nf4"

    def check(self, device: torch.device, dtype: torch.dtype) -> None:
        _library("bitsandbytes.functional")

    def pack(self, weight: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        api = _library("bitsandbytes.functional")
        packed, state = api.quantize_4bit(
            weight.contiguous(), blocksize=NF4_BLOCK, quant_type="nf4", compress_statistics=False
        )
        return packed, {"factors": state.absmax, "levels": state.code}

    def multiply(self, x: Tensor, layer: QuantizedLinear) -> Tensor:
        return F.linear(x, self.unpack(layer, x.dtype), layer.bias)

    def unpack(self, layer: QuantizedLinear, dtype: torch.dtype) -> Tensor:
        api = _library("bitsandbytes.functional")
        state = api.QuantState(
            absmax=layer.factors,
            code=layer.levels,
            shape=torch.Size((layer.out_features, layer.in_features)),
            blocksize=NF4_BLOCK,
            quant_type="nf4",
            dtype=dtype,
        )
        weight: Tensor = api.dequantize_4bit(layer.weight, state)
        return weight


SCHEMES: dict[str, type[Scheme]] = {scheme.name: scheme for scheme in (Int8WeightOnly, Int8Dynamic, Float8, NF4)}


class _FrozenProduct(torch.autograd.Function):
    """A quantized layer where gradients are recorded: through it, not of its weight.

    The weight is dequantized in the forward pass and again in the backward pass, so no copy of it is kept between them.
    """

    @staticmethod
    def forward(context: Any, x: Tensor, layer: QuantizedLinear) -> Tensor:
        context.layer = layer
        return layer.scheme.multiply(x, layer)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        layer: QuantizedLinear = context.layer
        return gradient @ layer.scheme.unpack(layer, gradient.dtype), None


class QuantizedLinear(nn.Linear, Change):
    """Replaces an ``nn.Linear``.

    Its state dict is that of the original layer. Loaded weights go to the original and are quantized again, and a move
    to another device or dtype quantizes the original again. Without an original, what is loaded or moved is quantized
    directly, and there is nothing to save.

    Args:
        original: the layer. On an accelerator its weights are moved to host memory.
        scheme: how to quantize it.
        keep: whether to keep the original.
        device: of the quantized weights; the original's unless given.
    """

    change = "quantized"
    undo = "dequantize() the model"
    conflicts: ClassVar = ("quantized", "fused")

    factors: Tensor
    levels: Tensor

    def __init__(self, original: nn.Linear, scheme: Scheme, keep: bool, device: torch.device | None = None):
        nn.Module.__init__(self)  # a linear layer to peft, without memory for a weight that is replaced
        self.in_features, self.out_features = original.in_features, original.out_features
        self.scheme = scheme
        self._dtype = original.weight.dtype
        self._has_bias = original.bias is not None
        self._fill(original, device or original.weight.device)
        # In a list it is no submodule: it is not moved, not counted and not in the state dict.
        self._kept = [original] if keep else []
        if keep and original.weight.device.type not in ("cpu", "meta"):
            for parameter in original.parameters():
                parameter.data = parameter.data.cpu()
        self.train(original.training)

    @property
    def original(self) -> nn.Linear | None:
        return self._kept[0] if self._kept else None

    def _fill(self, layer: nn.Linear, device: torch.device) -> None:
        """Quantize the weights of a layer."""
        with torch.no_grad():
            weight, others = self.scheme.pack(layer.weight.detach().to(device, self._dtype))
            bias = None if layer.bias is None else layer.bias.detach().to(device, self._dtype, copy=True)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        for name, tensor in others.items():
            self.register_buffer(name, tensor, persistent=False)

    def restored(self) -> nn.Linear:
        """The original layer, on the device and in the dtype that this one has now.

        Raises:
            ConfigurationError: it was not kept.
        """
        if self.original is None:
            raise ConfigurationError("the original weights were not kept (keep_originals=False); load the model again")
        device = self.weight.device
        for parameter in self.original.parameters():
            parameter.data = parameter.data.to(device, self._dtype)
        return self.original.train(self.training)

    @property
    def dtype(self) -> torch.dtype:
        """That of the original weight."""
        return self._dtype

    @property
    def W_q(self) -> Tensor:
        """The quantized weight: where peft finds it, it calls ``dequantize`` for what depends on the weight."""
        return self.weight

    def dequantize(self) -> Tensor:
        """The weight [out, in] that this layer multiplies by, in the dtype of the original one."""
        with torch.no_grad():
            return self.scheme.unpack(self, self._dtype)

    def forward(self, input: Tensor) -> Tensor:
        if torch.is_grad_enabled() and input.requires_grad:
            out: Tensor = _FrozenProduct.apply(input, self)  # type: ignore[no-untyped-call]
            return out
        return self.scheme.multiply(input, self)  # [..., out]

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self._has_bias}, {self.scheme.name}"

    # --- moving, saving, loading ---

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        probe = fn(torch.empty(0, dtype=self._dtype, device=self.weight.device))
        if probe.device == self.weight.device and probe.dtype == self._dtype:
            return self
        self.scheme.check(probe.device, probe.dtype)
        factors = self._buffers.get("factors")
        self._dtype = probe.dtype
        if self.original is not None:
            self._fill(self.original, probe.device)
        else:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
            if factors is not None:  # the scales stay float32 in every dtype
                self.factors, self.levels = factors.to(probe.device), self.levels.to(torch.float32)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if self.original is None:
            raise ConfigurationError(
                f"{prefix.removesuffix('.')} is quantized and its original weights were not kept "
                f"(keep_originals=False), so there is nothing to save; save the model before quantizing it"
            )
        for name, parameter in self.original.named_parameters(recurse=False):
            # Casts leave the original as it is, with all its digits; what is saved has the dtype of the other layers.
            destination[prefix + name] = (parameter if keep_vars else parameter.detach()).to(self._dtype)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *arguments: Any) -> None:
        layer = self.original
        if layer is None:
            layer = nn.Linear(self.in_features, self.out_features, self._has_bias, self.weight.device, self._dtype)
        layer._load_from_state_dict(state_dict, prefix, *arguments)
        names = ("weight", "bias") if self._has_bias else ("weight",)
        if self.original is not None or all(prefix + name in state_dict for name in names):
            self._fill(layer, self.weight.device)
