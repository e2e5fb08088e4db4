"""Names of tensors in other programs <-> those of published folders, as invertible tables.

A row maps a module, or a tensor, of the other program to ours: to one, or to several whose tensors are the equal parts
of theirs along the first dimension. ``{}`` is a number.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from ...errors import WeightsMismatchError
from ..stored import listing

Row = tuple[str, tuple[str, ...]]


class Renamed(NamedTuple):
    """What a dict of tensors has become, and the names that no row of the table has."""

    tensors: dict[str, Tensor]
    unknown: list[str]


class Table:
    """Rows of names, read in both directions."""

    def __init__(self, rows: Iterable[Row]):
        self.rows = tuple(rows)

    @cached_property
    def _theirs(self) -> list[tuple[re.Pattern[str], Row]]:
        return [(_pattern(row[0]), row) for row in self.rows]

    @cached_property
    def _ours(self) -> list[tuple[re.Pattern[str], Row, int]]:
        return [(_pattern(name), row, place) for row in self.rows for place, name in enumerate(row[1])]

    def ours(self, name: str) -> tuple[str, ...]:
        """Our names for a tensor, or a module, of the other program; empty if the table lacks it."""
        for pattern, (_, ours) in self._theirs:
            if match := pattern.fullmatch(name):
                *numbers, suffix = match.groups()
                return tuple(each.format(*numbers) + suffix for each in ours)
        return ()

    def theirs(self, name: str) -> tuple[str, int, int] | None:
        """The other program's name for one of ours, which part of it ours is, and of how many."""
        for pattern, (theirs, ours), place in self._ours:
            if match := pattern.fullmatch(name):
                *numbers, suffix = match.groups()
                return theirs.format(*numbers) + suffix, place, len(ours)
        return None

    def split(self, tensors: Mapping[str, Tensor]) -> Renamed:
        """The other program's tensors under our names.

        Raises:
            WeightsMismatchError: the first dimension of a tensor cannot be divided.
        """
        found: dict[str, Tensor] = {}
        unknown = []
        for name, tensor in tensors.items():
            ours = self.ours(name)
            if not ours:
                unknown.append(name)
            elif len(ours) == 1:
                found[ours[0]] = tensor
            else:
                if tensor.ndim == 0 or tensor.shape[0] % len(ours):
                    raise WeightsMismatchError(
                        f"{listing([name])} of shape {list(tensor.shape)} holds {len(ours)} projections, and its first "
                        f"dimension is no multiple of {len(ours)}; the file is damaged, or of another model"
                    )
                found.update(zip(ours, tensor.chunk(len(ours)), strict=True))
        return Renamed(found, unknown)

    def join(self, tensors: Mapping[str, Tensor]) -> Renamed:
        """Our tensors under the other program's names: the inverse of ``split``.

        Raises:
            WeightsMismatchError: parts of a tensor are missing.
        """
        parts: dict[str, list[Tensor | None]] = {}
        unknown = []
        for name, tensor in tensors.items():
            place = self.theirs(name)
            if place is None:
                unknown.append(name)
                continue
            theirs, number, count = place
            parts.setdefault(theirs, [None] * count)[number] = tensor
        found = {}
        for name, pieces in parts.items():
            whole = [piece for piece in pieces if piece is not None]
            if len(whole) < len(pieces):
                raise WeightsMismatchError(
                    f"{listing([name])} is made of {len(pieces)} tensors ({', '.join(self.ours(name))}), and only "
                    f"{len(whole)} are there"
                )
            found[name] = whole[0] if len(whole) == 1 else torch.cat(whole)
        return Renamed(found, unknown)


def _pattern(template: str) -> re.Pattern[str]:
    return re.compile(re.escape(template).replace(r"\{\}", r"(\d{1,5})") + r"(|\.weight|\.bias)")


def _same(*names: str) -> list[Row]:
    return [(name, (name,)) for name in names]


_TIMES = "adaln_single.emb"
_BLOCK = "transformer_blocks.{}"

