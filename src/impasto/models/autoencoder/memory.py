"""What the autoencoder holds in memory: the plan by which it is tiled, and estimates made from its config alone.

A tiled pass goes through the layers one by one, and through each layer in strips of rows (autoencoder_tiling.py).
A layer's input is freed as its output grows, so that the peak is about the largest map between two layers. What would
add to it is computed again in place of being held, where memory is short:

    resnet          the map between its convolutions: its statistics are needed before any of it is normalised
    upsample        its result, four times the input: the resnet after it reads it two or three times

All sizes are bytes of one picture's activations: no weights, and nothing that a kernel takes for itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch

from ...errors import InputError

#: Strips this large keep the rows that a convolution computes twice below a tenth at 4096 px.
STRIP_BYTES = 256 * 2**20
#: Elements that the statistics of a map are computed from at a time: float32 copies of them stay in cache.
STATISTICS_BLOCK = 2**20

Kind = Literal["conv_in", "resnet", "attention", "upsample", "downsample", "head"]


@dataclass(frozen=True)
class Layer:
    """One layer, and the map that it is given. Layers of one block share its number."""

    kind: Kind
    in_channels: int
    out_channels: int
    height: int
    width: int
    block: int

    @property
    def out_sides(self) -> tuple[int, int]:
        if self.kind == "upsample":
            return 2 * self.height, 2 * self.width
        return (self.height // 2, self.width // 2) if self.kind == "downsample" else (self.height, self.width)

    @property
    def inputs(self) -> int:
        """Elements of the input."""
        return self.in_channels * self.height * self.width

    @property
    def outputs(self) -> int:
        """Elements of the output."""
        height, width = self.out_sides
        return self.out_channels * height * width

    @property
    def first_products(self) -> int:
        """Multiplications of the (first) convolution, which is the one that may be computed again."""
        return 9 * self.in_channels * self.outputs

    @property
    def products(self) -> int:
        """Multiplications of the whole layer."""
        if self.kind == "attention":
            return 4 * self.in_channels * self.inputs + 2 * self.height * self.width * self.inputs
        if self.kind != "resnet":
            return self.first_products
        shortcut = self.in_channels * self.outputs if self.in_channels != self.out_channels else 0
        return self.first_products + 9 * self.out_channels * self.outputs + shortcut


@dataclass(frozen=True)
class Stage:
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
    recomputation: float  # multiplications that are done again, as a share of those of an untiled pass


def decoder_layers(config: Mapping[str, Any], height: int, width: int) -> list[Layer]:
    """The layers of the decoder in order, for latents of these sides."""
    widths = list(config["block_out_channels"])[::-1]
    layers = [Layer("conv_in", config["latent_channels"], widths[0], height, width, block=0)]
    layers += _mid(config, widths[0], height, width, block=1)
    channels = widths[0]
    for level, out in enumerate(widths):
        for _ in range(config["layers_per_block"] + 1):
            layers.append(Layer("resnet", channels, out, height, width, block=2 + level))
            channels = out
        if level < len(widths) - 1:
            layers.append(Layer("upsample", out, out, height, width, block=2 + level))
            height, width = layers[-1].out_sides
    return [*layers, Layer("head", channels, config["out_channels"], height, width, block=2 + len(widths))]


def encoder_layers(config: Mapping[str, Any], height: int, width: int) -> list[Layer]:
    """The layers of the encoder in order, for a picture of these sides."""
    widths = list(config["block_out_channels"])
    layers = [Layer("conv_in", config["in_channels"], widths[0], height, width, block=0)]
    channels = widths[0]
    for level, out in enumerate(widths):
        for _ in range(config["layers_per_block"]):
            layers.append(Layer("resnet", channels, out, height, width, block=1 + level))
            channels = out
        if level < len(widths) - 1:
            layers.append(Layer("downsample", out, out, height, width, block=1 + level))
            height, width = layers[-1].out_sides
    layers += _mid(config, channels, height, width, block=1 + len(widths))
    return [*layers, Layer("head", channels, 2 * config["latent_channels"], height, width, block=2 + len(widths))]


def _mid(config: Mapping[str, Any], channels: int, height: int, width: int, block: int) -> list[Layer]:
    kinds: list[Kind] = ["resnet", "attention", "resnet"]
    if not config.get("mid_block_add_attention", True):
        kinds.remove("attention")
    return [Layer(kind, channels, channels, height, width, block) for kind in kinds]


def make_plan(
    layers: Sequence[Layer], itemsize: int, max_bytes: int | None = None, strip_bytes: int = STRIP_BYTES
) -> Plan:
    """The plan with the least recomputation that stays within ``max_bytes``, or else within the least that works.

    Args:
        layers: those of one pass.
        itemsize: bytes of a number.
        max_bytes: of activations; None is 0.
        strip_bytes: the working memory of one strip, which is part of ``max_bytes``.
    """
    # An upsample and the resnet after it are decided together.
    groups: list[list[Layer]] = []
    for layer in layers:
        if groups and groups[-1][-1].kind == "upsample":
            groups[-1].append(layer)
        else:
            groups.append([layer])
    ways = [_ways(group, itemsize, strip_bytes) for group in groups]
    least = max(min(_peak(way) for way in options) for options in ways)
    budget = max(least, max_bytes or 0)
    chosen = [next(way for way in options if _peak(way) <= budget) for options in ways]
    stages = [stage for way in chosen for stage in way]
    again = sum(stage.computed_again for stage in stages)
    # The parts of the output are put together when everything else has been freed.
    peak = max(_peak(stages), 2 * layers[-1].outputs * itemsize) + layers[0].inputs * itemsize
    return Plan(stages, peak, again / sum(layer.products for layer in layers))


def _peak(stages: Sequence[Stage]) -> int:
    return max(stage.peak for stage in stages)


def _ways(group: Sequence[Layer], itemsize: int, strip_bytes: int) -> list[list[Stage]]:
    """The ways to compute a layer, or an upsample and the resnet after it, from the fastest to the leanest."""

    def stage(layer: Layer, maps: int, channels: int, again: int = 0, hold: bool = True) -> Stage:
        """``maps``: elements of the whole maps held; ``channels``: of all rows held for each row of a strip."""
        height, width = layer.out_sides if layer.kind == "upsample" else (layer.height, layer.width)
        row_bytes = channels * width * itemsize
        rows = min(max(1, strip_bytes // row_bytes), height) if channels else height
        strip = min(rows + 4, height) * row_bytes  # two rows above, and two below
        # Where one strip follows another, each convolution computes two rows too many.
        again += 2 * layer.products * -(-height // rows) // height if rows < height and channels else 0
        return Stage(layer, rows, hold, maps * itemsize + strip, again)

    layer = group[0]
    c, out = layer.in_channels, layer.out_channels
    either = max(layer.inputs, layer.outputs)  # one shrinks as the other grows
    if layer.kind == "attention":
        return [[stage(layer, 8 * layer.inputs, 0)]]  # x, its tokens, Q, K, V, the result twice, the sum
    if layer.kind == "downsample":
        return [[stage(layer, either, 4 * c + out)]]  # strips of x, joined, padded; the output and its copy
    if layer.kind in ("conv_in", "head"):
        return [[stage(layer, either, 4 * c + 2 * out)]]  # strips of x, activated, joined; the output and its copy
    if layer.kind == "resnet":
        # Strips of x that wait for the sum; then whichever takes most of: activated and joined, or the sum's parts.
        channels = 2 * c + max(2 * c, c + 2 * out, 3 * out)
        return [
            [stage(layer, layer.inputs + layer.outputs, channels + 2 * out)],
            [stage(layer, either, channels, layer.first_products, hold=False)],
        ]
    resnet = group[1]
    held = stage(layer, either, 3 * c)  # enlarged, joined; the output and its copy
    low, channels = layer.inputs, c  # strips of the input wait too
    channels += 2 * c + max(2 * c, c + 2 * resnet.out_channels, 3 * resnet.out_channels)
    hold = stage(resnet, low + resnet.outputs, channels + 2 * resnet.out_channels)
    recompute = stage(resnet, max(low, resnet.outputs), channels, resnet.first_products, hold=False)
    lazy = [stage(layer, 0, 3 * c, 2 * layer.first_products, hold=False)]
    return [[held, *way] for way in _ways([resnet], itemsize, strip_bytes)] + [[*lazy, hold], [*lazy, recompute]]


def decode_memory(
    model: Any,
    height: int,
    width: int,
    dtype: torch.dtype,
    tiled: bool,
    *,
    batch: int = 1,
    max_bytes: int | None = None,
    strip_bytes: int = STRIP_BYTES,
) -> int:
    """The peak of the activations of ``decode`` in bytes: at least what it takes, and at most a third more.

    (More than that only where a tiled picture is so small that it is a single strip.) The picture counts; the weights
    and the latents do not, nor what kernels hold for themselves, such as the scores of attention: a few MB in most,
    but the square of the latents' pixels where the device has only the plain products.

    Args:
        model: an AutoencoderKL or its config.
        height, width: of the latents.
        dtype: what it computes in.
        tiled: whether tiling is enabled, with ``max_bytes`` and ``strip_bytes``.
        batch: pictures decoded in one call.

    Raises:
        InputError: sizes that no latents have.
    """
    return _memory(model, decoder_layers, (height, width, batch), dtype, tiled, max_bytes, strip_bytes)


def encode_memory(
    model: Any,
    height: int,
    width: int,
    dtype: torch.dtype,
    tiled: bool,
    *,
    batch: int = 1,
    max_bytes: int | None = None,
    strip_bytes: int = STRIP_BYTES,
) -> int:
    """The same of ``encode``; ``height`` and ``width`` are those of the pictures, which do not count."""
    return _memory(model, encoder_layers, (height, width, batch), dtype, tiled, max_bytes, strip_bytes)


def _memory(
    model: Any,
    list_layers: Callable[[Mapping[str, Any], int, int], list[Layer]],
    sizes: tuple[int, int, int],
    dtype: torch.dtype,
    tiled: bool,
    max_bytes: int | None,
    strip_bytes: int,
) -> int:
    height, width, batch = sizes
    if min(sizes) < 1:
        raise InputError(f"height, width and batch must be at least 1; they are {height}, {width} and {batch}")
    layers = list_layers(getattr(model, "config", model), height, width)
    if not layers[-1].outputs:
        raise InputError(f"{height} x {width} is too small: nothing would be left of it")
    if not tiled:
        return batch * _untiled_peak(layers) * dtype.itemsize
    others = 2 * batch * layers[-1].outputs * dtype.itemsize if batch > 1 else 0  # one by one, then put together
    return make_plan(layers, dtype.itemsize, max_bytes, strip_bytes).peak_bytes + others


def _untiled_peak(layers: Sequence[Layer]) -> int:
    """Elements held at most when every layer is computed at once. A block's input is held until the block ends."""
    peak, start = 0, layers[0]
    for layer in layers:
        if layer.block != start.block:
            start = layer
        block_input = 0 if layer is start else start.inputs
        x, out = layer.inputs, layer.outputs
        needed = {
            "conv_in": out,
            "resnet": x + max(2 * x, x + out, 3 * out),
            "attention": 8 * x,
            "upsample": x + 2 * out,
            "downsample": 2 * x + out,
            "head": x + max(2 * x, x + out),
        }[layer.kind]
        peak = max(peak, block_input + needed)
    return peak + layers[0].inputs
