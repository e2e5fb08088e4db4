"""Compressed keys and values: attention to fewer tokens than there are (PixArt-Σ, 2403.04692, on KV compression).

The grid of an image's tokens is reduced by a factor R on each side, that of the keys and that of the values alike. So
self-attention, which dominates at 2K and 4K, takes R² times fewer multiplications; queries and outputs stay.

Shapes: B images, N = H * W tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from ...errors import ConfigurationError, InputError
from ...nn.changes import is_compiled, refuse_adapters

#: How keys and values are chosen, as the original code names it.
Sampling = Literal["conv", "ave", "uniform", "uniform_every"]
#: Rows and columns of an image's tokens.
Grid: TypeAlias = tuple[int, int]


class KVCompression(nn.Module):
    """Keys, or values, of a grid of tokens -> those of a grid R times smaller on each side.

    - ``"conv"``: a convolution of each channel over R x R tokens, then layer normalization, both trained. It starts as
      the mean. Rows and columns beyond a multiple of R are left out.
    - ``"ave"``: every R-th row and column, without those beyond a multiple of R. (The original code has this name for
      it, although it averages nothing.)
    - ``"uniform"``: every R-th row and column.
    - ``"uniform_every"``: every R-th token in reading order, so R times fewer.
    """

    def __init__(self, width: int, sampling: Sampling, factor: int):
        super().__init__()
        self.sampling, self.factor = sampling, factor
        if sampling == "conv":
            self.conv = nn.Conv2d(width, width, factor, stride=factor, groups=width)
            self.norm = nn.LayerNorm(width)
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """The layer normalization of the mean, with which training starts."""
        if self.sampling == "conv":
            nn.init.constant_(self.conv.weight, self.factor**-2)
            nn.init.zeros_(self.conv.bias)  # type: ignore[arg-type]
            self.norm.reset_parameters()

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """[B, H * W, D] -> [B, H' * W', D]."""
        step = self.factor
        if self.sampling == "uniform_every":
            return x[:, ::step]
        rows, columns = grid
        if self.sampling != "uniform":
            if min(grid) < step:
                raise InputError(
                    f"an image of {rows} x {columns} tokens is too small for keys and values that are compressed "
                    f"{step} x {step} times; its sides need {step} tokens or more"
                )
            rows, columns = rows - rows % step, columns - columns % step
        x = torch.unflatten(x, 1, grid)[:, :rows, :columns]  # [B, H, W, D]
        if self.sampling != "conv":
            return x[:, ::step, ::step].flatten(1, 2)  # [B, H' * W', D]
        mixed: Tensor = self.conv(x.permute(0, 3, 1, 2))  # [B, D, H', W']
        normed: Tensor = self.norm(mixed.flatten(2).transpose(1, 2))  # [B, H' * W', D]
        return normed

    def extra_repr(self) -> str:
        return f"{self.sampling!r}, factor={self.factor}"


def compressed_layers(
    sampling: str | None, factor: int, layers: Sequence[int] | None, num_layers: int, owner: str
) -> frozenset[int]:
    """The layers whose keys and values are compressed: those given, or the second half, as in the original.

    Raises:
        ConfigurationError: layers that do not exist, or a factor or layers without a sampling.
    """
    if sampling is None:
        if layers:
            raise ConfigurationError(
                f"{owner}: kv_compression_layers needs kv_compression, one of {', '.join(get_args(Sampling))}"
            )
        return frozenset()
    if factor < 2:
        raise ConfigurationError(f"{owner}: kv_compression_factor must be 2 or more, not {factor}")
    chosen = frozenset(range(num_layers // 2, num_layers) if layers is None else layers)
    if not chosen:
        raise ConfigurationError(f"{owner}: kv_compression_layers is empty; leave kv_compression away instead")
    if max(chosen) >= num_layers:
        raise ConfigurationError(
            f"{owner}: kv_compression_layers has {max(chosen)}, and the layers are 0 to {num_layers - 1}"
        )
    return chosen


def compress_keys(
    transformer: Any, sampling: Sampling = "conv", factor: int = 2, layers: Sequence[int] | None = None
) -> Any:
    """Turn a plain PixArt transformer into one with compressed keys and values, to be trained from there.

    Its tensors stay. New ones, of ``"conv"``, start as the layer normalization of the mean, so that the output differs
    from that of the plain model: training has to recover it (docs/convert.md has numbers).

    Args:
        transformer: a ``PixArtTransformer2DModel``; it is changed.
        sampling: see ``KVCompression``.
        factor: R, 2 or more.
        layers: which layers; by default the second half.

    Returns:
        the transformer

    Raises:
        ConfigurationError: it is compressed or compiled already, has adapters, or a value that cannot be used.
    """
    name = type(transformer).__name__
    blocks = transformer.transformer_blocks
    if transformer.config.get("kv_compression") is not None:
        raise ConfigurationError(f"the keys and values of this {name} are compressed already; load a plain one")
    refuse_adapters(name, transformer, "changed")
    if any(is_compiled(block) for block in blocks):
        raise ConfigurationError(f"this {name} is compiled: compress its keys and values before compiling it")
    chosen = {
        "kv_compression": sampling,
        "kv_compression_factor": factor,
        "kv_compression_layers": None if layers is None else [*layers],
    }
    checked = transformer.checked_arguments(transformer.config, **chosen)
    numbers = compressed_layers(sampling, factor, checked["kv_compression_layers"], len(blocks), name)
    for number in sorted(numbers):
        attention = blocks[number].attn1
        weight = attention.to_k.weight
        made = KVCompression(transformer.inner_dim, sampling, factor).to(weight.device, weight.dtype)
        attention.kv_compression = made.train(attention.training)
    transformer.register_to_config(**{key: checked[key] for key in chosen if checked[key] is not None})
    return transformer
