"""The known keys of configs of transformers' models and processors, with types and ranges.

Keys that are not listed here are ignored at every level, so a checkpoint cannot choose code, files or kernels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from ...checks import printable, shown
from ...errors import CheckpointError, ConfigurationError
from ..config import read_json
from ..values import Bounds, Count, Epsilon, Patch, Share, Tokens, check

#: Key -> the type of its value, or the table of a nested object.
Table = Mapping[str, Any]

Layers = Annotated[int, Bounds(1, 1000)]
Width = Annotated[int, Bounds(1, 2**20)]
TokenId = Annotated[int, Bounds(0, 2**24)]
TokenIds = TokenId | Sequence[TokenId] | None
Activation = Literal["relu", "gelu", "gelu_new", "gelu_pytorch_tanh", "silu"]
Dtype = Literal["float32", "float16", "bfloat16", "float64"]
Colors = Annotated[Sequence[Annotated[float, Bounds(-10, 10)]], Bounds(3, 3)]
Spreads = Annotated[Sequence[Annotated[float, Bounds(1e-3, 10)]], Bounds(3, 3)]
Pixels = Annotated[int, Bounds(1, 2**24)]
#: Patches per token, in space or time.
Merge = Annotated[int, Bounds(1, 8)]

T5: Table = {
    "vocab_size": Tokens,
    "d_model": Count,
    "d_kv": Count,
    "d_ff": Width,
    "num_layers": Layers,
    "num_decoder_layers": Annotated[int, Bounds(0, 1000)] | None,
    "num_heads": Count,
    "relative_attention_num_buckets": Annotated[int, Bounds(4, 65_536)],
    "relative_attention_max_distance": Annotated[int, Bounds(2, 2**24)],
    "dropout_rate": Share,
    "layer_norm_epsilon": Epsilon,
    "initializer_factor": Annotated[float, Bounds(0, 1e3)],
    "feed_forward_proj": Literal[
        "relu", "gelu", "gelu_new", "silu", "gated-relu", "gated-gelu", "gated-gelu_new", "gated-silu"
    ],
    "tie_word_embeddings": bool,
    "scale_decoder_outputs": bool,
    "pad_token_id": TokenId | None,
    "eos_token_id": TokenIds,
}

_ROPE: Table = {
    "rope_type": Literal["default"],
    "type": Literal["default"],
    "rope_theta": Annotated[float, Bounds(1, 1e12)],
    "partial_rotary_factor": Share,
    "mrope_section": Annotated[Sequence[Annotated[int, Bounds(0, 65_536)]], Bounds(3, 3)],
}
GLM_IMAGE: Table = {
    "text_config": {
        "vocab_size": Tokens,
        "vision_vocab_size": Tokens,
        "hidden_size": Count,
        "intermediate_size": Width,
        "num_hidden_layers": Layers,
        "num_attention_heads": Count,
        "num_key_value_heads": Count | None,
        "hidden_act": Activation,
        "max_position_embeddings": Tokens,
        "initializer_range": Share,
        "rms_norm_eps": Epsilon,
        "attention_dropout": Share,
        "attention_bias": bool,
        "rope_parameters": _ROPE,
        "rope_scaling": _ROPE,  # the same in transformers 4, in addition to the next two
        "rope_theta": _ROPE["rope_theta"],
        "partial_rotary_factor": Share,
        "pad_token_id": TokenId | None,
        "eos_token_id": TokenIds,
    },
    "vision_config": {
        "depth": Layers,
        "hidden_size": Count,
        "hidden_act": Activation,
        "attention_bias": bool,
        "attention_dropout": Share,
        "num_heads": Count,
        "in_channels": Count,
        "image_size": Count,
        "patch_size": Patch,
        "spatial_merge_size": Merge,
        "intermediate_size": Width,
        "initializer_range": Share,
        "layer_norm_eps": Epsilon,
    },
    "vq_config": {
        "embed_dim": Count,
        "num_embeddings": Tokens,
        "latent_channels": Count,
        "in_channels": Count,
        "initializer_range": Share,
    },
    "image_token_id": TokenId,
    "image_start_token_id": TokenId,
    "image_end_token_id": TokenId,
    "tie_word_embeddings": bool,
}

GENERATION: Table = {
    "temperature": Annotated[float, Bounds(1e-4, 1e4)] | None,
    "top_k": Annotated[int, Bounds(0, 2**24)] | None,
    "top_p": Annotated[float, Bounds(0, 1, above=0)] | None,
    "do_sample": bool | None,
    "max_new_tokens": Tokens | None,
    "max_length": Tokens | None,
    "bos_token_id": TokenId | None,
    "pad_token_id": TokenId | None,
    "eos_token_id": TokenIds,
}

IMAGES: Table = {
    "do_resize": bool | None,
    "do_rescale": bool | None,
    "do_normalize": bool | None,
    "do_convert_rgb": bool | None,
    "resample": Annotated[int, Bounds(0, 5)] | None,
    "rescale_factor": Annotated[float, Bounds(1e-6, 1)] | None,
    "image_mean": Colors | None,
    "image_std": Spreads | None,
    "patch_size": Patch,
    "temporal_patch_size": Merge,
    "merge_size": Merge,
    "min_pixels": Pixels | None,
    "max_pixels": Pixels | None,
    "size": {"shortest_edge": Pixels, "longest_edge": Pixels},
}

_BITSANDBYTES: Table = {
    "load_in_8bit": bool,
    "load_in_4bit": bool,
    "llm_int8_threshold": Annotated[float, Bounds(0, 1e6)],
    "llm_int8_skip_modules": Sequence[str] | None,
    "llm_int8_enable_fp32_cpu_offload": bool,
    "llm_int8_has_fp16_weight": bool,
    "bnb_4bit_compute_dtype": Dtype | None,
    "bnb_4bit_quant_type": Literal["fp4", "nf4"],
    "bnb_4bit_use_double_quant": bool,
    "bnb_4bit_quant_storage": Literal["float16", "float32", "int8", "uint8", "float64", "bfloat16"] | None,
}
_TORCHAO: Table = {
    "quant_type": {
        "default": {
            "_type": Literal[
                "Int8WeightOnlyConfig",
                "Int4WeightOnlyConfig",
                "IntxWeightOnlyConfig",
                "Float8WeightOnlyConfig",
                "Int8DynamicActivationInt8WeightConfig",
                "Float8DynamicActivationFloat8WeightConfig",
            ],
            "_version": Annotated[int, Bounds(0, 100)],
            "_data": object,
        }
    },
    "modules_to_not_convert": Sequence[str] | None,
    "include_input_output_embeddings": bool,
    "untie_embedding_weights": bool,
}
#: The classes allowed in settings of torchao.
_TORCHAO_TYPES = (
    "torch.dtype",
    "PerTensor",
    "PerRow",
    "PerAxis",
    "PerGroup",
    "PerToken",
    "MappingType",
    "ZeroPointDomain",
    "KernelPreference",
    "Float8MMConfig",
    "Int4PackingFormat",
    "Float8PackingFormat",
    "Int4ChooseQParamsAlgorithm",
    "Int8PackingFormat",
    "IntxPackingFormat",
    "IntxChooseQParamsAlgorithm",
)
_QUANTIZATIONS: Mapping[str, Table] = {"bitsandbytes": _BITSANDBYTES, "torchao": _TORCHAO}


def read_values(path: Path, table: Table) -> dict[str, Any]:
    """The known values of a JSON file.

    Raises:
        ConfigurationError: a value is of another type or out of its range; the message names the file and the key.
        CheckpointError: not a JSON file.
    """
    return known_values(f"{path}: ", read_json(path), table)


def known_values(where: str, content: Mapping[str, Any], table: Table) -> dict[str, Any]:
    """The known values of an object, checked. In messages, ``where`` precedes the name of a key."""
    found = {}
    for key in table.keys() & content.keys():
        hint, value = table[key], content[key]
        if not isinstance(hint, Mapping):
            found[key] = check(f"{where}{key}", value, hint)
        elif value is not None:
            if not isinstance(value, Mapping):
                raise ConfigurationError(f"{where}{key} must be a JSON object, not {shown(value)}")
            found[key] = known_values(f"{where}{key}.", value, hint)
    return found


def read_image_settings(where: str, content: Mapping[str, Any]) -> dict[str, Any]:
    """How a processor prepares images. In messages, ``where`` precedes the name of a key.

    Raises:
        ConfigurationError: a value has the wrong type or range, or the smallest size is above the largest.
    """
    values = known_values(where, content, IMAGES)
    found = {key: value for key, value in values.items() if value not in (None, {})}
    size = found.get("size", {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280})
    edges = []
    for key, name in (("shortest_edge", "min_pixels"), ("longest_edge", "max_pixels")):
        if name not in found and key not in size:
            raise ConfigurationError(f"{where}size must have a shortest_edge and a longest_edge, not {shown(size)}")
        edges.append(found.get(name, size.get(key)))
    if edges[0] > edges[1]:
        raise ConfigurationError(
            f"{where}the smallest size (min_pixels, or size.shortest_edge) must not be above the largest (max_pixels, "
            f"or size.longest_edge), but they are {edges[0]} and {edges[1]}"
        )
    return found


def read_model_config(path: Path, table: Table, model_types: Sequence[str]) -> dict[str, Any]:
    """The arguments of a transformers config: known values, the dtype and the quantization.

    Raises:
        ConfigurationError: a value has the wrong type or range, or contradicts another.
        CheckpointError: not a JSON file, the config of another model, or an unknown quantization.
    """
    content = read_json(path)
    model_type = content.get("model_type", model_types[0])
    if model_type not in model_types:
        raise CheckpointError(
            f"{path} is the config of another model: model_type must be {' or '.join(model_types)}, "
            f"not {shown(model_type)}"
        )
    values = known_values(f"{path}: ", content, table)
    if values.get("text_config", {}).get("pad_token_id", 0) is None:  # transformers represents None by a missing value
        del values["text_config"]["pad_token_id"]
    dtype = check(f"{path}: dtype", content.get("dtype", content.get("torch_dtype")), Dtype | None)
    _check_relations(path, values)
    quantization = _quantization(path, content)
    return {**values, "dtype": dtype, **({"quantization_config": quantization} if quantization else {})}


def _check_relations(path: Path, values: Mapping[str, Any]) -> None:
    buckets = values.get("relative_attention_num_buckets", 32)
    distance = values.get("relative_attention_max_distance", 128)
    if distance <= buckets // 4:  # half of the buckets of a direction hold one position each
        raise ConfigurationError(
            f"{path}: relative_attention_max_distance must be above {buckets // 4}, a quarter of "
            f"relative_attention_num_buckets, not {distance}"
        )
    for name, whole, divisor in (
        ("text_config", "hidden_size", "num_attention_heads"),
        ("text_config", "num_attention_heads", "num_key_value_heads"),
        ("vision_config", "hidden_size", "num_heads"),
    ):
        section = values.get(name, {})
        total, count = section.get(whole), section.get(divisor)
        if total and count and total % count:
            raise ConfigurationError(
                f"{path}: {name}.{divisor} must divide {whole}, but {count} does not divide {total}"
            )
    text = values.get("text_config", {})
    rope = text.get("rope_parameters", {})
    has_heads = text.keys() >= {"hidden_size", "num_attention_heads"}
    if has_heads and rope.keys() >= {"mrope_section", "partial_rotary_factor"}:
        channels = text["hidden_size"] // text["num_attention_heads"]
        turned = math.floor(channels * rope["partial_rotary_factor"]) // 2
        if sum(rope["mrope_section"]) != turned:
            raise ConfigurationError(
                f"{path}: text_config.rope_parameters.mrope_section must sum to {turned}, half of the rotated channels "
                f"of a head, not {shown(rope['mrope_section'])}"
            )


def _quantization(path: Path, content: Mapping[str, Any]) -> dict[str, Any] | None:
    """How the weights are quantized; None if they are not."""
    given = content.get("quantization_config")
    if given is None:
        return None
    if not isinstance(given, Mapping):
        raise ConfigurationError(f"{path}: quantization_config must be a JSON object, not {shown(given)}")
    method = given.get("quant_method")
    if not isinstance(method, str) or method not in _QUANTIZATIONS:
        raise CheckpointError(
            f"{path}: quantization_config has the unknown quant_method {shown(method)}; known are "
            f"{', '.join(_QUANTIZATIONS)}. Load an unquantized checkpoint and call impasto.quantize"
        )
    values = known_values(f"{path}: quantization_config.", given, _QUANTIZATIONS[method])
    data = values.get("quant_type", {}).get("default", {}).get("_data")
    _require_plain(f"{path}: quantization_config.quant_type.default._data", data)
    return {"quant_method": method, **values}


def _require_plain(where: str, value: Any, depth: int = 0) -> None:
    """Raise unless it consists of numbers, strings, booleans and null, slightly nested, and of known classes: torchao
    calls the classes that are named."""
    if isinstance(value, Mapping) and depth < 4 and len(value) <= 100:
        if value.get("_type", "torch.dtype") not in _TORCHAO_TYPES:
            raise CheckpointError(
                f"{where}: _type must be one of {', '.join(_TORCHAO_TYPES)}, not {shown(value['_type'])}"
            )
        for key, item in value.items():
            _require_plain(f"{where}.{printable(key)}", item, depth + 1)
    elif value is not None and not isinstance(value, bool | int | float | str):
        raise ConfigurationError(f"{where} must be a number, a string, true, false or null, not {shown(value)}")
