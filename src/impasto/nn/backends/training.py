"""16-bit attention with gradients on the CPU, as matrix products whose scores stay in cache and are not stored.

Shapes: B images, N queries, M keys, d channels of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

#: Scores of the heads that are computed at a time.
_SCORES_AT_ONCE = 2**21


def products(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float | None) -> Tensor:
    """softmax(query keyᵀ · scale + bias) value in plain torch, which stores all scores for the backward pass."""
    scores = (query * (query.shape[-1] ** -0.5 if scale is None else scale)) @ key.transpose(-2, -1)
    if bias is None:
        return torch.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype) @ value
    finite = bias.clamp(min=torch.finfo(bias.dtype).min / 2)
    out = torch.softmax(scores + finite, dim=-1, dtype=torch.float32).to(value.dtype) @ value
    return out.masked_fill(bias.amax(dim=-1, keepdim=True) == -torch.inf, 0.0)


def recomputed_products(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    """The same without bias, some heads at a time; the backward pass computes the scores again.

    Args:
        query: [B, heads, N, d].
        key, value: [B, heads, M, d].

    Returns:
        [B, heads, N, d]
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    out: Tensor = _RecomputedProducts.apply(query, key, value, scale)  # type: ignore[no-untyped-call]
    return out


class _RecomputedProducts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.scale = scale
        queries, keys, values = (x.flatten(0, 1) for x in (query, key, value))  # [B * heads, N or M, d]
        out = values.new_empty(*queries.shape[:2], values.shape[2])
        for some in _groups(queries, keys):
            torch.bmm(_weights(queries[some], keys[some], scale), values[some], out=out[some])
        return out.view(*query.shape[:3], -1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        query, key, value = ctx.saved_tensors
        scale = ctx.scale
        if torch.is_grad_enabled():  # for gradients of gradients
            out = products(query, key, value, None, scale)
            needed = [x for x, needs in zip((query, key, value), ctx.needs_input_grad) if needs]
            found = iter(torch.autograd.grad(out, needed, gradient, create_graph=True))
            return *(next(found) if needs else None for needs in ctx.needs_input_grad[:3]), None
        queries, keys, values, outs = (x.flatten(0, 1) for x in (query, key, value, gradient))
        unused = queries.new_zeros(())
        of_queries, of_keys, of_values = (torch.empty_like(x) for x in (queries, keys, values))
        for some in _groups(queries, keys):
            weights = _weights(queries[some], keys[some], scale)  # [n, N, M]
            torch.bmm(weights.transpose(1, 2), outs[some], out=of_values[some])
            of_weights = outs[some] @ values[some].transpose(1, 2)  # [n, N, M]
            of_scores = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype)
            torch.baddbmm(unused, of_scores, keys[some], beta=0, alpha=scale, out=of_queries[some])
            torch.baddbmm(unused, of_scores.transpose(1, 2), queries[some], beta=0, alpha=scale, out=of_keys[some])
        return *(x.unflatten(0, query.shape[:2]) for x in (of_queries, of_keys, of_values)), None


def _weights(queries: Tensor, keys: Tensor, scale: float) -> Tensor:
    """softmax(queries keysᵀ · scale): [n, N, d], [n, M, d] -> [n, N, M]."""
    scores = torch.baddbmm(queries.new_zeros(()), queries, keys.transpose(1, 2), beta=0, alpha=scale)
    return torch.softmax(scores, dim=-1)


def _groups(queries: Tensor, keys: Tensor) -> list[slice]:
    at_once = max(1, _SCORES_AT_ONCE // max(1, queries.shape[1] * keys.shape[1]))
    return [slice(start, start + at_once) for start in range(0, len(queries), at_once)]
