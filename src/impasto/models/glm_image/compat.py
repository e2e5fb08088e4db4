"""Attention processors of GLM-Image, with the interface of diffusers: image and text tokens are apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import InputError
from ...nn.attention import attention
from ...nn.embeddings import apply_rotary
from ...nn.tokens import text_bias
from .context import GlmImageContext, GlmImageModulation, GlmImageReferences, Past
from .places import Places


class GlmImageAttnProcessor:
    """The default: the attention's own code. Called by itself, it computes the same."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,  # [B, N, D]
        encoder_hidden_states: Tensor,  # [B, M, D]
        attention_mask: Tensor | None = None,  # [B, M], 1 keeps
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,  # [N, d] each
        kv_cache: Any = None,
    ) -> tuple[Tensor, Tensor]:
        """The image tokens [B, N, D], and the text tokens [B, M, D]."""
        text, x = encoder_hidden_states.shape[1], torch.cat([encoder_hidden_states, hidden_states], dim=1)
        layers = (attn.to_q, attn.to_k, attn.to_v)
        query, key, value = (torch.unflatten(layer(x), -1, (attn.heads, -1)) for layer in layers)
        query, key = attn.norm_q(query), attn.norm_k(key)
        if image_rotary_emb is not None:
            pairs = zip(image_rotary_emb, (1.0, 0.0), strict=True)
            cos, sin = (F.pad(y, (0, 0, text, 0), value=one)[:, None] for y, one in pairs)
            query, key = apply_rotary(query, cos, sin), apply_rotary(key, cos, sin)
        if kv_cache is not None and kv_cache.mode == "write":
            kv_cache.store(key, value)
        if kv_cache is not None and kv_cache.mode == "read":
            key, value = kv_cache.get(key, value)
        bias = None
        if attention_mask is not None:
            tokens = key.shape[1] - x.shape[1]  # of the references
            bias = F.pad(text_bias(attention_mask), (tokens, hidden_states.shape[1]))
        out = attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), bias)
        out = attn.to_out(out.transpose(1, 2).flatten(2))
        return out[:, text:], out[:, :text]


class LayerCache:
    """A layer's keys and values of the references, as processors read or write them: [B, tokens, heads, d]."""

    def __init__(self, past: Past):
        self.mode = "write" if past is None else "read"
        self._past = past
        self.written: tuple[Tensor, Tensor] | None = None

    def store(self, key: Tensor, value: Tensor) -> None:
        self.written = (key, value)

    def get(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Those of the references, followed by the given ones."""
        assert isinstance(self._past, tuple)
        before = (x.transpose(1, 2) for x in self._past)
        key, value = (torch.cat(pair, dim=1) for pair in zip(before, (key, value), strict=True))
        return key, value


def process(attn: Any, x: Tensor, places: Places, past: Past) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """What an attention's processor makes of x [B, S, D], and the keys and values [B, S, heads, d] that it wrote."""
    if places.bias is not None or places.cos.shape[0] > 1 or x.ndim != 3:
        raise InputError(
            "an attention processor computes images of one size, with the same positions and without a mask: give the "
            "images of this batch one by one"
        )
    m, cache = places.text, LayerCache(past)
    rotary = (places.cos[0, m:, 0], places.sin[0, m:, 0])
    taken = attn.call_processor(x[:, m:], x[:, :m], image_rotary_emb=rotary, kv_cache=cache)
    return torch.cat([taken[1], taken[0]], dim=1), cache.written


def differ(latents: Tensor | Sequence[Tensor], context: GlmImageContext, references: GlmImageReferences | None) -> bool:
    """Whether the images of a batch differ in what they see, which no argument of a processor says."""
    masked = context.bias is not None or (references is not None and references.bias is not None)
    return masked or not isinstance(latents, Tensor) or context.cos.shape[0] > 1


def one_by_one(
    predict: Callable[..., Any],
    latents: Tensor | Sequence[Tensor],
    context: GlmImageContext,
    modulation: GlmImageModulation,
    references: GlmImageReferences | None,
) -> Any:
    """The predictions of each image by itself, without what it does not see."""
    references = None if references is None else references.for_batch(len(latents))
    steps, outputs = len(modulation.embedded), []
    for i, (image, one) in enumerate(zip(latents, context.each(drops=True), strict=True)):
        seen = None if references is None else references.seen_by(i)
        outputs.append(predict([image[None]], one, modulation.select([i % steps]), seen)[0][0][0])
    return torch.stack(outputs) if isinstance(latents, Tensor) else outputs
