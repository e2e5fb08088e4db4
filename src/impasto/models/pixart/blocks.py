"""The layers of PixArt's denoiser, from the outside in: patches, modulation, the block and its attention.

Shapes: B images, C channels, H x W latent pixels, N image tokens, M text tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import ConfigurationError, InputError
from ...nn.attention import attention, attention_by_image
from ...nn.backends.onednn import linear
from ...nn.changes import dtype_of
from ...nn.embeddings import sincos_2d, timestep_features
from ...nn.fused_linear import project
from ...nn.layers import FeedForward, PatchConvolution, TwoLayerMLP, gated, modulated_norm, modulation_table
from ...nn.tokens import Layout
from ..compat.attention_processor import ProcessedAttention
from .kv_compression import Grid, KVCompression
from .text import LayerText, Modulation, attend_text, encode_layer


class PatchEmbed(nn.Module):
    """A token for each patch of the latents, at its position on a grid of any size; keys ``proj.*``."""

    def __init__(self, in_channels: int, width: int, patch_size: int, base_size: int, interpolation_scale: float):
        super().__init__()
        self.patch_size, self.base_size, self.interpolation_scale = patch_size, base_size, interpolation_scale
        self.proj = PatchConvolution(in_channels, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, latents: Tensor) -> Tensor:
        patches: Tensor = self.proj(latents)  # [B, D, H / p, W / p]
        width, rows, columns = patches.shape[1:]
        scale = self.interpolation_scale
        positions = sincos_2d(width, rows, columns, self.base_size, scale, patches.device)  # [N, D]
        tokens = patches.flatten(2).transpose(1, 2).contiguous()  # [B, N, D]; every layer would copy it otherwise
        return tokens + positions.to(tokens.dtype)


class AdaLayerNormSingle(nn.Module):
    """The modulation that all blocks share (PixArt-α, 2.3)."""

    def __init__(self, width: int, use_additional_conditions: bool):
        super().__init__()
        self.emb = TimestepAndSizeEmbedder(width, use_additional_conditions)
        self.linear = nn.Linear(width, 6 * width)

    def forward(self, timestep: Tensor, conditions: Mapping[str, Tensor | None]) -> Modulation:
        embedded = self.emb(timestep, conditions, dtype_of(self.linear))  # [B, D]
        shared = self.linear(F.silu(embedded))  # [B, 6 * D]
        return Modulation(shared=torch.unflatten(shared, -1, (6, -1)), timestep=embedded[:, None])


class TimestepAndSizeEmbedder(nn.Module):
    """Timestep features, and for α at 1024 px those of resolution and aspect ratio, added to them."""

    def __init__(self, width: int, use_additional_conditions: bool):
        super().__init__()
        self.timestep_embedder = TwoLayerMLP(256, width)
        self.use_additional_conditions = use_additional_conditions
        if use_additional_conditions:
            self.resolution_embedder = TwoLayerMLP(256, width // 3)
            self.aspect_ratio_embedder = TwoLayerMLP(256, width // 3)

    def forward(self, timestep: Tensor, conditions: Mapping[str, Tensor | None], dtype: torch.dtype) -> Tensor:
        embedded: Tensor = self.timestep_embedder(timestep_features(timestep).to(dtype))  # [B, D]
        if not self.use_additional_conditions:
            return embedded
        resolution, aspect_ratio = conditions.get("resolution"), conditions.get("aspect_ratio")
        if resolution is None or aspect_ratio is None:
            raise InputError(
                "this model takes micro-conditions: give added_cond_kwargs={'resolution': [B, 2] (height and "
                "width in pixels), 'aspect_ratio': [B, 1] (height / width)}"
            )
        rows, batch = resolution.shape[0], embedded.shape[0]
        fits = rows == batch or 1 in (rows, batch)  # one timestep or one size may be for all
        if tuple(resolution.shape) != (rows, 2) or aspect_ratio.numel() != rows or not fits:
            raise InputError(
                f"added_cond_kwargs: resolution has shape {list(resolution.shape)} and aspect_ratio "
                f"{list(aspect_ratio.shape)}; expected [{batch}, 2] and [{batch}, 1]"
            )
        parts = [
            self.resolution_embedder(timestep_features(resolution[:, 0]).to(dtype)),  # [B, D / 3]
            self.resolution_embedder(timestep_features(resolution[:, 1]).to(dtype)),  # [B, D / 3]
            self.aspect_ratio_embedder(timestep_features(aspect_ratio.flatten()).to(dtype)),  # [B, D / 3]
        ]
        return embedded + torch.cat(parts, dim=-1)  # [B, D]


class PixArtBlock(nn.Module):
    """Self-attention, cross-attention, feed-forward; the first and the last are modulated by the timestep."""

    def __init__(
        self,
        width: int,
        heads: int,
        cross_attention_dim: int | None,
        *,
        attention_bias: bool,
        activation_fn: str,
        dropout: float,
        norm_elementwise_affine: bool,
        norm_eps: float,
        upcast_attention: bool,
        qk_norm: bool = False,
        kv_compression: KVCompression | None = None,
    ):
        super().__init__()
        self.scale_shift_table = modulation_table(6, width)
        self.norm1 = nn.LayerNorm(width, eps=norm_eps, elementwise_affine=norm_elementwise_affine)
        self.attn1 = Attention(width, None, heads, attention_bias, dropout, upcast_attention, qk_norm, kv_compression)
        self.attn2 = (
            None
            if cross_attention_dim is None
            else Attention(width, cross_attention_dim, heads, attention_bias, dropout, upcast_attention)
        )
        self.norm2 = nn.LayerNorm(width, eps=norm_eps, elementwise_affine=norm_elementwise_affine)
        self.ff = FeedForward(width, activation_fn, dropout)

    def encode_text(self, rows: Sequence[Tensor], biases: Sequence[Tensor | None], separate: bool = False) -> LayerText:
        """The projected texts [M, D] of B images with their biases [M] in this layer; see ``encode_layer``."""
        return encode_layer(self.attn2, rows, biases, separate)

    def forward(
        self,
        x: Tensor,  # [B, N, D], or [T, D] with a layout
        shared: Tensor,  # [B or 1, 6, D]
        text: LayerText,
        bias: Tensor | None = None,  # [B, 1, N], of self-attention
        layout: Layout | None = None,
        grids: Sequence[Grid] | None = None,  # of the images, or of all; only where keys and values are compressed
    ) -> Tensor:
        modulation = self.scale_shift_table[None] + shared  # [B, 6, D]
        shift_attn, scale_attn, gate_attn, shift_ff, scale_ff, gate_ff = modulation.chunk(6, dim=1)  # [B, 1, D] each

        normed = modulated_norm(self.norm1, x, shift_attn, scale_attn, layout)
        more = () if grids is None else (grids,)
        x = gated(x, gate_attn, self.attn1(normed, None, bias if layout is None else layout, *more), layout)
        x = attend_text(self.attn2, x, text, layout)  # not normalized: the original model has no layer norm here
        normed = modulated_norm(self.norm2, x, shift_ff, scale_ff, layout)
        return gated(x, gate_ff, self.ff(normed), layout)


class Attention(ProcessedAttention):
    """Multi-head attention of image tokens to themselves or to the text."""

    group_norm = None

    def __init__(
        self,
        width: int,
        context_dim: int | None,
        heads: int,
        bias: bool,
        dropout: float,
        upcast: bool,
        qk_norm: bool = False,
        kv_compression: KVCompression | None = None,
    ):
        super().__init__()
        self.is_cross = context_dim is not None
        self.heads = heads
        self.upcast = upcast
        self.to_q = nn.Linear(width, width, bias=bias)
        self.to_k = nn.Linear(context_dim or width, width, bias=bias)
        self.to_v = nn.Linear(context_dim or width, width, bias=bias)
        self.to_out = nn.Sequential(nn.Linear(width, width), nn.Dropout(dropout))
        self.q_norm = nn.LayerNorm(width) if qk_norm else None
        self.k_norm = nn.LayerNorm(width) if qk_norm else None
        self.kv_compression = kv_compression

    def compute(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | Layout | None = None,
        grids: Sequence[Grid] | None = None,
    ) -> Tensor:
        """[B, N, D] -> [B, N, D].

        Args:
            encoder_hidden_states: [B, M, C], the text; None: self-attention.
            attention_mask: a bias [B, 1 or N, M], added to the scores; or the layout of a mixed batch, whose image
                tokens [T, D] see those of their own image.
            grids: rows and columns of the tokens of each image in the layout; or of all, in a list of one.
        """
        if encoder_hidden_states is None:
            query, key, value = project(self._fused, [self.to_q, self.to_k, self.to_v], hidden_states)
            query = query if self.q_norm is None else self.q_norm(query)
            key = key if self.k_norm is None else self.k_norm(key)
        else:
            query = linear(self.to_q, hidden_states)
            key, value = project(self._fused, [self.to_k, self.to_v], encoder_hidden_states)
        if self.kv_compression is not None:
            return self._compressed(query, key, value, attention_mask, grids)
        if encoder_hidden_states is not None:
            assert not isinstance(attention_mask, Layout)
            return self.attend(query, self._split(key), self._split(value), _four(attention_mask))
        wide = torch.float32 if self.upcast else query.dtype
        q, k, v = (torch.unflatten(x.to(wide), -1, (self.heads, -1)) for x in (query, key, value))  # [B, N, heads, d]
        return linear(self.to_out, self.among(q, k, v, attention_mask).to(query.dtype).flatten(-2))

    def among(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | Layout | None) -> Tensor:
        """Attention of image tokens to those of their image: [B, N, heads, d], or [T, heads, d] with a layout."""
        if isinstance(mask, Layout):
            return attention_by_image(query, key, value, mask)
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))  # [B, heads, N, d] each
        return attention(q, k, v, _four(mask)).transpose(1, 2)

    def _compressed(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | Layout | None,
        grids: Sequence[Grid] | None,
    ) -> Tensor:
        """Attention of the tokens of each image to fewer keys and values, of [B, N, D] or [T, D]."""
        assert self.kv_compression is not None
        if isinstance(mask, Tensor):
            raise InputError("attention_mask masks image tokens, and the keys of this model are of several tokens each")
        if grids is None:
            raise ConfigurationError("attention with compressed keys needs the grid of its tokens: call the model")
        if mask is None:
            key, value = (self.kv_compression(x, grids[0]) for x in (key, value))  # [B, N', D]
            return self.attend(query, self._split(key), self._split(value), None)
        images = zip(mask.split(query), mask.split(key), mask.split(value), grids, strict=True)
        return torch.cat([self._compressed(q[None], k[None], v[None], None, [grid])[0] for q, k, v, grid in images])

    def process(self, *args: Any, **kwargs: Any) -> Any:
        if self.kv_compression is not None or self.q_norm is not None:
            raise ConfigurationError(
                "attention processors know neither compressed keys nor q/k normalization, which this model has; call "
                "set_default_attn_processor()"
            )
        return super().process(*args, **kwargs)

    def keys_values(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """[B, M, C] -> two of [B, heads, M, head_dim]."""
        key, value = project(self._fused, [self.to_k, self.to_v], text)  # [B, M, D] each
        return self._split(key), self._split(value)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        """Queries [B, N, D] -> [B, N, D]; key and value [B, heads, M, head_dim], bias [B, 1, 1 or N, M]."""
        q = self._split(query)
        if self.upcast:
            q, key, value = q.float(), key.float(), value.float()
        out = attention(q, key, value, bias).to(query.dtype)  # [B, heads, N, head_dim]
        return linear(self.to_out, out.transpose(1, 2).flatten(2))  # [B, N, D]

    def _split(self, x: Tensor) -> Tensor:
        return torch.unflatten(x, -1, (self.heads, -1)).transpose(1, 2)  # [B, heads, N, head_dim]

    @property
    def fusible(self) -> list[nn.Module]:
        """The projections of one input: of self-attention all three, of cross-attention those of the text."""
        layers: list[nn.Module] = [self.to_k, self.to_v]
        return layers if self.is_cross else [self.to_q, *layers]


def _four(mask: Tensor | None) -> Tensor | None:
    """A bias [B, M] or [B, 1 or N, M] -> [B, 1, 1 or N, M]."""
    if mask is None or mask.ndim == 4:
        return mask
    return mask[:, None] if mask.ndim == 3 else mask[:, None, None]
