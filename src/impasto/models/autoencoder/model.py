"""The autoencoder between images and latents (Rombach et al. 2022, section 3.1, appendix G).

Encoder and decoder are convolutional pyramids (layers.py): each level of the encoder but the last halves the sides::

    image -> conv_in -> down_blocks -> mid_block -> norm, SiLU, conv_out -> quant_conv -> mean, logvar
    latents -> post_quant_conv -> conv_in -> mid_block -> up_blocks -> norm, SiLU, conv_out -> image

Nothing here reshapes an image, so ``model.to(memory_format=torch.channels_last)`` holds throughout.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import ClassVar, Literal, cast, overload

import torch
from torch import Generator, Tensor, nn

from ...checkpoints.config import records_config
from ...checkpoints.values import Count, Levels, Scale, Shift
from ...checks import shown
from ...errors import ConfigurationError, InputError
from ...nn.changes import is_compiled, is_watched
from ...nn.gaussian import DiagonalGaussianDistribution
from ...nn.outputs import BaseOutput
from ...nn.tokens import is_tracing
from ..base import Model
from ..compat.blending import BlendedTiles
from ..compat.surface import FusedProjections, GradientCheckpointing
from .layers import Decoder, Encoder
from .tiling import Tiling


@dataclass
class AutoencoderKLOutput(BaseOutput):
    """What ``encode`` returns."""

    latent_dist: DiagonalGaussianDistribution


@dataclass
class DecoderOutput(BaseOutput):
    """What ``decode`` returns."""

    sample: Tensor  # [B, out_channels, H, W], about -1 to 1 and not clamped


class AutoencoderKL(FusedProjections, GradientCheckpointing, BlendedTiles, Tiling, Model):
    """Images <-> latents, 2 ** (levels - 1) times smaller on each side.

    Args:
        in_channels, out_channels: of the image that is encoded and of the one that is decoded.
        down_block_types: "DownEncoderBlock2D" for each level.
        up_block_types: "UpDecoderBlock2D" for each level.
        block_out_channels: the number of channels of each level, from the image inwards.
        layers_per_block: residual layers on each level of the encoder; the decoder has one more.
        act_fn: "silu", or its other name "swish".
        latent_channels: of the latents.
        norm_num_groups: of every group normalization; it must divide every width.
        sample_size: the side in pixels that the model was trained at, or [height, width].
        scaling_factor, shift_factor: a diffusion model works on (latents - shift_factor) * scaling_factor.
            Pipelines apply this; ``encode`` and ``decode`` work on plain latents.
        latents_mean, latents_std: the same with a value for each latent channel.
        force_upcast: whether pipelines should run this model in float32, because it overflows in float16.
        use_quant_conv, use_post_quant_conv: a 1 x 1 convolution after the encoder, and before the decoder.
        mid_block_add_attention: whether the innermost blocks have an attention layer.

    Raises:
        ConfigurationError: a value that is not one of those above.
    """

    _no_split_modules: ClassVar = ["MidBlock", "Resnet"]
    _encoded, _decoded = AutoencoderKLOutput, DecoderOutput

    stored_lists: ClassVar[Mapping[str, str]] = {
        "block_out_channels": "encoder.down_blocks",
        "layers_per_block": "encoder.down_blocks.0.resnets",
    }

    @records_config
    def __init__(
        self,
        in_channels: Count = 3,
        out_channels: Count = 3,
        down_block_types: Sequence[str] = ("DownEncoderBlock2D",),
        up_block_types: Sequence[str] = ("UpDecoderBlock2D",),
        block_out_channels: Levels = (64,),
        layers_per_block: Count = 1,
        act_fn: str = "silu",
        latent_channels: Count = 4,
        norm_num_groups: Count = 32,
        sample_size: Count | Sequence[Count] = 32,
        scaling_factor: Scale = 0.18215,
        shift_factor: Shift | None = None,
        latents_mean: Sequence[Shift] | None = None,
        latents_std: Sequence[Scale] | None = None,
        force_upcast: bool = True,
        use_quant_conv: bool = True,
        use_post_quant_conv: bool = True,
        mid_block_add_attention: bool = True,
    ):
        super().__init__()
        widths = list(block_out_channels)
        _check_blocks("down_block_types", down_block_types, "DownEncoderBlock2D", levels=len(widths))
        _check_blocks("up_block_types", up_block_types, "UpDecoderBlock2D", levels=len(widths))
        if any(width % norm_num_groups for width in widths):
            raise ConfigurationError(
                f"block_out_channels={widths} do not fit norm_num_groups={norm_num_groups}: "
                f"the number of groups has to divide every width"
            )
        if act_fn not in ("silu", "swish"):
            raise ConfigurationError(f"act_fn={shown(act_fn)} is not implemented; use 'silu'")
        for name, values in (("latents_mean", latents_mean), ("latents_std", latents_std)):
            if values is not None and len(values) != latent_channels:
                raise ConfigurationError(
                    f"{name} has {len(values)} values; it needs {latent_channels}, the latent_channels"
                )

        shape = (widths, layers_per_block, norm_num_groups, mid_block_add_attention)
        self.encoder = Encoder(in_channels, 2 * latent_channels, *shape)
        self.decoder = Decoder(latent_channels, out_channels, *shape)
        self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1) if use_quant_conv else None
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1) if use_post_quant_conv else None
        self.in_channels = in_channels
        self.latent_channels = latent_channels
        self.use_slicing = False
        self.tile_sample_min_size = sample_size if isinstance(sample_size, int) else sample_size[0]
        self.tile_latent_min_size = self.tile_sample_min_size // 2 ** (len(widths) - 1)
        self.tile_overlap_factor = 0.25

    @overload
    def encode(self, x: Tensor, return_dict: Literal[True] = True) -> AutoencoderKLOutput: ...

    @overload
    def encode(self, x: Tensor, return_dict: bool) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]: ...

    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """Images to a distribution over latents.

        Args:
            x: [B, in_channels, H, W], -1 to 1, in the dtype of the model.
            return_dict: whether to return an output with the field ``latent_dist``, or a plain tuple.

        Raises:
            InputError: images of another shape.
        """
        _check_channels("encode", x, self.in_channels)
        parameters = self._sliced(self._encode, x)  # [B, 2 C, H / f, W / f]
        distribution = DiagonalGaussianDistribution(parameters)
        return AutoencoderKLOutput(distribution) if return_dict else (distribution,)

    @overload
    def decode(
        self, z: Tensor, return_dict: Literal[True] = True, generator: Generator | None = None
    ) -> DecoderOutput: ...

    @overload
    def decode(
        self, z: Tensor, return_dict: bool, generator: Generator | None = None
    ) -> DecoderOutput | tuple[Tensor]: ...

    def decode(
        self, z: Tensor, return_dict: bool = True, generator: Generator | None = None
    ) -> DecoderOutput | tuple[Tensor]:
        """Latents to images.

        Args:
            z: [B, latent_channels, H, W], scaling undone, in the dtype of the model.
            return_dict: whether to return an output with the field ``sample``, or a plain tuple.
            generator: has no effect: decoding is deterministic.

        Raises:
            InputError: latents of another shape.
        """
        _check_channels("decode", z, self.latent_channels)
        sample = self._sliced(self._decode, z)  # [B, out_channels, f H, f W]
        return DecoderOutput(sample) if return_dict else (sample,)

    def forward(
        self,
        sample: Tensor,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: Generator | Sequence[Generator] | None = None,
    ) -> DecoderOutput | tuple[Tensor]:
        """Encode and decode: from a sample of the latents if ``sample_posterior``, otherwise from their mode."""
        distribution = self.encode(sample)[0]
        latents = distribution.sample(generator) if sample_posterior else distribution.mode()
        return self.decode(latents, return_dict=return_dict)

    def enable_slicing(self) -> None:
        """Compute one image at a time: the same result in the memory of a single image."""
        self.use_slicing = True

    def disable_slicing(self) -> None:
        """Compute the whole batch at once."""
        self.use_slicing = False

    def decoder_layers(self) -> list[Callable[[Tensor], Tensor]] | None:
        """What ``decode`` computes, from latents to images in inference, as functions to be called one after the other.

        None if it does more than that: it divides images or batches, or its layers are compiled or have hooks.
        """
        if self.use_slicing or self.use_tiling or is_watched(self) or any(map(is_compiled, self.modules())):
            return None
        first = [] if self.post_quant_conv is None else [self.post_quant_conv]
        return [_in_fast_format, *first, *chain(*self.decoder.layers()), Tensor.contiguous]

    def _encode(self, x: Tensor) -> Tensor:
        parameters = self._run(self.encoder, x)
        return parameters if self.quant_conv is None else cast(Tensor, self.quant_conv(parameters))

    def _decode(self, z: Tensor) -> Tensor:
        return self._run(self.decoder, z if self.post_quant_conv is None else self.post_quant_conv(z))

    def _sliced(self, function: Callable[[Tensor], Tensor], batch: Tensor) -> Tensor:
        slices = (self.use_slicing or self._tiles()) and batch.shape[0] > 1
        ordered = _in_fast_format(batch)
        result = torch.cat([function(one) for one in ordered.split(1)]) if slices else function(ordered)
        return result if ordered is batch else result.contiguous()

    @classmethod
    def _rename_key(cls, key: str) -> str:
        """Checkpoints of 2022, such as sd-vae-ft-ema, have other names for the projections of the attention."""
        for old, new in LEGACY_PROJECTIONS.items():
            key = key.replace(f".attentions.0.{old}.", f".attentions.0.{new}.")
        return key


LEGACY_PROJECTIONS = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def _check_blocks(name: str, types: Sequence[str], expected: str, levels: int) -> None:
    unknown = [block_type for block_type in types if block_type != expected]
    if unknown:
        raise ConfigurationError(f"{name}: {shown(unknown[0])} is not implemented; use {expected!r} for each level")
    if len(types) != levels:
        raise ConfigurationError(
            f"{name} has {len(types)} entries and block_out_channels {levels}; each needs one entry for every level"
        )


def _in_fast_format(x: Tensor) -> Tensor:
    """In inference on the CPU, the memory format in which convolutions are fastest; every layer preserves it."""
    last = torch.channels_last
    if is_tracing() or x.device.type != "cpu" or torch.is_grad_enabled() or x.is_contiguous(memory_format=last):
        return x
    return x.contiguous(memory_format=last)


def _check_channels(method: str, x: Tensor, channels: int) -> None:
    if x.ndim != 4 or x.shape[1] != channels:
        raise InputError(f"{method} needs [batch, {channels}, height, width]; it was given {list(x.shape)}")
