"""The quantization configs of diffusers and transformers, read by their attributes: what ``quantize`` makes of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ..checks import shown
from ..errors import InputError
from .quantize import Method, quantize

#: Names of torchao's formats, of its config classes without "Config" and underscores, in lower case -> our method.
_TORCHAO: dict[str, Method] = {
    "int8wo": "int8-weight-only",
    "int8weightonly": "int8-weight-only",
    "int8dq": "int8-dynamic",
    "int8dynamicactivationint8weight": "int8-dynamic",
    "float8dq": "fp8",
    "float8dqrow": "fp8",
    "float8dqe4m3": "fp8",
    "float8dqe4m3row": "fp8",
    "float8dynamicactivationfloat8weight": "fp8",
}


def quantize_as(config: Any, module: nn.Module) -> None:
    """Quantize a module as a ``BitsAndBytesConfig``, ``TorchAoConfig`` or ``QuantoConfig`` asks.

    - bitsandbytes in 4 bits: ``"nf4"``, for ``fp4`` too, which takes as much memory and is less exact.
    - bitsandbytes in 8 bits, quanto's int8, torchao's ``int8wo``: ``"int8-weight-only"``.
    - torchao's ``int8dq``: ``"int8-dynamic"``; its ``float8dq``: ``"fp8"``.

    Products are computed in the dtype of the activations, and scales are not quantized again, whatever the config says
    of these. The original weights are kept in host memory, so that saving writes them.

    Raises:
        InputError: another config, or one of a format that ``quantize`` does not have.
        ConfigurationError, ResourceError, MissingDependencyError: as ``quantize``.
    """
    quantize(module, method_of(config), skip=_skipped(config))


def configs_of(config: Any, models: Mapping[str, bool]) -> Mapping[str, Any]:
    """The quantization config of each component of a pipeline that has one.

    Args:
        config: a dict of configs by component, or a ``PipelineQuantizationConfig``. One of these for no component in
            particular is for all models but the autoencoder, which is small and sensitive.
        models: the components with weights that will be loaded, and whether they are ours.

    Raises:
        InputError: another config, or one for a component that is not loaded.
    """
    mapping = config if isinstance(config, Mapping) else getattr(config, "quant_mapping", None)
    if mapping is None and not hasattr(config, "quant_backend"):
        raise InputError(
            f"quantization_config of a pipeline is a PipelineQuantizationConfig, or a dict of configs by component, as "
            f"in {{'transformer': config}}, not a {type(config).__name__}"
        )
    chosen = mapping or getattr(config, "components_to_quantize", None) or [name for name in models if name != "vae"]
    wrong = [name for name in chosen if name not in models]
    if wrong:
        raise InputError(
            f"quantization_config is for {shown(wrong[0])}, which is not loaded or has no weights; use "
            f"{', '.join(models) or 'none'}"
        )
    if mapping:
        return dict(mapping)
    return {name: config._resolve_quant_config(is_diffusers=models[name], module_name=name) for name in chosen}


def method_of(config: Any) -> Method:
    """The method of ``quantize`` that a config asks for.

    Raises:
        InputError: there is none.
    """
    name = type(config).__name__
    asked = name
    if name == "BitsAndBytesConfig":
        if getattr(config, "load_in_4bit", False):
            return "nf4"
        if getattr(config, "load_in_8bit", False):
            return "int8-weight-only"
        asked = "BitsAndBytesConfig with neither load_in_4bit nor load_in_8bit"
    elif name == "TorchAoConfig":
        kind = getattr(config, "quant_type", None)
        word = kind if isinstance(kind, str) else type(kind).__name__.removesuffix("Config")
        if (key := word.lower().replace("_", "")) in _TORCHAO:
            return _TORCHAO[key]
        asked = f"TorchAoConfig({shown(word)})"
    elif name == "QuantoConfig":
        bits = getattr(config, "weights_dtype", getattr(config, "weights", None))
        if bits == "int8":
            return "int8-weight-only"
        asked = f"QuantoConfig({shown(bits)})"
    raise InputError(
        f"quantization_config asks for {asked}, which has no counterpart here. There are int8 and 4 bits of "
        f"BitsAndBytesConfig, and TorchAoConfig of int8wo, int8dq or float8dq; or load the model without it and call "
        f"impasto.quantize(model, 'nf4')"
    )


def _skipped(config: Any) -> Sequence[str]:
    named = ("llm_int8_skip_modules", "modules_to_not_convert")
    found = [value for name in named if (value := getattr(config, name, None))]
    return [name for value in found for name in ([value] if isinstance(value, str) else value)]
