"""The distribution over latents that an autoencoder encodes an image to."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from .noise import draw_noise


class DiagonalGaussianDistribution:
    """A diagonal normal distribution over latents: q(z | x) of Kingma and Welling (2013).

    Args:
        parameters: [B, 2 C, H, W], the means, then the log-variances, which are clamped to [-30, 20].
        deterministic: treat the variance as zero, so that every sample is the mean.

    Attributes:
        mean, logvar, std, var: each [B, C, H, W].
    """

    def __init__(self, parameters: Tensor, deterministic: bool = False):
        mean, logvar = parameters.chunk(2, dim=1)
        self.parameters = parameters
        self.deterministic = deterministic
        self.mean = mean
        self.logvar = logvar.clamp(-30.0, 20.0)
        self.std = torch.zeros_like(mean) if deterministic else torch.exp(0.5 * self.logvar)
        self.var = torch.zeros_like(mean) if deterministic else torch.exp(self.logvar)

    def sample(self, generator: Generator | Sequence[Generator] | None = None) -> Tensor:
        """Sample latents, [B, C, H, W].

        Args:
            generator: one for a single draw over the whole batch, or a list with one per image.

        Raises:
            InputError: the number of generators is not the batch size.
        """
        return self.mean + self.std * draw_noise(self.mean.shape, generator, self.mean.device, self.mean.dtype)

    def mode(self) -> Tensor:
        """The most likely latents, [B, C, H, W]: the mean."""
        return self.mean

    def kl(self, other: DiagonalGaussianDistribution | None = None) -> Tensor:
        """KL(self || other) in nats, summed over each image: [B]; None is the standard normal."""
        if self.deterministic:
            return self.mean.new_zeros(self.mean.shape[0])
        if other is None:
            terms = self.mean**2 + self.var - 1.0 - self.logvar
        else:
            distance = (self.mean - other.mean) ** 2
            terms = (distance + self.var) / other.var - 1.0 - self.logvar + other.logvar
        return 0.5 * terms.sum(dim=(1, 2, 3))

    def nll(self, sample: Tensor, dims: Sequence[int] = (1, 2, 3)) -> Tensor:
        """-log q(sample) in nats, summed over ``dims``: [B] by default."""
        if self.deterministic:
            return self.mean.new_zeros(self.mean.shape[0])
        terms = math.log(2.0 * math.pi) + self.logvar + (sample - self.mean) ** 2 / self.var
        return 0.5 * terms.sum(dim=tuple(dims))
