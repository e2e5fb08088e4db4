"""Image files, with the settings of their generation inside.

A file is checked before it is opened and measured before it is decoded, and only the decoders named here see it.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import stat
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, BinaryIO

from PIL import ExifTags, Image, ImageOps, PngImagePlugin, UnidentifiedImageError, WebPImagePlugin  # noqa: F401

from ..checks import MAX_CHARACTERS, MAX_FILE_BYTES, MAX_PIXELS, MAX_STEPS, finite, shown, whole_number
from ..errors import InputError, OutputError
from ..files import plain_path, write_file
from .images import check_pixels, reason, to_rgb

#: What is read. All are decoded inside this process: no EPS, which starts Ghostscript, no TIFF with dozens of codecs.
READ_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
#: What is written, by extension.
_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
_JPEG_MARKER = 65_533  # bytes that a marker of a JPEG holds: all of its EXIF
# https://exiv2.org/tags.html: a UserComment starts with eight bytes that name its encoding.
_UNICODE, _ASCII = b"UNICODE\0", b"ASCII\0\0\0"


# --- reading ---


def open_image(path: str | os.PathLike[str], background: str = "white") -> Image.Image:
    """The first image of a file as RGB: upright as its EXIF orientation says, transparency on ``background``.

    Raises:
        InputError: not a regular file, none of ``READ_FORMATS``, too large, or damaged.
    """
    return to_rgb(load_image(path, upright=True), background)


def load_image(path: str | os.PathLike[str], upright: bool = False) -> Image.Image:
    """The first image of a file, decoded, in the mode of the file; ``info`` holds its texts."""
    path = plain_path(path, InputError)
    with _naming(str(path)), _regular_file(path) as file:
        return decode_image(file, str(path), upright)


def decode_image(file: IO[bytes], name: str, upright: bool = False) -> Image.Image:
    """The same from an open file; errors call it ``name``."""
    with _naming(name), Image.open(file, formats=READ_FORMATS) as image:
        check_pixels(image.size)
        image.load()  # texts of a PNG may follow the pixels
        return ImageOps.exif_transpose(image) if upright else image


def measure_image(file: str | os.PathLike[str] | IO[bytes], name: str = "") -> tuple[int, int]:
    """Height and width of an image, upright, from its header; ``name`` is that of an open file.

    Raises:
        InputError: as ``open_image``, but for damage after the header.
    """
    if isinstance(file, str | os.PathLike):
        path = plain_path(file, InputError)
        with _naming(str(path)), _regular_file(path) as opened:
            return measure_image(opened, str(path))
    with _naming(name), Image.open(file, formats=READ_FORMATS) as image:
        check_pixels(image.size)
        # A PNG may have its EXIF after the pixels, which are not decoded here.
        exif = image.getexif() if image.format != "PNG" or "exif" in image.info else _exif_of_png(file)
        turned = exif.get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
        return (image.width, image.height) if turned else (image.height, image.width)


def _exif_of_png(file: IO[bytes]) -> Image.Exif:
    """The EXIF of a PNG, found by the headers of its chunks alone."""
    found = Image.Exif()
    file.seek(len(b"\x89PNG\r\n\x1a\n"))
    while len(header := file.read(8)) == 8:
        length, name = struct.unpack(">I4s", header)
        if name == b"eXIf":
            found.load(file.read(length))
            break
        file.seek(length + 4, io.SEEK_CUR)  # with the checksum
    return found


@contextlib.contextmanager
def _naming(name: str) -> Iterator[None]:
    """Turn all errors but a lack of memory into InputErrors that name the image."""
    try:
        yield
    except (MemoryError, _UnreadableImageError):
        raise
    except Exception as error:  # decoders raise nearly anything on damaged files
        unknown = isinstance(error, UnidentifiedImageError)
        problem = f"it is none of {', '.join(READ_FORMATS)}" if unknown else reason(error)
        raise _UnreadableImageError(f"{shown(name, 200)} cannot be read as an image: {problem}") from error


class _UnreadableImageError(InputError):
    """An InputError that names the image already."""


def _regular_file(path: Path) -> BinaryIO:
    """Open a regular file of a sensible size: reading anything else may block or never end."""
    _check_file(os.stat(path))  # opening a device may itself have effects
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        _check_file(os.fstat(descriptor))  # it may have been replaced
    except InputError:
        os.close(descriptor)
        raise
    return os.fdopen(descriptor, "rb")


def _check_file(found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise InputError(f"it is {_KINDS.get(stat.S_IFMT(found.st_mode), 'not a file')}; give a file")
    if found.st_size > MAX_FILE_BYTES:
        raise InputError(f"it has {found.st_size:,} bytes, and at most {MAX_FILE_BYTES:,} are read")


# --- writing ---


def check_image_path(path: str | os.PathLike[str]) -> None:
    """Raise OutputError if an image cannot be written to ``path``, before hours of work."""
    path = plain_path(path)
    if path.suffix.lower() not in _FORMATS:
        kinds = ", ".join(_FORMATS)
        raise OutputError(f"the extension of {path} is not that of an image; use one of: {kinds}")
    if os.path.isdir(path):  # takes names of any length
        raise OutputError(f"{path} is a folder; name a file in it")
    if not os.path.isdir(path.parent):
        raise OutputError(f"the folder {path.parent} does not exist; create it or choose another")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise OutputError(f"the folder {path.parent} is not writable; allow it or choose another")


def save_image(
    image: Image.Image,
    path: str | os.PathLike[str],
    settings: GenerationSettings | None = None,
    overwrite: bool = True,
) -> None:
    """Write an image completely or not at all, with its settings inside.

    The extension determines the format: .png (settings in the text chunk ``parameters``), .jpg, .jpeg or .webp
    (in the EXIF user comment; a JPEG has no room for more than about 32,000 characters, and is then without them).

    Args:
        overwrite: whether a file of this name is replaced; if not, it is an OutputError.

    Raises:
        OutputError: unknown extension, missing or unwritable folder, full disk, or an image that the format
            cannot hold. A file that was at ``path`` before is then unchanged.
    """
    check_image_path(path)
    path = Path(path)
    if not isinstance(image, Image.Image):
        raise InputError(f"save_image takes a PIL image, not a {type(image).__name__}")
    try:
        content = encode_image(image, _FORMATS[path.suffix.lower()], settings)
    except (ValueError, OSError) as error:
        raise OutputError(f"{path} cannot be written as {path.suffix}: {error}; try .png") from error
    write_file(path, content, overwrite=overwrite)


def encode_image(image: Image.Image, kind: str, settings: GenerationSettings | None, quality: int = 95) -> bytes:
    """The file of an image as ``save_image`` writes it; ``kind`` is PNG, JPEG or WEBP.

    Settings of more than about 32,000 characters, for which a JPEG has no room, are left out of it.
    """
    options: dict[str, Any] = {}
    # Lone surrogates (from undecodable command lines) cannot be written in any encoding.
    text = settings.to_text().encode("utf-8", "replace").decode("utf-8") if settings else None
    if kind == "PNG":
        chunks = PngImagePlugin.PngInfo()
        if text is not None:
            chunks.add_text("parameters", text)
        options["pnginfo"] = chunks
    else:
        options.update(quality=quality, **({"subsampling": 0} if kind == "JPEG" else {}))  # no chroma subsampling
        if image.mode not in ("RGB", "L") and (kind == "JPEG" or image.mode != "RGBA"):
            image = image.convert("RGB")
        if text is not None:
            exif = Image.Exif()
            exif[ExifTags.IFD.Exif] = {ExifTags.Base.UserComment: _UNICODE + text.encode("utf-16-be")}
            if kind != "JPEG" or len(exif.tobytes()) <= _JPEG_MARKER:
                options["exif"] = exif
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


# --- settings inside the file ---

_NEGATIVE = "Negative prompt: "
_NEGATIVE_FROM = "Negative prompt from line"
_NAMES = ("Steps", "Sampler", "CFG scale", "Seed", "Size", "Model", _NEGATIVE_FROM)
# The look-behinds keep the search linear in lines that are not settings.
_ENTRY = re.compile(r'(?:(?<![^:,"])|(?<=, ))([^:,"]+): ("(?:[^"\\]|\\.)*"|[^,]*)(?:, |$)')


@dataclass(frozen=True)
class GenerationSettings:
    """How an image was generated: written into its file, and read back from it.

    ``extra`` holds further settings, as text, by name.
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
                raise InputError(f"{shown(name)} cannot name an extra setting: use a name without commas or colons")

    def to_text(self) -> str:
        """The prompt, the negative prompt and one line of settings, in the form that image tools have in common."""
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
        # If a prompt itself has a line that looks like the marker, the line number of the real one is recorded.
        if sum(line.startswith(_NEGATIVE) for line in prompts.split("\n")) != bool(negative):
            entries[_NEGATIVE_FROM] = self.prompt.count("\n") + 2 if negative else 0
        line = ", ".join(f"{name}: {_quoted(value)}" for name, value in entries.items() if value is not None)
        return f"{prompts}\n{line}"

    @classmethod
    def from_text(cls, text: str) -> GenerationSettings:
        """The inverse of :meth:`to_text`. Raises InputError if the text has no line of settings."""
        *lines, last = text.rstrip("\n").split("\n")
        if len(last) > MAX_CHARACTERS:
            raise InputError(f"the text holds no settings: its last line has {len(last):,} characters")
        try:
            entries = {name.strip(): _unquoted(value) for name, value in _ENTRY.findall(last)}
            steps = whole_number("Steps", int(entries.pop("Steps")), 0, MAX_STEPS)
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
                height=whole_number("Size", int(height), most=MAX_PIXELS) if height else None,
                width=whole_number("Size", int(width), most=MAX_PIXELS) if width else None,
                model=entries.pop("Model", None),
                extra=entries,
            )
        except (KeyError, ValueError) as error:
            raise InputError(
                f"the text holds no settings: its last line should begin like 'Steps: 20, Sampler: ...', "
                f"and is {shown(last)}"
            ) from error


