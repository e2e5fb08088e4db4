"""Tensors <-> images: PIL images, arrays and tensors, checked (InputError if they cannot be used), in one form."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..checkpoints.config import Configurable, records_config
from ..checkpoints.stored import FLOATS
from ..checkpoints.values import Count
from ..checks import MAX_PIXELS, MAX_SIDE, shown, whole_number
from ..errors import ConfigurationError, ImpastoError, InputError
from .compat.images import ImageMethods

logger = logging.getLogger("impasto")

Images = Image.Image | np.ndarray[Any, Any] | Tensor
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
#: How far floats may lie outside of their range, by rounding.
_ROUNDING = 0.01
#: Values in all images of a call: eight of the largest, in grey.
_MOST_VALUES = 8 * MAX_PIXELS
_INTEGERS = tuple(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))


class ImageProcessor(ImageMethods, Configurable):
    """Converts between an autoencoder's tensors and images.

    Args:
        do_resize: whether ``preprocess`` resizes images.
        vae_scale_factor: pixels per latent along a side; heights and widths are rounded down to multiples of it.
        vae_latent_channels: ``preprocess`` takes tensors with this many channels for latents.
        resample: the filter for PIL images.
        reducing_gap: Pillow's option of this name, for faster and rougher reductions.
        do_normalize: whether the autoencoder's tensors are in [-1, 1] (True) or in [0, 1] (False).
        do_binarize: whether ``preprocess`` rounds values to 0 and 1, as for masks.
        do_convert_rgb: without effect, as PIL images are converted to RGB anyway, unless they become gray.
        do_convert_grayscale: whether ``preprocess`` converts PIL images to gray; arrays [B, H, W] are then gray images.
    """

    @records_config
    def __init__(
        self,
        do_resize: bool = True,
        vae_scale_factor: Count = 8,
        vae_latent_channels: Count = 4,
        resample: Literal["linear", "bilinear", "bicubic", "lanczos", "nearest"] = "lanczos",
        reducing_gap: float | None = None,
        do_normalize: bool = True,
        do_binarize: bool = False,
        do_convert_rgb: bool = False,
        do_convert_grayscale: bool = False,
    ):
        if do_convert_rgb and do_convert_grayscale:
            raise ConfigurationError("do_convert_rgb and do_convert_grayscale contradict each other; give one of them")

    def postprocess(
        self, image: Tensor, output_type: str = "pil", do_denormalize: list[bool] | None = None
    ) -> list[Image.Image] | np.ndarray[Any, Any] | Tensor:
        """Convert decoded images to the requested type.

        Args:
            image: [B, C, H, W] in [-1, 1], as an autoencoder decodes them.
            output_type: "pil": a list of PIL images; "np": an array [B, H, W, C] in [0, 1]; "pt": a tensor
                [B, C, H, W] in [0, 1]; "latent": ``image``, unchanged.
            do_denormalize: for each image, whether it is in [-1, 1] (True) or already in [0, 1] (False);
                None: as ``do_normalize`` of the processor.

        Raises:
            InputError: not a tensor [B, C, H, W], or an unknown ``output_type``.
        """
        check_output_type(output_type)
        if not isinstance(image, Tensor):
            raise InputError(f"postprocess takes a tensor [B, C, H, W], not a {type(image).__name__}")
        if output_type == "latent":
            return image
        if image.ndim != 4:
            raise InputError(f"postprocess takes a tensor [B, C, H, W], not {tuple(image.shape)}")
        if do_denormalize is not None and len(do_denormalize) != len(image):
            raise InputError(f"do_denormalize has {len(do_denormalize)} entries for {len(image)} images")
        _warn_of_non_finite(image)
        if do_denormalize is None:
            image = self.denormalize(image) if self.config.do_normalize else image
        else:
            image = torch.stack([self.denormalize(x) if do else x for x, do in zip(image, do_denormalize)])
        if output_type == "pt":
            return image
        if output_type == "np":
            return self.pt_to_numpy(image)
        return self.numpy_to_pil(self.pt_to_numpy(image.float().nan_to_num(0.0)))

    def preprocess(
        self,
        image: Images | Sequence[Images],
        height: int | None = None,
        width: int | None = None,
        resize_mode: str = "default",
        crops_coords: tuple[int, int, int, int] | None = None,
    ) -> Tensor:
        """Convert images to the tensor that an autoencoder encodes.

        Args:
            image: one image or a list: PIL images (converted to RGB, transparency on white), arrays [H, W],
                [H, W, C] or [B, H, W, C], or tensors [H, W], [C, H, W] or [B, C, H, W], of 1 or 3 channels; floats
                in [0, 1] or integers in [0, 255]. Floats in [-1, 1] are accepted with a warning; other ranges are
                refused. Tensors with the channels of latents are returned unchanged.
            height, width: in pixels, rounded down to multiples of ``vae_scale_factor``; the first image's by default.
            resize_mode: as for ``resize``.
            crops_coords: left, top, right and bottom of the region of PIL images that is used.

        Returns:
            A tensor [B, C, height, width] in [-1, 1], or in [0, 1] without ``do_normalize``.

        Raises:
            InputError: not images of one kind, or values outside of these ranges.
        """
        images = list(image) if isinstance(image, (list, tuple)) else [image]
        if not images:
            raise InputError("there is no image to preprocess")
        first = images[0]
        kind = Image.Image if isinstance(first, Image.Image) else type(first)
        if not isinstance(first, Image.Image | np.ndarray | Tensor) or not all(isinstance(x, kind) for x in images):
            names = ", ".join(sorted({type(x).__name__ for x in images}))
            raise InputError(f"expected PIL images, NumPy arrays or tensors, all of one kind, not {names}")

        if isinstance(first, Image.Image):
            plain = [x if crops_coords is None else x.crop(crops_coords) for x in images if isinstance(x, Image.Image)]
            gray = self.config.do_convert_grayscale
            plain = [x if gray and x.mode in ("L", "RGB") else to_rgb(x) for x in plain]
            if self.config.do_resize:
                size = self._size((plain[0].height, plain[0].width), height, width)
                plain = [self.resize(x, *size, resize_mode) for x in plain]
            elif len({x.size for x in plain}) > 1:
                raise InputError("the images have different sizes, and do_resize=False: give images of one size")
            batch = self.numpy_to_pt(self.pil_to_numpy([x.convert("L") for x in plain] if gray else plain))
            return self._in_range(batch)

        check_arrays(images)
        if self.config.do_convert_grayscale and not isinstance(image, list | tuple):
            images = [_gray(first)]
        batches = [as_batch(x) for x in images]
        if len({batch.shape[1:] for batch in batches}) > 1:
            shapes = ", ".join(str(list(batch.shape)) for batch in batches)
            raise InputError(f"arrays and tensors must have one size to form a batch, not {shapes}")
        batch = torch.cat(batches)
        if isinstance(first, Tensor) and batch.shape[1] == self.config.vae_latent_channels:
            return batch
        size = self._size((batch.shape[2], batch.shape[3]), height, width)
        if batch.shape[1] not in (1, 3):
            raise InputError(f"an image has 1 or 3 channels, not {batch.shape[1]} (shape {list(batch.shape)})")
        batch = self._in_range(batch)
        return self.resize(batch, *size, resize_mode) if self.config.do_resize else batch

    def _in_range(self, images: Tensor) -> Tensor:
        """In the autoencoder's range, and rounded to its ends if they are to be."""
        images = normalize(images) if self.config.do_normalize else unit_range(images)
        return self.binarize(images) if self.config.do_binarize else images

    def _size(self, old: tuple[int, int], height: int | None, width: int | None) -> tuple[int, int]:
        factor = self.config.vae_scale_factor
        height = old[0] if height is None else whole_number("height", height, most=MAX_SIDE)
        width = old[1] if width is None else whole_number("width", width, most=MAX_SIDE)
        if height < factor or width < factor:
            raise InputError(f"an image of {height} x {width} pixels is smaller than a latent of {factor} x {factor}")
        return height - height % factor, width - width % factor

    @staticmethod
    def convert_to_rgb(image: Image.Image) -> Image.Image:
        """A PIL image of any mode as 8-bit RGB, transparency on white."""
        return to_rgb(image)

    @staticmethod
    def denormalize(images: Tensor) -> Tensor:
        """From [-1, 1] to [0, 1], clamped."""
        return (images * 0.5 + 0.5).clamp(0, 1)

    @staticmethod
    def pil_to_numpy(images: Image.Image | list[Image.Image]) -> np.ndarray[Any, Any]:
        """PIL images of one size to an array [B, H, W, C] (or [B, H, W] if grey), float32 in [0, 1]."""
        images = images if isinstance(images, list) else [images]
        return np.stack([np.asarray(image, dtype=np.float32) / 255 for image in images])

    @staticmethod
    def numpy_to_pil(images: np.ndarray[Any, Any]) -> list[Image.Image]:
        """An array [B, H, W, C] or [H, W, C] in [0, 1], C = 1, 3 or 4, to PIL images."""
        images = images[None] if images.ndim == 3 else images
        if not np.isfinite(images).all():
            _warn_of_non_finite(torch.from_numpy(images))
            images = np.nan_to_num(images)
        levels = (np.clip(images, 0, 1) * 255).round().astype(np.uint8)
        return [Image.fromarray(x[..., 0] if x.shape[-1] == 1 else x) for x in levels]

    @staticmethod
    def numpy_to_pt(images: np.ndarray[Any, Any]) -> Tensor:
        """An array [B, H, W, C] or [B, H, W] to a tensor [B, C, H, W]."""
        images = images[..., None] if images.ndim == 3 else images
        return torch.from_numpy(images.transpose(0, 3, 1, 2))

    @staticmethod
    def pt_to_numpy(images: Tensor) -> np.ndarray[Any, Any]:
        """A tensor [B, C, H, W] to a float32 array [B, H, W, C]."""
        array: np.ndarray[Any, Any] = images.detach().cpu().permute(0, 2, 3, 1).float().numpy()
        return array


