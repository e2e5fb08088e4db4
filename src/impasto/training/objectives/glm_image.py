"""Training of GLM-Image's transformer on images and captions.

The transformer is conditioned on an image's own tokens of the prior, and on the texts that its caption quotes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import InputError
from ...family import PRIOR_PIXELS, pixels_per_latent
from ...models.glm_image.model import GlmImageTransformer2DModel
from ...models.glm_image.prior import doubled
from ...pipelines.glyphs import encode_glyphs
from ..data.sample import Batch as Samples
from ..data.sample import Sample
from ..running.randomness import Randomness
from .base import Loss, Tensors, linear_weights
from .flow_matching import Batch, FlowMatching
from .text_to_image import Latents, loss_mask


class GlmImageFlowMatching(FlowMatching):
    """Flow matching of images, whose tokens the prior's vision tower and codebook make.

    Args:
        latents: of the autoencoder, which is frozen.
        prior, processor: transformers' ``GlmImageForConditionalGeneration`` and its processor, frozen; None if samples
            have ``extra["prior_token_ids"]``, in the transformer's grid.
        tokenizer, text_encoder: of the glyphs, frozen.
        most_bytes: of a quoted text.
    """

    def __init__(
        self,
        transformer: GlmImageTransformer2DModel,
        latents: Latents,
        prior: Any,
        processor: Any,
        tokenizer: Any,
        text_encoder: Any,
        drop: float = 0.1,
        spread: float = 1.0,
        most_bytes: int = 2048,
        shift: Callable[[int], float] = lambda tokens: 1.0,
    ):
        pixels = pixels_per_latent(None if latents.vae is None else latents.vae.config)
        super().__init__(transformer, pixels, drop=drop, spread=spread, shift=shift)
        self.latents, self.prior, self.text_encoder = latents, prior, text_encoder
        self.processor, self.tokenizer, self.most_bytes = processor, tokenizer, most_bytes
        for frozen in (latents.vae, prior, text_encoder):
            if frozen is not None:
                self.freeze(frozen)

    def forward(self, batch: Samples, random: Randomness) -> Loss:  # type: ignore[override]
        values = self.prepare(batch.samples, random)
        return super().forward(Tensors(values, batch.count, batch.step, batch.first), random)

    @torch.no_grad()
    def prepare(self, samples: Sequence[Sample], random: Randomness) -> Batch:
        """The latents, the prior's tokens and the glyphs of samples."""
        device = self.transformer.device
        captions = [sample.caption or "" for sample in samples]
        text, mask = encode_glyphs(self.tokenizer, self.text_encoder, captions, self.most_bytes, device)
        keep = None if bool(mask.all()) else mask.bool()
        latents, tokens = self.latents(samples, random, device), self._tokens(samples).to(device)
        return Batch(latents, tokens, text, mask=keep, loss_mask=loss_mask(samples, latents))

    def _tokens(self, samples: Sequence[Sample]) -> Tensor:
        stored = [sample.extra["prior_token_ids"] for sample in samples if "prior_token_ids" in sample.extra]
        if len(stored) == len(samples):
            return torch.stack(stored)
        images = [sample.image for sample in samples if sample.image is not None]
        if len(images) < len(samples) or self.prior is None:
            raise InputError("GLM-Image is trained on images, or on samples with prior_token_ids")
        return image_tokens(self.prior, self.processor, torch.stack(images))

    def flops(self, batch: Samples) -> float:
        """Products of the transformer on image tokens; those on glyphs, which are few, are not counted."""
        config, blocks = self.transformer.config, self.transformer.transformer_blocks
        of_tokens = sum(n for name, n in linear_weights(blocks).items() if ".norm1." not in name)
        attention = 4 * config["num_attention_heads"] * config["attention_head_dim"] * len(blocks)  # of two tokens
        total = 0.0
        for sample in batch.samples:
            height, width = self.latents.size(sample)
            tokens = height * width / config["patch_size"] ** 2
            total += tokens * (2 * of_tokens + tokens * attention)
        return total * (3 if next(blocks.parameters()).requires_grad else 2)

    def export(self, folder: Path) -> None:
        self.transformer.save_pretrained(folder / "transformer")


def image_tokens(prior: Any, processor: Any, images: Tensor) -> Tensor:
    """The prior's tokens of images [B, 3, H, W] in [-1, 1], in the transformer's grid: [B, N].

    Raises:
        InputError: H or W is not a multiple of 32.
    """
    height, width = images.shape[-2:]
    if height % PRIOR_PIXELS or width % PRIOR_PIXELS:
        raise InputError(f"GLM-Image is trained on sides that are multiples of {PRIOR_PIXELS}, not {height} x {width}")
    side, rows, columns = processor.image_processor.patch_size, height // PRIOR_PIXELS, width // PRIOR_PIXELS
    if side != PRIOR_PIXELS:  # a token's pixels, as the tower sees them
        images = F.interpolate(images.float(), (rows * side, columns * side), mode="bilinear", antialias=True)
    levels = ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    arrays = [image.permute(1, 2, 0).cpu().numpy() for image in levels]
    given: Mapping[str, Tensor] = processor.image_processor(arrays, do_resize=False, return_tensors="pt")
    tower = prior.model.visual  # the language model may be elsewhere
    grids = given["image_grid_thw"].to(tower.device)
    features = prior.get_image_features(given["pixel_values"].to(tower.device, tower.dtype), grids).pooler_output
    maps = features[0].ndim == 3  # older versions of transformers give tokens
    found = prior.get_image_tokens(features) if maps else prior.get_image_tokens(torch.cat(list(features)), grids)
    each = found.flatten().view(len(images), rows * columns)
    return torch.stack([doubled(tokens, rows, columns) for tokens in each])
