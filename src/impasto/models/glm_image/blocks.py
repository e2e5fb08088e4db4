"""The parts of GLM-Image's denoiser, from the outside in: patches, conditions, the block and its attention.

Shapes: B pictures, C channels, H x W latent pixels, N image tokens, M text tokens, S = M + N, R reference tokens, d
channels of a head, D width, T width of the conditions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...nn.attention import attention
from ...nn.embeddings import apply_rotary, timestep_features
from ...nn.layers import FeedForward, TwoLayerMLP, modulate, patchify

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
    """Features of the timestep, of the crop's corner and of the picture's size, embedded and added."""

    def __init__(self, width: int, condition_dim: int):
        super().__init__()
        self.width, self.condition_dim = width, condition_dim
        self.timestep_embedder = TwoLayerMLP(width, width)
        self.condition_embedder = TwoLayerMLP(4 * condition_dim, width)

    def forward(self, timestep: Tensor, target_size: Tensor, crop_coords: Tensor, dtype: torch.dtype) -> Tensor:
        times: Tensor = self.timestep_embedder(timestep_features(timestep, self.width).to(dtype))  # [B, T]
        numbers = torch.cat([crop_coords, target_size], dim=1)  # [B, 4]: top, left, height, width
        features = timestep_features(numbers.flatten(), self.condition_dim).view(len(numbers), -1)
        sizes: Tensor = self.condition_embedder(features.to(dtype))  # [B, T]
        return F.silu(times + sizes)


class AdaLayerNormZero(nn.Module):
    """A block's modulations (2212.09748), of image and text tokens, from the embedded conditions; keys ``linear.*``."""

    def __init__(self, conditions: int, width: int):
        super().__init__()
        self.linear = nn.Linear(conditions, 12 * width)

    def forward(self, embedded: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """[B, T] -> for image and for text: shift, scale, gate of attention; shift, scale, gate of the feed-forward."""
        parts = self.linear(embedded)[:, None].chunk(12, dim=-1)  # [B, 1, D] each
        return parts[0::2], parts[1::2]


class AdaLayerNormContinuous(nn.Module):
    """The last normalisation and its modulation; keys ``linear.*``."""

    def __init__(self, width: int, conditions: int):
        super().__init__()
        self.linear = nn.Linear(conditions, 2 * width)

    def forward(self, x: Tensor, embedded: Tensor) -> Tensor:
        scale, shift = self.linear(embedded)[:, None].chunk(2, dim=-1)  # [B, 1, D] each
        return modulate(_normalized(x), shift, scale)  # [B, N, D]


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
        image: Tensor,
        text: Tensor,
        embedded: Tensor,
        rotary: tuple[Tensor, Tensor],
        past: tuple[Tensor, Tensor] | None,
        bias: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """image [B, N, D], text [B, M, D] -> both, and the keys and values [B, heads, S, d] of their tokens."""
        lengths = [text.shape[1], image.shape[1]]
        of_image, of_text = self.norm1(embedded)

        shift, scale, gate = of_image[:3]
        shift_text, scale_text, gate_text = of_text[:3]
        normed = [modulate(_normalized(text), shift_text, scale_text), modulate(_normalized(image), shift, scale)]
        attended, key, value = self.attn1(torch.cat(normed, dim=1), lengths[0], rotary, past, bias)  # [B, S, D]
        text_attended, image_attended = attended.split(lengths, dim=1)
        image = torch.addcmul(image, gate, image_attended)  # [B, N, D]
        text = torch.addcmul(text, gate_text, text_attended)  # [B, M, D]

        shift, scale, gate = of_image[3:]
        shift_text, scale_text, gate_text = of_text[3:]
        normed = [modulate(_normalized(text), shift_text, scale_text), modulate(_normalized(image), shift, scale)]
        text_out, image_out = self.ff(torch.cat(normed, dim=1)).split(lengths, dim=1)
        return torch.addcmul(image, gate, image_out), torch.addcmul(text, gate_text, text_out), key, value


class Attention(nn.Module):
    """Multi-head attention with normalised queries and keys; positions of the image tokens alone."""

    def __init__(self, width: int, heads: int, head_dim: int):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, heads * head_dim)
        self.to_k = nn.Linear(width, heads * head_dim)
        self.to_v = nn.Linear(width, heads * head_dim)
        self.to_out = nn.Sequential(nn.Linear(heads * head_dim, width), nn.Dropout(0.0))

    def forward(
        self,
        x: Tensor,
        text_tokens: int,
        rotary: tuple[Tensor, Tensor],
        past: tuple[Tensor, Tensor] | None,
        bias: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, S, D] -> [B, S, D], and its keys and values [B, heads, S, d].

        Args:
            text_tokens: M; the first ones of S.
            rotary: cosines and sines [B or 1, 1, N, d].
            past: keys and values [B, heads, R, d] of the references.
            bias: [B, 1, 1, R + S], added to the scores.
        """
        query, key, value = (self._split(layer(x)) for layer in (self.to_q, self.to_k, self.to_v))  # [B, heads, S, d]
        query = _placed(_normalized(query), text_tokens, rotary)
        key = _placed(_normalized(key), text_tokens, rotary)
        keys, values = key, value
        if past is not None:
            keys, values = torch.cat([past[0], key], dim=2), torch.cat([past[1], value], dim=2)  # [B, heads, R + S, d]
        out = attention(query, keys, values, bias)  # [B, heads, S, d]
        projected: Tensor = self.to_out(out.transpose(1, 2).flatten(2))  # [B, S, D]
        return projected, key, value

    def _split(self, x: Tensor) -> Tensor:
        return torch.unflatten(x, -1, (self.heads, -1)).transpose(1, 2)  # [B, heads, S, d]


def _normalized(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=_EPS)


def _placed(x: Tensor, text_tokens: int, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """The image tokens of [B, heads, S, d] turned by their positions."""
    text, image = x[:, :, :text_tokens], x[:, :, text_tokens:]
    return torch.cat([text, apply_rotary(image, *rotary)], dim=2)