class PixArtImageProcessor(ImageProcessor):
    """The same, with arguments in the documented order of PixArt's."""

    @records_config
    def __init__(
        self,
        do_resize: bool = True,
        vae_scale_factor: Count = 8,
        resample: Literal["linear", "bilinear", "bicubic", "lanczos", "nearest"] = "lanczos",
        do_normalize: bool = True,
        do_binarize: bool = False,
        do_convert_grayscale: bool = False,
        vae_latent_channels: Count = 4,
    ):
        super().__init__(
            do_resize, vae_scale_factor, vae_latent_channels, resample, None, do_normalize, do_binarize,
            do_convert_grayscale=do_convert_grayscale,
        )  # fmt: skip


def _gray(image: Any) -> Any:
    """Arrays [B, H, W] or [H, W, 1] and tensors [B, H, W] as gray images with a channel."""
    if image.ndim != 3:
        return image
    if isinstance(image, Tensor):
        return image.unsqueeze(1)
    return image[None] if image.shape[-1] == 1 else image[..., None]


def check_output_type(output_type: Any) -> None:
    """Raise InputError unless it is one of ``OUTPUT_TYPES``."""
    if not isinstance(output_type, str) or output_type not in OUTPUT_TYPES:
        raise InputError(f"output_type must be one of {', '.join(OUTPUT_TYPES)}, not {shown(output_type)}")


