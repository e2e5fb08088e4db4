"""Sinusoidal features of positions and timesteps."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def _precise(device: torch.device) -> torch.dtype:
    """The dtype of angles: float64, unless the device (MPS) lacks it."""
    return torch.float32 if device.type == "mps" else torch.float64


def timestep_features(timesteps: Tensor, dim: int = 256, max_period: float = 10_000.0) -> Tensor:
    """[cos(t ω_i), sin(t ω_i)] with ω_i = max_period^(-i / (dim/2)) (Vaswani et al. 2017, 3.5; DDPM's use of it).

    Args:
        timesteps: [N], integers or fractions.
        dim: number of features, even.

    Returns:
        [N, dim] in float32: bfloat16 would round timesteps near 1000 to multiples of 4.
    """
    half = dim // 2
    exponent = torch.arange(half, dtype=torch.float32, device=timesteps.device) * (-math.log(max_period) / half)
    angles = timesteps.float()[:, None] * exponent.exp()[None]  # [N, dim / 2]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def sincos_1d(positions: Tensor, dim: int) -> Tensor:
    """[sin(p ω_i), cos(p ω_i)] with ω_i = 10000^(-i / (dim/2)); positions [N] -> [N, dim]."""
    half = dim // 2
    omega = 10_000.0 ** (-torch.arange(half, dtype=positions.dtype, device=positions.device) / half)
    angles = positions[:, None] * omega[None]
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def sincos_2d(
    dim: int, height: int, width: int, base_size: int, interpolation_scale: float, device: torch.device
) -> Tensor:
    """Positions on a grid of any size, scaled to the grid that the model was trained on (PixArt-α, 2310.00426).

    The first half of the features encodes the column, the second half the row.

    Args:
        dim: number of features, a multiple of 4.
        height, width: of the grid, in tokens.
        base_size: side of the training grid, in tokens.
        interpolation_scale: further compression of positions.

    Returns:
        [height * width, dim] in float32.
    """
    dtype = _precise(device)
    step = base_size / interpolation_scale
    rows = torch.arange(height, dtype=dtype, device=device) * (step / height)
    columns = torch.arange(width, dtype=dtype, device=device) * (step / width)
    by_column = sincos_1d(columns, dim // 2)[None].expand(height, -1, -1)  # [height, width, dim / 2]
    by_row = sincos_1d(rows, dim // 2)[:, None].expand(-1, width, -1)  # [height, width, dim / 2]
    return torch.cat([by_column, by_row], dim=-1).flatten(0, 1).float()


def rotary_2d(
    height: int, width: int, dim: int, device: torch.device, theta: float = 10_000.0
) -> tuple[Tensor, Tensor]:
    """Rotary positions (RoFormer, 2104.09864) on a grid: a quarter of the angles encodes the row, a quarter the column,
    and the other half repeats them.

    Args:
        height, width: of the grid, in tokens.
        dim: channels per head, a multiple of 4.

    Returns:
        cosines and sines, [height * width, dim] each, in float32.
    """
    dtype = _precise(device)
    omega = theta ** (-torch.arange(0, dim // 2, 2, dtype=dtype, device=device) / (dim // 2))  # [dim / 4]
    rows = torch.arange(height, dtype=dtype, device=device)[:, None] * omega  # [height, dim / 4]
    columns = torch.arange(width, dtype=dtype, device=device)[:, None] * omega  # [width, dim / 4]
    by_row, by_column = rows[:, None].expand(-1, width, -1), columns[None].expand(height, -1, -1)
    angles = torch.cat([by_row, by_column] * 2, dim=-1).flatten(0, 1)  # [height * width, dim]
    return angles.cos().float(), angles.sin().float()


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x_i, x_(i + d/2)) of [..., N, d] by their angles, in at least float32, which positions need."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    first, second = wide.chunk(2, dim=-1)
    rotated = torch.cat([-second, first], dim=-1)
    return torch.addcmul(wide * cos, rotated, sin).to(x.dtype)
