"""PixArtTransformer2DModel: the denoiser of PixArt-α (2310.00426) and PixArt-Σ (2403.04692).

A forward pass is three stages, from the one that is needed least often to the one that is needed most often::

    context    = model.encode_context(text_embeds, mask)    # once a prompt
    modulation = model.modulate(timestep, conditions)       # once a step, or once for all steps
    output     = model.denoise(latents, context, modulation)

Shapes: B pictures, C channels, H x W latent pixels, N image tokens, M text tokens, D width, L layers.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..checkpoints.config import records_config
from ..errors import ConfigurationError, InputError
from ..nn.attention import attention
from ..nn.embeddings import sincos_2d, timestep_features
from ..nn.layers import FeedForward, TwoLayerMLP, gelu_tanh, modulate, unpatchify
from ..nn.module import Model, require_positive
from ..nn.outputs import Transformer2DModelOutput

logger = logging.getLogger("impasto")

#: A bias at or below this discards a key; the documented value is -10000, which bfloat16 rounds to -9984.
DISCARD = -9000.0


class PixArtContext(NamedTuple):
    """What the denoiser needs of the text, made once a prompt.

    In inference it holds every layer's keys and values; where gradients flow it holds the projected text, and
    each block makes its own, inside its forward. Without any text, blocks attend to their own image tokens.
    """

    text: Tensor | None  # [B, M, D]
    keys: tuple[Tensor, ...] | None  # L of [B, heads, M, head_dim]
    values: tuple[Tensor, ...] | None  # L of [B, heads, M, head_dim]
    bias: Tensor | None  # [B, 1, 1, M], added to the scores; -inf discards

    def select(self, rows: slice | Tensor | list[int]) -> PixArtContext:
        """The contexts of some rows of the batch."""

        def take(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[rows]

        return PixArtContext(
            text=take(self.text),
            keys=None if self.keys is None else tuple(key[rows] for key in self.keys),
            values=None if self.values is None else tuple(value[rows] for value in self.values),
            bias=take(self.bias),
        )

    @staticmethod
    def concat(contexts: Sequence[PixArtContext]) -> PixArtContext:
        """One batch of several; shorter texts are padded with discarded tokens."""
        first = contexts[0]
        if first.text is None and first.keys is None:
            return first
        lengths = [context.length for context in contexts]
        longest = max(lengths)

        def padded(x: Tensor, dim: int) -> Tensor:
            return F.pad(x, (0, 0) * (x.ndim - 1 - dim) + (0, longest - x.shape[dim]))

        def layers(name: str) -> tuple[Tensor, ...] | None:
            columns = [getattr(context, name) for context in contexts]
            if columns[0] is None:
                return None
            return tuple(torch.cat([padded(x, 2) for x in layer]) for layer in zip(*columns, strict=True))

        text = None if first.text is None else torch.cat([padded(c.text, 1) for c in contexts if c.text is not None])
        bias: Tensor | None = None
        if any(c.bias is not None for c in contexts) or len(set(lengths)) > 1:
            bias = torch.cat([F.pad(c._bias_or_zeros(), (0, longest - c.length), value=-torch.inf) for c in contexts])
        return PixArtContext(text, layers("keys"), layers("values"), bias)

    @property
    def _any(self) -> Tensor:
        some = self.text if self.keys is None else self.keys[0]
        assert some is not None
        return some

    @property
    def length(self) -> int:
        """Number of text tokens, M."""
        return self._any.shape[-2]

    def _bias_or_zeros(self) -> Tensor:
        return self._any.new_zeros(self._any.shape[0], 1, 1, self.length) if self.bias is None else self.bias


class Modulation(NamedTuple):
    """What the denoiser needs of the timestep (and of the micro-conditions): adaLN-single of PixArt-α, 2.3."""

    shared: Tensor  # [B, 6, D]: shift, scale, gate of attention; shift, scale, gate of the feed-forward
    timestep: Tensor  # [B, 1, D]: for the last layer

    def select(self, rows: slice | Tensor | list[int]) -> Modulation:
        """The modulation of some rows: of one step, where it was made for all of them."""
        return Modulation(self.shared[rows], self.timestep[rows])

    @staticmethod
    def concat(modulations: Sequence[Modulation]) -> Modulation:
        return Modulation(torch.cat([m.shared for m in modulations]), torch.cat([m.timestep for m in modulations]))


class PixArtTransformer2DModel(Model):
    """Predicts the noise (and, with twice the channels, its variance) in latents, given text and timestep.

    α and Σ differ by config alone. Arguments are those of the diffusers class of this name.

    Args:
        num_attention_heads, attention_head_dim: their product is the width D.
        in_channels, out_channels: of the latents and the prediction; 8 for 4 is a learned variance.
        num_layers: number of blocks.
        dropout: probability, in training.
        norm_num_groups: stored; no layer has group normalisation.
        cross_attention_dim: width of the text that the blocks see; None removes cross-attention.
        attention_bias: whether the projections to query, key and value have a bias.
        sample_size: side of the latents in training; sets the scale of positions.
        patch_size: latent pixels to a side of a token.
        activation_fn: of the feed-forward.
        num_embeds_ada_norm: stored; timesteps are embedded by their features, so any number of them works.
        upcast_attention: compute attention in float32.
        norm_type: "ada_norm_single", the only one that PixArt has.
        norm_elementwise_affine, norm_eps: of the blocks' layer normalisations.
        interpolation_scale: of positions; max(sample_size // 64, 1) if None.
        use_additional_conditions: embed resolution and aspect ratio; None means where sample_size is 128.
        caption_channels: width of the text embeddings, projected to D; None leaves them as they are.
        attention_type: "default", the only one that PixArt has.
        use_linear_projection, num_vector_embeds: deprecated; stored.

    Raises:
        ConfigurationError: a value that cannot be used, by name.
    """

    ignored_config_keys: ClassVar[frozenset[str]] = frozenset(
        {"double_self_attention", "only_cross_attention", "num_vector_embeds", "use_linear_projection"}
    )

    @records_config
    def __init__(
        self,
        num_attention_heads: int = 16,
        attention_head_dim: int = 72,
        in_channels: int = 4,
        out_channels: int | None = 8,
        num_layers: int = 28,
        dropout: float = 0.0,
        norm_num_groups: int = 32,
        cross_attention_dim: int | None = 1152,
        attention_bias: bool = True,
        sample_size: int = 128,
        patch_size: int = 2,
        activation_fn: str = "gelu-approximate",
        num_embeds_ada_norm: int | None = 1000,
        upcast_attention: bool = False,
        norm_type: str = "ada_norm_single",
        norm_elementwise_affine: bool = False,
        norm_eps: float = 1e-6,
        interpolation_scale: float | None = None,
        use_additional_conditions: bool | None = None,
        caption_channels: int | None = None,
        attention_type: str | None = "default",
        use_linear_projection: bool = False,
        num_vector_embeds: int | None = None,
    ):
        super().__init__()
        name = type(self).__name__
        if norm_type != "ada_norm_single":
            raise ConfigurationError(f"{name}: norm_type {norm_type!r} is not PixArt's; use 'ada_norm_single'")
        if attention_type not in ("default", None):
            raise ConfigurationError(f"{name}: attention_type {attention_type!r} is not PixArt's; use 'default'")
        if num_vector_embeds:
            raise ConfigurationError(
                f"{name}: num_vector_embeds={num_vector_embeds} asks for discrete latents; leave it"
            )
        require_positive(
            name,
            num_attention_heads=num_attention_heads,
            attention_head_dim=attention_head_dim,
            in_channels=in_channels,
            num_layers=num_layers,
            sample_size=sample_size,
            patch_size=patch_size,
        )
        if num_embeds_ada_norm is None:
            raise ConfigurationError(f"{name}: num_embeds_ada_norm cannot be None; the published models have 1000")
        if not 0.0 <= dropout < 1.0:
            raise ConfigurationError(f"{name}: dropout must be in [0, 1), not {dropout!r}")
        width = num_attention_heads * attention_head_dim
        if width % 4:
            raise ConfigurationError(
                f"{name}: num_attention_heads * attention_head_dim is {width}; 2-D positions need a multiple of 4"
            )
        if use_additional_conditions is None:
            use_additional_conditions = sample_size == 128
        if use_additional_conditions and width % 3:
            raise ConfigurationError(
                f"{name}: use_additional_conditions splits the width {width} in three; it must be a multiple of 3"
            )
        if caption_channels is not None and cross_attention_dim not in (None, width):
            raise ConfigurationError(
                f"{name}: captions are projected to the width {width}, so cross_attention_dim cannot be "
                f"{cross_attention_dim}; make them equal, or leave caption_channels None"
            )

        self.inner_dim = width
        self.has_cross_attention = cross_attention_dim is not None
        self.out_channels = out_channels or in_channels
        self.in_channels = in_channels
        self.patch_size = patch_size
        self.base_size = sample_size // patch_size
        self.interpolation_scale = max(sample_size // 64, 1) if interpolation_scale is None else interpolation_scale
        self.use_additional_conditions = use_additional_conditions
        self.gradient_checkpointing = False

        self.pos_embed = PatchEmbed(in_channels, width, patch_size)
        self.adaln_single = AdaLayerNormSingle(width, use_additional_conditions)
        self.caption_projection = (
            None if caption_channels is None else TwoLayerMLP(caption_channels, width, activation=gelu_tanh)
        )
        self.transformer_blocks = nn.ModuleList(
            PixArtBlock(
                width,
                num_attention_heads,
                cross_attention_dim,
                attention_bias=attention_bias,
                activation_fn=activation_fn,
                dropout=dropout,
                norm_elementwise_affine=norm_elementwise_affine,
                norm_eps=norm_eps,
                upcast_attention=upcast_attention,
            )
            for _ in range(num_layers)
        )
        self.scale_shift_table = nn.Parameter(torch.randn(2, width) / width**0.5)
        self.proj_out = nn.Linear(width, patch_size**2 * self.out_channels)

    # The three stages

    def encode_context(self, text_embeds: Tensor | None, mask: Tensor | None = None) -> PixArtContext:
        """Project the text and, in inference, make every layer's keys and values.

        Discarded tokens are left out, so that padded text costs nothing; in training and inside a compiled graph,
        where shapes are to be static, they are masked.

        Args:
            text_embeds: [B, M, caption_channels], or [B, M, cross_attention_dim] without ``caption_channels``;
                None (only without ``caption_channels``): blocks attend to the image tokens.
            mask: [B, M], true (or 1) keeps; or [B, 1, M], a bias added to the scores, where -10000 discards.
        """
        if text_embeds is None:
            if self.caption_projection is not None:
                raise InputError(
                    "encoder_hidden_states is None, and this model projects captions; give text embeddings "
                    "(those of the empty prompt for an unconditional picture)"
                )
            return PixArtContext(None, None, None, None if mask is None else _bias(mask))
        if not self.has_cross_attention:
            return PixArtContext(None, None, None, None)
        bias = None if mask is None else _bias(mask)
        layout = None
        if bias is not None and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            layout = _Layout.of(bias)
            text_embeds, bias = (
                layout.pack(text_embeds),
                layout.pack_bias(bias),
            )  # [1, T, C]: the real tokens alone

        text = text_embeds if self.caption_projection is None else self.caption_projection(text_embeds)  # [B, M, D]
        if torch.is_grad_enabled():
            return PixArtContext(text, None, None, bias)
        pairs = [block.encode_text(text) for block in self.transformer_blocks]
        if layout is not None:
            pairs = [(layout.unpack(key), layout.unpack(value)) for key, value in pairs]
        return PixArtContext(None, tuple(key for key, _ in pairs), tuple(value for _, value in pairs), bias)

    def modulate(self, timestep: Tensor, conditions: Mapping[str, Tensor | None] | None = None) -> Modulation:
        """Embed timesteps and micro-conditions.

        Args:
            timestep: [B], integers or fractions in the units of training (0 to 999).
            conditions: ``resolution`` [B, 2] (height and width in pixels) and ``aspect_ratio`` [B, 1]
                (height / width), for models with ``use_additional_conditions``; may be None elsewhere.
        """
        modulation: Modulation = self.adaln_single(timestep, conditions or {})
        return modulation

    def denoise(
        self,
        latents: Tensor,
        context: PixArtContext,
        modulation: Modulation,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Predict [B, out_channels, H, W] from latents [B, in_channels, H, W]; ``attention_mask`` as in forward."""
        height, width = latents.shape[-2] // self.patch_size, latents.shape[-1] // self.patch_size
        x = self.pos_embed(latents)  # [B, N, D]
        x = x + sincos_2d(self.inner_dim, height, width, self.base_size, self.interpolation_scale, x.device).to(x.dtype)

        self_bias = _image_bias(attention_mask, x)  # [B, 1, 1, N]
        for i, block in enumerate(self.transformer_blocks):
            text = context.text if context.keys is None else None
            key_value = None if context.keys is None or context.values is None else (context.keys[i], context.values[i])
            arguments = (x, modulation.shared, text, key_value, context.bias, self_bias)
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, *arguments, use_reentrant=False)  # [B, N, D]
            else:
                x = block(*arguments)  # [B, N, D]

        shift, scale = (self.scale_shift_table[None] + modulation.timestep).chunk(2, dim=1)  # [B, 1, D] each
        x = modulate(F.layer_norm(x, (self.inner_dim,), eps=1e-6), shift, scale)
        return unpatchify(self.proj_out(x), height, width, self.patch_size)  # [B, out_channels, H, W]

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | PixArtContext | None = None,
        timestep: Tensor | Modulation | None = None,
        added_cond_kwargs: Mapping[str, Tensor | None] | None = None,
        cross_attention_kwargs: Mapping[str, Any] | None = None,
        attention_mask: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predict the noise in latents.

        Args:
            hidden_states: latents [B, in_channels, H, W]; ``patch_size`` divides H and W.
            encoder_hidden_states: text embeddings [B, M, caption_channels], or what ``encode_context`` made.
            timestep: [B] (or one for all), or what ``modulate`` made.
            added_cond_kwargs: the micro-conditions ``resolution`` [B, 2] and ``aspect_ratio`` [B, 1].
            cross_attention_kwargs: accepted as documented; attention takes none (``scale`` is ignored).
            attention_mask: which image tokens self-attention may read: [B, N], true (or 1) keeps; or a bias
                [B, 1, N].
            encoder_attention_mask: which text tokens count: [B, M], true (or 1) keeps; or a bias [B, 1, M],
                where -10000 discards.
            return_dict: False returns a plain tuple.

        Returns:
            ``.sample``: [B, out_channels, H, W].

        Raises:
            InputError: a shape that does not fit, with the shape that would.
        """
        self._check_latents(hidden_states)
        if cross_attention_kwargs and set(cross_attention_kwargs) - {"scale"}:
            raise InputError(
                f"cross_attention_kwargs {sorted(cross_attention_kwargs)}: PixArt's attention takes none of them"
            )
        batch = hidden_states.shape[0]
        if isinstance(encoder_hidden_states, PixArtContext):
            context = encoder_hidden_states
        else:
            self._check_text(encoder_hidden_states, encoder_attention_mask, batch)
            context = self.encode_context(encoder_hidden_states, encoder_attention_mask)
        if isinstance(timestep, Modulation):
            modulation = timestep
        else:
            modulation = self.modulate(_timesteps(timestep, batch, hidden_states.device), added_cond_kwargs)
        output = self.denoise(hidden_states, context, modulation, attention_mask)
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)

    # Documented switches

    def enable_gradient_checkpointing(self) -> None:
        """Recompute each block in the backward pass, to save memory."""
        self.gradient_checkpointing = True

    def disable_gradient_checkpointing(self) -> None:
        self.gradient_checkpointing = False

    def fuse_qkv_projections(self) -> None:
        """One product for query, key and value of self-attention, and one for key and value of cross-attention.

        The state dict stays as it is. Raises ``ConfigurationError`` where an adapter wraps a projection.
        """
        for block in self.transformer_blocks:
            assert isinstance(block, PixArtBlock)
            block.attn1.fuse(cross=False)
            if block.attn2 is not None:
                block.attn2.fuse(cross=True)

    def unfuse_qkv_projections(self) -> None:
        """Undo ``fuse_qkv_projections``."""
        for module in self.modules():
            if isinstance(module, Attention):
                module.unfuse()

    def set_default_attn_processor(self) -> None:
        """Go back to the default attention: that is, undo ``fuse_qkv_projections``."""
        self.unfuse_qkv_projections()

    # Checks and loading

    def _check_latents(self, latents: Tensor) -> None:
        expected = f"[batch, {self.in_channels}, height, width] with sides that {self.patch_size} divides"
        if latents.ndim != 4 or latents.shape[1] != self.in_channels:
            raise InputError(f"hidden_states has shape {list(latents.shape)}; expected {expected}")
        if latents.shape[2] % self.patch_size or latents.shape[3] % self.patch_size or 0 in latents.shape[2:]:
            raise InputError(f"hidden_states has shape {list(latents.shape)}; expected {expected}")

    def _check_text(self, text: Tensor | None, mask: Tensor | None, batch: int) -> None:
        if text is None:
            return
        if text.ndim != 3 or text.shape[0] != batch:
            raise InputError(
                f"encoder_hidden_states has shape {list(text.shape)}; expected [{batch}, tokens, channels]"
            )
        if mask is not None and tuple(mask.shape) not in {(batch, text.shape[1]), (batch, 1, text.shape[1])}:
            raise InputError(
                f"encoder_attention_mask has shape {list(mask.shape)}; expected {[batch, text.shape[1]]} "
                f"(1 keeps) or {[batch, 1, text.shape[1]]} (a bias)"
            )

    @classmethod
    def _fit_config(cls, config: dict[str, Any], stored_names: set[str]) -> dict[str, Any]:
        # Early configs lack the key, and the class's rule for None is wrong for Σ at 1024: the weights decide.
        if config.get("use_additional_conditions") is None:
            found = any(name.startswith("adaln_single.emb.resolution_embedder") for name in stored_names)
            config = {**config, "use_additional_conditions": found}
        return config


class PatchEmbed(nn.Module):
    """A token for each patch of the latents; keys ``proj.*``."""

    def __init__(self, in_channels: int, width: int, patch_size: int):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, latents: Tensor) -> Tensor:
        tokens: Tensor = self.proj(latents)  # [B, D, H / p, W / p]
        return tokens.flatten(2).transpose(1, 2)  # [B, N, D]


class AdaLayerNormSingle(nn.Module):
    """The modulation that all blocks share (PixArt-α, 2.3)."""

    def __init__(self, width: int, use_additional_conditions: bool):
        super().__init__()
        self.emb = TimestepAndSizeEmbedder(width, use_additional_conditions)
        self.linear = nn.Linear(width, 6 * width)

    def forward(self, timestep: Tensor, conditions: Mapping[str, Tensor | None]) -> Modulation:
        embedded = self.emb(timestep, conditions, self.linear.weight.dtype)  # [B, D]
        shared = self.linear(F.silu(embedded))  # [B, 6 * D]
        return Modulation(shared=shared.unflatten(-1, (6, -1)), timestep=embedded[:, None])


class TimestepAndSizeEmbedder(nn.Module):
    """Timestep features, and for α at 1024 px those of resolution and aspect ratio, added to them."""

    def __init__(self, width: int, use_additional_conditions: bool):
        super().__init__()
        self.timestep_embedder = TwoLayerMLP(256, width)
        self.use_additional_conditions = use_additional_conditions
        if use_additional_conditions:
            self.resolution_embedder = TwoLayerMLP(256, width // 3)
            self.aspect_ratio_embedder = TwoLayerMLP(256, width // 3)

    def forward(self, timestep: Tensor, conditions: Mapping[str, Tensor | None], dtype: torch.dtype) -> Tensor:
        embedded: Tensor = self.timestep_embedder(timestep_features(timestep).to(dtype))  # [B, D]
        if not self.use_additional_conditions:
            return embedded
        resolution, aspect_ratio = conditions.get("resolution"), conditions.get("aspect_ratio")
        if resolution is None or aspect_ratio is None:
            raise InputError(
                "this model takes micro-conditions: give added_cond_kwargs={'resolution': [B, 2] (height and "
                "width in pixels), 'aspect_ratio': [B, 1] (height / width)}"
            )
        parts = [
            self.resolution_embedder(timestep_features(resolution[:, 0]).to(dtype)),  # [B, D / 3]
            self.resolution_embedder(timestep_features(resolution[:, 1]).to(dtype)),  # [B, D / 3]
            self.aspect_ratio_embedder(timestep_features(aspect_ratio.flatten()).to(dtype)),  # [B, D / 3]
        ]
        return embedded + torch.cat(parts, dim=-1)  # [B, D]


class PixArtBlock(nn.Module):
    """Self-attention, cross-attention, feed-forward; the first and the last are modulated by the timestep."""

    def __init__(
        self,
        width: int,
        heads: int,
        cross_attention_dim: int | None,
        *,
        attention_bias: bool,
        activation_fn: str,
        dropout: float,
        norm_elementwise_affine: bool,
        norm_eps: float,
        upcast_attention: bool,
    ):
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.randn(6, width) / width**0.5)
        self.norm1 = nn.LayerNorm(width, eps=norm_eps, elementwise_affine=norm_elementwise_affine)
        self.attn1 = Attention(width, width, heads, attention_bias, dropout, upcast_attention)
        self.attn2 = (
            None
            if cross_attention_dim is None
            else Attention(width, cross_attention_dim, heads, attention_bias, dropout, upcast_attention)
        )
        self.norm2 = nn.LayerNorm(width, eps=norm_eps, elementwise_affine=norm_elementwise_affine)
        self.ff = FeedForward(width, activation_fn, dropout)

    def encode_text(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, heads, M, head_dim] of the projected text [B, M, D]."""
        assert self.attn2 is not None
        return self.attn2.keys_values(text)

    def forward(
        self,
        x: Tensor,
        shared: Tensor,
        text: Tensor | None,
        key_value: tuple[Tensor, Tensor] | None,
        text_bias: Tensor | None,
        self_bias: Tensor | None,
    ) -> Tensor:
        modulation = self.scale_shift_table[None] + shared  # [B, 6, D]
        shift_attn, scale_attn, gate_attn, shift_ff, scale_ff, gate_ff = modulation.chunk(6, dim=1)  # [B, 1, D] each

        attended = self.attn1.self_attention(modulate(self.norm1(x), shift_attn, scale_attn), self_bias)
        x = torch.addcmul(x, gate_attn, attended)  # [B, N, D]
        if self.attn2 is not None:  # not normalised: the original model has no layer norm here
            if key_value is None:
                key_value = self.attn2.keys_values(x if text is None else text)
            x = x + self.attn2.cross_attention(x, *key_value, text_bias)  # [B, N, D]
        return torch.addcmul(x, gate_ff, self.ff(modulate(self.norm2(x), shift_ff, scale_ff)))  # [B, N, D]


