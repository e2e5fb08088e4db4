"""The parts of PixArt's denoiser, from the outside in: patches, modulation, the block and its attention.

Shapes: B pictures, C channels, H x W latent pixels, N image tokens, M text tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import InputError
from ...nn.attention import attention
from ...nn.backends.onednn import linear
from ...nn.embeddings import timestep_features
from ...nn.fused_linear import FusedLinear
from ...nn.layers import FeedForward, TwoLayerMLP, modulated_norm
from ...nn.plain import is_idle_dropout, is_plain_linear, is_watched
from .text import AbsorbedText, Modulation, TextKeys


class PatchEmbed(nn.Module):
    """A token for each patch of the latents; keys ``proj.*``."""

    def __init__(self, in_channels: int, width: int, patch_size: int):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, latents: Tensor) -> Tensor:
        tokens: Tensor = self.proj(latents)  # [B, D, H / p, W / p]
        return tokens.flatten(2).transpose(1, 2).contiguous()  # [B, N, D]; every layer would copy it otherwise


class AdaLayerNormSingle(nn.Module):
    """The modulation that all blocks share (PixArt-α, 2.3)."""

    def __init__(self, width: int, use_additional_conditions: bool):
        super().__init__()
        self.emb = TimestepAndSizeEmbedder(width, use_additional_conditions)
        self.linear = nn.Linear(width, 6 * width)

    def forward(self, timestep: Tensor, conditions: Mapping[str, Tensor | None]) -> Modulation:
        embedded = self.emb(timestep, conditions, self.linear.weight.dtype)  # [B, D]
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
        rows = resolution.shape[0]
        if tuple(resolution.shape) != (rows, 2) or aspect_ratio.numel() != rows or rows not in (1, embedded.shape[0]):
            raise InputError(
                f"added_cond_kwargs: resolution has shape {list(resolution.shape)} and aspect_ratio "
                f"{list(aspect_ratio.shape)}; expected [{embedded.shape[0]}, 2] and [{embedded.shape[0]}, 1]"
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
    ):
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.randn(6, width) / width**0.5)
        self.norm1 = nn.LayerNorm(width, eps=norm_eps, elementwise_affine=norm_elementwise_affine)
        self.attn1 = Attention(width, width, heads, attention_bias, dropout, upcast_attention)
        self.attn2 = (
            None
            if cross_attention_dim is None
            else Attention(width, cross_attention_dim, heads, attention_bias, dropout, upcast_attention)
        )
        self.norm2 = nn.LayerNorm(width, eps=norm_eps, elementwise_affine=norm_elementwise_affine)
        self.ff = FeedForward(width, activation_fn, dropout)

    def encode_text(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, heads, M, head_dim] of the projected text [B, M, D]."""
        assert self.attn2 is not None
        return self.attn2.keys_values(text)

    def encode_rows(self, rows: Sequence[Tensor], biases: Sequence[Tensor | None]) -> list[AbsorbedText | TextKeys]:
        """What stands for each projected text [M, D] with its bias [M]."""
        assert self.attn2 is not None
        attn2 = self.attn2
        return [
            attn2.absorb(text, bias) if attn2.can_absorb(len(text)) else attn2.row_keys(text, bias)
            for text, bias in zip(rows, biases, strict=True)
        ]

    def fuse(self) -> None:
        """One product for query, key and value of each attention."""
        self.attn1.fuse(cross=False)
        if self.attn2 is not None:
            self.attn2.fuse(cross=True)

    def forward(
        self,
        x: Tensor,
        shared: Tensor,
        text: Tensor | None,
        key_value: tuple[Tensor, Tensor] | None,
        text_bias: Tensor | None,
        self_bias: Tensor | None,
        rows: Sequence[AbsorbedText | TextKeys] | None = None,
    ) -> Tensor:
        modulation = self.scale_shift_table[None] + shared  # [B, 6, D]
        shift_attn, scale_attn, gate_attn, shift_ff, scale_ff, gate_ff = modulation.chunk(6, dim=1)  # [B, 1, D] each

        attended = self.attn1.self_attention(modulated_norm(self.norm1, x, shift_attn, scale_attn), self_bias)
        x = torch.addcmul(x, gate_attn, attended)  # [B, N, D]
        if rows is not None:
            assert self.attn2 is not None
            x = torch.stack([self.attn2.add_row(*row) for row in zip(x, rows, strict=True)])  # [B, N, D]
        elif self.attn2 is not None:  # not normalised: the original model has no layer norm here
            if key_value is None:
                key_value = self.attn2.keys_values(x if text is None else text)
            x = x + self.attn2.cross_attention(x, *key_value, text_bias)  # [B, N, D]
        return torch.addcmul(x, gate_ff, self.ff(modulated_norm(self.norm2, x, shift_ff, scale_ff)))  # [B, N, D]