#: PixArt's original code. ComfyUI has the same names with a prefix.
PIXART = Table(
    [
        ("x_embedder.proj", ("pos_embed.proj",)),
        ("t_embedder.mlp.0", (f"{_TIMES}.timestep_embedder.linear_1",)),
        ("t_embedder.mlp.2", (f"{_TIMES}.timestep_embedder.linear_2",)),
        ("csize_embedder.mlp.0", (f"{_TIMES}.resolution_embedder.linear_1",)),
        ("csize_embedder.mlp.2", (f"{_TIMES}.resolution_embedder.linear_2",)),
        ("ar_embedder.mlp.0", (f"{_TIMES}.aspect_ratio_embedder.linear_1",)),
        ("ar_embedder.mlp.2", (f"{_TIMES}.aspect_ratio_embedder.linear_2",)),
        ("t_block.1", ("adaln_single.linear",)),
        ("y_embedder.y_proj.fc1", ("caption_projection.linear_1",)),
        ("y_embedder.y_proj.fc2", ("caption_projection.linear_2",)),
        ("blocks.{}.scale_shift_table", (f"{_BLOCK}.scale_shift_table",)),
        ("blocks.{}.attn.qkv", (f"{_BLOCK}.attn1.to_q", f"{_BLOCK}.attn1.to_k", f"{_BLOCK}.attn1.to_v")),
        ("blocks.{}.attn.q_norm", (f"{_BLOCK}.attn1.q_norm",)),
        ("blocks.{}.attn.k_norm", (f"{_BLOCK}.attn1.k_norm",)),
        ("blocks.{}.attn.sr", (f"{_BLOCK}.attn1.kv_compression.conv",)),
        ("blocks.{}.attn.norm", (f"{_BLOCK}.attn1.kv_compression.norm",)),
        ("blocks.{}.attn.proj", (f"{_BLOCK}.attn1.to_out.0",)),
        ("blocks.{}.cross_attn.q_linear", (f"{_BLOCK}.attn2.to_q",)),
        ("blocks.{}.cross_attn.kv_linear", (f"{_BLOCK}.attn2.to_k", f"{_BLOCK}.attn2.to_v")),
        ("blocks.{}.cross_attn.proj", (f"{_BLOCK}.attn2.to_out.0",)),
        ("blocks.{}.mlp.fc1", (f"{_BLOCK}.ff.net.0.proj",)),
        ("blocks.{}.mlp.fc2", (f"{_BLOCK}.ff.net.2",)),
        ("final_layer.linear", ("proj_out",)),
        ("final_layer.scale_shift_table", ("scale_shift_table",)),
    ]
)

#: What the original code stores in addition: the embedding of the empty caption, and a table of positions.
PIXART_EXTRAS = ("y_embedder.y_embedding", "pos_embed")

_RESNET = {name: name for name in ("norm1", "conv1", "norm2", "conv2")} | {"nin_shortcut": "conv_shortcut"}
_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}

#: The autoencoder of latent diffusion (Rombach et al.), but for the order of the decoder's levels.
LDM_AUTOENCODER = Table(
    [
        *_same("encoder.conv_in", "encoder.conv_out", "decoder.conv_in", "decoder.conv_out"),
        *_same("quant_conv", "post_quant_conv"),
        *((f"{side}.norm_out", (f"{side}.conv_norm_out",)) for side in ("encoder", "decoder")),
        ("encoder.down.{}.downsample.conv", ("encoder.down_blocks.{}.downsamplers.0.conv",)),
        ("decoder.up.{}.upsample.conv", ("decoder.up_blocks.{}.upsamplers.0.conv",)),
        *(
            (f"encoder.down.{{}}.block.{{}}.{a}", (f"encoder.down_blocks.{{}}.resnets.{{}}.{b}",))
            for a, b in _RESNET.items()
        ),
        *(
            (f"decoder.up.{{}}.block.{{}}.{a}", (f"decoder.up_blocks.{{}}.resnets.{{}}.{b}",))
            for a, b in _RESNET.items()
        ),
        *(
            (f"{side}.mid.block_{number + 1}.{a}", (f"{side}.mid_block.resnets.{number}.{b}",))
            for side in ("encoder", "decoder")
            for number in (0, 1)
            for a, b in _RESNET.items()
        ),
        *(
            (f"{side}.mid.attn_1.{a}", (f"{side}.mid_block.attentions.0.{b}",))
            for side in ("encoder", "decoder")
            for a, b in _ATTENTION.items()
        ),
    ]
)
#: Projections that latent diffusion stores as convolutions of one pixel.
_AS_CONVOLUTION = re.compile(r"(en|de)coder\.mid_block\.attentions\.0\.to_(q|k|v|out\.0)\.weight")


def split_autoencoder(tensors: Mapping[str, Tensor]) -> Renamed:
    """Latent diffusion's autoencoder under our names."""
    found, unknown = LDM_AUTOENCODER.split(_reversed(tensors, "decoder.up."))
    flat = {name: x.flatten(1) if _AS_CONVOLUTION.fullmatch(name) and x.ndim == 4 else x for name, x in found.items()}
    return Renamed(flat, unknown)


def join_autoencoder(tensors: Mapping[str, Tensor]) -> Renamed:
    """The inverse of ``split_autoencoder``."""
    wide = {name: x[..., None, None] if _AS_CONVOLUTION.fullmatch(name) else x for name, x in tensors.items()}
    found, unknown = LDM_AUTOENCODER.join(wide)
    return Renamed(_reversed(found, "decoder.up."), unknown)


def _reversed(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors with the numbers after a prefix in reverse order: latent diffusion counts levels from the image."""
    matches = {name: re.match(re.escape(prefix) + r"(\d{1,5})(?=\.)", name) for name in tensors}
    last = max((int(match[1]) for match in matches.values() if match), default=0)
    return {
        f"{prefix}{last - int(match[1])}{name[match.end() :]}" if (match := matches[name]) else name: tensor
        for name, tensor in tensors.items()
    }
