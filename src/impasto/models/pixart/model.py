"""PixArtTransformer2DModel: the denoiser of PixArt-α (2310.00426) and PixArt-Σ (2403.04692).

A forward pass is three stages, from the one that is needed least often to the one that is needed most often::

    context    = model.encode_context(text_embeds, mask)    # once a prompt
    modulation = model.modulate(timestep, conditions)       # once a step, or once for all steps
    output     = model.denoise(latents, context, modulation)

Shapes: B images, C channels, H x W latent pixels, N image tokens, M text tokens, D width, L layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any, ClassVar, cast, overload

import torch
from torch import Tensor, nn

from ...checkpoints.config import records_config
from ...checkpoints.values import Count, Epsilon, Offset, Patch, Scale, Share
from ...errors import InputError
from ...nn.changes import is_compiled, is_plain, is_watched, register_methods
from ...nn.layers import TwoLayerMLP, gelu_tanh, modulated_norm, modulation_table, unpatchify
from ...nn.outputs import Transformer2DModelOutput
from ...nn.tokens import Layout, is_tracing, text_bias
from ..base import Model
from ..compat.attention_processor import giving
from ..compat.surface import Caching, FusedProjections, GradientCheckpointing
from ..inputs import as_batches, as_timesteps, check_batch, check_text
from .arguments import check_arguments
from .blocks import AdaLayerNormSingle, Attention, PatchEmbed, PixArtBlock
from .kv_compression import KVCompression, Sampling, compressed_layers
from .text import Modulation, PixArtContext, ProjectedText, bias_of, image_bias, kept_rows, pad


class PixArtTransformer2DModel(FusedProjections, Caching, GradientCheckpointing, Model):
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
        interpolation_scale: of positions; max(sample_size // 64, 1) if None. Σ's models have sample_size / 64, which is
            another number below 64 and for the 4K base of 2880 px (5.625): give it there.
        use_additional_conditions: embed resolution and aspect ratio; None means where sample_size is 128.
        caption_channels: width of the text embeddings, projected to D; None leaves them as they are.
        attention_type: "default", the only one that PixArt has.
        use_linear_projection, num_vector_embeds: deprecated; stored.
        kv_compression: how self-attention compresses its keys and values (``kv_compression.py``); None: not at all.
        kv_compression_factor: on each side of the grid of tokens.
        kv_compression_layers: the layers that do so; the second half if None.
        qk_norm: normalize the queries and keys of self-attention, over all heads together.

    The last four are not in diffusers.

    Raises:
        ConfigurationError: a value that cannot be used, by name.
    """

    not_in_diffusers: ClassVar[frozenset[str]] = frozenset(
        {"kv_compression", "kv_compression_factor", "kv_compression_layers", "qk_norm"}
    )
    ignored_config_keys: ClassVar[frozenset[str]] = not_in_diffusers | {
        "double_self_attention",
        "only_cross_attention",
        "num_vector_embeds",
        "use_linear_projection",
    }

    _no_split_modules: ClassVar = ["PixArtBlock", "PatchEmbed"]
    _repeated_blocks: ClassVar = ["PixArtBlock"]
    _skip_layerwise_casting_patterns: ClassVar = ["pos_embed", "norm", "adaln_single"]
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
        kv_compression: Sampling | None = None,
        kv_compression_factor: Count = 2,
        kv_compression_layers: Sequence[Offset] | None = None,
        qk_norm: bool = False,
    ):
        super().__init__()
        if use_additional_conditions is None:
            use_additional_conditions = sample_size == 128
        name = type(self).__name__
        check_arguments(name, self.config, use_additional_conditions)
        width = num_attention_heads * attention_head_dim
        compressed = compressed_layers(kv_compression, kv_compression_factor, kv_compression_layers, num_layers, name)

        self.inner_dim, self.attention_head_dim = width, attention_head_dim
        self.height = self.width = sample_size
        self.has_cross_attention = cross_attention_dim is not None
        self.text_channels = cross_attention_dim if caption_channels is None else caption_channels
        self.out_channels = out_channels or in_channels
        self.in_channels = in_channels
        self.patch_size = patch_size
        self.base_size = sample_size // patch_size
        self.interpolation_scale = max(sample_size // 64, 1) if interpolation_scale is None else interpolation_scale
        self.use_additional_conditions = use_additional_conditions

        self.pos_embed = PatchEmbed(in_channels, width, patch_size, self.base_size, self.interpolation_scale)
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
                qk_norm=qk_norm,
                kv_compression=KVCompression(width, kv_compression, kv_compression_factor)
                if kv_compression is not None and i in compressed
                else None,
            )
            for i in range(num_layers)
        )
        self.norm_out = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.scale_shift_table = modulation_table(2, width)
        self.proj_out = nn.Linear(width, patch_size**2 * self.out_channels)

    # The three stages

    def encode_context(self, text_embeds: Tensor | None, mask: Tensor | None = None) -> PixArtContext:
        """Project the text and, in inference, make every layer's keys and values.

        Discarded tokens are left out, so that padded text costs nothing. They are masked where shapes are to be static,
        which is inside a graph and in training with compiled blocks or on a GPU, and where someone watches ``attn2``.

        Args:
            text_embeds: [B, M, caption_channels], or [B, M, cross_attention_dim] without ``caption_channels``;
                None (only without ``caption_channels``): blocks attend to the image tokens.
            mask: [B, M], true (or 1) keeps; or [B, 1, M], a bias added to the scores, where -10000 discards.

        Raises:
            InputError: text or mask of another shape, or no text where captions are projected.
        """
        if text_embeds is None:
            if self.caption_projection is not None:
                required = "text embeddings (those of the empty prompt for an unconditional image)"
                raise InputError(f"encoder_hidden_states is None, and this model projects captions; give {required}")
            return PixArtContext(ProjectedText(None, None if mask is None else text_bias(mask)[:, 0]))
        check_text(text_embeds, mask, self.text_channels, "encoder_attention_mask")
        if not self.has_cross_attention:
            return PixArtContext(ProjectedText(None, None))
        bias = None if mask is None else text_bias(mask)[:, 0]  # [B, 1, M]
        if is_watched(self.caption_projection) and not is_tracing():
            return PixArtContext(ProjectedText(text_embeds, bias), projects=True)
        project = self.caption_projection or nn.Identity()
        masked = is_tracing() or text_embeds.is_meta or self._makes_keys_each_step()
        if torch.is_grad_enabled():
            masked |= text_embeds.device.type != "cpu" or is_compiled(self.transformer_blocks[0])
        if masked:
            return PixArtContext(ProjectedText(project(text_embeds), bias))
        rows, biases = kept_rows(text_embeds, bias)  # B of [M, C] and of [M], no longer padded
        lengths = [len(row) for row in rows]
        if torch.is_grad_enabled() and not any(lengths):  # every parameter gets a gradient in each step
            return PixArtContext(ProjectedText(project(text_embeds), bias))
        rows = project(torch.cat(rows)).split(lengths)  # B of [M, D]
        projected = ProjectedText(pad(rows), bias_of(lengths, biases, text_embeds))
        if torch.is_grad_enabled():
            return PixArtContext(projected)
        register_methods(self.transformer_blocks, "encode_text")
        separate = self._keeps_rows(text_embeds)
        layers = [cast(PixArtBlock, block).encode_text(rows, biases, separate) for block in self.transformer_blocks]
        return PixArtContext(projected, tuple(layers))

    @staticmethod
    def _keeps_rows(text: Tensor) -> bool:
        """Only on the CPU: rows of several lengths are no static graph, and small products do not fill a GPU."""
        return text.device.type == "cpu"

    @property
    def compresses(self) -> bool:
        """Whether layers compress keys and values, and so need to know the grid of the tokens."""
        return self.config.get("kv_compression") is not None

    def _is_watched(self) -> bool:
        """Whether someone expects calls of an attention: then these are made, on [B, N, D] and the padded text."""
        blocks = cast(Sequence[PixArtBlock], self.transformer_blocks)
        attentions = [attention for block in blocks for attention in (block.attn1, block.attn2)]
        return not all(attention is None or is_plain(attention, Attention) for attention in attentions)

    def _makes_keys_each_step(self) -> bool:
        blocks = cast(Sequence[PixArtBlock], self.transformer_blocks)
        return self._is_watched() or any(is_watched(block.attn2) for block in blocks)

    def modulate(self, timestep: Tensor, conditions: Mapping[str, Tensor | None] | None = None) -> Modulation:
        """Embed timesteps and micro-conditions.

        Args:
            timestep: [B], integers or fractions in the units of training (0 to 999).
            conditions: ``resolution`` [B, 2] (height and width in pixels) and ``aspect_ratio`` [B, 1]
                (height / width), for models with ``use_additional_conditions``; may be None elsewhere.
        """
        if is_watched(self.adaln_single) and not is_tracing():
            return Modulation.later(timestep, conditions or {})
        return Modulation(*self.adaln_single(timestep, conditions or {}))

    @overload
    def denoise(
        self, latents: Tensor, context: PixArtContext, modulation: Modulation, attention_mask: Tensor | None = None
    ) -> Tensor: ...

    @overload
    def denoise(
        self, latents: Sequence[Tensor], context: PixArtContext, modulation: Modulation, attention_mask: None = None
    ) -> list[Tensor]: ...

    def denoise(
        self,
        latents: Tensor | Sequence[Tensor],
        context: PixArtContext,
        modulation: Modulation,
        attention_mask: Tensor | None = None,
    ) -> Tensor | list[Tensor]:
        """Predict the noise in latents.

        Args:
            latents: [B, in_channels, H, W], or B of [in_channels, H, W] in any sizes.
            attention_mask: as in ``forward``.

        Returns:
            [B, out_channels, H, W], or B of [out_channels, H, W].
        """
        context, modulation = context.made(self.caption_projection), modulation.made(self.adaln_single)
        if isinstance(latents, Tensor):
            return self._predict([latents], context, modulation, attention_mask)[0]
        if len({image.shape for image in latents}) == 1:  # one size
            return [*self.denoise(torch.stack([*latents]), context, modulation, attention_mask)]
        if self._is_watched() or (self.compresses and (is_tracing() or is_compiled(self.transformer_blocks[0]))):
            return [
                self.denoise(image[None], context.select([i]), modulation.select([i % len(modulation.shared)]))[0]
                for i, image in enumerate(latents)
            ]
        batches = [torch.stack([*images]) for _, images in groupby(latents, key=lambda image: image.shape)]
        return [output for outputs in self._predict(batches, context, modulation) for output in outputs]

    def _predict(
        self,
        batches: Sequence[Tensor],
        context: PixArtContext,
        modulation: Modulation,
        attention_mask: Tensor | None = None,
    ) -> list[Tensor]:
        """One batch [B, C, H, W], or a mixed batch of several [b, C, H, W]."""
        p = self.patch_size
        grids = [(latents.shape[-2] // p, latents.shape[-1] // p) for latents in batches]
        embedded: list[Tensor] = [self.pos_embed(latents) for latents in batches]  # [B, N, D]
        layout, of_images = None, grids
        if len(batches) > 1:
            of_images = [grid for grid, latents in zip(grids, batches, strict=True) for _ in range(len(latents))]
            layout = Layout.of([rows * columns for rows, columns in of_images], batches[0].device)
        # [B, N, D] or [T, D]
        x = embedded[0] if layout is None else torch.cat([tokens.flatten(0, 1) for tokens in embedded])

        bias = image_bias(attention_mask, x)  # [B, 1, N]
        if context.layers is not None and self._makes_keys_each_step():
            context = PixArtContext(context.projected)
        dynamic = is_tracing() or is_compiled(self.transformer_blocks[0])
        texts = context.of_layers(len(self.transformer_blocks), layout, dynamic)
        places = layout.as_tensors() if layout is not None and dynamic else layout
        more = (of_images,) if self.compresses else ()
        for block, text in zip(self.transformer_blocks, texts, strict=True):
            x = self.in_training(block)(x, modulation.shared, text, bias, places, *more)

        shift, scale = (self.scale_shift_table[None] + modulation.timestep).chunk(2, dim=1)  # [B, 1, D] each
        x = self.proj_out(modulated_norm(self.norm_out, x, shift, scale, layout)).flatten(0, -2)  # [T, p * p * C]
        outputs = x.split([tokens.shape[0] * tokens.shape[1] for tokens in embedded])
        return [
            unpatchify(out.unflatten(0, tokens.shape[:2]), *grid, p)
            for out, tokens, grid in zip(outputs, embedded, grids, strict=True)
        ]

    def forward(
        self,
        hidden_states: Tensor | Sequence[Tensor],
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
            hidden_states: latents [B, in_channels, H, W]; ``patch_size`` divides H and W. Or B of [in_channels, H, W],
                in any sizes.
            encoder_hidden_states: text embeddings [B, M, caption_channels], or what ``encode_context`` made.
            timestep: [B] (or one for all), or what ``modulate`` made.
            added_cond_kwargs: the micro-conditions ``resolution`` [B, 2] and ``aspect_ratio`` [B, 1].
            cross_attention_kwargs: for attention processors that take them (``scale`` is ignored).
            attention_mask: which image tokens self-attention may read: [B, N], true (or 1) keeps; or a bias
                [B, 1, N].
            encoder_attention_mask: which text tokens count: [B, M], true (or 1) keeps; or a bias [B, 1, M],
                where -10000 discards.
            return_dict: False returns a plain tuple.

        Returns:
            ``.sample``: [B, out_channels, H, W], or B of [out_channels, H, W].

        Raises:
            InputError: a shape that does not fit, with the shape that would.
        """
        batches = as_batches(hidden_states, self.in_channels, self.patch_size)
        batch = sum(latents.shape[0] for latents in batches)
        if isinstance(encoder_hidden_states, PixArtContext):
            context = encoder_hidden_states
        else:
            context = self.encode_context(encoder_hidden_states, encoder_attention_mask)
        if isinstance(timestep, Modulation):
            modulation = timestep
        else:
            modulation = self.modulate(as_timesteps(timestep, batch, batches[0].device), added_cond_kwargs)
        self._check_rows(batches, context, modulation)
        if attention_mask is not None and not isinstance(hidden_states, Tensor):
            raise InputError("attention_mask masks the tokens of images of one size: give their latents as one tensor")
        with giving(cross_attention_kwargs, self, "cross_attention_kwargs"):
            output: Any = self.denoise(cast(Tensor, hidden_states), context, modulation, attention_mask)
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)

    def _check_rows(self, batches: Sequence[Tensor], context: PixArtContext, modulation: Modulation) -> None:
        batch, rows, bias = sum(latents.shape[0] for latents in batches), context.rows, context.projected.bias
        check_batch(batch, rows, modulation.shared.shape[0])
        learns = torch.is_grad_enabled() and any(p.requires_grad for p in self.transformer_blocks.parameters())
        if learns and context.layers is not None:
            raise InputError(
                "encoder_hidden_states is a context that was made without gradients, and gradients are recorded: make "
                "it where they are, or call the model under torch.no_grad()"
            )
        if rows is None and bias is not None and self.has_cross_attention:
            tokens = batches[0].shape[2] // self.patch_size * (batches[0].shape[3] // self.patch_size)
            if len(batches) > 1 or bias.shape != (batch, 1, tokens):
                raise InputError(
                    f"without text, encoder_attention_mask masks the image tokens: expected {[batch, tokens]} "
                    f"(1 keeps) or {[batch, 1, tokens]} (a bias)"
                )

    @classmethod
    def _fit_config(cls, config: dict[str, Any], stored_names: set[str]) -> dict[str, Any]:
        # Early configs lack the key, and the class's rule for None is wrong for Σ at 1024: the weights decide.
        if config.get("use_additional_conditions") is None:
            found = any(name.startswith("adaln_single.emb.resolution_embedder") for name in stored_names)
            config = {**config, "use_additional_conditions": found}
        return config
