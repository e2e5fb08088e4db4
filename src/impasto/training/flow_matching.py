"""Training of GLM-Image's transformer: the velocity from latents to noise (rectified flow, 2209.03003).

Shapes: B pictures, C channels, H x W latent pixels, N image tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..models.glm_image import GlmImageTransformer2DModel
from .loop import Loss, Recipe, train


class Reference(NamedTuple):
    """What each picture of a batch was made from."""

    latents: Tensor  # [B, C, H, W], standardised
    prior_token_ids: Tensor  # [B, N]


class Batch(NamedTuple):
    latents: Tensor  # [B, C, H, W], standardised: what the transformer draws
    prior_token_ids: Tensor  # [B, N]
    text: Tensor  # [B, M, channels], the glyphs
    reference: Reference | None = None


@dataclass(frozen=True)
class FlowMatchingRecipe(Recipe):
    """How to train. Levels of noise are drawn as logit-normal numbers are (2403.03206, section 3.1)."""

    pixels: int = 8  # of the picture, along a side of one of the latents
    timesteps: int = 1000
    drop: float = 0.1  # share of the pictures whose prior says nothing, for guidance
    spread: float = 1.2  # of the logits of the levels
    compile_blocks: bool = True


def initialize(transformer: GlmImageTransformer2DModel) -> None:
    """As DiT begins (2212.09748, section 3.2): every block as the identity, and the output as zero."""
    for name, parameter in transformer.named_parameters():
        if parameter.ndim == 2:
            nn.init.xavier_uniform_(parameter)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
    nn.init.normal_(transformer.prior_token_embedding.weight, std=0.5)
    for name, parameter in transformer.named_parameters():
        if ".norm1.linear" in name or name.startswith(("norm_out.linear", "proj_out")):
            nn.init.zeros_(parameter)


def train_flow_matching(
    transformer: GlmImageTransformer2DModel, batches: Iterator[Batch], recipe: FlowMatchingRecipe, folder: Path
) -> None:
    """Train in place, resuming from ``folder/state.pt`` where there is one.

    Args:
        batches: endless.
    """

    def loss(step: int, generator: torch.Generator) -> Loss:
        batch = next(batches)
        x0, count = batch.latents, len(batch.latents)
        # Stratified levels: the same spread in every batch.
        share = (torch.arange(count) + torch.rand(count, generator=generator)) / count
        sigma = (recipe.spread * share.clamp(1e-4, 1 - 1e-4).logit()).sigmoid()[:, None, None, None]
        noise = torch.randn(x0.shape, generator=generator)
        xt = (1 - sigma) * x0 + sigma * noise
        drop = torch.rand(count, generator=generator) < recipe.drop
        height, width = x0.shape[-2:]
        size = torch.tensor([[height * recipe.pixels, width * recipe.pixels]], dtype=torch.float32)
        text = batch.text.to(transformer.dtype)
        context = transformer.encode_context(text, None, batch.prior_token_ids, drop, height, width)
        timestep = sigma.flatten() * recipe.timesteps - 1
        modulation = transformer.modulate(timestep, size, torch.zeros_like(size))
        references = None
        if batch.reference is not None:
            ids = batch.reference.prior_token_ids
            own = transformer.encode_context(text[:, :0], None, ids, None, height, width)
            still = transformer.modulate(torch.zeros(1), size, torch.zeros_like(size))
            references = transformer.encode_references(batch.reference.latents.to(transformer.dtype), own, still)
            # The half without guidance does not see them.
            bias = references.keys[0].new_zeros(count, 1, 1, references.length)
            references = references._replace(bias=bias.masked_fill(drop[:, None, None, None], -torch.inf))
        velocity = transformer.denoise(xt.to(transformer.dtype), context, modulation, references).float()
        errors = (velocity - (noise - x0)).square().flatten(1).mean(1)  # [B]
        kind = "drawn" if batch.reference is None else "edited"
        parts = {f"{kind}_{i}": part.mean() for i, part in enumerate(errors.detach().chunk(4))}  # less noise first
        return Loss(errors.mean(), parts)

    blocks = list(transformer.transformer_blocks) if recipe.compile_blocks else []
    train(transformer, loss, recipe, folder, blocks=blocks)