def _warn_of_non_finite(images: Tensor) -> None:
    broken = (~images.isfinite()).flatten(1).any(dim=1).nonzero().flatten().tolist()
    if broken:
        logger.warning(
            "the decoded images %s (of %d) hold NaN or infinite values; NaN becomes black. "
            "The usual cause is an overflow in float16: run the autoencoder or the transformer in bfloat16 or float32",
            ", ".join(map(str, broken)),
            len(images),
        )


# --- images of any kind -> RGB, or a batch ---


def to_rgb(image: Image.Image, background: str = "white") -> Image.Image:
    """A PIL image of any mode as 8-bit RGB, transparency on ``background``, a color of Pillow's.

    16-bit grey is scaled by 1 / 257. 32-bit integers (mode I) are 8-bit levels, or 16-bit levels if any exceeds 255;
    floats (mode F) are 8-bit levels, or fractions of white if none exceeds 1.
    """
    check_pixels(image.size)
    try:
        image.load()
        if image.mode[0] in "IF":
            image = _levels(image)
        if image.mode in ("La", "RGBa"):  # premultiplied
            image = image.convert(image.mode.upper())
        if image.has_transparency_data:
            image = Image.alpha_composite(Image.new("RGBA", image.size, background), image.convert("RGBA"))
        return image if image.mode == "RGB" else image.convert("RGB")
    except (OSError, ValueError) as error:
        raise InputError(f"the image of mode {image.mode} cannot be made RGB: {reason(error)}") from error


