"""PixArtTransformer2DModel: the denoiser of PixArt-α (2310.00426) and PixArt-Σ (2403.04692).

A forward pass is three stages, from the one that is needed least often to the one that is needed most often::

    context    = model.encode_context(text_embeds, mask)    # once a prompt
    modulation = model.modulate(timestep, conditions)       # once a step, or once for all steps
    output     = model.denoise(latents, context, modulation)

Shapes: B pictures, C channels, H x W latent pixels, N image tokens, M text tokens, D width, L layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checkpoints.config import records_config
from ...checkpoints.values import MOST_CHANNELS, Count, Epsilon, Offset, Patch, Scale, Share
from ...checks import shown
from ...errors import ConfigurationError, InputError
from ...nn.embeddings import sincos_2d
from ...nn.layers import TwoLayerMLP, gelu_tanh, modulate, unpatchify
from ...nn.masks import text_bias
from ...nn.outputs import Transformer2DModelOutput
from ...nn.precision import checkpointed
from ..base import Model
from .blocks import AdaLayerNormSingle, Attention, PatchEmbed, PixArtBlock
from .text import AbsorbedText, Modulation, PixArtContext, TextKeys, TextLayout, image_bias

__all__ = ["Modulation", "PixArtContext", "PixArtTransformer2DModel"]


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

    stored_lists: ClassVar[Mapping[str, str]] = {"num_layers": "transformer_blocks"}

    @records_config
    def __init__(
        self,
        num_attention_heads: Count = 16,
        attention_head_dim: Count = 72,
        in_channels: Count = 4,
        out_channels: Count | None = 8,
        num_layers: Count = 28,
        dropout: Share = 0.0,
        norm_num_groups: Count = 32,
        cross_attention_dim: Count | None = 1152,
        attention_bias: bool = True,
        sample_size: Count = 128,
        patch_size: Patch = 2,
        activation_fn: str = "gelu-approximate",
        num_embeds_ada_norm: Count | None = 1000,
        upcast_attention: bool = False,
        norm_type: str = "ada_norm_single",
        norm_elementwise_affine: bool = False,
        norm_eps: Epsilon = 1e-6,
        interpolation_scale: Scale | None = None,
        use_additional_conditions: bool | None = None,
        caption_channels: Count | None = None,
        attention_type: str | None = "default",
        use_linear_projection: bool = False,
        num_vector_embeds: Offset | None = None,
    ):
        super().__init__()
        name = type(self).__name__
        if norm_type != "ada_norm_single":
            raise ConfigurationError(f"{name}: norm_type {shown(norm_type)} is not PixArt's; use 'ada_norm_single'")
        if attention_type not in ("default", None):
            raise ConfigurationError(f"{name}: attention_type {shown(attention_type)} is not PixArt's; use 'default'")
        if num_vector_embeds:
            raise ConfigurationError(
                f"{name}: num_vector_embeds={num_vector_embeds} asks for discrete latents; leave it"
            )
        if sample_size < patch_size:
            raise ConfigurationError(f"{name}: sample_size {sample_size} is smaller than patch_size {patch_size}")
        if num_embeds_ada_norm is None:
            raise ConfigurationError(f"{name}: num_embeds_ada_norm cannot be None; the published models have 1000")
        if dropout == 1:
            raise ConfigurationError(f"{name}: dropout must be in [0, 1), not {dropout!r}")
        width = num_attention_heads * attention_head_dim
        if width % 4 or width > MOST_CHANNELS:
            raise ConfigurationError(
                f"{name}: num_attention_heads * attention_head_dim is {width}; 2-D positions need a multiple of 4, "
                f"of at most {MOST_CHANNELS}"
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
        self.text_channels = cross_attention_dim if caption_channels is None else caption_channels
        self.out_channels = out_channels or in_channels
        self.in_channels = in_channels
        self.patch_size = patch_size
        self.base_size = sample_size // patch_size
        self.interpolation_scale = max(sample_size // 64, 1) if interpolation_scale is None else interpolation_scale
        self.use_additional_conditions = use_additional_conditions
        self.gradient_checkpointing = False

        self.pos_embed = PatchEmbed(in_channels, width, patch_size)
        self.adaln_single = AdaLayerNormSingle(width, use_additional_conditions)
        self.caption_projection: TwoLayerMLP | None = (
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

        Raises:
            InputError: text or mask of another shape, or no text where captions are projected.
        """
        if text_embeds is None:
            if self.caption_projection is not None:
                raise InputError(
                    "encoder_hidden_states is None, and this model projects captions; give text embeddings "
                    "(those of the empty prompt for an unconditional picture)"
                )
            return PixArtContext(None, None, None, None if mask is None else text_bias(mask))
        self._check_text(text_embeds, mask)
        if not self.has_cross_attention:
            return PixArtContext(None, None, None, None)
        bias = None if mask is None else text_bias(mask)
        layout = None
        if bias is not None and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            layout = TextLayout.of(bias)
            text_embeds, bias = layout.pack(text_embeds), layout.pack_bias(bias)  # [1, T, C]: the real tokens alone

        text = text_embeds if self.caption_projection is None else self.caption_projection(text_embeds)  # [B, M, D]
        if torch.is_grad_enabled():
            return PixArtContext(text, None, None, bias)
        if self._holds_rows(text):
            return PixArtContext(None, None, None, None, self._encode_rows(text, bias, layout))
        pairs = [cast(PixArtBlock, block).encode_text(text) for block in self.transformer_blocks]
        if layout is not None:
            pairs = [(layout.unpack(key), layout.unpack(value)) for key, value in pairs]
        return PixArtContext(None, tuple(key for key, _ in pairs), tuple(value for _, value in pairs), bias)

    @staticmethod
    def _holds_rows(text: Tensor) -> bool:
        """Only on the CPU: rows of several lengths are no static graph, and small products do not fill a GPU."""
        return text.device.type == "cpu" and not torch.compiler.is_compiling()

    def _encode_rows(
        self, text: Tensor, bias: Tensor | None, layout: TextLayout | None
    ) -> tuple[tuple[AbsorbedText | TextKeys, ...], ...]:
        """Each row of a projected text [B, M, D], or of a packed one [1, T, D], for each layer."""
        lengths = [text.shape[1]] * text.shape[0] if layout is None else layout.lengths
        rows = text.flatten(0, 1).split(lengths)  # B of [M, D]
        biases: list[Tensor | None] = [None] * len(rows)
        if bias is not None:  # that of padding adds nothing to what is kept
            kept = [bias[i, 0, 0, :length] for i, length in enumerate(lengths)]
            biases = [row if bool(row.any()) else None for row in kept]
        layers = [cast(PixArtBlock, block).encode_rows(rows, biases) for block in self.transformer_blocks]
        return tuple(zip(*layers, strict=True))

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

        self_bias = image_bias(attention_mask, x)  # [B, 1, 1, N]
        for i, block in enumerate(self.transformer_blocks):
            text = context.text if context.keys is None else None
            key_value = None if context.keys is None or context.values is None else (context.keys[i], context.values[i])
            rows = None if context.by_row is None else [row[i] for row in context.by_row]
            arguments = (x, modulation.shared, text, key_value, context.bias, self_bias, rows)
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpointed(block, *arguments)  # [B, N, D]
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
            context = self.encode_context(encoder_hidden_states, encoder_attention_mask)
        if isinstance(timestep, Modulation):
            modulation = timestep
        else:
            modulation = self.modulate(_timesteps(timestep, batch, hidden_states.device), added_cond_kwargs)
        self._check_rows(hidden_states, context, modulation)
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
        try:
            for block in self.transformer_blocks:
                cast(PixArtBlock, block).fuse()
        except ConfigurationError:
            self.unfuse_qkv_projections()
            raise

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

    def _check_text(self, text: Tensor, mask: Tensor | None) -> None:
        if text.ndim != 3 or self.text_channels not in (None, text.shape[2]):
            raise InputError(
                f"encoder_hidden_states has shape {list(text.shape)}; expected [batch, tokens, {self.text_channels}]"
            )
        batch, tokens = text.shape[:2]
        if mask is not None and tuple(mask.shape) not in {(batch, tokens), (batch, 1, tokens)}:
            raise InputError(
                f"encoder_attention_mask has shape {list(mask.shape)}; expected {[batch, tokens]} (1 keeps) "
                f"or {[batch, 1, tokens]} (a bias)"
            )

    def _check_rows(self, latents: Tensor, context: PixArtContext, modulation: Modulation) -> None:
        batch, _, height, width = latents.shape
        if context.rows not in (None, batch):
            raise InputError(f"encoder_hidden_states holds {context.rows} texts for {batch} pictures")
        if torch.is_grad_enabled() and context.by_row is not None and self._learns():
            raise InputError(
                "encoder_hidden_states is a context that was made without gradients, and gradients are recorded: make "
                "it where they are, or call the model under torch.no_grad()"
            )
        if context.rows is None and context.bias is not None and self.has_cross_attention:
            tokens = height // self.patch_size * (width // self.patch_size)
            if tuple(context.bias.shape) != (batch, 1, 1, tokens):
                raise InputError(
                    f"without text, encoder_attention_mask masks the image tokens: expected {[batch, tokens]} "
                    f"(1 keeps) or {[batch, 1, tokens]} (a bias)"
                )
        if modulation.shared.shape[0] not in (1, batch):
            raise InputError(
                f"timestep holds {modulation.shared.shape[0]} rows for {batch} pictures; give 1 or {batch}"
            )

    def _learns(self) -> bool:
        return any(p.requires_grad for p in self.transformer_blocks.parameters())

    @classmethod
    def _fit_config(cls, config: dict[str, Any], stored_names: set[str]) -> dict[str, Any]:
        # Early configs lack the key, and the class's rule for None is wrong for Σ at 1024: the weights decide.
        if config.get("use_additional_conditions") is None:
            found = any(name.startswith("adaln_single.emb.resolution_embedder") for name in stored_names)
            config = {**config, "use_additional_conditions": found}
        return config


def _timesteps(timestep: Tensor | float | None, batch: int, device: torch.device) -> Tensor:
    if timestep is None:
        raise InputError("timestep is None; give one number for the batch or one for each picture")
    timesteps = torch.as_tensor(timestep, device=device).reshape(-1)
    if timesteps.shape[0] not in (1, batch):
        raise InputError(f"timestep has {timesteps.shape[0]} values for {batch} pictures; give 1 or {batch}")
    return timesteps
