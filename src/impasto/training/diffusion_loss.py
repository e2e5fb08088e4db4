"""The objective of the PixArt models: prediction of the noise (or of the velocity), and a learned variance.

Notation of Nichol and Dhariwal (2102.09672) and Ho et al. (2006.11239): x_t = √ᾱ_t x_0 + √(1 - ᾱ_t) ε.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import InputError


class Losses(NamedTuple):
    """Per-image losses, each [B]."""

    mse: Tensor
    variational_bound: Tensor  # bits a dimension


class DiffusionLoss:
    """The squared error and, for models that predict twice the channels, the variational bound of their variance.

    Args:
        betas: [T], the noise schedule.
        prediction_type: what the model predicts, as in a scheduler's config: ``epsilon``, or ``v_prediction``, the
            velocity v = √ᾱ_t ε - √(1 - ᾱ_t) x_0 (2202.00512, appendix D).
        pixel_scale: half the distance between two values that the data can take, for the likelihood at t = 0.
    """

    def __init__(self, betas: Tensor, prediction_type: str = "epsilon", pixel_scale: float = 1.0 / 255.0):
        if prediction_type not in ("epsilon", "v_prediction"):
            raise InputError(f"prediction_type is {prediction_type!r}; it is 'epsilon' or 'v_prediction'")
        self.prediction_type = prediction_type
        self.pixel_scale = pixel_scale
        self.betas = betas.double()
        self.alphas_cumprod = (1.0 - self.betas).cumprod(0)
        previous = torch.cat([torch.ones(1, dtype=torch.float64), self.alphas_cumprod[:-1]])
        # The posterior q(x_{t-1} | x_t, x_0), DDPM eq. 7.
        self.posterior_variance = self.betas * (1 - previous) / (1 - self.alphas_cumprod)
        self.posterior_on_x0 = self.betas * previous.sqrt() / (1 - self.alphas_cumprod)
        self.posterior_on_xt = (1 - previous) * (1 - self.betas).sqrt() / (1 - self.alphas_cumprod)
        # Its variance is 0 at t = 0: there the one of t = 1 stands in, as in 2102.09672.
        self.posterior_log_variance = torch.cat([self.posterior_variance[1:2], self.posterior_variance[1:]]).log()

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t [B, C, H, W] of x_0, ε and t [B]."""
        alpha_bar = _at(self.alphas_cumprod, t)
        return alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * noise

    def __call__(self, output: Tensor, x0: Tensor, noise: Tensor, xt: Tensor, t: Tensor) -> Losses:
        """Losses of a prediction [B, C or 2C, H, W] made from x_t."""
        channels = x0.shape[1]
        output = output.float()
        prediction, target = output[:, :channels], noise
        epsilon = prediction
        alpha_bar = _at(self.alphas_cumprod, t)
        if self.prediction_type == "v_prediction":
            target = alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * x0
            epsilon = alpha_bar.sqrt() * prediction + (1 - alpha_bar).sqrt() * xt
        mse = (prediction - target).square().flatten(1).mean(1)
        if output.shape[1] == channels:
            return Losses(mse, torch.zeros_like(mse))
        # The mean is detached: the bound trains the variance alone (2102.09672, section 3.1).
        return Losses(mse, self._bound(epsilon.detach(), output[:, channels:], x0, xt, t))

    def _bound(self, epsilon: Tensor, interpolation: Tensor, x0: Tensor, xt: Tensor, t: Tensor) -> Tensor:
        alpha_bar = _at(self.alphas_cumprod, t)
        on_x0, on_xt = _at(self.posterior_on_x0, t), _at(self.posterior_on_xt, t)
        predicted_x0 = (xt - (1 - alpha_bar).sqrt() * epsilon) / alpha_bar.sqrt()
        true_mean = on_x0 * x0 + on_xt * xt
        mean = on_x0 * predicted_x0 + on_xt * xt
        # log Σ = v log β + (1 - v) log β̃, v from [-1, 1] (2102.09672, eq. 15).
        lower, upper = _at(self.posterior_log_variance, t), _at(self.betas.log(), t)
        v = (interpolation + 1) / 2
        log_variance = v * upper + (1 - v) * lower

        kl = 0.5 * (log_variance - lower - 1 + (lower - log_variance).exp()) + 0.5 * (
            (true_mean - mean).square() * (-log_variance).exp()
        )
        likelihood = _discretised_log_likelihood(x0, mean, 0.5 * log_variance, self.pixel_scale)
        first = (t == 0).view(-1, 1, 1, 1)
        bits = torch.where(first, -likelihood, kl) / math.log(2.0)
        return bits.flatten(1).mean(1)


def _at(table: Tensor, t: Tensor) -> Tensor:
    return table.to(t.device)[t].float().view(-1, 1, 1, 1)


def _discretised_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor, half_step: float) -> Tensor:
    """log of the normal's mass in [x - half_step, x + half_step], open-ended beyond ±0.999 (DDPM, eq. 13)."""
    inverse = (-log_scale).exp()
    above = _normal_cdf((x - mean + half_step) * inverse)
    below = _normal_cdf((x - mean - half_step) * inverse)
    mass = torch.where(x < -0.999, above, torch.where(x > 0.999, 1 - below, above - below))
    return mass.clamp_min(1e-12).log()


def _normal_cdf(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.erf(x / math.sqrt(2.0)))
