"""The config of a component, from the shapes of its tensors; what these do not say comes from names or is assumed."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from ...errors import InputError, WeightsMismatchError

#: Width -> number of heads, of DiT's sizes S, B, L and XL.
_HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}
_HEAD_CHANNELS = 72
_GLM_HEAD_CHANNELS = 128
_SIDES = re.compile(r"(?<!\d)(256|512|768|1024|2048|2880|4096)(?!\d)|(?<![0-9a-z])2k(?![0-9a-z])")
#: Of the autoencoders of Stable Diffusion and of SDXL, which have the same shapes.
_SD_SCALE, _SDXL_SCALE = 0.18215, 0.13025
_NULL_CAPTION, _POSITIONS = "y_embedder.y_embedding", "pos_embed"


class Guess(NamedTuple):
    """A config, and sentences about what in it was not read from the tensors."""

    config: dict[str, Any]
    assumed: list[str]


Tensors = Mapping[str, Tensor]


def pixart_config(tensors: Tensors, extras: Tensors, name: str, given: Mapping[str, Any]) -> Guess:
    """The config of a PixArt transformer.

    Args:
        tensors: under our names.
        extras: what else the original format stores, ``PIXART_EXTRAS``.
        name: of the file: published ones say the family and the size of the images.
        given: values that are known.
    """
    patch_weight = tensor_of(tensors, "pos_embed.proj.weight", 4)  # [D, C, p, p]
    width, channels, patch, _ = patch_weight.shape
    text = _channels(tensors, "caption_projection.linear_1.weight")
    cross = _channels(tensors, "transformer_blocks.0.attn2.to_k.weight")
    conv = [n for n in tensors if re.fullmatch(r"transformer_blocks\.\d+\.attn1\.kv_compression\.conv\.weight", n)]
    micro = "adaln_single.emb.resolution_embedder.linear_1.weight" in tensors
    assumed: list[str] = []
    config: dict[str, Any] = {
        **_heads(width, given),
        "in_channels": channels,
        "out_channels": tensor_of(tensors, "proj_out.weight", 2).shape[0] // patch**2,
        "num_layers": count_of(tensors, "transformer_blocks"),
        "cross_attention_dim": cross,
        "attention_bias": "transformer_blocks.0.attn1.to_q.bias" in tensors,
        "patch_size": patch,
        "use_additional_conditions": micro,
        "caption_channels": text,
        **_positions(extras, patch, micro, name, given, assumed),
    }
    if "transformer_blocks.0.attn1.q_norm.weight" in tensors:
        config["qk_norm"] = True
    if conv:
        config["kv_compression"] = "conv"
        config["kv_compression_factor"] = tensor_of(tensors, conv[0], 4).shape[-1]  # [D, 1, R, R]
        config["kv_compression_layers"] = sorted(int(each.split(".")[1]) for each in conv)
    # Early configs lack the key, and the class's rule for None is wrong for Σ at 1024: the tensors decide.
    settled = {key: value for key, value in given.items() if (key, value) != ("use_additional_conditions", None)}
    return Guess({**config, **settled}, assumed)


def _positions(
    extras: Tensors, patch: int, micro: bool, name: str, given: Mapping[str, Any], assumed: list[str]
) -> dict[str, Any]:
    """``sample_size`` and ``interpolation_scale``: of the stored positions, else of the file's name, else assumed."""
    table = extras.get(_POSITIONS)
    side, scale = (0, 0.0) if table is None else _of_table(table)
    size = given.get("sample_size") or side * patch
    if not size:
        size, origin = _size_of_name(name)
        if not size:
            size, origin = (128, "its micro-conditions") if micro else (64, "nothing that the file says")
        assumed.append(f"sample_size {size} (images of {8 * size} px) is a guess from {origin}")
    if given.get("interpolation_scale"):
        return {"sample_size": size, "interpolation_scale": given["interpolation_scale"]}
    if not scale or size != side * patch:
        scale = size / 64 if size > 128 or _is_sigma(extras, micro, name) else max(size // 64, 1)
        assumed.append(f"interpolation_scale {scale:g} is that of the published models of this size")
    return {"sample_size": size, "interpolation_scale": int(scale) if scale == int(scale) else scale}


def _of_table(table: Tensor) -> tuple[int, float]:
    """The side of the grid of a table of positions [1, N, D], and its interpolation; zeros if it is none.

    The second token is in column 1, at the position 1 / scale, whose sine and cosine come first in each half.
    """
    side = math.isqrt(table.shape[-2]) if table.ndim >= 2 else 0
    if side < 2 or side**2 != table.shape[-2] or table.shape[-1] % 4 or not table.numel():
        return 0, 0.0
    second = table.reshape(-1, table.shape[-1])[1].double()
    position = math.atan2(float(second[0]), float(second[table.shape[-1] // 4])) % (2 * math.pi)
    scale = round(8 / position) / 8 if position > 0.05 else 0.0
    return side, scale if scale and abs(scale * position - 1) < 0.02 else 0.0


def _size_of_name(name: str) -> tuple[int, str]:
    match = _SIDES.search(name.lower())
    return (0, "") if match is None else (int(match[1] or 2048) // 8, "its name")


def _is_sigma(extras: Tensors, micro: bool, name: str) -> bool:
    """Whether a model is of Σ: its captions have 300 tokens, it has no micro-conditions."""
    caption = extras.get(_NULL_CAPTION)
    if micro or caption is None or caption.ndim < 2:
        return not micro and "sigma" in name.lower()
    return caption.shape[-2] > 120


def glm_image_config(tensors: Tensors, given: Mapping[str, Any]) -> Guess:
    """The config of a GLM-Image transformer."""
    patch = given.get("patch_size", 2)
    patches = tensor_of(tensors, "image_projector.proj.weight", 2)  # [D, C p p]
    width = patches.shape[0]
    times = tensor_of(tensors, "time_condition_embed.timestep_embedder.linear_1.weight", 2)
    heads = given.get("num_attention_heads")
    head = width // heads if heads else given.get("attention_head_dim", _GLM_HEAD_CHANNELS)
    if not head or width % head:
        raise InputError(
            f"the number of heads of a width of {width} is not stored; give num_attention_heads=... (--heads of "
            f"impasto convert)"
        )
    config = {
        "patch_size": patch,
        "in_channels": patches.shape[1] // patch**2,
        "out_channels": tensor_of(tensors, "proj_out.weight", 2).shape[0] // patch**2,
        "num_layers": count_of(tensors, "transformer_blocks"),
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "text_embed_dim": tensor_of(tensors, "glyph_projector.net.0.proj.weight", 2).shape[1],
        "time_embed_dim": times.shape[0],
        "condition_dim": tensor_of(tensors, "time_condition_embed.condition_embedder.linear_1.weight", 2).shape[1] // 4,
        "prior_vq_quantizer_codebook_size": tensor_of(tensors, "prior_token_embedding.weight", 2).shape[0],
    }
    return Guess({**config, **given}, [])


def autoencoder_config(tensors: Tensors, name: str, given: Mapping[str, Any]) -> Guess:
    """The config of an autoencoder, from tensors under our names."""
    levels = count_of(tensors, "encoder.down_blocks")
    widths = [tensor_of(tensors, f"encoder.down_blocks.{i}.resnets.0.conv1.weight", 4).shape[0] for i in range(levels)]
    latents = tensor_of(tensors, "decoder.conv_in.weight", 4).shape[1]
    config: dict[str, Any] = {
        "in_channels": tensor_of(tensors, "encoder.conv_in.weight", 4).shape[1],
        "out_channels": tensor_of(tensors, "decoder.conv_out.weight", 4).shape[0],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "block_out_channels": widths,
        "layers_per_block": count_of(tensors, "encoder.down_blocks.0.resnets"),
        "latent_channels": latents,
        "sample_size": 512,
        "use_quant_conv": "quant_conv.weight" in tensors,
        "use_post_quant_conv": "post_quant_conv.weight" in tensors,
        "mid_block_add_attention": any(".mid_block.attentions." in each for each in tensors),
    }
    assumed = []
    if "scaling_factor" not in given and "latents_std" not in given:
        scale, origin = (_SDXL_SCALE, "SDXL and PixArt-Σ") if "xl" in name.lower() else (_SD_SCALE, "SD and PixArt-α")
        config["scaling_factor"] = scale
        assumed.append(f"scaling_factor {scale} is that of {origin}, a guess from the file's name")
    return Guess({**config, **given}, assumed)


def _heads(width: int, given: Mapping[str, Any]) -> dict[str, int]:
    heads, channels = given.get("num_attention_heads"), given.get("attention_head_dim")
    if not heads and not channels:
        heads = _HEADS.get(width) or (width // _HEAD_CHANNELS if width % _HEAD_CHANNELS == 0 else None)
    heads = heads or (width // channels if channels else 0)
    if not heads or width % heads:
        raise InputError(
            f"the number of heads is not stored, and a width of {width} is none of the known ones or cannot be divided "
            f"by it; give num_attention_heads=... (--heads of impasto convert)"
        )
    return {"num_attention_heads": heads, "attention_head_dim": width // heads}


def _channels(tensors: Tensors, name: str) -> int | None:
    """The inputs of a linear layer; None if there is none of this name."""
    return tensor_of(tensors, name, 2).shape[1] if name in tensors else None


def tensor_of(tensors: Tensors, name: str, ndim: int) -> Tensor:
    """The tensor of this name.

    Raises:
        WeightsMismatchError: there is none, it is empty, or it has another number of dimensions.
    """
    if name not in tensors:
        raise WeightsMismatchError(f"the file lacks {name}; it is incomplete, or of another model")
    if tensors[name].ndim != ndim or 0 in tensors[name].shape:
        raise WeightsMismatchError(f"{name} has shape {list(tensors[name].shape)}; expected {ndim} dimensions")
    return tensors[name]


def count_of(tensors: Tensors, path: str) -> int:
    """How many members a list has."""
    return len({name.removeprefix(f"{path}.").split(".")[0] for name in tensors if name.startswith(f"{path}.")})