def _first_marker(lines: list[str]) -> int:
    """The number (from 1) of the first line that begins a negative prompt; 0 if none does."""
    return next((number for number, line in enumerate(lines, 1) if line.startswith(_NEGATIVE)), 0)


def _quoted(value: Any) -> str:
    text = str(value)
    plain = text and text == text.strip() and not any(mark in text for mark in ',:"\n\r')
    return text if plain else json.dumps(text, ensure_ascii=False)


def _unquoted(text: str) -> str:
    return str(json.loads(text)) if text.startswith('"') else text


def _user_comment(image: Image.Image) -> Any:
    """What EXIF holds as the user's comment; None if it is damaged."""
    try:
        return image.getexif().get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment)
    except Exception:  # Pillow raises SyntaxError, struct.error and others
        return None


def read_settings(path: str | os.PathLike[str]) -> GenerationSettings:
    """Read the settings from an image that :func:`save_image`, or another tool that writes this form, has saved.

    Raises:
        InputError: the file is not a readable image, or holds no settings.
    """
    text = settings_text(load_image(path))
    if text is None:
        raise InputError(f"{shown(str(path), 200)} holds no generation settings")
    return GenerationSettings.from_text(text)


def settings_text(image: Image.Image) -> str | None:
    """The text of the settings in an image that was read from a file; None if it holds none."""
    text = image.info.get("parameters")
    comment = _user_comment(image)
    if text is None and isinstance(comment, bytes):
        if comment.startswith(_UNICODE):
            text = comment[len(_UNICODE) :].decode("utf-16-be", "replace")
        else:
            text = comment.removeprefix(_ASCII).decode("utf-8", "replace")
    return text if isinstance(text, str) else None
