"""The autoencoder's latents <-> those that PixArt's transformer was trained on, which have a variance of about 1.

Shapes: B images, C latent channels, h x w latent pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def scaled(z: Tensor, config: Mapping[str, Any]) -> Tensor:
    """Latents [B, C, h, w] as encoded -> as the transformer takes them.

    Args:
        config: the autoencoder's.
    """
    mean, std, factor = _statistics(z, config)
    return (z - mean) / std * factor


def unscaled(z: Tensor, config: Mapping[str, Any]) -> Tensor:
    """The inverse of ``scaled``: latents [B, C, h, w] to be decoded."""
    mean, std, factor = _statistics(z, config)
    return z / factor * std + mean


def _statistics(z: Tensor, config: Mapping[str, Any]) -> tuple[Tensor | float, Tensor | float, float]:
    """Mean and standard deviation of each channel, [C, 1, 1] or one number, and a factor for all."""
    factor, mean, std = (config.get(name) for name in ("scaling_factor", "latents_mean", "latents_std"))
    factor = 1.0 if factor is None else float(factor)
    if mean is None or std is None:
        return config.get("shift_factor") or 0.0, 1.0, factor
    return z.new_tensor(mean)[:, None, None], z.new_tensor(std)[:, None, None], factor
