"""The rest of the documented methods of image processors: resizing, masks, and pasting back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor

from ...checks import MAX_SIDE, shown, whole_number
from ...errors import InputError
from ..resolution import nearest_bin, resize_and_crop

if TYPE_CHECKING:
    from ...checkpoints.config import Config

T = TypeVar("T", bound="np.ndarray[Any, Any] | Tensor")

FILTERS = {
    "linear": Image.Resampling.BILINEAR,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "nearest": Image.Resampling.NEAREST,
}
Box = tuple[int, int, int, int]


class ImageMethods:
    """Methods that the calls of the pipelines do not need."""

    config: Config

    @staticmethod
    def normalize(images: T) -> T:
        """From [0, 1] to [-1, 1]."""
        return cast(T, 2.0 * images - 1.0)

    @staticmethod
    def convert_to_grayscale(image: Image.Image) -> Image.Image:
        """A PIL image in 8-bit gray."""
        return image.convert("L")

    @staticmethod
    def blur(image: Image.Image, blur_factor: float = 4) -> Image.Image:
        """A PIL image with a Gaussian blur of this radius in pixels."""
        return image.filter(ImageFilter.GaussianBlur(blur_factor))

    @staticmethod
    def classify_height_width_bin(height: int, width: int, ratios: Mapping[Any, Any]) -> tuple[int, int]:
        """:func:`~impasto.pipelines.resolution.nearest_bin`, under its documented name."""
        return nearest_bin(height, width, ratios)

    @staticmethod
    def resize_and_crop_tensor(samples: Tensor, new_width: int, new_height: int) -> Tensor:
        """:func:`~impasto.pipelines.resolution.resize_and_crop`, under its documented name; width comes first."""
        return resize_and_crop(samples, new_height, new_width)

    def binarize(self, image: T) -> T:
        """0 where a value is below 0.5, 1 elsewhere; the given tensor or array is not changed."""
        if isinstance(image, Tensor):
            return cast(T, (image >= 0.5).to(image.dtype))
        return cast(T, (image >= 0.5).astype(image.dtype))

    def get_default_height_width(
        self, image: Any, height: int | None = None, width: int | None = None
    ) -> tuple[int, int]:
        """Height and width, or those of the image, rounded down to multiples of ``vae_scale_factor``.

        Args:
            image: a PIL image, an array [B, H, W] or [B, H, W, C], or a tensor [B, C, H, W].
        """
        if isinstance(image, Image.Image):
            own = (image.height, image.width)
        else:
            own = tuple(image.shape[2:4] if isinstance(image, Tensor) else image.shape[1:3])
        factor = int(self.config.vae_scale_factor)
        sides = (own[0] if height is None else height, own[1] if width is None else width)
        return sides[0] - sides[0] % factor, sides[1] - sides[1] % factor

    def resize(self, image: Any, height: int, width: int, resize_mode: str = "default") -> Any:
        """Scale an image.

        Args:
            image: a PIL image, an array [B, H, W, C] or a tensor [B, C, H, W]; the latter two take the nearest pixels.
            resize_mode: "default": to this size, whatever the aspect ratio. For PIL images also "fill": it fits in,
                and its edges continue beyond it; "crop": it covers the size, and its middle is kept.
        """
        height, width = whole_number("height", height, most=MAX_SIDE), whole_number("width", width, most=MAX_SIDE)
        if not isinstance(image, Image.Image):
            if resize_mode != "default":
                raise InputError(f"resize_mode={shown(resize_mode)} is for PIL images; use 'default'")
            if isinstance(image, Tensor):
                return F.interpolate(image, size=(height, width))
            batch = torch.from_numpy((image[..., None] if image.ndim == 3 else image).transpose(0, 3, 1, 2))
            return F.interpolate(batch, size=(height, width)).permute(0, 2, 3, 1).float().numpy()
        resample = FILTERS[self.config.resample]
        if resize_mode == "default":
            return image.resize((width, height), resample, reducing_gap=self.config.reducing_gap)
        if resize_mode not in ("fill", "crop"):
            raise InputError(f"resize_mode must be 'default', 'fill' or 'crop', not {shown(resize_mode)}")
        wider = image.width * height > width * image.height  # than the size
        by_width = wider == (resize_mode == "fill")  # whether the widths become equal, or the heights
        scaled = (
            (width, image.height * width // image.width) if by_width else (image.width * height // image.height, height)
        )
        resized = image.resize(scaled, resample)
        left, top = width // 2 - scaled[0] // 2, height // 2 - scaled[1] // 2
        canvas = Image.new("RGB", (width, height))
        canvas.paste(resized, (left, top))
        if top > 0:
            for edge, place in ((0, 0), (scaled[1], top + scaled[1])):
                canvas.paste(resized.resize((width, top), box=(0, edge, width, edge)), (0, place))
        if left > 0:
            for edge, place in ((0, 0), (scaled[0], left + scaled[0])):
                canvas.paste(resized.resize((left, height), box=(edge, 0, edge, height)), (place, 0))
        return canvas

    @staticmethod
    def get_crop_region(mask_image: Image.Image, width: int, height: int, pad: int = 0) -> Box:
        """The region around what a mask selects, with the aspect ratio of width and height as far as there is room.

        Returns:
            left, top, right and bottom, in pixels.

        Raises:
            InputError: the mask is black everywhere.
        """
        selected = np.asarray(mask_image.convert("L")) > 0
        if not selected.any():
            raise InputError("the mask is black everywhere and selects nothing; white marks what is repainted")
        spans = []
        for lines, most in zip(selected.nonzero()[::-1], mask_image.size, strict=True):  # columns, rows
            spans.append((max(int(lines.min() - pad), 0), min(int(lines.max() + 1 + pad), most)))
        wide, high = (end - start for start, end in spans)
        ratio = width / height
        if wide / high > ratio:
            spans[1] = _widened(*spans[1], wide / ratio, mask_image.height)
        else:
            spans[0] = _widened(*spans[0], high * ratio, mask_image.width)
        return spans[0][0], spans[1][0], spans[0][1], spans[1][1]

    def apply_overlay(
        self, mask: Image.Image, init_image: Image.Image, image: Image.Image, crop_coords: Box | None = None
    ) -> Image.Image:
        """The original image where the mask is black, and the new one where it is white.

        Args:
            crop_coords: left, top, right and bottom of the region of the original that ``image`` shows.
        """
        kept = Image.new("RGBa", init_image.size)
        kept.paste(init_image.convert("RGBA").convert("RGBa"), mask=ImageOps.invert(mask.convert("L")))
        if crop_coords is not None:
            left, top, right, bottom = crop_coords
            whole = Image.new("RGB", init_image.size)
            whole.paste(self.resize(image, bottom - top, right - left, "crop"), (left, top))
            image = whole
        return Image.alpha_composite(image.convert("RGBA"), kept.convert("RGBA")).convert("RGB")


def _widened(start: int, end: int, length: float, most: int) -> tuple[int, int]:
    """A span of about this length around another one, moved to lie within [0, most]."""
    more = int(length - (end - start))
    start, end = start - more // 2, end + more - more // 2
    if end >= most:
        start, end = start - (end - most), most
    if start < 0:
        start, end = 0, end - start
    return start, min(end, most)
