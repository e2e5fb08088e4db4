"""The training objective of the PixArt models: the error of a prediction and the bound of a learned variance.

Notation of Nichol and Dhariwal (2102.09672) and Ho et al. (2006.11239): x_t = √ᾱ_t x_0 + √(1 - ᾱ_t) ε.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ...errors import InputError
from ...schedulers import process

Weighting = Literal["none", "velocity", "min-snr", "balanced"]


class Losses(NamedTuple):
    """Per-image losses, each [B]."""

    mse: Tensor
    variational_bound: Tensor  # bits per dimension


class DiffusionLoss:
    """The squared error and, for models with twice the channels, the variational bound of the predicted variance.

    Args:
        betas: [T], the noise schedule.
        prediction_type: ``epsilon`` or ``v_prediction``, as in a scheduler's config.
        pixel_scale: half the distance between adjacent data values, for the likelihood at t = 0.

    Raises:
        InputError: another prediction, or ``epsilon`` with a schedule that ends in pure noise, where it says nothing
            about the image.
    """

    def __init__(self, betas: Tensor, prediction_type: str = "epsilon", pixel_scale: float = 1.0 / 255.0):
        if prediction_type not in ("epsilon", "v_prediction"):
            raise InputError(f"prediction_type is {prediction_type!r}; it is 'epsilon' or 'v_prediction'")
        self.prediction_type = prediction_type
        self.pixel_scale = pixel_scale
        self.steps = len(betas)
        self.alphas_cumprod = (1.0 - betas.double()).cumprod(0)
        if prediction_type == "epsilon" and float(self.alphas_cumprod[-1]) < 1e-8:
            raise InputError(
                "the noise schedule ends in pure noise (rescale_betas_zero_snr), where noise says nothing about the "
                "image; predict v_prediction"
            )
        previous = torch.cat([torch.ones(1, dtype=torch.float64), self.alphas_cumprod[:-1]])
        self.posterior = process.posterior(self.alphas_cumprod, previous)
        # The variance is 0 at t = 0 and replaced by that at t = 1, as in 2102.09672.
        variance = self.posterior.variance
        self.posterior_log_variance = torch.cat([variance[1:2], variance[1:]]).log()

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t [B, C, H, W] of x_0, ε and t [B]."""
        return process.add_noise(x0, noise, *self.levels(t))

    def noise_between(self, x0: Tensor, xt: Tensor, t: Tensor) -> Tensor:
        """ε [B, C, H, W] of x_0 and x_t."""
        return process.predicted_noise("sample", x0, xt, *self.levels(t))

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma [B, 1, 1, 1] of timesteps [B]."""
        return process.alpha_sigma(_at(self.alphas_cumprod, t))

    def weights(self, kind: Weighting, gamma: float = 5.0, limit: float = 1000.0) -> Tensor:
        """The weight [T] of the squared error at each timestep.

        Args:
            kind: ``none``; ``min-snr`` (2303.09556, section 3.4) with ``gamma``; ``velocity``, with which the noise's
                error counts as the velocity's does: 1 / ᾱ_t, at most ``limit``, of mean 1; ``balanced``, with which the
                velocity's error counts min(SNR, 1)^¼ times: its square was measured to grow as 1 / √SNR, so that the
                gradients of all timesteps have the same size.
        """
        snr = self.alphas_cumprod / (1 - self.alphas_cumprod)
        if kind == "min-snr":
            clipped = snr.clamp(max=gamma)
            return (clipped / (snr if self.prediction_type == "epsilon" else snr + 1)).float()
        weights = snr.clamp(max=1.0) ** 0.25 if kind == "balanced" else torch.ones_like(snr)
        if kind != "none" and self.prediction_type == "epsilon":
            weights = (weights / self.alphas_cumprod).clamp(max=limit)
            weights = weights / weights.mean()
        return weights.float()

    def __call__(
        self, output: Tensor, x0: Tensor, noise: Tensor, xt: Tensor, t: Tensor, mask: Tensor | None = None
    ) -> Losses:
        """Losses of a prediction [B, C or 2C, H, W] made from x_t.

        Args:
            mask: [B, 1, H, W], the weight of each latent pixel; an image's loss is its weighted mean.
        """
        channels = x0.shape[1]
        output = output.float()
        prediction = output[:, :channels]
        levels = self.levels(t)
        target = process.prediction_target(self.prediction_type, x0, noise, *levels)
        mse = masked_mean((prediction - target).square(), mask)
        if output.shape[1] == channels:
            return Losses(mse, torch.zeros_like(mse))
        # The mean is detached: the bound trains the variance alone (2102.09672, section 3.1).
        predicted_x0 = process.predicted_original(self.prediction_type, prediction.detach(), xt, *levels)
        return Losses(mse, masked_mean(self._bound(predicted_x0, output[:, channels:], x0, xt, t), mask))

    def _bound(self, predicted_x0: Tensor, interpolation: Tensor, x0: Tensor, xt: Tensor, t: Tensor) -> Tensor:
        """Bits of each value, [B, C, H, W]."""
        on_x0, on_xt = _at(self.posterior.on_original, t), _at(self.posterior.on_sample, t)
        true_mean = on_x0 * x0 + on_xt * xt
        mean = on_x0 * predicted_x0 + on_xt * xt
        lower, upper = _at(self.posterior_log_variance, t), _at(self.posterior.beta.log(), t)
        log_variance = process.learned_log_variance(interpolation, upper, lower)

        kl = 0.5 * (log_variance - lower - 1 + (lower - log_variance).exp()) + 0.5 * (
            (true_mean - mean).square() * (-log_variance).exp()
        )
        likelihood = _discretized_log_likelihood(x0, mean, 0.5 * log_variance, self.pixel_scale)
        first = (t == 0).view(-1, 1, 1, 1)
        bits: Tensor = torch.where(first, -likelihood, kl) / math.log(2.0)
        return bits


def masked_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """The mean [B] of values [B, C, H, W], weighted by a mask [B, 1, H, W] if there is one; 0 where it is empty."""
    if mask is None:
        return values.flatten(1).mean(1)
    return (values * mask).flatten(1).sum(1) / (values.shape[1] * mask.flatten(1).sum(1)).clamp_min(1e-6)


def _at(table: Tensor, t: Tensor) -> Tensor:
    return table.to(t.device)[t].float().view(-1, 1, 1, 1)


def _discretized_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor, half_step: float) -> Tensor:
    """log of the normal's mass in [x - half_step, x + half_step], open-ended beyond ±0.999 (DDPM, eq. 13)."""
    inverse = (-log_scale).exp()
    above = _normal_cdf((x - mean + half_step) * inverse)
    below = _normal_cdf((x - mean - half_step) * inverse)
    mass = torch.where(x < -0.999, above, torch.where(x > 0.999, 1 - below, above - below))
    return mass.clamp_min(1e-12).log()


def _normal_cdf(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.erf(x / math.sqrt(2.0)))
