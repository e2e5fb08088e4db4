"""Tensors <-> images, and the settings that travel inside an image file."""

from __future__ import annotations

import io
import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, PngImagePlugin
from torch import Tensor

from ..checkpoints.config import Configurable, records_config
from ..checks import finite, shown, whole_number
from ..errors import InputError, OutputError
from ..files import plain_path, write_file
from . import limits
from .image_inputs import as_batch, check_arrays, load_image, normalize, to_rgb
from .resolution import nearest_bin, resize_and_crop

logger = logging.getLogger("impasto")

Images = Image.Image | np.ndarray[Any, Any] | Tensor
OUTPUT_TYPES = ("pil", "np", "pt", "latent")


class ImageProcessor(Configurable):
    """What stands between the autoencoder's tensors and the pictures that people handle.

    Args:
        vae_scale_factor: Pixels per latent along a side; heights and widths are cut down to multiples of it.
        vae_latent_channels: Tensors with this many channels are taken for latents by ``preprocess``.
    """

    @records_config
    def __init__(self, vae_scale_factor: int = 8, vae_latent_channels: int = 4):
        pass

    def postprocess(
        self, image: Tensor, output_type: str = "pil", do_denormalize: list[bool] | None = None
    ) -> list[Image.Image] | np.ndarray[Any, Any] | Tensor:
        """Turn decoded images into what the caller asked for.

        Args:
            image: [B, C, H, W] in [-1, 1], as an autoencoder decodes them.
            output_type: "pil": a list of pictures; "np": an array [B, H, W, C] in [0, 1]; "pt": a tensor
                [B, C, H, W] in [0, 1]; "latent": ``image`` as it is.
            do_denormalize: For each image, whether it is in [-1, 1] (True) or already in [0, 1] (False);
                None: all are in [-1, 1].

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
            image = self.denormalize(image)
        else:
            image = torch.stack([self.denormalize(x) if do else x for x, do in zip(image, do_denormalize)])
        if output_type == "pt":
            return image
        if output_type == "np":
            return self.pt_to_numpy(image)
        return self.numpy_to_pil(self.pt_to_numpy(image.float().nan_to_num(0.0)))

    def preprocess(
        self, image: Images | Sequence[Images], height: int | None = None, width: int | None = None
    ) -> Tensor:
        """Turn images into what an autoencoder encodes.

        Args:
            image: One image or a list: PIL images (made RGB, transparency on white), arrays [H, W], [H, W, C] or
                [B, H, W, C], or tensors [H, W], [C, H, W] or [B, C, H, W], of 1 or 3 channels; floating-point values
                in [0, 1] or integers in [0, 255]. Floats in [-1, 1] are taken as such, with a warning; other ranges
                are refused. Tensors that have the channels of latents are returned unchanged.
            height: In pixels, cut down to a multiple of ``vae_scale_factor``; None: the first image's.
            width: The same.

        Returns:
            A tensor [B, C, height, width] in [-1, 1].

        Raises:
            InputError: something else than images of one kind, or values that are not those of an image.
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
            size = self._size((first.height, first.width), height, width)
            resized = [
                to_rgb(x).resize(size[::-1], Image.Resampling.LANCZOS) for x in images if isinstance(x, Image.Image)
            ]
            return normalize(self.numpy_to_pt(self.pil_to_numpy(resized)))

        check_arrays(images)
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
        return F.interpolate(normalize(batch), size=size)

    def _size(self, old: tuple[int, int], height: int | None, width: int | None) -> tuple[int, int]:
        factor = self.config.vae_scale_factor
        height = old[0] if height is None else whole_number("height", height, most=limits.SIDE)
        width = old[1] if width is None else whole_number("width", width, most=limits.SIDE)
        if height < factor or width < factor:
            raise InputError(f"an image of {height} x {width} pixels is smaller than a latent of {factor}")
        return height - height % factor, width - width % factor

    @staticmethod
    def denormalize(images: Tensor) -> Tensor:
        """From [-1, 1] to [0, 1]; what lies outside is clamped."""
        return (images * 0.5 + 0.5).clamp(0, 1)

    @staticmethod
    def pil_to_numpy(images: Image.Image | list[Image.Image]) -> np.ndarray[Any, Any]:
        """Pictures of one size to an array [B, H, W, C] (or [B, H, W] if grey), float32 in [0, 1]."""
        pictures = images if isinstance(images, list) else [images]
        return np.stack([np.asarray(picture, dtype=np.float32) / 255 for picture in pictures])

    @staticmethod
    def numpy_to_pil(images: np.ndarray[Any, Any]) -> list[Image.Image]:
        """An array [B, H, W, C] or [H, W, C] in [0, 1], C = 1, 3 or 4, to pictures."""
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

    @staticmethod
    def classify_height_width_bin(height: int, width: int, ratios: Mapping[Any, Any]) -> tuple[int, int]:
        """:func:`~impasto.pipelines.resolution.nearest_bin` under its documented name."""
        return nearest_bin(height, width, ratios)

    @staticmethod
    def resize_and_crop_tensor(samples: Tensor, new_width: int, new_height: int) -> Tensor:
        """:func:`~impasto.pipelines.resolution.resize_and_crop` by its documented name; width comes first."""
        return resize_and_crop(samples, new_height, new_width)


