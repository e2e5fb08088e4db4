"""Text absorbed into the projections of a cross-attention.

With W_q, W_k, W_v, W_o its projections, the scores x W_q kᵀ are x (W_q kᵀ), and p v W_o is p (v W_o). A text with fewer
tokens than a head has channels makes that less to multiply. A single token has weight 1 in every head, so that its
cross-attention is a constant.

Shapes: N image tokens, M text tokens, C text channels, D width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..changes import is_plain


class AbsorbedText(NamedTuple):
    """A text of M tokens in a layer."""

    scores: Tensor | None  # [D, M * heads], scaled; None for the constant
    offsets: Tensor | None  # [M * heads]: what the query's bias and the text's bias add to the scores
    values: Tensor  # [M * heads, D], the output's bias among them; [1, D] for the constant

    def attend(self, attention: Any, x: Tensor, out: Tensor | None = None) -> Tensor:
        """x [N, D] plus its cross-attention; in ``out`` if given, which may be x."""
        if self.scores is None or self.offsets is None:
            return torch.add(x, self.values, out=out)
        scores = torch.addmm(self.offsets, x, self.scores)  # [N, M * heads]
        # In at least float32: torch takes five times as long for 16 bits.
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        weights = torch.softmax(scores.unflatten(-1, (-1, attention.heads)), dim=1).to(x.dtype).flatten(1)
        if torch.is_autocast_enabled("cpu"):  # which would round x, too
            return torch.add(x, weights @ self.values, out=out)
        return torch.addmm(x, weights, self.values, out=out)  # [N, D]


def can_absorb(attention: Any, tokens: int) -> bool:
    """Whether a text of so many tokens makes less work absorbed, and the projections are plain."""
    inputs, to_out = (attention.to_q, attention.to_k, attention.to_v), attention.to_out
    if attention.training or attention.upcast or not is_plain(to_out, nn.Sequential) or len(to_out) != 2:
        return False
    plain = is_plain(to_out[1], nn.Dropout) and all(is_plain(layer, nn.Linear) for layer in (*inputs, to_out[0]))
    return bool(plain and tokens < to_out[0].in_features // attention.heads)


def absorb(attention: Any, text: Tensor, bias: Tensor | None) -> AbsorbedText:
    """Text [M, C] and its bias [M] -> what takes the place of the query's and the output's projections."""
    heads, to_q, to_out = attention.heads, attention.to_q, attention.to_out[0]
    assert isinstance(to_out, nn.Linear)
    width = to_out.out_features
    out_bias = text.new_zeros(width) if to_out.bias is None else to_out.bias
    key = torch.unflatten(attention.to_k(text), -1, (heads, -1)).transpose(0, 1)  # [heads, M, head_dim]
    value = torch.unflatten(attention.to_v(text), -1, (heads, -1)).transpose(0, 1)  # [heads, M, head_dim]
    out_weight = torch.unflatten(to_out.weight.T, 0, (heads, -1))  # [heads, head_dim, D]
    if len(text) < 2:
        return AbsorbedText(None, None, ((value @ out_weight).sum((0, 1)) + out_bias)[None])
    # The weights of a head sum to 1, so each head may add its share of the bias.
    values = torch.baddbmm(out_bias / heads, value, out_weight)  # [heads, M, D]

    scale = key.shape[-1] ** -0.5
    weight = torch.unflatten(to_q.weight, 0, (heads, -1))  # [heads, head_dim, D]
    scores = torch.baddbmm(key.new_empty(heads, len(text), width), key, weight, beta=0, alpha=scale)
    offsets = key.new_zeros(key.shape[:2])  # [heads, M]
    if to_q.bias is not None:
        offsets = offsets + (key * torch.unflatten(to_q.bias, 0, (heads, 1, -1))).sum(-1) * scale
    if bias is not None:
        offsets = offsets + bias.to(offsets.dtype)
    # Heads next to each other, which softmax over M reads in order.
    by_token = scores.transpose(0, 1).flatten(0, 1)  # [M * heads, D]
    return AbsorbedText(by_token.T.contiguous(), offsets.T.flatten(), values.transpose(0, 1).flatten(0, 1))
