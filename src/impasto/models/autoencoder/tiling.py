"""Exact tiling of the autoencoder: the same numbers as without it, to rounding, in a fraction of the memory.

Tiles that go through the whole network on their own differ at their edges and in the statistics of every group
normalisation, which is why they have to be blended. Here the whole picture goes through one layer after the other,
and only within a layer in parts, strips of full rows:

    convolution      carries the last rows of a strip to the next (halo exchange); zeros only around the picture
    normalisation    with the statistics of the whole map, which are computed from all its strips beforehand

A map between two layers is a list of strips that are freed as they are read for the last time. What is held and what
is computed twice is decided by the plan (autoencoder_memory.py).

A strip is [1, C, rows, W]: one picture at a time. Whoever waits for a next strip must hold no strip itself, or the
memory would add up; that is why strips are handed on by ``map``, dropped by ``del`` and taken out of lists.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import InputError
from .layers import Attention, Coder, Downsample, Head, Resnet, Upsample
from .memory import STATISTICS_BLOCK, STRIP_BYTES, Stage, make_plan, trace


class Tiling:
    """What an autoencoder has of tiling; beside ``encoder``, ``decoder`` and their config."""

    use_tiling: bool = False
    _max_bytes: int | None = None
    _strip_bytes: int = STRIP_BYTES

    def enable_tiling(self, max_bytes: int | None = None, strip_bytes: int = STRIP_BYTES) -> None:
        """Encode and decode in parts: the same result to rounding, without seams, in less memory.

        Pictures of a batch are worked on one at a time. It has its effect where no gradients are recorded (under
        ``torch.no_grad()`` or ``torch.inference_mode()``); where they are, everything is computed at once. Layers are
        called one by one, not the blocks they belong to: hooks on blocks do not run, and compiled blocks are not used.

        SDXL's autoencoder decodes 4096 x 4096 pixels in bfloat16 with 4.6 GB of activations, which take 26 GB untiled,
        and 26 % more arithmetic; with ``max_bytes=9 * 10**9``, with 6 % more.

        Args:
            max_bytes: how much the activations may take. The more, the less is computed twice. None, or less than
                works, takes the least that works. ``decode_memory`` tells how much that is.
            strip_bytes: the working memory of one strip, part of the above; strips of at least one row are used.

        Raises:
            InputError: sizes that are no positive numbers.
        """
        for name, value in (("max_bytes", max_bytes), ("strip_bytes", strip_bytes)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise InputError(f"{name} must be a number of bytes, not {value!r}")
        self.use_tiling, self._max_bytes, self._strip_bytes = True, max_bytes, strip_bytes

    def disable_tiling(self) -> None:
        """Work on whole pictures again."""
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


class Source(Protocol):
    """A map that can be read several times, and freed by the last reading."""

    def read(self, rows: int, free: bool = False) -> Iterator[Tensor]:
        """Strips of about ``rows`` rows, from the top to the bottom."""


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


def _enlarge(strip: Tensor) -> Tensor:
    return F.interpolate(strip, scale_factor=2.0, mode="nearest")


def _compact(strip: Tensor) -> Tensor:
    """A copy if the strip is part of something larger, which it would keep alive."""
    whole = strip.untyped_storage().nbytes() == strip.numel() * strip.element_size()
    return strip if whole else strip.clone()


class Queue:
    """Rows in waiting: pushed, or drawn from ``source`` when they are needed."""

    def __init__(self, source: Iterator[Tensor]):
        self.source = source
        self.strips: list[Tensor] = []

    def push(self, strip: Tensor) -> Tensor:
        self.strips.append(strip)
        return strip

    def pop(self, rows: int) -> Tensor:
        """The next ``rows`` rows."""
        while _rows(self.strips) < rows:
            strip = next(self.source, None)
            assert strip is not None
            self.push(strip)
            del strip
        taken: list[Tensor] = []
        while (missing := rows - _rows(taken)) > 0:
            strip = self.strips.pop(0)
            if strip.shape[2] > missing:
                self.strips.insert(0, strip[:, :, missing:])
                strip = strip[:, :, :missing]
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


# --- what happens to strips ---


def convolve(conv: nn.Module, strips: Iterator[Tensor], height: int) -> Iterator[Tensor]:
    """A 3 x 3 convolution with a padding of 1, over strips of a map of ``height`` rows.

    The convolution pads each strip. Its outermost rows are therefore wrong, and left out, unless they are those of the
    map. The result's strips are a row higher up than those that were given: the row below is not known before.
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
    """Rows ``first`` to ``end`` of the convolution of ``window``, of which its last two rows are left."""
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
    """Mean and variance of every channel, of strips that come one after the other (Chan et al. 1983, eq. 2.1)."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = self.squares = torch.zeros(())  # [C], and the sum of squared deviations from it, [C]

    def add(self, strip: Tensor) -> None:
        # Blocks are reduced in float32 around their own mean, so nothing cancels; float64 joins them (not on MPS).
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


def measure(strips: Iterator[Tensor]) -> Statistics:
    """The statistics of a whole map."""
    statistics = Statistics()
    for strip in strips:
        statistics.add(strip)
        del strip
    return statistics


def normalizer(norm: Any, statistics: Statistics) -> Callable[[Tensor], Tensor]:
    """silu(norm(x)) of a strip x, where ``norm`` is a group normalisation and ``statistics`` are of the whole map."""
    # With known statistics a group normalisation is a batch normalisation in evaluation. Its parameters are float32
    # whatever the dtype of the strip, so that the result is rounded only once.
    values = (*statistics.of_groups(norm.num_groups), norm.weight, norm.bias)
    wide = torch.promote_types(norm.weight.dtype, torch.float32)
    mean, variance, weight, bias = (value.to(statistics.mean.device, wide) for value in values)

    def normalise(strip: Tensor) -> Tensor:
        return F.silu(F.batch_norm(strip, mean, variance, weight, bias, eps=norm.eps), inplace=True)

    return normalise
