"""Training of GLM-Image's transformer by flow matching (rectified flow, 2209.03003).

Shapes: B images, C channels, H x W latent pixels, N image tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..models.glm_image.model import GlmImageTransformer2DModel
from ..schedulers import process
from .loop import Loss, Recipe, train
from .randomness import Randomness


class Reference(NamedTuple):
    """The image that each image of a batch was edited from."""

    latents: Tensor  # [B, C, H, W], standardized
    prior_token_ids: Tensor  # [B, N]


class Batch(NamedTuple):
    latents: Tensor  # [B, C, H, W], standardized: what the transformer generates
    prior_token_ids: Tensor  # [B, N]
    text: Tensor  # [B, M, channels], the glyphs
    reference: Reference | None = None


@dataclass(frozen=True)
class FlowMatchingRecipe(Recipe):
    """The training recipe. Noise levels are logit-normal (2403.03206, section 3.1)."""

    pixels: int = 8  # image pixels along a side of a latent pixel
    timesteps: int = 1000
    drop: float = 0.1  # share of images trained without prior tokens, for guidance
    spread: float = 1.2  # scale of the logits of the levels


def initialize(transformer: GlmImageTransformer2DModel) -> None:
    """Initialize as DiT (2212.09748, section 3.2): every block is the identity, and the output zero."""
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
    transformer: GlmImageTransformer2DModel, batch: Callable[[int], Batch], recipe: FlowMatchingRecipe, folder: Path
) -> None:
    """Train in place, resuming from ``folder/state.pt`` if it exists.

    Args:
        batch: step -> its batch.
    """

    def loss(step: int, random: Randomness) -> Loss:
        x0, prior_token_ids, text, reference = batch(step)
        count = len(x0)
        # Stratified levels: the same spread in every batch.
        share = random.stratified(count)
        sigma = process.per_sample((recipe.spread * share.clamp(1e-4, 1 - 1e-4).logit()).sigmoid(), x0)
        noise = random.normal(x0.shape)
        xt = process.add_noise(x0, noise, 1 - sigma, sigma)
        target = process.prediction_target("flow_prediction", x0, noise, 1 - sigma, sigma)
        drop = random.uniform([count]) < recipe.drop
        height, width = x0.shape[-2:]
        size = torch.tensor([[height * recipe.pixels, width * recipe.pixels]], dtype=torch.float32)
        text = text.to(transformer.dtype)
        context = transformer.encode_context(text, None, prior_token_ids, drop, height, width)
        timestep = sigma.flatten() * recipe.timesteps - 1
        modulation = transformer.modulate(timestep, size, torch.zeros_like(size))
        references = None
        if reference is not None:
            own = transformer.encode_context(text[:, :0], None, reference.prior_token_ids, None, height, width)
            still = transformer.modulate(torch.zeros(1), size, torch.zeros_like(size))
            references = transformer.encode_references(reference.latents.to(transformer.dtype), own, still)
            # The unconditional half does not see them.
            bias = references.keys[0].new_zeros(count, 1, 1, references.length)
            references = references._replace(bias=bias.masked_fill(drop[:, None, None, None], -torch.inf))
        velocity = transformer.denoise(xt.to(transformer.dtype), context, modulation, references).float()
        errors = (velocity - target).square().flatten(1).mean(1)  # [B]
        kind = "generated" if reference is None else "edited"
        bands = {f"{kind}_{i}": band.mean() for i, band in enumerate(errors.detach().chunk(4))}  # least noise first
        return Loss(errors.mean(), bands)

    train(transformer, loss, recipe, folder, blocks=list(transformer.transformer_blocks))