def check_output_type(output_type: Any) -> None:
    """Raise InputError unless it is one of ``OUTPUT_TYPES``."""
    if not isinstance(output_type, str) or output_type not in OUTPUT_TYPES:
        raise InputError(f"output_type must be one of {', '.join(OUTPUT_TYPES)}, not {shown(output_type)}")


def _warn_of_non_finite(images: Tensor) -> None:
    broken = (~images.isfinite()).flatten(1).any(dim=1).nonzero().flatten().tolist()
    if broken:
        logger.warning(
            "the decoded images %s (of %d) hold NaN or infinite values; in pictures NaN becomes black. "
            "Usually float16 has overflowed: run the autoencoder or the transformer in bfloat16 or float32",
            ", ".join(map(str, broken)),
            len(images),
        )


# --- settings inside the file -------------------------------------------------------------------------------

_NEGATIVE = "Negative prompt: "
_NEGATIVE_FROM = "Negative prompt from line"
_NAMES = ("Steps", "Sampler", "CFG scale", "Seed", "Size", "Model", _NEGATIVE_FROM)
# A name begins where one can: the search is then linear in a line of another origin.
_ENTRY = re.compile(r'(?:(?<![^:,"])|(?<=, ))([^:,"]+): ("(?:[^"\\]|\\.)*"|[^,]*)(?:, |$)')


@dataclass(frozen=True)
class GenerationSettings:
    """How a picture was made: written into the picture file, and read back from it.

    ``extra`` holds whatever else should be remembered, as text, by names of their own.
    """

    prompt: str
    steps: int
    negative_prompt: str = ""
    sampler: str | None = None
    guidance_scale: float | None = None
    seed: int | None = None
    height: int | None = None
    width: int | None = None
    model: str | None = None
    extra: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in self.extra:
            if name in _NAMES or not re.fullmatch(r'[^\s:,"]([^:,"\n\r]*[^\s:,"])?', name):
                raise InputError(f"{shown(name)} cannot name an extra setting: take another, without commas or colons")

    def to_text(self) -> str:
        """The prompt, the negative prompt and one line of settings, in the form that image tools share."""
        negative = f"\n{_NEGATIVE}{self.negative_prompt}" if self.negative_prompt else ""
        prompts = self.prompt + negative
        entries: dict[str, Any] = {
            "Steps": self.steps,
            "Sampler": self.sampler,
            "CFG scale": self.guidance_scale,
            "Seed": self.seed,
            "Size": None if self.height is None or self.width is None else f"{self.width}x{self.height}",
            "Model": self.model,
            **self.extra,
        }
        # Where a prompt itself has a line that looks like the marker, the place of the true one is recorded.
        if sum(line.startswith(_NEGATIVE) for line in prompts.split("\n")) != bool(negative):
            entries[_NEGATIVE_FROM] = self.prompt.count("\n") + 2 if negative else 0
        line = ", ".join(f"{name}: {_quoted(value)}" for name, value in entries.items() if value is not None)
        return f"{prompts}\n{line}"

    @classmethod
    def from_text(cls, text: str) -> GenerationSettings:
        """The inverse of :meth:`to_text`. Raises InputError for a text that has no line of settings."""
        *lines, last = text.rstrip("\n").split("\n")
        if len(last) > limits.CHARACTERS:
            raise InputError(f"the text holds no settings: its last line has {len(last):,} characters")
        try:
            entries = {name.strip(): _unquoted(value) for name, value in _ENTRY.findall(last)}
            steps = whole_number("Steps", int(entries.pop("Steps")), 0, limits.STEPS)
            guidance_scale = entries.pop("CFG scale", None)
            seed = entries.pop("Seed", None)
            width, _, height = entries.pop("Size", "").partition("x")
            start = whole_number(_NEGATIVE_FROM, int(entries.pop(_NEGATIVE_FROM, _first_marker(lines))), 0, len(lines))
            return cls(
                prompt="\n".join(lines[: start - 1] if start else lines),
                negative_prompt="\n".join(lines[start - 1 :])[len(_NEGATIVE) :] if start else "",
                steps=steps,
                sampler=entries.pop("Sampler", None),
                guidance_scale=None if guidance_scale is None else finite("CFG scale", float(guidance_scale)),
                seed=None if seed is None else whole_number("Seed", int(seed), -(2**63), 2**64 - 1),
                height=whole_number("Size", int(height), most=limits.PIXELS) if height else None,
                width=whole_number("Size", int(width), most=limits.PIXELS) if width else None,
                model=entries.pop("Model", None),
                extra=entries,
            )
        except (KeyError, ValueError) as error:
            raise InputError(
                f"the text holds no settings: its last line should begin like 'Steps: 20, Sampler: ...', "
                f"and is {shown(last)}"
            ) from error


