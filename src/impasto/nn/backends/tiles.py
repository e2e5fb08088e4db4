"""16-bit attention on the CPU, as matrix products whose scores stay in cache.

The one in torch multiplies 16-bit matrices at a fraction of oneDNN's rate, except where there is AMX
(benchmarks/attention.py). Shapes: B images, N queries, M keys, d channels of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..machine import has_onednn_products

#: Scores of one tile: 4 MB in bfloat16, which two cores hold in their caches.
_TILE_SCORES = 2**21
#: All keys and values are read for each tile, which must pay even with many of them.
_LEAST_ROWS = 256
#: The largest score of a query is estimated from about so many keys.
_SAMPLED_KEYS = 32

#: From so many queries on, the product of a single head is enough work for one call.
_LONG = 512
#: Subtracted from the scores in addition to the peak, so that the sigmoid is an exponential: e^x / (1 + e^x) ≈ e^x. The
#: largest score may then be up to 41 above the peak, and the rounding error of very large ones up to 39.
_DEPTH = 48.0
#: If the weights of a query add up to less, the relative error of each is smaller than rounding to bfloat16.
_LARGEST_SUM = 2.0**-10
#: If they add up to more, the small ones among them do not underflow: float32 ends at 2 ** -126.
_SMALLEST_SUM = 2.0**-100


def tiled_attention(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    """softmax(query keyᵀ · scale) value, without gradients.

    Softmax is invariant to a number subtracted from all scores of a query. Here that is about the largest of them,
    estimated from some of the keys (the peak), and subtracted inside the product, in float32, by an additional channel
    of query and key.

    Args:
        query: [B, heads, N, d].
        key, value: [B, heads, M, d].

    Returns:
        [B, heads, N, d], stored as [B, N, heads, d], the order that the next projection reads.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if query.dtype == torch.bfloat16 and query.shape[2] >= _LONG and has_onednn_products(torch.bfloat16):
        out, exact = _sigmoid_tiles(query, key, value, scale)
        if exact:
            return out
    return _softmax_tiles(query, key, value, scale)


@torch.library.custom_op("impasto::tiled_attention", mutates_args=())
def tiled_attention_in_graphs(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    """The same as one operation of a compiled graph, which does not grow with the number of tiles."""
    return tiled_attention(query, key, value, scale)


@tiled_attention_in_graphs.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    batch, heads, length, _ = query.shape
    return query.new_empty(batch, length, heads, value.shape[3]).transpose(1, 2)


def _sigmoid_tiles(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, bool]:
    """Exponentials in the epilogue of the score product, while the scores are in registers; they are rounded once.

    oneDNN has no exponential epilogue, but far below zero its sigmoid is one. An additional channel of ones in the
    value sums the weights. Also returns whether the scores were in the range where this holds: a key that was not
    sampled may have a score far above the peak, and the rounding error of the peak of very large scores may exceed the
    depth.
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

    The scores are rounded between product and softmax, relative to their size. The largest ones matter most, and with
    the peak subtracted they are closest to zero.
    """
    batch, heads, length, size = query.shape
    largest = torch.finfo(query.dtype).max / 2
    peak = _peak(query, key).clamp(-largest, largest)  # a product of float16 may overflow
    queries = query.new_empty(batch, heads, length, size + 1)  # [B, heads, N, d + 1]
    queries[..., :-1] = query
    queries[..., -1:] = -peak
    # A tile may hold heads of several images: short images then take fewer calls.
    queries, keys, values = (x.flatten(0, 1) for x in (queries, _with_ones(key), value))  # [B * heads, N or M, ...]
    found = value.new_empty(batch * heads, length, value.shape[3])

    rows = max(min(_LEAST_ROWS, length), _TILE_SCORES // key.shape[2])
    at_once = min(batch * heads, max(1, rows // length))  # heads
    tile = query.new_empty(at_once, min(rows, length), key.shape[2])
    for first in range(0, batch * heads, at_once):
        group = slice(first, first + at_once)
        for start in range(0, length, rows):
            some = queries[group, start : start + rows]  # [g, n, d + 1]
            scores = tile[: some.shape[0], : some.shape[1]]  # [g, n, M]
            torch.baddbmm(scores, some, keys[group].transpose(1, 2), beta=0, alpha=scale, out=scores)
            weights = torch.softmax(scores, dim=-1, out=scores)
            torch.bmm(weights, values[group], out=found[group, start : start + rows])  # [g, n, d]
    out = query.new_empty(batch, length, heads, value.shape[3]).transpose(1, 2)  # [B, heads, N, d]
    return out.copy_(found.view(batch, heads, length, -1))


def _peak(query: Tensor, key: Tensor) -> Tensor:
    """About the largest score of each query: [..., N, d] and [..., M, d] -> [..., N, 1] in float32."""
    some = key[..., :: max(1, key.shape[-2] // _SAMPLED_KEYS), :]
    products = query @ some.transpose(-2, -1)
    return products.float().amax(-1, keepdim=True)  # torch takes five times as long in 16 bits


def _with_ones(x: Tensor) -> Tensor:
    """Append a channel of ones: [..., M, d] -> [..., M, d + 1]."""
    longer = x.new_empty(*x.shape[:-1], x.shape[-1] + 1)
    longer[..., :-1] = x
    longer[..., -1] = 1
    return longer
