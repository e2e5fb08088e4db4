"""PixArt-α's first stage starts from an ImageNet model: a class-conditional DiT (2212.09748; PixArt-α, 2310.00426).

A block of DiT makes its modulation from the timestep and the class; PixArt's blocks share one, to which each adds its
own table. The tables are chosen so that the modulation of each block, and of the last layer, is that of DiT at one
timestep, for no class. The shared part is the mean of DiT's blocks (the paper leaves it open). Cross-attention adds
nothing at first. So at this timestep the new model computes exactly what DiT computes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...checkpoints.original.configs import count_of, pixart_config, tensor_of
from ...checkpoints.original.names import PIXART
from ...checkpoints.stored import listing
from ...checks import finite, whole_number
from ...errors import CheckpointError, WeightsMismatchError
from ...nn.embeddings import timestep_features

#: The timestep that the authors chose.
TIMESTEP = 500.0
#: Deviation of new embeddings of captions, as in the original.
_DEVIATION = 0.02
_IMAGENET = 1000


def start_from_dit(
    dit: Mapping[str, Tensor],
    *,
    timestep: float = TIMESTEP,
    null_class: bool | None = None,
    caption_channels: int = 4096,
    seed: int = 0,
    name: str = "",
    **given: Any,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config and tensors of a PixArt transformer that starts from a DiT.

    Args:
        dit: DiT's state dict.
        timestep: where both compute the same.
        null_class: whether the last class embedding is that of no class, with which DiT was trained for guidance;
            otherwise no class is an embedding of zero. By default, if there are 1001 (of ImageNet).
        caption_channels: of the text encoder.
        seed: of the new layers, which read the captions.
        name: of the file.
        given: values of the config, such as ``num_attention_heads``.

    Returns:
        Arguments of ``PixArtTransformer2DModel``, and its state dict in float32.

    Raises:
        CheckpointError: tensors are missing, unknown or misshapen.
    """
    finite("timestep", timestep, 0, 999)
    whole_number("caption_channels", caption_channels)
    tensors = {key: tensor.double() for key, tensor in dit.items()}
    whole_number("seed", seed, 0, 2**63 - 1)
    width = tensor_of(tensors, "t_embedder.mlp.2.bias", 1).shape[0]
    depth = count_of(tensors, "blocks")

    t = timestep_features(torch.tensor([timestep])).double()  # [1, 256]
    first, second = _linear(tensors, "t_embedder.mlp.0", width, 256), _linear(tensors, "t_embedder.mlp.2", width, width)
    t = F.linear(F.silu(F.linear(t, *first)), *second)[0]  # [D]
    c = t + _no_class(tensors, width, null_class)  # [D]

    made = [
        _linear(tensors, f"blocks.{i}.adaLN_modulation.1", 6 * width, width) for i in range(depth)
    ]  # L of [6 D, D] and [6 D]
    modulations = torch.stack([F.linear(F.silu(c), *each) for each in made])  # [L, 6 D]
    weight, bias = torch.stack([w for w, _ in made]).mean(dim=0), torch.stack([b for _, b in made]).mean(dim=0)
    shared = F.linear(F.silu(t), weight, bias)  # [6 D]
    last = F.linear(F.silu(c), *_linear(tensors, "final_layer.adaLN_modulation.1", 2 * width, width))  # [2 D]

    extras = {key: tensors[key] for key in ("pos_embed",) if key in tensors}
    dropped = (*extras, "y_embedder.embedding_table.weight")
    kept = {key: x for key, x in tensors.items() if key not in dropped and "adaLN_modulation" not in key}
    found, unknown = PIXART.split(kept)
    if unknown:
        raise CheckpointError(f"{name or 'the file'} has tensors that no DiT has: {listing(unknown)}")
    found |= {"adaln_single.linear.weight": weight, "adaln_single.linear.bias": bias}
    found["scale_shift_table"] = last.unflatten(0, (2, width)) - t
    for i in range(depth):
        found[f"transformer_blocks.{i}.scale_shift_table"] = (modulations[i] - shared).unflatten(0, (6, width))
    found |= _text_layers(width, depth, caption_channels, seed)
    return pixart_config(found, extras, name, given).config, {key: tensor.float() for key, tensor in found.items()}


def _text_layers(width: int, depth: int, caption_channels: int, seed: int) -> dict[str, Tensor]:
    """The layers that read captions, as they are in the original at the start: cross-attention adds zero."""
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, Tensor] = {}
    for layer, channels in (("linear_1", caption_channels), ("linear_2", width)):
        found[f"caption_projection.{layer}.weight"] = torch.randn(width, channels, generator=generator) * _DEVIATION
        found[f"caption_projection.{layer}.bias"] = torch.zeros(width)
    spans = {"to_q": (6 / (2 * width)) ** 0.5, "to_k": (6 / (3 * width)) ** 0.5, "to_v": (6 / (3 * width)) ** 0.5}
    for i in range(depth):
        path = f"transformer_blocks.{i}.attn2"
        for layer, span in spans.items():  # Glorot and Bengio 2010; k and v are one layer in the original
            uniform = torch.rand(width, width, generator=generator) * 2 - 1
            found |= {f"{path}.{layer}.weight": span * uniform, f"{path}.{layer}.bias": torch.zeros(width)}
        found |= {f"{path}.to_out.0.weight": torch.zeros(width, width), f"{path}.to_out.0.bias": torch.zeros(width)}
    return found


def _no_class(tensors: Mapping[str, Tensor], width: int, null_class: bool | None) -> Tensor:
    """The embedding [D] of no class."""
    table = tensor_of(tensors, "y_embedder.embedding_table.weight", 2)
    if table.shape[1] != width:
        raise WeightsMismatchError(f"the class embeddings have shape {list(table.shape)}; expected [classes, {width}]")
    trained = table.shape[0] == _IMAGENET + 1 if null_class is None else null_class
    return table[-1] if trained else torch.zeros_like(table[0])


def _linear(tensors: Mapping[str, Tensor], name: str, out: int, inner: int) -> tuple[Tensor, Tensor]:
    weight, bias = tensor_of(tensors, f"{name}.weight", 2), tensor_of(tensors, f"{name}.bias", 1)
    if weight.shape != (out, inner) or bias.shape != (out,):
        raise WeightsMismatchError(f"{name} has a weight of shape {list(weight.shape)}; expected {[out, inner]}")
    return weight, bias
