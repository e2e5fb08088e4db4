"""What the autoencoder holds in memory, and how it is tiled accordingly: all from the list of its layers (layers.py).

When a pass is tiled (tiling.py), a layer's input is freed as its output grows, so that the peak is about the largest
map between two layers. When memory is short, what would add to it is computed twice rather than held:

    resnet          the map between its convolutions: its statistics are needed before any of it is normalized
    upsample        its result, four times the input: the resnet after it reads it two or three times

All sizes are bytes of one image's activations, without the weights and the working memory of kernels. The model may
be on the meta device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from .layers import Attention, Coder, Downsample, Head, Resnet, Upsample

#: With strips this large, less than a tenth of the rows are convolved twice at 4096 px.
STRIP_BYTES = 256 * 2**20
#: Elements that the statistics of a map are computed from at a time: float32 copies of them stay in cache.
STATISTICS_BLOCK = 2**20


class Layer(NamedTuple):
    """One layer, and the map that it is given."""

    module: Any
    in_channels: int
    out_channels: int
    height: int
    width: int
    block: int  # the number of its block

    @property
    def out_sides(self) -> tuple[int, int]:
        if isinstance(self.module, Upsample):
            return 2 * self.height, 2 * self.width
        halves = isinstance(self.module, Downsample)
        return (self.height // 2, self.width // 2) if halves else (self.height, self.width)

    @property
    def inputs(self) -> int:
        """Elements of the input."""
        return self.in_channels * self.height * self.width

    @property
    def outputs(self) -> int:
        """Elements of the output."""
        return self.out_channels * math.prod(self.out_sides)

    @property
    def first_products(self) -> int:
        """Multiplications of the (first) convolution, which is the one that may be computed twice."""
        return 9 * self.in_channels * self.outputs

    @property
    def products(self) -> int:
        """Multiplications of the whole layer."""
        if isinstance(self.module, Attention):
            return 4 * self.in_channels * self.inputs + 2 * self.height * self.width * self.inputs
        if not isinstance(self.module, Resnet):
            return self.first_products
        shortcut = self.in_channels * self.outputs if self.in_channels != self.out_channels else 0
        return self.first_products + 9 * self.out_channels * self.outputs + shortcut


class Stage(NamedTuple):
    """How one layer is computed when tiled."""

    layer: Layer
    rows: int  # of one strip
    hold: bool  # a resnet: the map between its convolutions; an upsample: its result
    peak: int  # bytes held at most while it runs
    computed_again: int  # multiplications


class Plan(NamedTuple):
    """How a whole pass is computed when tiled."""

    stages: list[Stage]
    peak_bytes: int
    recomputation: float  # multiplications that are computed twice, relative to all of an untiled pass


def trace(coder: Coder, height: int, width: int) -> list[Layer]:
    """The layers in order, for an input of these sides."""
    traced: list[Layer] = []
    for block, modules in enumerate(coder.layers()):
        for module in modules:
            module = getattr(module, "_orig_mod", module)  # torch.compile has wrapped it
            match module:
                case Resnet():
                    channels = module.norm1.num_channels, module.norm2.num_channels
                case Attention():
                    channels = module.group_norm.num_channels, module.group_norm.num_channels
                case _:
                    weight = getattr(module, "conv", module).weight
                    channels = weight.shape[1], weight.shape[0]
            traced.append(Layer(module, *channels, height, width, block))
            height, width = traced[-1].out_sides
    return traced


def make_plan(
    layers: Sequence[Layer], itemsize: int, max_bytes: int | None = None, strip_bytes: int = STRIP_BYTES
) -> Plan:
    """The plan with the least recomputation that stays within ``max_bytes``, or within about the least that works.

    Its ``peak_bytes`` are at least what the pass takes and, unless the image is a single strip, at most a third more.

    Args:
        layers: those of one pass.
        itemsize: bytes per element.
        max_bytes: of activations; None is 0.
        strip_bytes: the working memory of one strip, included in ``max_bytes``.
    """
    groups: list[list[Layer]] = []
    for layer in layers:
        if groups and isinstance(groups[-1][-1].module, Upsample):  # decided together with the resnet after it
            groups[-1].append(layer)
        else:
            groups.append([layer])
    ways = [_ways(group, itemsize, strip_bytes) for group in groups]
    least = max(min(map(_peak, options)) for options in ways)
    budget = max(int(1.01 * least), max_bytes or 0)  # strips are not all of one size
    stages = [stage for options in ways for stage in next(way for way in options if _peak(way) <= budget)]
    again = sum(stage.computed_again for stage in stages)
    # The strips of the output are joined when everything else has been freed.
    peak = max(_peak(stages), 2 * layers[-1].outputs * itemsize) + layers[0].inputs * itemsize
    return Plan(stages, peak, again / sum(layer.products for layer in layers))


def _peak(stages: Sequence[Stage]) -> int:
    return max(stage.peak for stage in stages)


def _ways(group: Sequence[Layer], itemsize: int, strip_bytes: int) -> list[list[Stage]]:
    """The ways to compute a layer, or an upsample and the resnet after it, from the fastest to the leanest."""

    def stage(layer: Layer, maps: int, channels: int, again: int = 0, hold: bool = True) -> Stage:
        """``maps``: elements of the whole maps held; ``channels``: of all rows held for each row of a strip."""
        height, width = layer.out_sides if isinstance(layer.module, Upsample) else (layer.height, layer.width)
        row_bytes = channels * width * itemsize
        rows = min(max(1, strip_bytes // row_bytes), height) if channels else height
        strip = min(rows + 4, height) * row_bytes  # two rows above, and two below
        if rows < height:  # at each strip a convolution computes two rows too many, and four if another one follows
            again += (2 * layer.products + 4 * again) * -(-height // rows) // height
        return Stage(layer, rows, hold, maps * itemsize + strip, again)

    def resnet(layer: Layer, held: int) -> list[Stage]:
        """``held``: elements of the map that it is computed from."""
        c, out = layer.in_channels, layer.out_channels
        # Rows of x that are not freed yet, and a strip of x; it activated and convolved, or the terms of the sum.
        channels = 2 * c + max(c + out, 3 * out)
        return [
            stage(layer, held + layer.outputs, channels + out),
            stage(layer, max(held, layer.outputs), channels, layer.first_products, hold=False),
        ]

    layer = group[0]
    c, out = layer.in_channels, layer.out_channels
    either = max(layer.inputs, layer.outputs)  # one shrinks as the other grows
    match layer.module:
        case Attention():
            return [[stage(layer, 8 * layer.inputs, 0)]]  # x, its tokens, q, k, v, the result twice, the sum
        case Downsample():
            return [[stage(layer, either, 3 * c + out)]]  # rows of x not freed yet, a strip of x, padded; the output
        case Resnet():
            return [[way] for way in resnet(layer, layer.inputs)]
        case Upsample():
            held = stage(layer, either, 3 * c)  # a strip of x, enlarged; the output and its copy
            lazy = stage(layer, 0, 3 * c, 2 * layer.first_products, hold=False)
            ways = [[held, way] for way in resnet(group[1], layer.outputs)]
            return ways + [[lazy, way] for way in resnet(group[1], layer.inputs)]
        case _:
            return [[stage(layer, either, 3 * c + 2 * out)]]  # as before, activated; the output and its copy


def untiled_peak(layers: Sequence[Layer], itemsize: int) -> int:
    """The peak of the activations in bytes if every layer is computed at once: at most a fifth more than measured.

    It includes the result. A block's input is held until the block ends.
    """
    peak, start = 0, layers[0]
    for layer in layers:
        if layer.block != start.block:
            start = layer
        x, out = layer.inputs, layer.outputs
        match layer.module:
            case Resnet():
                needed = x + max(2 * x, x + out, 3 * out)
            case Attention():
                needed = 8 * x
            case Upsample():
                needed = x + 2 * out
            case Downsample():
                needed = 2 * x + out
            case Head():
                needed = x + max(2 * x, x + out)
            case _:
                needed = out
        peak = max(peak, needed if layer is start else start.inputs + needed)
    return (peak + layers[0].inputs) * itemsize
