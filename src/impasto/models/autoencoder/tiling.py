"""Exact tiling of the autoencoder: the same numbers as without it, to rounding, in a fraction of the memory.

Tiles that go through the whole network independently differ at their edges and in the statistics of every group
normalization, which is why they have to be blended. Here the whole image goes through one layer after the other, and
only within a layer in strips of full rows:

    convolution      carries the last rows of a strip over to the next (halo exchange); zeros only around the image
    normalization    with the statistics of the whole map, which are computed from all its strips beforehand

A map between two layers is a list of strips that are freed as they are read for the last time. What is held and what
is computed twice is decided by the plan (memory.py).

A strip is [1, C, rows, W], of one image. Code that waits for the next strip must not hold one itself, or the memory
would add up; that is why strips are passed on by ``map``, dropped by ``del`` and popped from lists.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
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

        SDXL's autoencoder decodes 4096 x 4096 pixels in bfloat16 with 4.6 GB of activations instead of 26 GB and 26 %
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
    """All layers of an encoder or decoder, one after the other.

    Args:
        stages: how each layer is computed.
        x: [1, C, H, W].

    Returns:
        [1, C', H', W'].
    """
    source: Source = Map([x])
    for stage in stages:
        layer, rows, height = stage.layer.module, stage.rows, stage.layer.height
        match layer:
            case Resnet():
                source = _resnet(layer, source, stage)
            case Attention():
                whole = [_join(list(source.read(height, free=True)))]
                whole.append(layer(whole.pop()))
                source = Map.store(regroup(iter([whole.pop()]), -(-height // 8)))  # so that it is freed in strips
            case Upsample():
                source = Upsampled(layer.conv, source, height)
                if stage.hold:
                    source = Map.store(source.read(rows, free=True))
            case Downsample():
                source = Map.store(halve(layer.conv, source.read(rows, free=True), height))
            case Head():
                norm = normalizer(layer.norm, measure(source.read(rows)))
                source = Map.store(convolve(layer.conv, map(norm, source.read(rows, free=True)), height))
            case _:
                source = Map.store(convolve(layer, source.read(rows, free=True), height))
    return _join(list(source.read(stages[-1].layer.height, free=True)))


def _resnet(layer: Any, source: Source, stage: Stage) -> Map:
    """shortcut(x) + conv2(silu(norm2(h))), where h = conv1(silu(norm1(x)))."""
    rows, height = stage.rows, stage.layer.height
    norm1 = normalizer(layer.norm1, measure(source.read(rows)))

    def inner(strips: Iterator[Tensor]) -> Iterator[Tensor]:
        return convolve(layer.conv1, map(norm1, strips), height)

    if stage.hold:
        h = Map.store(inner(source.read(rows)))
        norm2 = normalizer(layer.norm2, measure(h.read(rows)))
        x = Queue(source.read(rows, free=True))
        strips = h.read(rows, free=True)
    else:
        norm2 = normalizer(layer.norm2, measure(inner(source.read(rows))))
        x = Queue(iter(()))
        strips = inner(map(x.push, source.read(rows, free=True)))

    def add_shortcut(h: Tensor) -> Tensor:
        strip = x.pop(h.shape[2])
        return (strip if layer.conv_shortcut is None else layer.conv_shortcut(strip)) + h

    return Map.store(map(add_shortcut, convolve(layer.conv2, map(norm2, strips), height)))


# --- where strips come from ---


class Map:
    """A map as the list of its strips."""

    def __init__(self, strips: list[Tensor]):
        self.strips = strips

    @classmethod
    def store(cls, strips: Iterable[Tensor]) -> Map:
        return cls(list(map(_compact, strips)))

    def read(self, rows: int, free: bool = False) -> Iterator[Tensor]:
        return regroup(self._drain() if free else iter(self.strips), rows)

    def _drain(self) -> Iterator[Tensor]:
        while self.strips:
            yield self.strips.pop(0)


class Upsampled:
    """A map of twice the sides that is computed whenever it is read: every pixel four times, then ``conv``."""

    def __init__(self, conv: nn.Module, source: Source, height: int):
        self.conv, self.source, self.height = conv, source, height

    def read(self, rows: int, free: bool = False) -> Iterator[Tensor]:
        enlarged = map(_enlarge, self.source.read(max(1, rows // 2), free))
        return convolve(self.conv, enlarged, 2 * self.height)


#: A map that can be read several times, in strips from top to bottom, and is freed by the last reading.
Source = Map | Upsampled


def _enlarge(strip: Tensor) -> Tensor:
    return F.interpolate(strip, scale_factor=2.0, mode="nearest")


def _compact(strip: Tensor) -> Tensor:
    """A copy if the strip is part of something larger, which it would keep alive."""
    whole = strip.untyped_storage().nbytes() == strip.numel() * strip.element_size()
    return strip if whole else strip.clone()


class Queue:
    """Rows that wait for their turn: pushed, or read from ``source`` when they are needed."""

    def __init__(self, source: Iterator[Tensor]):
        self.source = source
        self.strips: list[Tensor] = []

    def push(self, strip: Tensor) -> Tensor:
        self.strips.append(strip)
        return strip

    def pop(self, rows: int) -> Tensor:
        """The next ``rows`` rows."""
        taken: list[Tensor] = []
        while rows > 0:
            strip = self.strips.pop(0) if self.strips else next(self.source, None)
            assert strip is not None
            if strip.shape[2] > rows:
                self.strips.insert(0, strip[:, :, rows:])
                strip = strip[:, :, :rows]
            rows -= strip.shape[2]
            taken.append(strip)
            del strip
        return _join(taken)


def regroup(strips: Iterator[Tensor], rows: int) -> Iterator[Tensor]:
    """The same rows in strips of at most ``rows``: large ones are cut into equal parts, small ones joined."""
    group: list[Tensor] = []
    for strip in strips:
        parts = -(-strip.shape[2] // rows)
        pieces = list(strip.split(-(-strip.shape[2] // parts), dim=2))
        del strip
        while pieces:
            if group and _rows(group) + pieces[0].shape[2] > rows:
                yield _join(group)
            group.append(pieces.pop(0))
    if group:
        yield _join(group)


def _rows(strips: list[Tensor]) -> int:
    return sum(strip.shape[2] for strip in strips)


def _join(strips: list[Tensor]) -> Tensor:
    """One strip of all of them; the list is empty afterwards."""
    joined = strips[0] if len(strips) == 1 else torch.cat(strips, dim=2)
    strips.clear()
    return joined


# --- what is computed from strips ---


def convolve(conv: nn.Module, strips: Iterator[Tensor], height: int) -> Iterator[Tensor]:
    """A 3 x 3 convolution with a padding of 1, over strips of a map of ``height`` rows.

    The convolution pads each strip. Its outermost rows are therefore wrong, and left out, unless they are those of the
    map. The strips of the result end one row above those of the input, because the row below is not known yet.
    """
    window: list[Tensor] = []  # the last rows of the strips before, and a new strip
    seen = done = 0  # rows
    for strip in strips:
        window.append(strip)
        seen += strip.shape[2]
        del strip
        end = seen if seen == height else seen - 1
        if end > done:
            start, done, first = seen - _rows(window), end, done
            yield _convolved(conv, window, first - start, end - start)


def _convolved(conv: nn.Module, window: list[Tensor], first: int, end: int) -> Tensor:
    """Rows ``first`` to ``end`` of the convolution of ``window``, which is cut down to its last two rows."""
    joined = _join(window)
    window.append(joined[:, :, -2:].clone())
    result: Tensor = conv(joined)
    return result[:, :, first:end]


def halve(conv: nn.Module, strips: Iterator[Tensor], height: int) -> Iterator[Tensor]:
    """A 3 x 3 convolution of stride 2, with zeros on the right and at the bottom of the map only."""
    window: list[Tensor] = []  # begins with an even row
    seen = 0
    for strip in strips:
        window.append(strip)
        seen += strip.shape[2]
        del strip
        bottom = int(seen == height)
        ready = (_rows(window) + bottom - 1) // 2  # rows of the result; each takes three, and shares one
        if ready > 0:
            yield _halved(conv, window, ready, bottom)


def _halved(conv: nn.Module, window: list[Tensor], ready: int, bottom: int) -> Tensor:
    joined = _join(window)
    if not bottom:
        window.append(joined[:, :, 2 * ready :].clone())
    result: Tensor = conv(F.pad(joined, (0, 1, 0, bottom)))
    return result


class Statistics:
    """Mean and variance of every channel, of strips that come one after the other."""

    def __init__(self) -> None:
        self.blocks: list[tuple[int, Tensor, Tensor]] = []  # positions, and mean and variance of each channel, [C]

    def add(self, strip: Tensor) -> None:
        # Blocks are reduced in float32 around their own mean, so nothing cancels; float64 joins them (not on MPS).
        single = torch.promote_types(strip.dtype, torch.float32)
        double = torch.float32 if strip.device.type == "mps" else torch.float64
        for rows in strip.split(max(1, STATISTICS_BLOCK // (strip.shape[1] * strip.shape[3])), dim=2):
            block = rows.to(single, copy=True)
            mean = block.mean(dim=(2, 3), keepdim=True)  # [1, C, 1, 1]
            variance = block.sub_(mean).square_().mean(dim=(2, 3))  # [1, C]
            self.blocks.append((rows.shape[2] * rows.shape[3], mean.flatten().to(double), variance[0].to(double)))

    def of_groups(self, groups: int) -> tuple[Tensor, Tensor]:
        """Mean and variance of the group that each channel belongs to, [C] both."""
        counts, *rest = zip(*self.blocks, strict=True)
        means, variances = (torch.stack(values).unflatten(1, (groups, -1)) for values in rest)  # [blocks, groups, C/g]
        shares = means.new_tensor(counts).view(-1, 1, 1) / sum(counts)
        mean = (shares * means).sum(0).mean(1, keepdim=True)  # [groups, 1]
        variance = (shares * (variances + (means - mean).square())).sum(0).mean(1, keepdim=True)
        return mean.expand_as(means[0]).flatten(), variance.expand_as(means[0]).flatten()


def measure(strips: Iterator[Tensor]) -> Statistics:
    """The statistics of a whole map."""
    statistics = Statistics()
    for strip in strips:
        statistics.add(strip)
        del strip
    return statistics


def normalizer(norm: Any, statistics: Statistics) -> Callable[[Tensor], Tensor]:
    """silu(norm(x)) of a strip x, where ``norm`` is a group normalization and ``statistics`` are of the whole map."""
    # With known statistics a group normalization is a batch normalization in evaluation. Its parameters are float32
    # whatever the dtype of the strip, so that the result is rounded only once.
    values = (*statistics.of_groups(norm.num_groups), norm.weight, norm.bias)
    wide = torch.promote_types(norm.weight.dtype, torch.float32)
    mean, variance, weight, bias = (value.to(values[0].device, wide) for value in values)

    def normalize(strip: Tensor) -> Tensor:
        return F.silu(F.batch_norm(strip, mean, variance, weight, bias, eps=norm.eps), inplace=True)

    return normalize
