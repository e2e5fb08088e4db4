"""Training of GLM-Image's transformer by flow matching (rectified flow, 2209.03003).

Shapes: B images, C channels, H x W latent pixels, N image tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...models.glm_image.model import GlmImageTransformer2DModel
from ...schedulers import noise_schedule, process
from ..running.randomness import Randomness
from .base import Loss, Objective, Tensors
from .diffusion_loss import masked_mean


class Reference(NamedTuple):
    """The image that each image of a batch was edited from."""

    latents: Tensor  # [B, C, H, W], standardized
    prior_token_ids: Tensor  # [B, N]


class Batch(NamedTuple):
    latents: Tensor  # [B, C, H, W], standardized: what the transformer generates
    prior_token_ids: Tensor  # [B, N]
    text: Tensor  # [B, M, channels], the glyphs
    reference: Reference | None = None
    mask: Tensor | None = None  # [B, M], true where there is a token; None: everywhere
    loss_mask: Tensor | None = None  # [B, 1, H, W], the weights of latent pixels in the loss; None: all the same


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


class FlowMatching(Objective):
    """The error of the predicted velocity at logit-normal times u in (0, 1) (2403.03206, section 3.1).

    As in sampling, the transformer is given T u - 1, and the noise level σ is u shifted by the number of image tokens.

    Args:
        pixels: image pixels along a side of a latent pixel.
        drop: the share of images trained without prior tokens, for guidance.
        spread: the standard deviation of logit u.
        shift: of the sampler's noise levels, by the number of image tokens.
    """

    def __init__(
        self,
        transformer: GlmImageTransformer2DModel,
        pixels: int = 8,
        timesteps: int = 1000,
        drop: float = 0.1,
        spread: float = 1.0,
        shift: Callable[[int], float] = lambda tokens: 1.0,
    ):
        super().__init__()
        self.transformer, self.pixels, self.timesteps = transformer, pixels, timesteps
        self.drop, self.spread, self.shift = drop, spread, shift

    def forward(self, batch: Tensors, random: Randomness) -> Loss:
        x0, prior_token_ids, text, reference, mask, weights = batch.values
        transformer, count = self.transformer, len(x0)
        height, width = x0.shape[-2:]
        # Stratified times: the same spread in every batch.
        share = random.stratified(count).to(x0.device)
        timestep, sigma = self.times(share, height * width // transformer.config["patch_size"] ** 2)
        sigma = process.per_sample(sigma, x0)
        noise = random.normal(x0.shape, x0.device)
        xt = process.add_noise(x0, noise, 1 - sigma, sigma)
        target = process.prediction_target("flow_prediction", x0, noise, 1 - sigma, sigma)
        drop = random.uniform([count]).to(x0.device) < self.drop
        size = x0.new_tensor([[height * self.pixels, width * self.pixels]], dtype=torch.float32)
        text = text.to(transformer.dtype)
        context = transformer.encode_context(text, mask, prior_token_ids, drop, height, width)
        modulation = transformer.modulate(timestep, size, torch.zeros_like(size))
        references = None
        if reference is not None:
            own = transformer.encode_context(text[:, :0], None, reference.prior_token_ids, None, height, width)
            still = transformer.modulate(size.new_zeros(1), size, torch.zeros_like(size))
            references = transformer.encode_references(reference.latents.to(transformer.dtype), own, still)
            # The unconditional half does not see them.
            bias = references.keys[0].new_zeros(count, 1, 1, references.length)
            references = references._replace(bias=bias.masked_fill(drop[:, None, None, None], -torch.inf))
        velocity = transformer.denoise(xt.to(transformer.dtype), context, modulation, references).float()
        errors = masked_mean((velocity - target).square(), weights)  # [B]
        kind = "generated" if reference is None else "edited"
        bands = {
            f"{kind}_{i}": torch.where((share * 4).long().clamp(max=3) == i, errors.detach(), torch.nan)
            for i in range(4)  # least noise first
        }
        return Loss(errors, bands)

    def times(self, share: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
        """The transformer's timesteps and the noise levels, each [B], of uniform numbers [B] for images of N tokens."""
        u = (self.spread * torch.special.ndtri(share.clamp(1e-4, 1 - 1e-4))).sigmoid()
        return self.timesteps * u - 1, noise_schedule.shifted(u, self.shift(tokens))

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return list(self.transformer.transformer_blocks)

    def export(self, folder: Path) -> None:
        self.transformer.save_pretrained(folder)