def _levels(image: Image.Image) -> Image.Image:
    """8-bit grey from grey of more bits."""
    values = np.asarray(image).astype(np.float32)
    least, most = float(values.min()), float(values.max())
    if image.mode == "F":
        full = 1.0 if most <= 1 else 255.0
    else:
        full = 255.0 if image.mode == "I" and most <= 255 else 65535.0
    if not 0 <= least <= most <= full:  # which NaN is not
        raise InputError(f"its values, from {least:g} to {most:g}, are not from 0 to {full:g}")
    return Image.fromarray((values * (255 / full)).round().astype(np.uint8))


def as_batch(image: Any) -> Tensor:
    """An array [(B,) H, W (, C)] or a tensor [(B,) (C,) H, W] as a tensor [B, C, H, W] of the same numbers."""
    check_arrays([image])
    if isinstance(image, Tensor):
        image = image if image.is_floating_point() or image.dtype == torch.uint8 else image.long()
        image = image[None] if image.ndim == 2 else image
        batch: Tensor = image[None] if image.ndim == 3 else image
    else:
        plain = {"u": np.int64, "i": np.int64, "f": np.float64 if image.itemsize > 4 else np.float32}
        array = image if image.dtype == np.uint8 else image.astype(plain[image.dtype.kind])
        array = array[..., None] if array.ndim == 2 else array
        array = array[None] if array.ndim == 3 else array
        batch = torch.from_numpy(np.array(array.transpose(0, 3, 1, 2)))
    return batch


def check_arrays(images: Sequence[Any]) -> None:
    """Check that arrays and tensors are images, before any is copied: a view that repeats values can have any size."""
    for image in images:
        if isinstance(image, Tensor):
            name = str(image.dtype).removeprefix("torch.")
            if image.is_meta or image.is_nested or image.layout != torch.strided or name not in (*FLOATS, *_INTEGERS):
                kind = "meta" if image.is_meta else f"{image.layout}, {image.dtype}"
                raise InputError(f"an image must be a dense tensor of floats or integers, not {kind}")
        elif image.dtype.kind not in "uif":
            raise InputError(f"an image must be an array of floats or integers, not {image.dtype}")
        shape = list(image.shape)
        if not 2 <= len(shape) <= 4:
            raise InputError(f"an image has 2 to 4 dimensions, not the shape {shape}")
        if 0 in shape:
            raise InputError(f"an image of shape {shape} is empty")
        height, width = shape[-2:] if isinstance(image, Tensor) or len(shape) == 2 else shape[-3:-1]
        check_pixels((width, height))
    values = sum(math.prod(image.shape) for image in images)
    if values > _MOST_VALUES:
        raise InputError(f"images of {values:,} values are too large; at most {_MOST_VALUES:,} are taken at once")


def normalize(images: Tensor) -> Tensor:
    """Images in [-1, 1], from integers in [0, 255] or floats in [0, 1]; floats in [-1, 1] are kept, with a warning."""
    least, most = images.min().item(), images.max().item()
    if not images.is_floating_point():
        if least < 0 or most > 255:
            raise InputError(f"images of integers must be in [0, 255], not in [{least}, {most}]; scale them")
        return 2.0 * (images.float() / 255) - 1.0
    if not -1 - _ROUNDING <= least <= most <= 1 + _ROUNDING:  # which NaN is not
        raise InputError(
            f"images of floats must be in [0, 1] or [-1, 1], not in [{least:g}, {most:g}]; scale them, or give "
            f"integers in [0, 255]"
        )
    if least < 0:
        logger.warning("images to encode should be in [0, 1]; these have negative values, and are taken as in [-1, 1]")
        return images
    return 2.0 * images - 1.0


def unit_range(images: Tensor) -> Tensor:
    """Images in [0, 1], from what ``normalize`` takes; floats that are in [0, 1] are returned unchanged."""
    signed = normalize(images)
    if not images.is_floating_point():
        return images.float() / 255
    return images if bool((images >= 0).all()) else signed * 0.5 + 0.5


def check_pixels(size: tuple[int, int]) -> None:
    """Refuse an image of too many pixels, by its width and height."""
    if size[0] * size[1] > MAX_PIXELS:
        raise InputError(f"an image of {size[0]} x {size[1]} pixels is too large; scale it to {MAX_PIXELS:,} pixels")


def reason(error: Exception) -> str:
    """The reason for an error, shortened and printable, without its type."""
    if isinstance(error, ImpastoError):
        return str(error)
    return shown((isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__, 200)[1:-1]
