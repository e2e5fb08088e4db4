"""Attention in 16 bits on the CPU, as matrix products whose scores stay in cache.

torch's own multiplies 16-bit matrices at a fraction of oneDNN's rate, except where there is AMX
(benchmarks/attention.py). Shapes: B pictures, N queries, M keys, d channels of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..machine import has_onednn_products

#: Scores of one tile: 4 MB in bfloat16, which two cores hold in their caches.
_TILE_SCORES = 2**21
#: For each tile all keys and values are read, which must pay even where they are many.
_LEAST_ROWS = 256
#: Among so many keys the largest score of a query is looked for.
_SAMPLED_KEYS = 32

#: From so many queries on, one product of one head is enough work for a call of its own.
_LONG = 512
#: Taken off the scores beside the peak, so that the sigmoid is an exponential: e^x / (1 + e^x) ≈ e^x. The largest score
#: may then be up to 41 above the peak, and the rounding of very large ones up to 39.
_DEPTH = 48.0
#: As long as a query's weights add up to less, each is off by a smaller share than bfloat16's rounding.
_LARGEST_SUM = 2.0**-10
#: And as long as they add up to more, the small ones among them are not lost: float32 ends at 2 ** -126.
_SMALLEST_SUM = 2.0**-100


def tiled_attention(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    """softmax(query keyᵀ · scale) value, without gradients.

    Softmax does not mind what is taken off a query's scores. Here it is about the largest of them, found among some
    of the keys (the peak), and inside the product, in float32: an additional channel of query and key.

    Args:
        query: [B, heads, N, d].
        key, value: [B, heads, M, d].

    Returns:
        [B, heads, N, d], laid out as [B, N, heads, d], where the next projection wants it.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if query.dtype == torch.bfloat16 and query.shape[2] >= _LONG and has_onednn_products(torch.bfloat16):
        out, exact = _sigmoid_tiles(query, key, value, scale)
        if exact:
            return out
    return _softmax_tiles(query, key, value, scale)


@torch.library.custom_op("impasto::tiled_attention", mutates_args=())
def tiled_attention_in_graphs(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    """The same as one operation of a compiled graph, which its tiles would only bloat."""
    return tiled_attention(query, key, value, scale)


@tiled_attention_in_graphs.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    batch, heads, length, _ = query.shape
    return query.new_empty(batch, length, heads, value.shape[3]).transpose(1, 2)


def _sigmoid_tiles(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, bool]:
    """Exponentials in the epilogue of the scores' product, while they are in registers; they are rounded once.

    oneDNN has no exponential there, but far below zero its sigmoid is one. An additional channel of ones in the
    value adds the weights up. Also returns whether the scores were where this holds: a key that was not sampled may
    have a score far above the peak, and the peak of very large scores is rounded by more than the depth.
    """
    batch, heads, length, size = query.shape
    queries = query.new_empty(batch, heads, length, size + 1)  # [B, heads, N, d + 1]
    torch.mul(query, scale, out=queries[..., :-1])
    torch.sub(-_DEPTH, _peak(queries[..., :-1], key), out=queries[..., -1:])
    keys, values = _with_ones(key), _with_ones(value)  # [B, heads, M, d + 1] each
    sums = query.new_empty(batch, heads, length, values.shape[3])  # [B, heads, N, d + 1]
    rows = max(_LEAST_ROWS, _TILE_SCORES // key.shape[2])
    for head in range(batch * heads):
        at = divmod(head, heads)
        for start in range(0, length, rows):
            tile = slice(start, start + rows)
            weights = torch.ops.mkldnn._linear_pointwise(queries[at][tile], keys[at], None, "sigmoid", [], "")  # [n, M]
            torch.mm(weights, values[at], out=sums[at][tile])  # [n, d + 1]
    total = sums[..., -1:]  # [B, heads, N, 1]
    out = query.new_empty(batch, length, heads, value.shape[3]).transpose(1, 2)  # [B, heads, N, d]
    torch.div(sums[..., :-1], total, out=out)
    smallest, largest = total.aminmax()
    return out, bool((smallest >= _SMALLEST_SUM) & (largest <= _LARGEST_SUM))  # not with NaN


def _softmax_tiles(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Some heads, or some queries of one head, at a time.

    The scores are rounded between product and softmax, by a share of their size. It is the largest ones that count,
    and with the peak off those are the smallest.
    """
    batch, heads, length, size = query.shape
    largest = torch.finfo(query.dtype).max / 2
    peak = _peak(query, key).clamp(-largest, largest)  # a product of float16 may overflow
    queries = query.new_empty(batch, heads, length, size + 1)  # [B, heads, N, d + 1]
    queries[..., :-1] = query
    queries[..., -1:] = -peak
    keys = _with_ones(key).transpose(2, 3)  # [B, heads, d + 1, M]
    out = query.new_empty(batch, length, heads, value.shape[3]).transpose(1, 2)  # [B, heads, N, d]

    rows = max(min(_LEAST_ROWS, length), _TILE_SCORES // key.shape[2])
    at_once = max(1, rows // length)  # heads
    for picture in range(batch):
        for first in range(0, heads, at_once):
            group = slice(first, first + at_once)
            for start in range(0, length, rows):
                tile = slice(start, start + rows)
                part = queries[picture, group, tile]  # [g, n, d + 1]
                scores = part.new_empty(*part.shape[:2], key.shape[2])  # [g, n, M]
                torch.baddbmm(scores, part, keys[picture, group], beta=0, alpha=scale, out=scores)
                weights = torch.softmax(scores, dim=-1, out=scores)
                out[picture, group, tile] = weights @ value[picture, group]  # [g, n, d]
    return out


def _peak(query: Tensor, key: Tensor) -> Tensor:
    """About the largest product of each query with a key: [..., N, d] and [..., M, d] -> [..., N, 1] in float32."""
    some = key[..., :: max(1, key.shape[-2] // _SAMPLED_KEYS), :]
    products = query @ some.transpose(-2, -1)
    return products.float().amax(-1, keepdim=True)  # torch takes five times as long over 16 bits


def _with_ones(x: Tensor) -> Tensor:
    """A channel of ones behind the others: [..., M, d] -> [..., M, d + 1]."""
    longer = x.new_empty(*x.shape[:-1], x.shape[-1] + 1)
    longer[..., :-1] = x
    longer[..., -1] = 1
    return longer
