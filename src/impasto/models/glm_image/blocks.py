"""The parts of GLM-Image's denoiser, from the outside in: patches, conditions, the block and its attention.

Shapes: B images, C channels, H x W latent pixels, N image tokens, M text tokens, S = M + N, R reference tokens, d
channels of a head, D width, T tokens of a mixed batch, or the width of the conditions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...nn.embeddings import apply_rotary, timestep_features
from ...nn.layers import FeedForward, TwoLayerMLP, modulate, patchify
from ...nn.tokens import Layout
from ..compat.attention_processor import ProcessedAttention
from .compat import GlmImageAttnProcessor, process
from .context import Past
from .places import Places

_EPS = 1e-5


class ImageProjector(nn.Module):
    """A token for each patch of the latents; keys ``proj.*``."""

    def __init__(self, in_channels: int, width: int, patch_size: int):
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Linear(in_channels * patch_size**2, width)

    def forward(self, latents: Tensor) -> Tensor:
        tokens: Tensor = self.proj(patchify(latents, self.patch_size))  # [B, N, D]
        return tokens


class TimestepAndSizeEmbedder(nn.Module):
    """Features of the timestep, of the crop's corner and of the image's size, embedded and added."""

    def __init__(self, width: int, condition_dim: int):
        super().__init__()
        self.width, self.condition_dim = width, condition_dim
        self.timestep_embedder = TwoLayerMLP(width, width)
        self.condition_embedder = TwoLayerMLP(4 * condition_dim, width)

    def forward(self, timestep: Tensor, target_size: Tensor, crop_coords: Tensor, dtype: torch.dtype) -> Tensor:
        times: Tensor = self.timestep_embedder(timestep_features(timestep, self.width).to(dtype))  # [B, T]
        numbers = torch.cat([crop_coords, target_size], dim=1)  # [B, 4]: top, left, height, width
        features = timestep_features(numbers.flatten(), self.condition_dim).view(numbers.shape[0], -1)
        sizes: Tensor = self.condition_embedder(features.to(dtype))  # [B, T]
        return F.silu(times + sizes)


class AdaLayerNormZero(nn.Module):
    """A block's modulations (2212.09748), of image and text tokens, from the embedded conditions; keys ``linear.*``."""

    def __init__(self, conditions: int, width: int):
        super().__init__()
        self.linear = nn.Linear(conditions, 12 * width)

    def forward(self, embedded: Tensor) -> tuple[Tensor, ...]:
        """[B, T] -> shift, scale, gate of attention; shift, scale, gate of the feed-forward: each [B, 2, D], the text's
        and the image's.
        """
        image_and_text = torch.unflatten(self.linear(embedded), -1, (6, 2, -1))  # [B, 6, 2, D]
        return image_and_text.flip(2).unbind(1)


class AdaLayerNormContinuous(nn.Module):
    """The last normalization and its modulation; keys ``linear.*``."""

    def __init__(self, width: int, conditions: int):
        super().__init__()
        self.linear = nn.Linear(conditions, 2 * width)

    def forward(self, x: Tensor, embedded: Tensor, layout: Layout | None = None) -> Tensor:
        scale, shift = self.linear(embedded)[:, None].chunk(2, dim=-1)  # [B, 1, D] each
        return modulate(_normalized(x), shift, scale, layout)  # [B, N, D], or [T, D] with a layout


class GlmImageBlock(nn.Module):
    """Attention of image and text tokens to both, and to the references; a feed-forward. Both share all weights but the
    modulations.
    """

    def __init__(self, width: int, heads: int, head_dim: int, conditions: int):
        super().__init__()
        self.norm1 = AdaLayerNormZero(conditions, width)
        self.attn1 = Attention(width, heads, head_dim)
        self.ff = FeedForward(width, "gelu-approximate")

    def forward(
        self,
        x: Tensor,  # [B, S, D], or [T, D] of a mixed batch
        embedded: Tensor,  # [B or 1, T]
        places: Places,
        past: Past = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The tokens, and their keys and values [B, heads, S, d]; None from a processor that reads references."""
        shift_attn, scale_attn, gate_attn, shift_ff, scale_ff, gate_ff = self.norm1(embedded)  # [B, 2, D] each

        normed = places.modulate(_normalized(x), shift_attn, scale_attn)
        attended, key, value = self.attn1(normed, places, past)
        x = places.gated(x, gate_attn, attended)
        normed = places.modulate(_normalized(x), shift_ff, scale_ff)
        return places.gated(x, gate_ff, self.ff(normed)), key, value


class Attention(ProcessedAttention):
    """Multi-head attention with normalized queries and keys; only image tokens have positions."""

    default_processor = GlmImageAttnProcessor()
    group_norm = None
    norm_q = property(lambda self: _normalized)
    norm_k = norm_q

    def __init__(self, width: int, heads: int, head_dim: int):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, heads * head_dim)
        self.to_k = nn.Linear(width, heads * head_dim)
        self.to_v = nn.Linear(width, heads * head_dim)
        self.to_out = nn.Sequential(nn.Linear(heads * head_dim, width), nn.Dropout(0.0))

    def compute(self, x: Tensor, places: Places, past: Past = None) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, S, D] -> [B, S, D], and its keys and values [B, heads, S, d]; or [T, D] of a mixed batch.

        Args:
            past: keys and values [B, heads, R, d] of the references; of a mixed batch, a pair or None for each image.
        """
        query = apply_rotary(_normalized(self._heads(self.to_q, x)), places.cos, places.sin)  # [B, S, heads, d]
        key, value = self._keys_values(x, places)
        out = self.among(query, key, value, places, past).flatten(-2)  # [B, S, D]
        projected: Tensor = self.to_out(out)
        return projected, key.transpose(-3, -2), value.transpose(-3, -2)

    def among(self, query: Tensor, key: Tensor, value: Tensor, places: Places, past: Past) -> Tensor:
        """Attention of the tokens of each image to one another: [B, S, heads, d], or [T, heads, d] of a mixed batch."""
        return places.attend(query, key, value, past)

    def process(self, x: Tensor, places: Places, past: Past = None) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The same by the processor; a call that reads references returns no keys and values: nobody refers to it."""
        projected, written = process(self, x, places, past)
        if past is not None:
            return projected, None, None
        key, value = written or self._keys_values(x, places)
        return projected, key.transpose(-3, -2), value.transpose(-3, -2)

    def _keys_values(self, x: Tensor, places: Places) -> tuple[Tensor, Tensor]:
        key = apply_rotary(_normalized(self._heads(self.to_k, x)), places.cos, places.sin)
        return key, self._heads(self.to_v, x)

    def _heads(self, layer: nn.Module, x: Tensor) -> Tensor:
        return torch.unflatten(layer(x), -1, (self.heads, -1))


def _normalized(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=_EPS)
