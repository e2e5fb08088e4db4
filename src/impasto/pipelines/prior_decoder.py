"""The language model of GLM-Image's prior, a token at a time: the latency of a picture.

transformers' own ``generate`` does this for any model. Here the memory of keys and values is allocated once, only the
scores of tokens that a picture may have are computed, and nothing waits for the device between two tokens: on a GPU, a
token is one graph of kernels, recorded once and replayed. The weights are those of the loaded model.

Shapes: B pictures, S tokens at a time, L tokens in all, d channels of a head, H width, V tokens that may be sampled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn.backends.onednn import Product, joined_product
from ..nn.plain import is_plain_linear, is_watched
from .compiling import CudaGraphs, Recorder

Norm = Callable[[Tensor], Tensor]


class Sampling(NamedTuple):
    """How a token is chosen by its scores: a checkpoint's generation settings."""

    temperature: float = 1.0
    top_k: int = 0  # among so many of the likeliest; 0: of all
    top_p: float = 1.0  # among the fewest of the likeliest that have this probability together

    @classmethod
    def of(cls, config: Any) -> Sampling:
        """From transformers' ``GenerationConfig``; what it leaves open is what transformers' ``generate`` takes."""
        usual = cls(temperature=1.0, top_k=50, top_p=1.0)
        given = {name: getattr(config, name, None) for name in cls._fields}
        return usual._replace(**{name: value for name, value in given.items() if value is not None})

    def choose(self, scores: Tensor, uniform: Tensor) -> Tensor:
        """Scores [B, V] and numbers [B] in [0, 1) -> tokens [B], by the inverse of the distribution function."""
        scores = scores.float() / self.temperature
        tokens: Tensor | None = None  # in another order than by number
        if 0 < self.top_k < scores.shape[-1]:
            scores, tokens = scores.topk(self.top_k, dim=-1)  # the likeliest first
        elif self.top_p < 1.0:
            scores, tokens = scores.sort(dim=-1, descending=True, stable=True)
        probabilities = scores.softmax(dim=-1)  # [B, V or top_k]
        if self.top_p < 1.0:
            below = probabilities.cumsum(dim=-1) - probabilities  # that of all likelier ones
            probabilities = torch.where(below < self.top_p, probabilities, 0.0)
        reached = probabilities.cumsum(dim=-1)
        place = torch.searchsorted(reached, (uniform * reached[:, -1])[:, None], right=True)  # [B, 1]
        place = place.clamp(max=scores.shape[-1] - 1)
        chosen = place if tokens is None else tokens.gather(1, place)
        return chosen[:, 0]


class _Layer(NamedTuple):
    """A layer of the model: its products, and the norms before and behind its two halves."""

    attention: Any
    activation: Callable[[Tensor], Tensor]
    project: Product  # to query, key and value, one behind the other
    out: Product
    widen: Product
    narrow: Product
    before_attention: Norm
    behind_attention: Norm
    before_mlp: Norm
    behind_mlp: Norm

    @classmethod
    def of(cls, layer: Any, rows: int | None) -> _Layer:
        attention, mlp = layer.self_attn, layer.mlp
        projections = [attention.q_proj, attention.k_proj, attention.v_proj]
        products = [projections, [attention.o_proj], [mlp.gate_up_proj], [mlp.down_proj]]
        norms = [layer.input_layernorm, layer.post_self_attn_layernorm]
        norms += [layer.post_attention_layernorm, layer.post_mlp_layernorm]
        parts: list[Any] = [*(joined_product(layers, rows) for layers in products), *map(fast_norm, norms)]
        return cls(attention, mlp.activation_fn, *parts)