class Attention(nn.Module):
    """Multi-head attention of image tokens to themselves or to the text."""

    def __init__(self, width: int, context_dim: int, heads: int, bias: bool, dropout: float, upcast: bool):
        super().__init__()
        self.heads = heads
        self.upcast = upcast
        self.to_q = nn.Linear(width, width, bias=bias)
        self.to_k = nn.Linear(context_dim, width, bias=bias)
        self.to_v = nn.Linear(context_dim, width, bias=bias)
        self.to_out = nn.Sequential(nn.Linear(width, width), nn.Dropout(dropout))
        self._fused: FusedLinear | None = None

    def self_attention(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """[B, N, D] -> [B, N, D]; bias [B, 1, 1, N]."""
        if self._fused is not None and self._fused.holds(self.to_q, self.to_k, self.to_v):
            query, key, value = self._fused(x).chunk(3, dim=-1)  # [B, N, D] each
        else:
            query, key, value = self.to_q(x), self.to_k(x), self.to_v(x)  # [B, N, D] each
        return self._attend(query, self._split(key), self._split(value), bias)

    def keys_values(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """[B, M, C] -> two of [B, heads, M, head_dim]."""
        if self._fused is not None and self._fused.holds(self.to_k, self.to_v):
            key, value = self._fused(text).chunk(2, dim=-1)  # [B, M, D] each
        else:
            key, value = self.to_k(text), self.to_v(text)  # [B, M, D] each
        return self._split(key), self._split(value)

    def cross_attention(self, x: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        """[B, N, D] -> [B, N, D]; key and value [B, heads, M, head_dim], bias [B, 1, 1, M]."""
        return self._attend(self.to_q(x), key, value, bias)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        q = self._split(query)
        if self.upcast:
            q, key, value = q.float(), key.float(), value.float()
        out = attention(q, key, value, bias).to(query.dtype)  # [B, heads, N, head_dim]
        projected: Tensor = self.to_out(out.transpose(1, 2).flatten(2))  # [B, N, D]
        return projected

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, heads, N, head_dim]

    def fuse(self, cross: bool) -> None:
        """Compute key and value (and in self-attention the query) in one product."""
        layers = [self.to_k, self.to_v] if cross else [self.to_q, self.to_k, self.to_v]
        self._fused = FusedLinear(layers)

    def unfuse(self) -> None:
        self._fused = None

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # Moving or casting gives every projection storage of its own again.
        super()._apply(fn, recurse)
        if self._fused is not None:
            self._fused = FusedLinear(self._fused.layers)
        return self


class FusedLinear:
    """Several linear layers of one input as one product, whose matrix is the layers' own memory.

    The layers' parameters become views of it, so that it costs no memory, and what is loaded into them in place
    is seen here too.
    """

    def __init__(self, layers: Sequence[nn.Module]):
        for layer in layers:
            if type(layer) is not nn.Linear:
                raise ConfigurationError(
                    f"cannot fuse a {type(layer).__name__}: an adapter or a quantised layer is in the place of a "
                    f"linear projection. Merge or remove it first."
                )
        self.layers: list[nn.Linear] = list(layers)  # type: ignore[arg-type]
        with torch.no_grad():
            self.weight = torch.cat([layer.weight for layer in self.layers])
            self.bias = None if self.layers[0].bias is None else torch.cat([layer.bias for layer in self.layers])
            sizes = [layer.out_features for layer in self.layers]
            for i, layer in enumerate(self.layers):
                layer.weight.data = self.weight.split(sizes)[i]
                if self.bias is not None:
                    layer.bias.data = self.bias.split(sizes)[i]
        self._parameters = [parameter for layer in self.layers for parameter in layer.parameters()]

    def holds(self, *layers: nn.Module) -> bool:
        """Whether the fused matrix may stand for these layers: none was replaced, and no gradient is wanted."""
        if torch.is_grad_enabled():
            return False
        if any(mine is not theirs for mine, theirs in zip(self.layers, layers)):
            return False
        current = [parameter for layer in self.layers for parameter in layer.parameters()]
        return all(mine is theirs for mine, theirs in zip(self._parameters, current))

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class _Layout(NamedTuple):
    """Where the kept text tokens of a batch lie: row by row in one packed sequence, or at the left of each row."""

    keep: Tensor  # [B, M], true for the tokens that count
    row: Tensor  # [T]
    column: Tensor  # [T], counted among the kept ones
    longest: int

    @classmethod
    def of(cls, bias: Tensor) -> _Layout:
        keep = bias[:, 0, 0] > -torch.inf  # [B, M]
        row = keep.nonzero()[:, 0]
        column = (keep.cumsum(dim=1) - 1)[keep]
        return cls(keep, row, column, max(1, int(keep.sum(dim=1).max())))

    def pack(self, text: Tensor) -> Tensor:
        """[B, M, C] -> [1, T, C]."""
        return text[self.keep][None]

    def pack_bias(self, bias: Tensor) -> Tensor | None:
        """[B, 1, 1, M] -> [B, 1, 1, longest]; None where nothing is left to add."""
        packed = bias.new_full((bias.shape[0], self.longest), -torch.inf)
        packed[self.row, self.column] = bias[:, 0, 0][self.keep]
        return packed[:, None, None] if bool((packed != 0).any()) else None

    def unpack(self, x: Tensor) -> Tensor:
        """[1, heads, T, C] -> [B, heads, longest, C]; what is not there is 0."""
        padded = x.new_zeros(self.keep.shape[0], self.longest, x.shape[1], x.shape[3])
        padded[self.row, self.column] = x[0].transpose(0, 1)
        return padded.transpose(1, 2)


def _bias(mask: Tensor) -> Tensor:
    """Either mask format -> a bias [B, 1, 1, M] in which -inf discards."""
    if mask.ndim == 2:
        zeros = torch.zeros(mask.shape, device=mask.device)
        return zeros.masked_fill(~mask.bool(), -torch.inf)[:, None, None]
    bias = mask.float()
    return bias.masked_fill(bias <= DISCARD, -torch.inf)[:, None]


def _image_bias(mask: Tensor | None, x: Tensor) -> Tensor | None:
    """The bias [B, 1, 1, N] of self-attention. A row that discards every token keeps them all."""
    if mask is None:
        return None
    if tuple(mask.shape) not in {(x.shape[0], x.shape[1]), (x.shape[0], 1, x.shape[1])}:
        raise InputError(
            f"attention_mask has shape {list(mask.shape)}; it masks image tokens: expected {list(x.shape[:2])} "
            f"(1 keeps) or {[x.shape[0], 1, x.shape[1]]} (a bias)"
        )
    if mask.ndim == 2:
        return ((~mask.bool()).to(x.dtype) * -10_000.0)[:, None, None]
    return mask.to(x.dtype)[:, None]


def _timesteps(timestep: Tensor | float | None, batch: int, device: torch.device) -> Tensor:
    if timestep is None:
        raise InputError("timestep is None; give one number for the batch or one for each picture")
    timesteps = torch.as_tensor(timestep, device=device).reshape(-1)
    if timesteps.shape[0] not in (1, batch):
        raise InputError(f"timestep has {timesteps.shape[0]} values for {batch} pictures; give 1 or {batch}")
    return timesteps
