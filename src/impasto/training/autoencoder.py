"""Training of an AutoencoderKL: reconstruction error and a small KL term."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models.autoencoder.model import AutoencoderKL
from .loop import Loss, Recipe, train
from .randomness import Randomness


@dataclass(frozen=True)
class AutoencoderRecipe(Recipe):
    """How to train."""

    optimizer: Literal["muon", "adamw"] = "adamw"
    learning_rate: float = 1e-3
    schedule: Literal["trapezoid", "cosine"] = "cosine"
    warmup_steps: int = 100
    weight_decay: float = 0.0
    ema_decay: float = 0.0
    log_every: int = 100
    save_every: int = 100
    kl_weight: float = 1e-6
    l1_weight: float = 0.5  # in addition to the squared error: keeps edges sharp


def psnr(images: Tensor, reconstructions: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of images in [-1, 1], averaged over the batch."""
    error = ((images - reconstructions.clamp(-1, 1)) / 2).square().flatten(1).mean(1)
    return float((-10 * error.clamp_min(1e-10).log10()).mean())


def train_autoencoder(
    model: AutoencoderKL, batch: Callable[[int], Tensor], recipe: AutoencoderRecipe, folder: Path, validation: Tensor
) -> None:
    """Train in place, resuming from ``folder/state.pt`` if it exists.

    Args:
        batch: the images [B, 3, H, W] of a step, in [-1, 1].
        validation: images [B, 3, H, W] whose PSNR is logged with each save.
    """

    def loss(step: int, random: Randomness) -> Loss:
        images = batch(step).contiguous(memory_format=torch.channels_last)
        posterior = model.encode(images.to(model.dtype)).latent_dist
        noise = random.normal(posterior.mean.shape).to(posterior.mean)
        reconstruction = model.decode(posterior.mean + posterior.std * noise).sample.float()
        mse = F.mse_loss(reconstruction, images)
        l1 = F.l1_loss(reconstruction, images)
        kl = posterior.kl().float().mean() / images[0].numel()
        return Loss(mse + recipe.l1_weight * l1 + recipe.kl_weight * kl, {"mse": mse, "l1": l1, "kl": kl})

    def check(step: int) -> dict[str, float]:
        return {"psnr": psnr(validation, model.decode(model.encode(validation).latent_dist.mode()).sample)}

    train(model, loss, recipe, folder, check)
