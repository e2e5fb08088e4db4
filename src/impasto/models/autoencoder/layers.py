"""The encoder and decoder of the autoencoder, their blocks and layers, from the outside in.

Their order is specified once, by ``blocks()`` and ``layers()``: ``forward`` runs through them, tiling runs through
each layer in strips (tiling.py), and the estimate of the memory reads what each layer holds (memory.py).

Letters in the margins: B images, C channels, H and W the sides at that level, N = H * W, f the product of all scales.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...nn.attention import attention
from ...nn.fused_linear import project
from ...nn.tokens import is_tracing
from ..compat.attention_processor import ProcessedAttention
from ..compat.surface import GradientCheckpointing


class Coder(GradientCheckpointing, nn.Module):
    """An encoder or decoder: a convolution, blocks, and a head."""

    conv_in: nn.Conv2d
    conv_norm_out: nn.GroupNorm
    conv_out: nn.Conv2d

    def blocks(self) -> list[Block]:
        raise NotImplementedError

    def head(self) -> Head:
        return Head(self.conv_norm_out, self.conv_out)

    def layers(self) -> list[list[Any]]:
        """All layers in order, those of each block in a list of their own."""
        return [[self.conv_in], *(block.layers() for block in self.blocks()), [self.head()]]

    def forward(self, x: Tensor) -> Tensor:  # [B, in_channels, H, W]
        x = self.conv_in(x)
        checkpointing = self.gradient_checkpointing and torch.is_grad_enabled()
        for block in self.blocks():
            x = self.checkpoint(block, x) if checkpointing else block(x)
        return self.head()(x)  # [B, out_channels, H / f, W / f], or f H, f W


class Encoder(Coder):
    """Images to the parameters of the distribution."""

    def __init__(self, in_channels: int, out_channels: int, widths: list[int], layers: int, groups: int, attend: bool):
        super().__init__()
        inputs = [widths[0], *widths[:-1]]
        self.conv_in = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            DownBlock(inputs[level], width, layers, groups, downsample=level < len(widths) - 1)
            for level, width in enumerate(widths)
        )
        self.mid_block = MidBlock(widths[-1], groups, attend)
        self.conv_norm_out = GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], out_channels, 3, padding=1)

    def blocks(self) -> list[Block]:
        return [*cast("list[Block]", self.down_blocks), self.mid_block]


class Decoder(Coder):
    """Latents to images: the mirror image of the encoder, with one more residual layer on each level."""

    def __init__(self, in_channels: int, out_channels: int, widths: list[int], layers: int, groups: int, attend: bool):
        super().__init__()
        outputs = widths[::-1]
        inputs = [outputs[0], *outputs[:-1]]
        self.conv_in = nn.Conv2d(in_channels, outputs[0], 3, padding=1)
        self.mid_block = MidBlock(outputs[0], groups, attend)
        self.up_blocks = nn.ModuleList(
            UpBlock(inputs[level], width, layers + 1, groups, upsample=level < len(widths) - 1)
            for level, width in enumerate(outputs)
        )
        self.conv_norm_out = GroupNorm(groups, outputs[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(outputs[-1], out_channels, 3, padding=1)

    def blocks(self) -> list[Block]:
        return [self.mid_block, *cast("list[Block]", self.up_blocks)]


class Head(NamedTuple):
    """Normalization, SiLU and a convolution, which the checkpoints keep outside of any block."""

    norm: nn.GroupNorm
    conv: nn.Conv2d

    def __call__(self, x: Tensor) -> Tensor:  # [B, C, H, W]
        return cast(Tensor, self.conv(F.silu(self.norm(x))))  # [B, out_channels, H, W]


class Block(nn.Module):
    """Layers, one after the other."""

    resnets: nn.ModuleList

    def layers(self) -> list[nn.Module]:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:  # [B, in_channels, H, W]
        for layer in self.layers():
            x = layer(x)
        return x


class DownBlock(Block):
    """One level of the encoder: [B, in_channels, H, W] to [B, out_channels, H / 2, W / 2], on the innermost H, W."""

    def __init__(self, in_channels: int, out_channels: int, layers: int, groups: int, downsample: bool):
        super().__init__()
        self.resnets = _resnets(in_channels, out_channels, layers, groups)
        self.downsamplers = nn.ModuleList([Downsample(out_channels)] if downsample else [])

    def layers(self) -> list[nn.Module]:
        return [*self.resnets, *self.downsamplers]


class UpBlock(Block):
    """One level of the decoder: [B, in_channels, H, W] to [B, out_channels, 2 H, 2 W], on the outermost H, W."""

    def __init__(self, in_channels: int, out_channels: int, layers: int, groups: int, upsample: bool):
        super().__init__()
        self.resnets = _resnets(in_channels, out_channels, layers, groups)
        self.upsamplers = nn.ModuleList([Upsample(out_channels)] if upsample else [])

    def layers(self) -> list[nn.Module]:
        return [*self.resnets, *self.upsamplers]


class MidBlock(Block):
    """Two residual layers, with attention between them if requested: [B, C, H, W] to the same shape."""

    def __init__(self, channels: int, groups: int, add_attention: bool):
        super().__init__()
        self.resnets = _resnets(channels, channels, 2, groups)
        self.attentions = nn.ModuleList([Attention(channels, groups)] if add_attention else [])

    def layers(self) -> list[nn.Module]:
        before, after = self.resnets
        return [before, *self.attentions, after]


def _resnets(in_channels: int, out_channels: int, layers: int, groups: int) -> nn.ModuleList:
    inputs = [in_channels] + [out_channels] * (layers - 1)
    return nn.ModuleList(Resnet(channels, out_channels, groups) for channels in inputs)


class Resnet(nn.Module):
    """x + f(x), where f is normalization, SiLU and a convolution, twice (He et al. 2016, pre-activation)."""

    def __init__(self, in_channels: int, out_channels: int, groups: int):
        super().__init__()
        self.norm1 = GroupNorm(groups, in_channels, eps=1e-6)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = GroupNorm(groups, out_channels, eps=1e-6)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor) -> Tensor:  # [B, in_channels, H, W]
        h: Tensor = self.conv1(F.silu(self.norm1(x)))  # [B, out_channels, H, W]
        h = self.conv2(F.silu(self.norm2(h)))
        shortcut: Tensor = x if self.conv_shortcut is None else self.conv_shortcut(x)
        return shortcut + h  # [B, out_channels, H, W]


class GroupNorm(nn.GroupNorm):
    """Normalizes each image by itself on the CPU, so that the result does not depend on the other images of its batch.

    With channels last, torch divides the sums of a batch among its threads differently for each size of batch.
    """

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W]
        if is_tracing() or torch.is_grad_enabled() or x.device.type != "cpu" or len(x) < 2:
            return super().forward(x)
        images = x.split(1)
        first = super().forward(images[0])
        normed = torch.empty_like(x, dtype=first.dtype)
        normed[:1] = first
        for image, place in zip(images[1:], normed.split(1)[1:], strict=True):
            place.copy_(super().forward(image))
        return normed


class Attention(ProcessedAttention):
    """x + attention over the positions of the image, with a single head as wide as the level."""

    heads = 1
    residual_connection = True

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.group_norm = GroupNorm(groups, channels, eps=1e-6)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.Sequential(nn.Linear(channels, channels), nn.Dropout(0.0))

    def compute(self, x: Tensor, *_: Any) -> Tensor:  # [B, C, H, W]
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)  # [B, N, C]
        query, key, value = project(self._fused, self.fusible, tokens)  # [B, N, C]
        h = attention(query.unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1)).squeeze(1)  # [B, N, C]
        h = cast(Tensor, self.to_out(h)).transpose(1, 2).reshape(x.shape)  # [B, C, H, W]
        return x + h

    def process(self, hidden_states: Tensor, *_: Any, **__: Any) -> Any:
        return self.call_processor(hidden_states.contiguous(), temb=None)  # processors view it as tokens

    @property
    def fusible(self) -> list[nn.Module]:
        """The projections of one input."""
        return [self.to_q, self.to_k, self.to_v]


class Downsample(nn.Module):
    """Halves the sides. Zeros are padded on the right and at the bottom only, as in the original training."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W]
        return cast(Tensor, self.conv(F.pad(x, (0, 1, 0, 1))))  # [B, C, H / 2, W / 2]


class Upsample(nn.Module):
    """Doubles the sides: every pixel four times, then a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W]
        return cast(Tensor, self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest")))  # [B, C, 2 H, 2 W]