class Attention(nn.Module):
    """Multi-head attention of image tokens to themselves or to the text."""

    def __init__(self, width: int, context_dim: int, heads: int, bias: bool, dropout: float, upcast: bool):
        super().__init__()
        self.heads = heads
        self.upcast = upcast
        self.to_q = nn.Linear(width, width, bias=bias)
        self.to_k = nn.Linear(context_dim, width, bias=bias)
        self.to_v = nn.Linear(context_dim, width, bias=bias)
        self.to_out = nn.Sequential(nn.Linear(width, width), nn.Dropout(dropout))
        self._fused: FusedLinear | None = None

    def self_attention(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """[B, N, D] -> [B, N, D]; bias [B, 1, 1, N]."""
        if self._fused is not None and self._fused.holds(self.to_q, self.to_k, self.to_v):
            query, key, value = self._fused(x).chunk(3, dim=-1)  # [B, N, D] each
        else:
            query, key, value = linear(self.to_q, x), linear(self.to_k, x), linear(self.to_v, x)  # [B, N, D] each
        return self._attend(query, self._split(key), self._split(value), bias)

    def keys_values(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """[B, M, C] -> two of [B, heads, M, head_dim]."""
        if self._fused is not None and self._fused.holds(self.to_k, self.to_v):
            key, value = self._fused(text).chunk(2, dim=-1)  # [B, M, D] each
        else:
            key, value = self.to_k(text), self.to_v(text)  # [B, M, D] each
        return self._split(key), self._split(value)

    def can_absorb(self, tokens: int) -> bool:
        """Whether a text of so many tokens makes less work absorbed, and no one changes or watches the projections."""
        layers = (self.to_q, self.to_k, self.to_v, self.to_out[0])
        watched = len(self.to_out) != 2 or is_watched(self.to_out) or not is_idle_dropout(self.to_out[1])
        plain = not watched and all(is_plain_linear(layer) for layer in layers)
        return plain and not self.training and not self.upcast and tokens < self.to_q.out_features // self.heads

    def absorb(self, text: Tensor, bias: Tensor | None) -> AbsorbedText:
        """Text [M, C] and its bias [M] -> what stands for the query's and the output's projections."""
        to_out = self.to_out[0]
        assert isinstance(to_out, nn.Linear)
        width = to_out.out_features
        out_bias = text.new_zeros(width) if to_out.bias is None else to_out.bias
        key = torch.unflatten(self.to_k(text), -1, (self.heads, -1)).transpose(0, 1)  # [heads, M, head_dim]
        value = torch.unflatten(self.to_v(text), -1, (self.heads, -1)).transpose(0, 1)  # [heads, M, head_dim]
        out_weight = torch.unflatten(to_out.weight.T, 0, (self.heads, -1))  # [heads, head_dim, D]
        if len(text) < 2:
            return AbsorbedText(None, None, ((value @ out_weight).sum((0, 1)) + out_bias)[None])
        # Every head's weights sum to 1, so that each may add its share of the bias.
        values = torch.baddbmm(out_bias / self.heads, value, out_weight)  # [heads, M, D]

        scale = key.shape[-1] ** -0.5
        weight = torch.unflatten(self.to_q.weight, 0, (self.heads, -1))  # [heads, head_dim, D]
        scores = torch.baddbmm(key.new_empty(self.heads, len(text), width), key, weight, beta=0, alpha=scale)
        offsets = key.new_zeros(key.shape[:2])  # [heads, M]
        if self.to_q.bias is not None:
            offsets = offsets + (key * torch.unflatten(self.to_q.bias, 0, (self.heads, 1, -1))).sum(-1) * scale
        if bias is not None:
            offsets = offsets + bias.to(offsets.dtype)
        # Heads side by side, which softmax over M reads in order.
        by_token = scores.transpose(0, 1).flatten(0, 1)  # [M * heads, D]
        return AbsorbedText(by_token.T.contiguous(), offsets.T.flatten(), values.transpose(0, 1).flatten(0, 1))

    def row_keys(self, text: Tensor, bias: Tensor | None) -> TextKeys:
        """Text [M, C] and its bias [M] as keys and values."""
        key, value = self.keys_values(text[None])  # [1, heads, M, head_dim] each
        return TextKeys(key[0], value[0], bias)

    def add_row(self, x: Tensor, text: AbsorbedText | TextKeys) -> Tensor:
        """x [N, D] plus its cross-attention to the text of its row."""
        if isinstance(text, TextKeys):
            bias = None if text.bias is None else text.bias[None, None, None]  # [1, 1, 1, M]
            return x + self.cross_attention(x[None], text.key[None], text.value[None], bias)[0]
        if text.scores is None or text.offsets is None:
            return x + text.values
        scores = torch.addmm(text.offsets, x, text.scores)  # [N, M * heads]
        # In float32: torch takes five times as long over 16 bits.
        weights = torch.softmax(scores.float().unflatten(-1, (-1, self.heads)), dim=1).to(x.dtype)  # [N, M, heads]
        if torch.is_autocast_enabled("cpu"):  # which would round x, too
            return x + weights.flatten(1) @ text.values
        return torch.addmm(x, weights.flatten(1), text.values)  # [N, D]

    def cross_attention(self, x: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        """[B, N, D] -> [B, N, D]; key and value [B, heads, M, head_dim], bias [B, 1, 1, M]."""
        return self._attend(self.to_q(x), key, value, bias)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        q = self._split(query)
        if self.upcast:
            q, key, value = q.float(), key.float(), value.float()
        out = attention(q, key, value, bias).to(query.dtype)  # [B, heads, N, head_dim]
        out = out.transpose(1, 2).flatten(2)  # [B, N, D]
        if len(self.to_out) == 2 and not is_watched(self.to_out) and is_idle_dropout(self.to_out[1]):
            return linear(self.to_out[0], out)
        projected: Tensor = self.to_out(out)
        return projected

    def _split(self, x: Tensor) -> Tensor:
        return torch.unflatten(x, -1, (self.heads, -1)).transpose(1, 2)  # [B, heads, N, head_dim]

    def fuse(self, cross: bool) -> None:
        """Compute key and value (and in self-attention the query) in one product."""
        layers = [self.to_k, self.to_v] if cross else [self.to_q, self.to_k, self.to_v]
        self._fused = FusedLinear(layers)

    def unfuse(self) -> None:
        self._fused = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Moving or casting gives every projection storage of its own again.
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self._fused is not None:
            self._fused = FusedLinear(self._fused.layers)
        return self
