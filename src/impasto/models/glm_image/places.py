"""The sequence of text and image tokens of a batch: what its tokens' modulations, positions and keys are.

Shapes: B images, N image tokens, M text tokens, S = M + N, T tokens of a mixed batch, R reference tokens, d channels
of a head, D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...nn.attention import attention, attention_by_image
from ...nn.layers import gated, modulate
from ...nn.tokens import Layout
from .context import GlmImageContext, GlmImageReferences, Past


class Places(NamedTuple):
    """A batch's sequence [B, S, D], each text before its image; or [T, D], text and image after text and image."""

    text: int  # M, of a batch of images of one size
    cos: Tensor  # [B or 1, S, 1, d], or [T, 1, d]; 1 for text
    sin: Tensor  # the same; 0 for text
    bias: Tensor | None  # [B, 1, 1, R + S], or [1, 1, T, R + T] in a compiled graph
    segments: Layout | None = None  # each text and each image of a mixed batch
    images: Layout | None = None  # each text with its image; None in a compiled graph, which has a bias instead
    biases: Sequence[Tensor | None] = ()  # of each image of a mixed batch, [1, 1, 1, R + M + N]

    def as_tensors(self) -> Places:
        """The same for compiled blocks; see ``Layout.as_tensors``."""
        return self if self.segments is None else self._replace(segments=self.segments.as_tensors())

    def modulate(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        """x (1 + scale) + shift; shift and scale [B or 1, 2, D] of texts and images."""
        if self.segments is not None:
            return modulate(x, self._rows(shift), self._rows(scale), self.segments)
        return torch.cat([modulate(y, shift[:, i, None], scale[:, i, None]) for i, y in self._parts(x)], dim=1)

    def gated(self, x: Tensor, gate: Tensor, change: Tensor) -> Tensor:
        """x + gate · change; gate [B or 1, 2, D] of texts and images."""
        if self.segments is not None:
            return gated(x, self._rows(gate), change, self.segments)
        pairs = zip(self._parts(x), self._parts(change), strict=True)
        return torch.cat([gated(y, gate[:, i, None], z) for (i, y), (_, z) in pairs], dim=1)

    def image_tokens(self, x: Tensor) -> Tensor:
        """The image tokens of a sequence, [B, N, D]; or [sum of N, D] of a mixed batch."""
        if self.segments is None:
            return x[:, self.text :]
        return torch.cat(self.segments.split(x)[1::2])

    def _rows(self, x: Tensor) -> Tensor:
        """[B or 1, 2, D] -> [2 B, 1, D], one for each segment."""
        assert self.segments is not None
        return x.expand((len(self.segments.offsets) - 1) // 2, -1, -1).flatten(0, 1)[:, None]

    def _parts(self, x: Tensor) -> Iterator[tuple[int, Tensor]]:
        return enumerate((x[:, : self.text], x[:, self.text :]))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, past: Past) -> Tensor:
        """Attention of [B, S, heads, d] each, or [T, heads, d] -> the same."""
        if self.images is None:
            batched = [x if x.ndim == 4 else x[None] for x in (query, key, value)]
            q, k, v = (x.transpose(1, 2) for x in batched)  # [B, heads, S, d] each
            if isinstance(past, tuple):
                k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)  # [B, heads, R + S, d]
            return attention(q, k, v, self.bias).transpose(1, 2).view_as(query)
        if past is None and all(bias is None for bias in self.biases):
            return attention_by_image(query, key, value, self.images)
        results = []
        split, before_each = self.images.split, past if isinstance(past, list) else [None] * len(self.biases)
        for q, k, v, before, bias in zip(split(query), split(key), split(value), before_each, self.biases, strict=True):
            q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # [1, heads, M + N, d]
            if before is not None:
                k, v = torch.cat([before[0], k], dim=2), torch.cat([before[1], v], dim=2)
            results.append(attention(q, k, v, bias)[0].transpose(0, 1))
        return torch.cat(results)


def places_of(context: GlmImageContext, references: GlmImageReferences | None) -> Places:
    """Of a batch of images of one size."""
    text = context.text.shape[1]
    cos, sin = (F.pad(x[:, 0], (0, 0, text, 0), value=one) for x, one in ((context.cos, 1.0), (context.sin, 0.0)))
    bias: Tensor | None = None
    if context.bias is not None or (references is not None and references.bias is not None):
        parts = [part.bias_or_zeros() for part in (references, context) if part is not None]
        bias = F.pad(torch.cat([part.float() for part in parts], dim=3), (0, context.prior.shape[1]))
    return Places(text, cos[:, :, None], sin[:, :, None], bias)


def mixed_places(contexts: Sequence[GlmImageContext], references: GlmImageReferences | None, dynamic: bool) -> Places:
    """Of a mixed batch, of whose images each has a context; no text token is discarded.

    Args:
        references: B rows.
        dynamic: the blocks are compiled, so that a bias says which tokens see each other, and not numbers.
    """
    lengths = [(one.text.shape[1], one.prior.shape[1]) for one in contexts]
    device = contexts[0].prior.device
    segments = Layout.of([length for pair in lengths for length in pair], device)
    images = Layout.of([sum(pair) for pair in lengths], device)
    own = [places_of(one, None) for one in contexts]
    cos, sin = torch.cat([one.cos[0] for one in own]), torch.cat([one.sin[0] for one in own])
    if dynamic:
        keys, texts = images.rows, [one.bias_or_zeros()[0, 0, 0] for one in contexts]
        added = torch.cat([F.pad(bias, (0, n)) for bias, (_, n) in zip(texts, lengths, strict=True)])  # [T]
        if references is not None:
            owners = torch.arange(references.rows, device=device).repeat_interleave(references.length)
            keys, added = torch.cat([owners, keys]), torch.cat([references.bias_or_zeros().flatten(), added])
        bias = images.bias(keys, torch.float32) + added  # [1, 1, T, B R + T]
        return Places(0, cos, sin, bias, segments)
    before = [None] * len(contexts) if references is None else references.bias_or_zeros()
    biases = [_bias_of(one, seen) for one, seen in zip(contexts, before, strict=True)]
    return Places(0, cos, sin, None, segments, images, biases)


def _bias_of(context: GlmImageContext, references: Tensor | None) -> Tensor | None:
    """The bias [1, 1, 1, R + M + N] of an image, given that of its references [1, 1, R]; None if it adds nothing."""
    text, image = context.bias_or_zeros(), context.prior.shape[1]
    if references is None:
        return None if context.bias is None else F.pad(text, (0, image))
    seen = references[references.isfinite()].view(1, 1, 1, -1)  # without the ones that it does not see
    bias = F.pad(torch.cat([seen.to(text.dtype), text], dim=3), (0, image))
    return bias if bool(bias.any()) else None
