"""GlmImageTransformer2DModel: the denoiser of GLM-Image.

Latents are denoised together with the glyphs' text; what the image is to show comes as the tokens of an
autoregressive model, the prior, one for each image token. A forward pass is three stages::

    context    = model.encode_context(text_embeds, mask, prior_token_id, prior_token_drop, height, width)
    modulation = model.modulate(timestep, target_size, crop_coords)     # once a step, or once for all steps
    output     = model.denoise(latents, context, modulation)

Shapes: B images, C channels, H x W latent pixels, N image tokens, M text tokens, R reference tokens, d channels of a
head, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from ...checkpoints.config import records_config
from ...checkpoints.values import MOST_CHANNELS, Count, Patch
from ...errors import ConfigurationError, InputError
from ...nn.changes import dtype_of, is_compiled, is_watched
from ...nn.layers import FeedForward, unpatchify_channels_first
from ...nn.outputs import Transformer2DModelOutput
from ...nn.tokens import Layout, is_tracing, text_bias
from ..base import Model
from ..compat.attention_processor import giving
from ..compat.surface import Caching, GradientCheckpointing, Processors, Rope
from ..inputs import as_batches, as_timesteps, check_prior, check_text, require_none
from .blocks import AdaLayerNormContinuous, GlmImageBlock, ImageProjector, TimestepAndSizeEmbedder
from .compat import differ, one_by_one
from .context import (
    GlmImageContext,
    GlmImageKVCache,
    GlmImageModulation,
    GlmImageReferences,
    Rotary,
    check_rows,
    rotary_tables,
)
from .places import Places, mixed_places, places_of


class GlmImageTransformer2DModel(Processors, Caching, Rope, GradientCheckpointing, Model):
    """Predicts the velocity of latents, given glyphs, the prior's tokens, timestep and size.

    Arguments are those of the diffusers class of this name. The released model has 32 heads of 128.

    Args:
        patch_size: latent pixels to a side of a token.
        in_channels, out_channels: of the latents and the prediction.
        num_layers: number of blocks.
        attention_head_dim, num_attention_heads: their product is the width D; the former a multiple of 4.
        text_embed_dim: width of the glyphs' embeddings.
        time_embed_dim: width of the embedded conditions.
        condition_dim: number of features of each of the four numbers that tell size and crop.
        pos_embed_max_size: stored; rotary positions have no largest size.
        sample_size: side of the latents that a pipeline draws by default.
        prior_vq_quantizer_codebook_size: number of the prior's tokens.

    Raises:
        ConfigurationError: a value that cannot be used, by name.
    """

    # Of the documents, not of the class that wrote the released config: only written where they say something.
    ignored_config_keys: ClassVar[frozenset[str]] = frozenset({"pos_embed_max_size", "sample_size"})

    _no_split_modules: ClassVar = ["GlmImageBlock", "ImageProjector", "TimestepAndSizeEmbedder"]
    _repeated_blocks: ClassVar = ["GlmImageBlock"]
    _skip_layerwise_casting_patterns: ClassVar = ["patch_embed", "norm", "proj_out"]
    stored_lists: ClassVar[Mapping[str, str]] = {"num_layers": "transformer_blocks"}

    @records_config
    def __init__(
        self,
        patch_size: Patch = 2,
        in_channels: Count = 16,
        out_channels: Count = 16,
        num_layers: Count = 30,
        attention_head_dim: Count = 40,
        num_attention_heads: Count = 64,
        text_embed_dim: Count = 1472,
        time_embed_dim: Count = 512,
        condition_dim: Count = 256,
        prior_vq_quantizer_codebook_size: Count = 16384,
        *,
        pos_embed_max_size: Count = 128,
        sample_size: Count = 128,
    ):
        super().__init__()
        name = type(self).__name__
        if attention_head_dim % 4:
            raise ConfigurationError(
                f"{name}: attention_head_dim {attention_head_dim} must be a multiple of 4: half of the channels "
                f"turn by the row and half by the column, in pairs"
            )
        for key, size in (("time_embed_dim", time_embed_dim), ("condition_dim", condition_dim)):
            if size % 2:
                raise ConfigurationError(f"{name}: {key} {size} must be even: sines and cosines")
        width = num_attention_heads * attention_head_dim
        if width > MOST_CHANNELS:
            raise ConfigurationError(
                f"{name}: num_attention_heads * attention_head_dim is {width}, and may be {MOST_CHANNELS} at most"
            )

        self.inner_dim = width
        self.head_dim = attention_head_dim
        self.in_channels, self.out_channels = in_channels, out_channels
        self.patch_size = patch_size
        self.text_channels = text_embed_dim
        self.codebook_size = prior_vq_quantizer_codebook_size

        self.image_projector = ImageProjector(in_channels, width, patch_size)
        self.glyph_projector = FeedForward(text_embed_dim, "gelu", hidden=width, out=width)
        self.prior_token_embedding = nn.Embedding(prior_vq_quantizer_codebook_size, width)
        self.prior_projector = FeedForward(width, "linear-silu", hidden=width, out=width)
        self.time_condition_embed = TimestepAndSizeEmbedder(time_embed_dim, condition_dim)
        self.transformer_blocks = nn.ModuleList(
            GlmImageBlock(width, num_attention_heads, attention_head_dim, time_embed_dim) for _ in range(num_layers)
        )
        self.norm_out = AdaLayerNormContinuous(width, time_embed_dim)
        self.proj_out = nn.Linear(width, patch_size**2 * out_channels)

    def encode_context(
        self,
        text_embeds: Tensor,
        mask: Tensor | None,
        prior_token_id: Tensor,
        prior_token_drop: Tensor | None,
        height: int,
        width: int,
        image_rotary_emb: Rotary | None = None,
    ) -> GlmImageContext:
        """Project the glyphs and the prior's tokens, and place the image tokens.

        Args:
            text_embeds: [B, M, text_embed_dim]; M may be 0.
            mask, prior_token_id, prior_token_drop, image_rotary_emb: as in ``forward``.
            height, width: of the latents.

        Raises:
            InputError: a shape that does not fit, with the shape that would.
        """
        rows, columns = height // self.patch_size, width // self.patch_size
        check_text(text_embeds, mask, self.text_channels, "attention_mask")
        batch = text_embeds.shape[0]
        prior = check_prior(prior_token_id, prior_token_drop, batch, (rows, columns), (height, width))  # [B, N, 2]
        cos, sin = rotary_tables(image_rotary_emb, (rows, columns), self.head_dim, batch, text_embeds.device)
        bias = None if mask is None else text_bias(mask)
        context = GlmImageContext(text_embeds, bias, prior, cos, sin, projects=True)
        made_by = (self.glyph_projector, self.prior_token_embedding, self.prior_projector)
        return context if not is_tracing() and any(map(is_watched, made_by)) else context.made(self._project)

    def _project(self, context: GlmImageContext) -> GlmImageContext:
        ids, dropped = context.prior.unbind(-1)  # [B, N]
        prior = self.prior_token_embedding(ids).masked_fill(dropped.bool()[..., None], 0.0)  # [B, N, D]
        return context._replace(text=self.glyph_projector(context.text), prior=self.prior_projector(prior))

    def modulate(self, timestep: Tensor, target_size: Tensor, crop_coords: Tensor) -> GlmImageModulation:
        """Embed timesteps, sizes and crops.

        Args:
            timestep: [B], integers or fractions in the units of training (0 to 999).
            target_size: [B, 2], the image's height and width in pixels.
            crop_coords: [B, 2], where in it the crop begins, from the top and from the left.
        """
        batch = timestep.shape[0]
        for name, numbers in (("target_size", target_size), ("crop_coords", crop_coords)):
            if numbers.ndim != 2 or numbers.shape[1] != 2 or (numbers.shape[0] != 1 and numbers.shape[0] != batch):
                raise InputError(f"{name} has shape {list(numbers.shape)}; expected {[batch, 2]}")
        sizes, crops = (x.expand(batch, 2) for x in (target_size, crop_coords))
        numbers = torch.cat([x.float() for x in (timestep[:, None], sizes, crops)], dim=1)  # [B, 5]
        modulation = GlmImageModulation(numbers, embeds=True)
        later = is_watched(self.time_condition_embed) and not is_tracing()
        return modulation if later else self._embed(modulation)

    def _embed(self, modulation: GlmImageModulation) -> GlmImageModulation:
        return modulation.made(self.time_condition_embed, dtype_of(self.proj_out))

    def denoise(
        self,
        latents: Tensor | Sequence[Tensor],
        context: GlmImageContext,
        modulation: GlmImageModulation,
        references: GlmImageReferences | None = None,
    ) -> Any:
        """Predict the velocity of latents; image and text see the references.

        Args:
            latents: [B, in_channels, H, W], or B of [in_channels, H, W] in any sizes.

        Returns:
            [B, out_channels, H, W], or B of [out_channels, H, W].
        """
        context, modulation = context.made(self._project), self._embed(modulation)
        if self._is_processed() and differ(latents, context, references):
            return one_by_one(self._predict, latents, context, modulation, references)
        if isinstance(latents, Tensor):
            return self._predict([latents], context, modulation, references)[0][0]
        if len({image.shape for image in latents}) == 1:
            return [*self.denoise(torch.stack([*latents]), context, modulation, references)]
        images = [image[None] for image in latents]
        return [output[0] for output in self._predict(images, context, modulation, references)[0]]

    def _is_processed(self) -> bool:
        return any(cast(GlmImageBlock, block).attn1.is_processed for block in self.transformer_blocks)

    def encode_references(
        self, latents: Tensor, context: GlmImageContext, modulation: GlmImageModulation
    ) -> GlmImageReferences:
        """Every layer's keys and values of images [B, in_channels, H, W], for the images that refer to them.

        The context is of the images' own prior tokens, and of no text; the timestep is 0: they have no noise.
        """
        return self._encode_references(latents, context, modulation)[1]

    def _encode_references(
        self, latents: Tensor, context: GlmImageContext, modulation: GlmImageModulation
    ) -> tuple[Tensor, GlmImageReferences]:
        context, modulation = context.made(self._project), self._embed(modulation)
        layers: list[tuple[Tensor, Tensor]] = []
        outputs, places = self._predict([latents], context, modulation, None, layers)
        keys, values = zip(*layers, strict=True)
        return outputs[0], GlmImageReferences(keys, values, None if context.bias is None else places.bias)

    def _predict(
        self,
        batches: Sequence[Tensor],
        context: GlmImageContext,
        modulation: GlmImageModulation,
        references: GlmImageReferences | None,
        layers: list[tuple[Tensor, Tensor]] | None = None,
    ) -> tuple[list[Tensor], Places]:
        """Outputs of one batch [B, C, H, W], or of a mixed batch of several [1, C, H, W].

        Args:
            layers: to which the keys and values of each layer are added.
        """
        p, mixed = self.patch_size, len(batches) > 1
        grids = [(latents.shape[-2] // p, latents.shape[-1] // p) for latents in batches]
        dynamic = is_tracing() or is_compiled(self.transformer_blocks[0])
        contexts = context.each(drops=not dynamic) if mixed else [context]
        if references is not None:
            references = references.for_batch(sum(latents.shape[0] for latents in batches))
        parts = [
            torch.cat([one.text, self.image_projector(latents) + one.prior], dim=1)  # [B, M + N, D]
            for latents, one in zip(batches, contexts, strict=True)
        ]
        x = torch.cat([part[0] for part in parts]) if mixed else parts[0]  # [B, S, D], or [T, D]
        places = mixed_places(contexts, references, dynamic) if mixed else places_of(context, references)
        pasts = [None] * len(self.transformer_blocks) if references is None else references.of_layers(mixed, dynamic)

        inside = places.as_tensors() if dynamic else places
        for block, past in zip(self.transformer_blocks, pasts, strict=True):
            x, *key_value = self.in_training(block)(x, modulation.embedded, inside, past)
            if layers is not None:
                layers.append((key_value[0], key_value[1]))
            del key_value

        layout = Layout.of([one.prior.shape[1] for one in contexts], x.device) if mixed else None
        x = self.proj_out(self.norm_out(places.image_tokens(x), modulation.embedded, layout))  # [B, N, C * p * p]
        outputs = [x] if layout is None else [one[None] for one in layout.split(x)]
        return [unpatchify_channels_first(o, *grid, p) for o, grid in zip(outputs, grids, strict=True)], places

    def forward(
        self,
        hidden_states: Tensor | Sequence[Tensor],
        encoder_hidden_states: Tensor | GlmImageContext,
        prior_token_id: Tensor | Sequence[Tensor] | None = None,
        prior_token_drop: Tensor | Sequence[Tensor] | None = None,
        timestep: Tensor | GlmImageModulation | None = None,
        target_size: Tensor | None = None,
        crop_coords: Tensor | None = None,
        attention_kwargs: Mapping[str, Any] | None = None,
        return_dict: bool = True,
        attention_mask: Tensor | None = None,
        kv_caches: GlmImageKVCache | GlmImageReferences | None = None,
        image_rotary_emb: Rotary | None = None,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predict the velocity of latents.

        Args:
            hidden_states: latents [B, in_channels, H, W]; ``patch_size`` divides H and W. Or B of [in_channels, H, W]
                in any sizes; prior_token_id, and prior_token_drop of tokens, are then lists of B, too.
            encoder_hidden_states: glyph embeddings [B, M, text_embed_dim], or what ``encode_context`` made, in place of
                them, of the prior's tokens and of the positions.
            prior_token_id: [B, N], one for each image token, row by row; or [N], the same for all images.
            prior_token_drop: [B, N] or [B] (or [N] with such ids): where true, the prior says nothing.
            timestep: [B] (or one for all), or what ``modulate`` made, in place of it, of size and crop.
            target_size: [B, 2] (or one for all), the image's height and width in pixels.
            crop_coords: [B, 2] (or one for all), where in it the crop begins, from the top and from the left.
            attention_kwargs: for attention processors that take them (``scale`` is ignored).
            return_dict: False returns a plain tuple.
            attention_mask: which text tokens count: [B, M], true (or 1) keeps; or a bias [B, 1, M], where -10000
                discards.
            kv_caches: reference images: a cache, read or written as its mode says, or what ``encode_references`` made.
            image_rotary_emb: cosines and sines [N, d], in place of those of rows and columns; or one pair an image.

        Returns:
            ``.sample``: [B, out_channels, H, W], or B of [out_channels, H, W].

        Raises:
            InputError: a shape that does not fit, with the shape that would; or something missing.
        """
        batches = as_batches(hidden_states, self.in_channels, self.patch_size)
        batch = sum(latents.shape[0] for latents in batches)
        if isinstance(encoder_hidden_states, GlmImageContext):
            replaced = {
                "prior_token_id": prior_token_id,
                "prior_token_drop": prior_token_drop,
                "attention_mask": attention_mask,
                "image_rotary_emb": image_rotary_emb,
            }
            require_none(replaced, "encoder_hidden_states is a context, which holds")
            context = encoder_hidden_states
        else:
            if prior_token_id is None:
                raise InputError(
                    "prior_token_id is None; give a token for each image token. Without a prior, give zeros and "
                    "prior_token_drop of ones"
                )
            per_image = (attention_mask, prior_token_id, prior_token_drop, image_rotary_emb)
            context = self._contexts(batches, encoder_hidden_states, per_image)
        if isinstance(timestep, GlmImageModulation):
            require_none({"target_size": target_size, "crop_coords": crop_coords}, "timestep is a modulation, of")
            modulation = timestep
        else:
            given = {"timestep": timestep, "target_size": target_size, "crop_coords": crop_coords}
            missing = [name for name, value in given.items() if value is None]
            if missing:
                raise InputError(f"{missing[0]} is None; give one for the batch or one for each image")
            times = as_timesteps(timestep, batch, batches[0].device)
            modulation = self.modulate(times.expand(batch), cast(Tensor, target_size), cast(Tensor, crop_coords))
        check_rows(batches, context, modulation, self.patch_size)

        references: Any = kv_caches
        if isinstance(kv_caches, GlmImageKVCache):
            references = kv_caches.read() if kv_caches.mode == "read" else None
        with giving(attention_kwargs, self, "attention_kwargs"):
            if isinstance(kv_caches, GlmImageKVCache) and kv_caches.mode == "write":
                if not isinstance(hidden_states, Tensor):
                    raise InputError("a cache is written with latents of one size: give them as one tensor")
                output, written = self._encode_references(hidden_states, context, modulation)
                kv_caches.write(written)
            else:
                output = self.denoise(hidden_states, context, modulation, references)
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)

    def _contexts(self, batches: Sequence[Tensor], text: Tensor, per_image: Sequence[Any]) -> GlmImageContext:
        """From text and mask, prior_token_id, prior_token_drop and image_rotary_emb; of a mixed batch, one each."""
        mask, ids, drop, rotary = per_image
        if len(batches) == 1 and isinstance(ids, Tensor):
            height, width = batches[0].shape[-2:]
            return self.encode_context(text, mask, ids, drop, height, width, rotary)
        contexts = []
        for i, latents in enumerate(batches):
            own_ids = ids if isinstance(ids, Tensor) and ids.ndim == 1 else ids[i].reshape(-1)
            own_mask, own_drop = (None if x is None else x[i : i + 1] for x in (mask, drop))
            if own_drop is not None and not isinstance(own_drop, Tensor):  # one tensor for each image
                own_drop = own_drop[0].reshape(-1)
            own_rotary = rotary if rotary is None or isinstance(rotary[0], Tensor) else rotary[i : i + 1]
            (height, width), own_text = latents.shape[-2:], text[i : i + 1]
            contexts.append(self.encode_context(own_text, own_mask, own_ids, own_drop, height, width, own_rotary))
        return GlmImageContext.concat(contexts)