def fast_norm(norm: Any) -> Norm:
    """transformers' ``GlmImageRMSNorm`` (1910.07467), rounded once: one kernel on a GPU, three on a CPU, not eight.

    One that is watched is called as it is, and so is any other.
    """
    if type(norm).__name__ != "GlmImageRMSNorm" or is_watched(norm):
        own: Norm = norm
        return own
    weight, eps = norm.weight.detach(), norm.variance_epsilon
    width = len(weight)
    if weight.device.type != "cpu":
        return lambda x: F.rms_norm(x, (width,), weight, eps)
    # On a CPU torch has no such kernel, but one of LayerNorm: x and -x together have no mean, and x's mean square.
    twice = weight.repeat(2)
    return lambda x: F.layer_norm(torch.cat([x, -x], dim=-1), (2 * width,), twice, None, eps)[..., :width]


class PriorDecoder:
    """The prior with the keys and values of B sequences of at most L tokens.

    A token is as fast as its weights are read. On a CPU that multiplies bfloat16, packed copies are read faster: made
    here, unless ``packed`` says no, they live as long as this. The model is not to change in the meantime.

    Args:
        model: transformers' ``GlmImageForConditionalGeneration``.
        batch: B.
        length: L.
        vocabulary: V, the first of the model's tokens.
        packed: whether to make such copies, where they are faster; they take as much memory as the weights.
        fixed: whether every token is computed with the same shapes, at the cost of attention to what is not there
            yet: then its kernels can be replayed. None: on a GPU.
        make_recorder: of a device, what replays them; None: CUDA graphs on a GPU, and nothing elsewhere.
    """

    def __init__(
        self,
        model: Any,
        batch: int,
        length: int,
        vocabulary: int,
        packed: bool = True,
        fixed: bool | None = None,
        make_recorder: Callable[[torch.device], Recorder] | None = None,
    ):
        language = model.model.language_model
        self._embed, self._norm, self._rotary = language.embed_tokens, fast_norm(language.norm), language.rotary_emb
        rows = batch if packed else None
        self._layers = [_Layer.of(layer, rows) for layer in language.layers]
        self._head = _head_product(model.lm_head, vocabulary, rows)
        config = language.config
        heads = config.num_key_value_heads or config.num_attention_heads
        weight = language.norm.weight  # quantised layers tell no dtype
        options: Any = {"device": weight.device, "dtype": weight.dtype}
        self._fixed = weight.device.type == "cuda" if fixed is None else fixed
        if make_recorder is None and weight.device.type == "cuda":
            make_recorder = CudaGraphs
        if self._fixed:
            length = -(-length // 64) * 64  # which kernels are faster at
        shape = (len(self._layers), 2, batch, heads, length, language.layers[0].self_attn.head_dim)
        self._memory = [tuple(pair) for pair in torch.zeros(shape, **options)]  # keys and values of each layer
        self._bias = torch.zeros(batch, 1, 1, length, **options)  # -inf: padding, and with fixed shapes what is to come
        self._padded = False
        self._length = 0
        # What a token of fixed shape reads, and its place, which it moves on by itself.
        self._token = torch.zeros(batch, dtype=torch.long, device=weight.device)
        self._position = torch.zeros(3, batch, dtype=torch.long, device=weight.device)
        self._place = torch.zeros(1, dtype=torch.long, device=weight.device)
        self._replay: Callable[[], Tensor] | None = None
        self._make_recorder = make_recorder

    @torch.inference_mode()
    def prefill(self, tokens: Tensor, positions: Tensor, mask: Tensor | None = None) -> Tensor:
        """Read prompts [B, S] at positions [3, B, S] -> the scores [B, V] of what follows.

        Args:
            mask: [B, S], 1 where there is a token; padding is in front.
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
            # Padding attends to itself, so that it has no row without any key.
            causal = causal & (mask.bool()[:, None, None] | torch.eye(count, dtype=torch.bool, device=tokens.device))
        self._length = count
        return self._run(tokens, positions, slice(0, count), count, causal)

    @torch.inference_mode()
    def step(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """One more token [B] of each at positions [3, B] -> the scores [B, V] of what follows.

        With fixed shapes, the next step writes its scores into the same memory.
        """
        self._length += 1
        if not self._fixed:
            end = self._length
            bias = self._bias[..., :end] if self._padded else None
            return self._run(tokens[:, None], positions[..., None], slice(end - 1, end), end, bias)
        self._token.copy_(tokens)
        self._position.copy_(positions)
        if self._make_recorder is None:
            return self._fixed_step()
        if self._replay is None:
            before = self._bias.clone(), self._place.clone()
            self._replay = self._make_recorder(self._token.device)(self._fixed_step)
            # What trials write behind this place of the memory is written over.
            self._bias.copy_(before[0])
            self._place.copy_(before[1])
        return self._replay()

    def _fixed_step(self) -> Tensor:
        end = self._memory[0][0].shape[2]
        place = self._place.clamp(max=end - 1)  # trials at the end
        self._bias.index_fill_(3, place, 0.0)
        scores = self._run(self._token[:, None], self._position[..., None], place, end, self._bias)
        self._place += 1
        return scores

    def _run(self, tokens: Tensor, positions: Tensor, places: slice | Tensor, end: int, bias: Tensor | None) -> Tensor:
        """Tokens [B, S] at positions [3, B, S], which go to places of the memory and read it up to its end."""
        x = self._embed(tokens)  # [B, S, H]
        cos, sin = (part[:, None] for part in self._rotary(x, positions))  # [B, 1, S, rotated channels] each
        sin[..., : sin.shape[-1] // 2].neg_()
        for layer, (keys, values) in zip(self._layers, self._memory, strict=True):
            attended = _attend(layer, layer.before_attention(x), cos, sin, keys, values, places, end, bias)
            x = x + layer.behind_attention(attended)
            gate, up = layer.widen(layer.before_mlp(x)).chunk(2, dim=-1)
            x = x + layer.behind_mlp(layer.narrow(up * layer.activation(gate)))
        scores: Tensor = self._head(self._norm(x[:, -1]))  # [B, V]
        return scores


def _head_product(head: nn.Module, vocabulary: int, rows: int | None) -> Product:
    """The scores of the first tokens alone, where the layer is a plain one."""
    if not is_plain_linear(head):
        return lambda x: head(x)[..., :vocabulary]
    assert isinstance(head.weight, Tensor)
    part = nn.Linear(head.weight.shape[1], vocabulary, bias=False, device="meta")
    part.weight = nn.Parameter(head.weight[:vocabulary].detach(), requires_grad=False)  # of the model's memory
    return joined_product([part], rows)


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
    """x [B, S, H] -> [B, S, H]; its keys and values are put into the memory, [B, heads, L, d] each."""
    attention = layer.attention
    heads = layer.project(x).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)  # [B, all heads, S, d]
    count = keys.shape[1]
    query_key, value = heads.split([heads.shape[1] - count, count], dim=1)
    _turn(query_key, cos, sin)
    query, key = query_key.split([query_key.shape[1] - count, count], dim=1)
    if isinstance(places, slice):
        keys[:, :, places], values[:, :, places] = key, value
    else:
        keys.index_copy_(2, places, key)
        values.index_copy_(2, places, value)
    keys, values = keys[:, :, :end], values[:, :, :end]
    if x.shape[1] == 1:  # heads that share a key as so many queries to it, which torch is faster at
        grouped = query.reshape(*keys.shape[:2], -1, attention.head_dim)  # [B, heads, group, d]
        out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=bias, scale=attention.scaling)
        return layer.out(out.flatten(1)[:, None])
    # Without a mask, kernels that keep no scores can take it.
    options: Any = {"attn_mask": bias, "is_causal": bias is None, "scale": attention.scaling, "enable_gqa": True}
    out = F.scaled_dot_product_attention(query, keys, values, **options)
    return layer.out(out.transpose(1, 2).flatten(2))


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Turn the first channels of [B, heads, S, d] in place by their positions; ``sin`` has its first half negated."""
    turns = x[..., : cos.shape[-1]]
    turns.copy_(torch.addcmul(turns * cos, turns.roll(cos.shape[-1] // 2, dims=-1), sin))
