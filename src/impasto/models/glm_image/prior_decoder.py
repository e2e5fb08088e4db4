"""Decoding with the language model of GLM-Image's prior, one token at a time: most of the latency of an image.

The ``generate`` method of transformers does this for any model. Here the key-value cache is allocated once, only the
scores of image tokens are computed, and nothing waits for the device between two tokens: on a GPU each token is the
replay of a captured CUDA graph. The weights are those of the loaded model.

Shapes: B images, S tokens at a time, L tokens in all, d channels of a head, H width, V tokens that may be sampled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...nn.backends.onednn import Product, joined_product
from ...nn.changes import is_plain
from ...nn.graphs import Capture, CudaGraphs

Norm = Callable[[Tensor], Tensor]


class Sampling(NamedTuple):
    """How tokens are sampled: the generation settings of a checkpoint."""

    temperature: float = 1.0
    top_k: int = 0  # sample among so many of the likeliest; 0: among all
    top_p: float = 1.0  # sample among the likeliest whose probabilities add up to this

    @classmethod
    def of(cls, config: Any) -> Sampling:
        """From a ``GenerationConfig`` of transformers, with the defaults of its ``generate``."""
        usual = cls(temperature=1.0, top_k=50, top_p=1.0)
        given = {name: getattr(config, name, None) for name in cls._fields}
        return usual._replace(**{name: value for name, value in given.items() if value is not None})

    def choose(self, scores: Tensor, uniform: Tensor) -> Tensor:
        """Scores [B, V] and numbers [B] in [0, 1) -> tokens [B], by inverting the cumulative distribution."""
        scores = scores.float() / self.temperature
        tokens: Tensor | None = None  # the tokens of the scores, if they are not in the order of the vocabulary
        if 0 < self.top_k < scores.shape[-1]:
            scores, tokens = scores.topk(self.top_k, dim=-1)  # the likeliest first
        elif self.top_p < 1.0:
            scores, tokens = scores.sort(dim=-1, descending=True, stable=True)
        probabilities = scores.softmax(dim=-1)  # [B, V or top_k]
        if self.top_p < 1.0:
            below = probabilities.cumsum(dim=-1) - probabilities  # of all likelier tokens
            probabilities = torch.where(below < self.top_p, probabilities, 0.0)
        reached = probabilities.cumsum(dim=-1)
        place = torch.searchsorted(reached, (uniform * reached[:, -1])[:, None], right=True)  # [B, 1]
        place = place.clamp(max=scores.shape[-1] - 1)
        chosen = place if tokens is None else tokens.gather(1, place)
        return chosen[:, 0]


class _Layer(NamedTuple):
    """A layer of the model: its products, and the norms before and after its two halves."""

    attention: Any
    activation: Callable[[Tensor], Tensor]
    project: Product  # to query, key and value, concatenated
    out: Product
    widen: Product
    narrow: Product
    before_attention: Norm
    after_attention: Norm
    before_mlp: Norm
    after_mlp: Norm

    @classmethod
    def of(cls, layer: Any, rows: int | None) -> _Layer:
        attention, mlp = layer.self_attn, layer.mlp
        projections = [attention.q_proj, attention.k_proj, attention.v_proj]
        products = [projections, [attention.o_proj], [mlp.gate_up_proj], [mlp.down_proj]]
        norms = [layer.input_layernorm, layer.post_self_attn_layernorm]
        norms += [layer.post_attention_layernorm, layer.post_mlp_layernorm]
        calls: list[Any] = [*(joined_product(layers, rows) for layers in products), *map(fast_norm, norms)]
        return cls(attention, mlp.activation_fn, *calls)


def fast_norm(norm: Any) -> Norm:
    """transformers' ``GlmImageRMSNorm`` (1910.07467), rounded once: one kernel on a GPU, three on a CPU, not eight.

    Any other norm, or one with hooks, is returned unchanged.
    """
    if type(norm).__name__ != "GlmImageRMSNorm" or not is_plain(norm, type(norm)):
        own: Norm = norm
        return own
    weight, eps = norm.weight.detach(), norm.variance_epsilon
    width = len(weight)
    if weight.device.type != "cpu":
        return lambda x: F.rms_norm(x, (width,), weight, eps)
    # On a CPU torch has no such kernel, but one for LayerNorm: x and -x together have mean 0 and the mean square of x.
    twice = weight.repeat(2)
    return lambda x: F.layer_norm(torch.cat([x, -x], dim=-1), (2 * width,), twice, None, eps)[..., :width]


class PriorDecoder:
    """The prior with a key-value cache for B sequences of at most L tokens.

    The time of a token is that of reading the weights. On a CPU that multiplies bfloat16, packed copies are read
    faster; they are made here, unless ``packed`` is False. The model must not change as long as this object is used.

    Args:
        model: transformers' ``GlmImageForConditionalGeneration``.
        batch: B.
        length: L.
        vocabulary: V, the first tokens of the model.
        packed: whether to make such copies if they are faster; they take as much memory as the weights.
        fixed: whether every token is computed with the same shapes, at the cost of attending to masked positions, so
            that a graph can be captured. None: on a GPU.
        make_capture: given a device; None: CUDA graphs on a GPU, no capture elsewhere.
    """

    def __init__(
        self,
        model: Any,
        batch: int,
        length: int,
        vocabulary: int,
        packed: bool = True,
        fixed: bool | None = None,
        make_capture: Callable[[torch.device], Capture] | None = None,
    ):
        language = model.model.language_model
        self._embed, self._norm, self._rotary = language.embed_tokens, fast_norm(language.norm), language.rotary_emb
        rows = batch if packed else None
        self._layers = [_Layer.of(layer, rows) for layer in language.layers]
        self._head = _head_product(model.lm_head, vocabulary, rows)
        config = language.config
        heads = config.num_key_value_heads or config.num_attention_heads
        weight = language.norm.weight  # quantized layers have none of these dtypes
        options: Any = {"device": weight.device, "dtype": weight.dtype}
        self._fixed = weight.device.type == "cuda" if fixed is None else fixed
        if make_capture is None and weight.device.type == "cuda":
            make_capture = CudaGraphs
        if self._fixed:
            length = -(-length // 64) * 64  # a length at which kernels are faster
        shape = (len(self._layers), 2, batch, heads, length, language.layers[0].self_attn.head_dim)
        self._cache = [tuple(pair) for pair in torch.zeros(shape, **options)]  # keys and values of each layer
        self._bias = torch.zeros(batch, 1, 1, length, **options)  # -inf: padding and, if fixed, later positions
        self._padded = False
        self._length = 0
        # The inputs of a captured token, and its index, which the graph increments.
        self._token = torch.zeros(batch, dtype=torch.long, device=weight.device)
        self._position = torch.zeros(3, batch, dtype=torch.long, device=weight.device)
        self._place = torch.zeros(1, dtype=torch.long, device=weight.device)
        self._replay: Callable[[], Tensor] | None = None
        self._make_capture = make_capture

    @torch.inference_mode()
    def prefill(self, tokens: Tensor, positions: Tensor, mask: Tensor | None = None) -> Tensor:
        """Prompts [B, S] at positions [3, B, S] -> the scores [B, V] of the next token.

        Args:
            mask: [B, S], 1 for tokens and 0 for padding, which is on the left.
        """
        self._padded = mask is not None and not bool(mask.all())
        count = tokens.shape[1]
        self._bias.zero_()
        if self._fixed:
            self._bias[..., count:] = -torch.inf
            self._place.fill_(count)
        causal: Tensor | None = None  # [B, 1, S, S]
        if self._padded:
            assert mask is not None
            causal = torch.ones(count, count, dtype=torch.bool, device=tokens.device).tril()
            self._bias[:, :, :, :count].masked_fill_(~mask.bool()[:, None, None], -torch.inf)
            # Padding attends to itself, so that no row is without a key.
            causal = causal & (mask.bool()[:, None, None] | torch.eye(count, dtype=torch.bool, device=tokens.device))
        self._length = count
        return self._run(tokens, positions, slice(0, count), count, causal)

    @torch.inference_mode()
    def step(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """The next tokens [B] at positions [3, B] -> the scores [B, V] of the ones after them.

        With fixed shapes, the next step overwrites the scores.
        """
        self._length += 1
        if not self._fixed:
            end = self._length
            bias = self._bias[..., :end] if self._padded else None
            return self._run(tokens[:, None], positions[..., None], slice(end - 1, end), end, bias)
        self._token.copy_(tokens)
        self._position.copy_(positions)
        if self._make_capture is None:
            return self._fixed_step()
        if self._replay is None:
            before = self._bias.clone(), self._place.clone()
            self._replay = self._make_capture(self._token.device)(self._fixed_step)
            # What warm-up calls write to later positions of the cache is overwritten.
            self._bias.copy_(before[0])
            self._place.copy_(before[1])
        return self._replay()

    def _fixed_step(self) -> Tensor:
        end = self._cache[0][0].shape[2]
        place = self._place.clamp(max=end - 1)  # warm-up calls for the last token
        self._bias.index_fill_(3, place, 0.0)
        scores = self._run(self._token[:, None], self._position[..., None], place, end, self._bias)
        self._place += 1
        return scores

    def _run(self, tokens: Tensor, positions: Tensor, places: slice | Tensor, end: int, bias: Tensor | None) -> Tensor:
        """Tokens [B, S] at positions [3, B, S] -> scores [B, V]; they fill places of the cache, read up to end."""
        x = self._embed(tokens)  # [B, S, H]
        cos, sin = (part[:, None] for part in self._rotary(x, positions))  # [B, 1, S, rotated channels] each
        sin[..., : sin.shape[-1] // 2].neg_()
        for layer, (keys, values) in zip(self._layers, self._cache, strict=True):
            attended = _attend(layer, layer.before_attention(x), cos, sin, keys, values, places, end, bias)
            x = x + layer.after_attention(attended)
            gate, up = layer.widen(layer.before_mlp(x)).chunk(2, dim=-1)
            x = x + layer.after_mlp(layer.narrow(up * layer.activation(gate)))
        scores: Tensor = self._head(self._norm(x[:, -1]))  # [B, V]
        return scores


def _head_product(head: nn.Module, vocabulary: int, rows: int | None) -> Product:
    """The scores of the first tokens; only those are computed if the layer is a plain one."""
    if not is_plain(head, nn.Linear):
        return lambda x: head(x)[..., :vocabulary]
    assert isinstance(head.weight, Tensor)
    first = nn.Linear(head.weight.shape[1], vocabulary, bias=False, device="meta")
    first.weight = nn.Parameter(head.weight[:vocabulary].detach(), requires_grad=False)  # a view
    return joined_product([first], rows)


def _attend(
    layer: _Layer,
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    places: slice | Tensor,
    end: int,
    bias: Tensor | None,
) -> Tensor:
    """x [B, S, H] -> [B, S, H]; its keys and values are written to the cache, [B, heads, L, d] each."""
    attention = layer.attention
    heads = layer.project(x).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)  # [B, all heads, S, d]
    count = keys.shape[1]
    query_key, value = heads.split([heads.shape[1] - count, count], dim=1)
    _rotate(query_key, cos, sin)
    query, key = query_key.split([query_key.shape[1] - count, count], dim=1)
    if isinstance(places, slice):
        keys[:, :, places], values[:, :, places] = key, value
    else:
        keys.index_copy_(2, places, key)
        values.index_copy_(2, places, value)
    keys, values = keys[:, :, :end], values[:, :, :end]
    if x.shape[1] == 1:  # query heads that share a key as queries of one head, which is faster
        grouped = query.reshape(*keys.shape[:2], -1, attention.head_dim)  # [B, heads, group, d]
        out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=bias, scale=attention.scaling)
        return layer.out(out.flatten(1)[:, None])
    # Without a mask, flash kernels can be used.
    options: Any = {"attn_mask": bias, "is_causal": bias is None, "scale": attention.scaling, "enable_gqa": True}
    out = F.scaled_dot_product_attention(query, keys, values, **options)
    return layer.out(out.transpose(1, 2).flatten(2))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotary embedding of the first channels of [B, heads, S, d], in place; ``sin`` has its first half negated."""
    rotated = x[..., : cos.shape[-1]]
    rotated.copy_(torch.addcmul(rotated * cos, rotated.roll(cos.shape[-1] // 2, dims=-1), sin))
