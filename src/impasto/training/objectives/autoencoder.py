"""Training of an AutoencoderKL: reconstruction error and a small KL term."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ...models.autoencoder.model import AutoencoderKL
from ..data.sample import Batch, Sample
from ..randomness import Randomness
from .base import Loss, Objective


class Autoencoder(Objective):
    """|x - x'|² + l1_weight |x - x'| + kl_weight KL, of images of one size."""

    def __init__(self, vae: AutoencoderKL, kl_weight: float = 1e-6, l1_weight: float = 0.5):
        super().__init__()
        self.vae = vae
        self.kl_weight = kl_weight
        self.l1_weight = l1_weight  # in addition to the squared error: keeps edges sharp

    def forward(self, batch: Batch, random: Randomness) -> Loss:
        x = images_of(batch.samples, self.vae.device)  # [B, 3, H, W]
        posterior = self.vae.encode(x.to(self.vae.dtype)).latent_dist
        noise = random.normal(posterior.mean.shape).to(posterior.mean)
        z = posterior.mean + posterior.std * noise  # [B, C, h, w]
        difference = (self.vae.decode(z).sample.float() - x).flatten(1)
        mse, l1 = difference.square().mean(1), difference.abs().mean(1)  # [B]
        kl = posterior.kl().float() / x[0].numel()
        return Loss(mse + self.l1_weight * l1 + self.kl_weight * kl, {"mse": mse, "l1": l1, "kl": kl})

    def validation(self, batch: Batch, random: Randomness) -> Mapping[str, Tensor]:
        """The PSNR in dB of reconstructions."""
        return {"psnr": torch.as_tensor(self.psnr(images_of(batch.samples, self.vae.device)))}

    @torch.no_grad()
    def psnr(self, images: Tensor) -> float:
        """The PSNR of reconstructions of images [B, 3, H, W]."""
        decoded = self.vae.decode(self.vae.encode(images.to(self.vae.dtype)).latent_dist.mode()).sample
        return psnr(images, decoded.float())

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return [*self.vae.encoder.down_blocks, *self.vae.decoder.up_blocks]

    def export(self, folder: Path) -> None:
        self.vae.save_pretrained(folder)


def images_of(samples: Sequence[Sample], device: torch.device) -> Tensor:
    """Images of one size, [B, 3, H, W]."""
    images = [sample.image for sample in samples]
    assert all(image is not None for image in images)
    stacked = torch.stack([image for image in images if image is not None])
    return stacked.to(device, memory_format=torch.channels_last)


def psnr(images: Tensor, reconstructions: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of images in [-1, 1], averaged over the batch."""
    error = ((images - reconstructions.clamp(-1, 1)) / 2).square().flatten(1).mean(1)
    return float((-10 * error.clamp_min(1e-10).log10()).mean())
