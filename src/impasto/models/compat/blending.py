"""Tiles that are blended where they overlap, as diffusers tiles: approximate, since no tile knows the others.

``enable_tiling`` (tiling.py) is exact, and needs none of this. It is for code that calls these methods itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...nn.gaussian import DiagonalGaussianDistribution


class BlendedTiles:
    """Methods of an autoencoder with ``encoder``, ``decoder``, ``quant_conv`` and ``post_quant_conv``."""

    tile_sample_min_size: int  # side of a tile of an image, in pixels
    tile_latent_min_size: int  # side of a tile of latents
    tile_overlap_factor: float  # the share of a side that overlaps
    _encoded: ClassVar[Any]  # the classes of the outputs
    _decoded: ClassVar[Any]

    def blend_v(self, a: Tensor, b: Tensor, blend_extent: int) -> Tensor:
        """Fade from the last rows of ``a`` to the first ones of ``b``, in place in ``b``; both [B, C, H, W]."""
        return _fade(a, b, blend_extent, 2)

    def blend_h(self, a: Tensor, b: Tensor, blend_extent: int) -> Tensor:
        """Fade from the last columns of ``a`` to the first ones of ``b``, in place in ``b``; both [B, C, H, W]."""
        return _fade(a, b, blend_extent, 3)

    def tiled_encode(self, x: Tensor, return_dict: bool = True) -> Any:
        """``encode`` by blended tiles of ``tile_sample_min_size``; approximate."""
        distribution = DiagonalGaussianDistribution(self._tiled_encode(x))
        return self._encoded(distribution) if return_dict else (distribution,)

    def _tiled_encode(self, x: Tensor) -> Tensor:
        def encode(tile: Tensor) -> Tensor:
            return _maybe(self.quant_conv, self.encoder(tile))  # type: ignore[attr-defined]

        return self._tiled(encode, x, self.tile_sample_min_size, self.tile_latent_min_size)

    def tiled_decode(self, z: Tensor, return_dict: bool = True) -> Any:
        """``decode`` by blended tiles of ``tile_latent_min_size``; approximate."""

        def decode(tile: Tensor) -> Tensor:
            decoded: Tensor = self.decoder(_maybe(self.post_quant_conv, tile))  # type: ignore[attr-defined]
            return decoded

        sample = self._tiled(decode, z, self.tile_latent_min_size, self.tile_sample_min_size)
        return self._decoded(sample) if return_dict else (sample,)

    def _tiled(self, compute: Callable[[Tensor], Tensor], x: Tensor, size: int, out_size: int) -> Tensor:
        step = int(size * (1 - self.tile_overlap_factor))
        extent = int(out_size * self.tile_overlap_factor)
        limit = out_size - extent
        tops, lefts = range(0, x.shape[2], step), range(0, x.shape[3], step)
        rows = [[compute(x[:, :, i : i + size, j : j + size]) for j in lefts] for i in tops]
        results = []
        for i, row in enumerate(rows):
            for j, tile in enumerate(row):
                if i > 0:
                    self.blend_v(rows[i - 1][j], tile, extent)
                if j > 0:
                    self.blend_h(row[j - 1], tile, extent)
            results.append(torch.cat([tile[:, :, :limit, :limit] for tile in row], dim=3))
        return torch.cat(results, dim=2)


def _maybe(layer: Any, x: Tensor) -> Tensor:
    out: Tensor = x if layer is None else layer(x)
    return out


def _fade(a: Tensor, b: Tensor, extent: int, dim: int) -> Tensor:
    extent = min(a.shape[dim], b.shape[dim], extent)
    if extent == 0:
        return b
    weight = torch.arange(extent, device=b.device, dtype=torch.float32) / extent
    weight = weight.to(b.dtype).view(-1, *[1] * (3 - dim))
    end, start = a.narrow(dim, a.shape[dim] - extent, extent), b.narrow(dim, 0, extent)
    start.copy_(end * (1 - weight) + start * weight)
    return b