def _first_marker(lines: list[str]) -> int:
    """The number of the first line (from 1) that begins the negative prompt; 0 if none does."""
    return next((number for number, line in enumerate(lines, 1) if line.startswith(_NEGATIVE)), 0)


def _quoted(value: Any) -> str:
    text = str(value)
    plain = text and text == text.strip() and not any(mark in text for mark in ',:"\n\r')
    return text if plain else json.dumps(text, ensure_ascii=False)


def _unquoted(text: str) -> str:
    return str(json.loads(text)) if text.startswith('"') else text


# --- picture files ------------------------------------------------------------------------------------------

_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
# https://exiv2.org/tags.html: a UserComment starts with eight bytes that name its encoding.
_UNICODE, _ASCII = b"UNICODE\0", b"ASCII\0\0\0"


def check_picture_path(path: str | os.PathLike[str]) -> None:
    """Raise OutputError if a picture could not be written to ``path``: worth knowing before hours of work."""
    path = plain_path(path)
    if path.suffix.lower() not in _FORMATS:
        kinds = ", ".join(_FORMATS)
        raise OutputError(f"the extension of {path} is not one of a picture; give it one of: {kinds}")
    if os.path.isdir(path):  # which takes names of any length
        raise OutputError(f"{path} is a folder; name a file in it")
    if not os.path.isdir(path.parent):
        raise OutputError(f"the folder {path.parent} does not exist; create it or choose another")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise OutputError(f"the folder {path.parent} is not writable; allow it or choose another")


def save_picture(image: Image.Image, path: str | os.PathLike[str], settings: GenerationSettings | None = None) -> None:
    """Write a picture, whole or not at all, with its settings inside.

    The extension chooses the format: .png (settings in the text chunk ``parameters``), .jpg, .jpeg or .webp
    (in the EXIF user comment).

    Raises:
        OutputError: unknown extension, missing or unwritable folder, full disk, or a picture that the format
            cannot hold. What was at ``path`` before is then untouched.
    """
    check_picture_path(path)
    path = Path(path)
    if not isinstance(image, Image.Image):
        raise InputError(f"save_picture takes a PIL image, not a {type(image).__name__}")
    try:
        content = _encode_picture(image, _FORMATS[path.suffix.lower()], settings)
    except (ValueError, OSError) as error:
        raise OutputError(f"{path} cannot be written as {path.suffix}: {error}; try .png") from error
    write_file(path, content)


def _encode_picture(image: Image.Image, kind: str, settings: GenerationSettings | None) -> bytes:
    options: dict[str, Any] = {}
    # Lone surrogates (from undecodable command lines) cannot be written in any encoding.
    text = settings.to_text().encode("utf-8", "replace").decode("utf-8") if settings else None
    if kind == "PNG":
        chunks = PngImagePlugin.PngInfo()
        if text is not None:
            chunks.add_text("parameters", text)
        options["pnginfo"] = chunks
    else:
        options.update(quality=95, **({"subsampling": 0} if kind == "JPEG" else {}))  # keeps colours crisp
        if image.mode not in ("RGB", "L") and (kind == "JPEG" or image.mode != "RGBA"):
            image = image.convert("RGB")
        if text is not None:
            exif = Image.Exif()
            exif[ExifTags.IFD.Exif] = {ExifTags.Base.UserComment: _UNICODE + text.encode("utf-16-be")}
            options["exif"] = exif
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def _user_comment(image: Image.Image) -> Any:
    """What EXIF holds as the user's comment; None if it is damaged."""
    try:
        return image.getexif().get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment)
    except Exception:  # Pillow raises SyntaxError, struct.error and others
        return None


def read_settings(path: str | os.PathLike[str]) -> GenerationSettings:
    """Read the settings back from a picture that :func:`save_picture` or a tool of the same habit wrote.

    Raises:
        InputError: the file is not a readable image, or holds no settings.
    """
    image = load_image(path)
    text = image.info.get("parameters")
    comment = _user_comment(image)
    if text is None and isinstance(comment, bytes):
        if comment.startswith(_UNICODE):
            text = comment[len(_UNICODE) :].decode("utf-16-be", "replace")
        else:
            text = comment.removeprefix(_ASCII).decode("utf-8", "replace")
    if not isinstance(text, str):
        raise InputError(f"{shown(str(path), 200)} holds no generation settings")
    return GenerationSettings.from_text(text)
