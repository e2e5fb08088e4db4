"""Exact tiling of the autoencoder: the same numbers as without it, to rounding, in a fraction of the memory.

The whole image goes through one layer after the other, and within a layer in strips of full rows, so that nothing has
to be blended:

    convolution      reads a row above and a row below each strip (halo); zeros only around the image
    normalization    with the statistics of the whole map, which are computed from all its strips beforehand

A map between two layers is a list of strips that are freed when they are read for the last time. What is held and what
is computed twice is decided by the plan (memory.py). A strip is [1, C, rows, W], of one image.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import InputError
from .layers import Attention, Coder, Downsample, Head, Resnet, Upsample
from .memory import STATISTICS_BLOCK, STRIP_BYTES, Stage, make_plan, trace


class Tiling:
    """The methods of an autoencoder that are about tiling."""

    use_tiling: bool = False
    _max_bytes: int | None = None
    _strip_bytes: int = STRIP_BYTES

    def enable_tiling(self, max_bytes: int | None = None, strip_bytes: int = STRIP_BYTES) -> None:
        """Encode and decode in strips: the same result to rounding, without seams, in less memory.

        The images of a batch are computed one at a time. It takes effect when no gradients are recorded (under
        ``torch.no_grad()`` or ``torch.inference_mode()``); otherwise everything is computed at once. Layers are called
        one by one, not the blocks that they belong to: hooks on blocks do not run, and compiled blocks are not used.

        SDXL's autoencoder decodes 4096 x 4096 pixels in bfloat16 with 4.6 GB of activations instead of 26 GB and 28 %
        more arithmetic; with ``max_bytes=9 * 10**9``, with 6 % more.

        Args:
            max_bytes: the memory for activations: the more, the less is computed twice. None, or less than the
                smallest amount that works: that amount.
            strip_bytes: the working memory of one strip, included in ``max_bytes``; a strip has at least one row.

        Raises:
            InputError: sizes that are not positive integers.
        """
        for name, value in (("max_bytes", max_bytes), ("strip_bytes", strip_bytes)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise InputError(f"{name} must be a number of bytes, not {value!r}")
        self.use_tiling, self._max_bytes, self._strip_bytes = True, max_bytes, strip_bytes

    def disable_tiling(self) -> None:
        """Compute whole images again."""
        self.use_tiling = False

    def _tiles(self) -> bool:
        return self.use_tiling and not torch.is_grad_enabled()

    def _run(self, coder: Coder, x: Tensor) -> Tensor:
        layers = trace(coder, *x.shape[2:]) if self._tiles() else []
        if not layers or not all(layer.outputs for layer in layers):  # too small to be divided: torch raises the error
            return cast(Tensor, coder(x))
        return compute(make_plan(layers, x.element_size(), self._max_bytes, self._strip_bytes).stages, x)


def compute(stages: list[Stage], x: Tensor) -> Tensor:
    """All layers of an encoder or decoder, one after the other: [1, C, H, W] -> [1, C', H', W']."""
    source: Source = Map([x])
    for stage in stages:
        source = _compute_layer(stage, source)
    return source.rows(0, stages[-1].layer.height)


def _compute_layer(stage: Stage, source: Source) -> Source:
    layer, step, height = stage.layer.module, stage.rows, stage.layer.height
    match layer:
        case Resnet():
            return _compute_resnet(layer, source, height, step, stage.hold)
        case Attention():
            x = source.rows(0, height)
            source.free(height + HALO)
            return Map([strip.clone() for strip in layer(x).split(-(-height // 8), dim=2)])  # to be freed in strips
        case Upsample():
            upsampled = Upsampled(layer.conv, source, height)
            return store(upsampled.rows, 2 * height, step, upsampled.free) if stage.hold else upsampled
        case Downsample():
            half, step = halved(layer.conv, source.rows, height), max(1, step // 2)
            return store(half, height // 2, step, lambda end: source.free(2 * end))
        case Head():
            norm = normalizer(layer.norm, measure(source.rows, height, step))
            return store(convolved(layer.conv, source.rows, height, norm), height, step, source.free)
        case _:
            return store(convolved(layer, source.rows, height), height, step, source.free)


def _compute_resnet(layer: Any, source: Source, height: int, step: int, hold: bool) -> Map:
    """shortcut(x) + conv2(silu(norm2(h))), where h = conv1(silu(norm1(x)))."""
    norm1 = normalizer(layer.norm1, measure(source.rows, height, step))
    inner = convolved(layer.conv1, source.rows, height, norm1)
    held = store(inner, height, step) if hold else None
    norm2 = normalizer(layer.norm2, measure(held.rows if held else inner, height, step))

    def rows(first: int, end: int) -> Tensor:
        x: Rows = source.rows
        if held is None:  # x is read once and used twice
            x = window(x, max(first - HALO, 0), min(end + HALO, height))
        h = held.rows if held else convolved(layer.conv1, x, height, norm1)
        result = convolved(layer.conv2, h, height, norm2)(first, end)
        shortcut = x(first, end)
        return (shortcut if layer.conv_shortcut is None else layer.conv_shortcut(shortcut)) + result

    def free(end: int) -> None:
        source.free(end)
        if held:
            held.free(end)

    return store(rows, height, step, free)


# --- maps ---

#: Rows ``first`` to ``end`` of a map: [1, C, end - first, W].
Rows = Callable[[int, int], Tensor]
#: Rows on each side of a strip that two convolutions need.
HALO = 2


class Map:
    """A map as the list of its strips."""

    def __init__(self, strips: list[Tensor]):
        self.strips, self.start = strips, 0  # and the row that they start with

    def rows(self, first: int, end: int) -> Tensor:
        pieces, top = [], self.start
        for strip in self.strips:
            bottom = top + strip.shape[2]
            if top < end and bottom > first:
                pieces.append(strip[:, :, max(first - top, 0) : end - top])
            top = bottom
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2)

    def free(self, end: int) -> None:
        """Drop the strips that are not needed for a result from row ``end`` on."""
        while self.strips and self.start + self.strips[0].shape[2] <= end - HALO:
            self.start += self.strips.pop(0).shape[2]


class Upsampled:
    """A map of twice the sides that is computed whenever it is read: every pixel four times, then ``conv``."""

    def __init__(self, conv: nn.Module, source: Source, height: int):
        self.conv, self.source, self.height = conv, source, height  # before

    def rows(self, first: int, end: int) -> Tensor:
        top = max(first - 1, 0) // 2
        x = self.source.rows(top, min(end // 2 + 1, self.height))
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")  # the source rows are freed
        result: Tensor = self.conv(x)
        return result[:, :, first - 2 * top : end - 2 * top]

    def free(self, end: int) -> None:
        self.source.free(end // 2)


Source = Map | Upsampled


def store(rows: Rows, height: int, step: int, free: Callable[[int], None] = lambda end: None) -> Map:
    """Compute a whole map in strips of ``step`` rows; ``free`` is called with the first row that is still missing."""
    strips = []
    for first in range(0, height, step):
        end = min(first + step, height)
        strip = rows(first, end)
        whole = strip.untyped_storage().nbytes() == strip.numel() * strip.element_size()
        strips.append(strip if whole else strip.clone())  # rather than keep alive what it is a part of
        del strip
        free(end)
    return Map(strips)


def window(rows: Rows, top: int, bottom: int) -> Rows:
    """Rows ``top`` to ``bottom`` of a map, which is read once."""
    x = rows(top, bottom)
    return lambda first, end: x[:, :, first - top : end - top]


def convolved(conv: nn.Module, rows: Rows, height: int, before: Callable[[Tensor], Tensor] | None = None) -> Rows:
    """A 3 x 3 convolution with a padding of 1 of a map of ``height`` rows, after the function ``before``.

    The convolution pads each strip. Its outermost rows are therefore wrong, and cut off, unless they are those of the
    map.
    """

    def read(first: int, end: int) -> Tensor:
        top = max(first - 1, 0)
        x = rows(top, min(end + 1, height))
        if before is not None:
            x = before(x)
        result: Tensor = conv(x)
        return result[:, :, first - top : end - top]

    return read


def halved(conv: nn.Module, rows: Rows, height: int) -> Rows:
    """A 3 x 3 convolution of stride 2, with zeros on the right and at the bottom of the map only."""

    def read(first: int, end: int) -> Tensor:
        missing = max(2 * end + 1 - height, 0)
        result: Tensor = conv(F.pad(rows(2 * first, 2 * end + 1 - missing), (0, 1, 0, missing)))
        return result

    return read


# --- normalization with the statistics of a whole map ---


class Statistics:
    """Mean and variance of every channel, of strips that are added one after the other (Chan et al. 1983, eq. 2.1)."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = self.squares = torch.zeros(())  # [C], and the sum of squared deviations from it, [C]

    def add(self, strip: Tensor) -> None:
        # Blocks are reduced in float32 around their own mean, so nothing cancels; float64, if any, joins them.
        single = torch.promote_types(strip.dtype, torch.float32)
        double = torch.float32 if strip.device.type == "mps" else torch.float64
        for rows in strip.split(max(1, STATISTICS_BLOCK // (strip.shape[1] * strip.shape[3])), dim=2):
            block = rows.to(single, copy=True)
            mean = block.mean(dim=(2, 3), keepdim=True)  # [1, C, 1, 1]
            squares = block.sub_(mean).square_().sum(dim=(2, 3)).flatten().to(double)
            mean, count = mean.flatten().to(double), block.shape[2] * block.shape[3]
            if self.count == 0:
                self.mean, self.squares = torch.zeros_like(mean), torch.zeros_like(mean)
            total = self.count + count
            delta = mean - self.mean
            self.squares = self.squares + squares + delta.square() * (self.count * count / total)
            self.mean = self.mean + delta * (count / total)
            self.count = total

    def of_groups(self, groups: int) -> tuple[Tensor, Tensor]:
        """Mean and variance of the group that each channel belongs to, [C] both."""
        means = self.mean.view(groups, -1)
        mean = means.mean(dim=1, keepdim=True)  # [groups, 1]
        variance = (self.squares.view(groups, -1) / self.count + (means - mean).square()).mean(dim=1, keepdim=True)
        return mean.expand_as(means).flatten(), variance.expand_as(means).flatten()


def measure(rows: Rows, height: int, step: int) -> Statistics:
    """The statistics of a whole map."""
    statistics = Statistics()
    for first in range(0, height, step):
        statistics.add(rows(first, min(first + step, height)))
    return statistics


def normalizer(norm: Any, statistics: Statistics) -> Callable[[Tensor], Tensor]:
    """silu(norm(x)) of a strip x, where ``norm`` is a group normalization and ``statistics`` are of the whole map."""
    # With known statistics a group normalization is a batch normalization in evaluation. Its parameters are float32
    # whatever the dtype of the strip, so that the result is rounded only once.
    values = (*statistics.of_groups(norm.num_groups), norm.weight, norm.bias)
    wide = torch.promote_types(norm.weight.dtype, torch.float32)
    mean, variance, weight, bias = (value.to(statistics.mean.device, wide) for value in values)

    def normalize(strip: Tensor) -> Tensor:
        return F.silu(F.batch_norm(strip, mean, variance, weight, bias, eps=norm.eps), inplace=True)

    return normalize
