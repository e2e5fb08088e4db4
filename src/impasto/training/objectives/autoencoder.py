"""Training of an AutoencoderKL: reconstruction errors and a small KL term."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import InputError
from ...models.autoencoder.model import AutoencoderKL
from ..data.sample import Batch, Sample
from ..running.randomness import Randomness
from .base import Loss, Objective


class Autoencoder(Objective):
    """|x - x'|² + l1_weight |x - x'| + edge_weight |∇x - ∇x'| + kl_weight KL, of images of one size.

    Args:
        l1_weight: in addition to the squared error: keeps edges sharp.
        edge_weight: of the error of differences between adjacent pixels, for which blur costs more than it saves.
        half_scale_weight: of the squared and absolute errors of what latents at half their size are decoded to,
            compared with images at half their size. It makes the latents smooth, which a denoiser learns from faster
            (2502.09509, 2502.14831).
    """

    def __init__(
        self,
        vae: AutoencoderKL,
        kl_weight: float = 1e-6,
        l1_weight: float = 0.5,
        edge_weight: float = 0.0,
        half_scale_weight: float = 0.0,
    ):
        super().__init__()
        self.vae = vae
        self.kl_weight, self.l1_weight, self.edge_weight = kl_weight, l1_weight, edge_weight
        self.half_scale_weight = half_scale_weight

    def forward(self, batch: Batch, random: Randomness) -> Loss:
        x = images_of(batch.samples, self.vae.device)  # [B, 3, H, W]
        posterior = self.vae.encode(x.to(self.vae.dtype)).latent_dist
        noise = random.normal(posterior.mean.shape, posterior.mean.device).to(posterior.mean)
        z = posterior.mean + posterior.std * noise  # [B, C, h, w]
        difference = self.vae.decode(z).sample.float() - x
        mse, l1 = errors(difference)  # [B]
        kl = posterior.kl().float() / x[0].numel()
        each = mse + self.l1_weight * l1 + self.kl_weight * kl
        parts = {"mse": mse, "l1": l1, "kl": kl}
        if self.edge_weight:
            parts["edges"] = edges(difference)
            each = each + self.edge_weight * parts["edges"]
        if self.half_scale_weight:
            small = self.vae.decode(F.avg_pool2d(z, 2)).sample.float()  # [B, 3, H / 2, W / 2]
            half_mse, half_l1 = errors(small - F.avg_pool2d(x, 2))
            parts["half_scale"] = half_mse + self.l1_weight * half_l1
            each = each + self.half_scale_weight * parts["half_scale"]
        return Loss(each, parts)

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
    return torch.stack([image for image in images if image is not None]).to(device)


def errors(difference: Tensor) -> tuple[Tensor, Tensor]:
    """The mean squared and absolute errors [B] of images [B, 3, H, W]."""
    flat = difference.flatten(1)
    return flat.square().mean(1), flat.abs().mean(1)


def edges(difference: Tensor) -> Tensor:
    """The mean absolute errors [B] of differences between adjacent pixels, along both sides of [B, 3, H, W]."""
    return sum((difference.diff(dim=side).abs().flatten(1).mean(1) for side in (2, 3)), difference.new_zeros(()))


def psnr(images: Tensor, reconstructions: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of images in [-1, 1], averaged over the batch."""
    error = ((images - reconstructions.clamp(-1, 1)) / 2).square().flatten(1).mean(1)
    return float((-10 * error.clamp_min(1e-10).log10()).mean())


@torch.no_grad()
def latent_moments(vae: AutoencoderKL, batches: Iterable[Sequence[Sample]]) -> tuple[Tensor, Tensor]:
    """The mean and the deviation [C] of the unscaled latents of images; those of a batch have one size."""
    found = [vae.encode(images_of(samples, vae.device).to(vae.dtype)).latent_dist.mode() for samples in batches]
    latents = torch.cat([each.transpose(0, 1).flatten(1).float() for each in found], 1)  # [C, all]
    return latents.mean(1), latents.std(1)


@torch.no_grad()
def standardize(vae: AutoencoderKL, mean: Tensor, std: Tensor) -> None:
    """Fold an affine map into the 1 x 1 convolutions, so that scaled latents have mean 0 and deviation 1.

    z' = (z - mean) / (std * scaling_factor), and its inverse before the decoder.

    Args:
        mean, std: [C], of the latents of images as they are now.
    """
    first, last = vae.quant_conv, vae.post_quant_conv
    if first is None or last is None or first.bias is None or last.bias is None:
        raise InputError("latents are standardized in the quantization convolutions, and this autoencoder has none")
    scale = 1.0 / (std * vae.config["scaling_factor"])
    channels = len(mean)
    first.weight[:channels] *= scale.view(-1, 1, 1, 1)
    first.bias[:channels] = (first.bias[:channels] - mean) * scale
    first.bias[channels:] += 2 * scale.log()  # log-variances
    last.bias += last.weight[:, :, 0, 0] @ mean
    last.weight /= scale.view(1, -1, 1, 1)
