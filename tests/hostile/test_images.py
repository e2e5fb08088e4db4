"""Image files and images that users give: what is dangerous or damaged is refused, what is unusual comes out right."""

from __future__ import annotations

import io
import os
import socket
import struct
import types
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, PngImagePlugin

from impasto.checks import MAX_CHARACTERS, MAX_FILE_BYTES
from impasto.pipelines import image_files
from impasto.pipelines.glm_image_inputs import reference_image
from impasto.pipelines.image_files import GenerationSettings, open_image, read_settings, save_image
from impasto.pipelines.images import ImageProcessor, to_rgb

from .sandbox import refused, run

RAMP = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3) * 5)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(width: int, height: int, *chunks: bytes, depth: int = 8, color: int = 2, data: bytes = b"") -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(data)) if data else b""
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(chunks) + body + chunk(b"IEND", b"")


def pixels(side: int) -> bytes:
    return (b"\0" + b"\0\0\0" * side) * side


PNG, JPEG, WEBP = encoded(RAMP, "PNG"), encoded(RAMP, "JPEG"), encoded(RAMP, "WEBP", lossless=True)
ZEROS, MANY_ZEROS = zlib.compress(bytes(1 << 20)), zlib.compress(bytes(1 << 28))
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n(/tmp/pwned) (w) file closefile showpage\n"
#: File name -> content. Formats that Pillow decodes and we do not are among them.
FILES: dict[str, bytes] = {
    "empty.png": b"",
    "text.png": b"a red cube",
    "zeros.png": bytes(4096),
    "signature.png": PNG[:8],
    "header.png": PNG[:33],
    "half.png": PNG[: len(PNG) // 2],
    "half.jpg": JPEG[: len(JPEG) // 2],
    "start.jpg": JPEG[:4],
    "half.webp": WEBP[: len(WEBP) // 2],
    "half.gif": encoded(RAMP, "GIF")[:20],
    "half.bmp": encoded(RAMP, "BMP")[:60],
    "no pixels.png": png(4, 4),
    "too few pixels.png": png(64, 64, data=b"\0" * 10),
    "0 x 0.png": png(0, 0, data=b"\0"),
    "bad filter.png": png(1, 1, data=b"\x09\0\0\0"),
    "flipped pixels.png": PNG[:50] + bytes([PNG[50] ^ 255]) + PNG[51:],
    "wrong depth.png": png(1, 1, depth=7, data=b"\0" * 4),
    "bomb.png": png(60_000, 60_000, data=b"\0"),
    "wide bomb.png": png(2**31 - 1, 1, data=b"\0"),
    "9000 x 9000.png": png(9000, 9000, data=b"\0"),
    "bomb.gif": b"GIF89a" + struct.pack("<HH", 65535, 65535) + b"\0\0\0" + encoded(RAMP, "GIF")[13:],
    "bomb.bmp": b"BM" + struct.pack("<IHHIIiiHHIIiiII", 100, 0, 0, 54, 40, 60000, 60000, 1, 24, 0, 0, 0, 0, 0, 0),
    "bomb.jpg": JPEG.replace(struct.pack(">HH", 4, 4), struct.pack(">HH", 65000, 65000), 1),
    "bomb.webp": b"RIFF\x1e\0\0\0WEBPVP8X\x0a\0\0\0" + b"\0\0\0\0\xff\x3f\0\xff\x3f\0" + b"VP8 \0\0\0\0",
    "text bomb.png": png(1, 1, chunk(b"zTXt", b"a\0\0" + MANY_ZEROS), data=pixels(1)),
    "international bomb.png": png(1, 1, chunk(b"iTXt", b"a\0\1\0\0\0" + MANY_ZEROS), data=pixels(1)),
    "many texts.png": png(1, 1, *[chunk(b"zTXt", b"a%d\0\0" % i + ZEROS) for i in range(99)], data=pixels(1)),
    "pages.tif": encoded(RAMP, "TIFF"),
    "image.ico": encoded(RAMP.resize((16, 16)), "ICO"),
    "image.ppm": encoded(RAMP, "PPM"),
    "image.tga": encoded(RAMP, "TGA"),
    "image.pdf": encoded(RAMP, "PDF"),
    "image.eps": EPS,
    "eps.png": EPS,
    "svg.png": b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
    "fits.png": b"SIMPLE  =                    T" + b" " * 4000,
}
PLACES = ("missing.png", "folder.png", "fifo.png", "socket.png", "link to nothing.png", "loop.png", "x" * 300 + ".png")
DEVICES = ("/dev/zero", "/dev/stdin", "/dev/urandom", "/proc/self/mem", "/proc/kmsg")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    (folder / "folder.png").mkdir()
    os.mkfifo(folder / "fifo.png")
    (folder / "link to nothing.png").symlink_to("nothing")
    (folder / "loop.png").symlink_to("loop.png")
    with (folder / "huge.png").open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)
    server = socket.socket(socket.AF_UNIX)
    place = os.getcwd()
    os.chdir(folder)  # the path of a socket may have 107 bytes
    server.bind("socket.png")
    os.chdir(place)
    server.close()
    return folder


def opened(path: str) -> tuple[int, int]:
    return open_image(path).size


def settings_of(path: str) -> str:
    return read_settings(path).prompt


@pytest.mark.parametrize("name", [*FILES, *PLACES, "huge.png"])
def test_files(folder: Path, name: str) -> None:
    refused(run(opened, str(folder / name)), "InputError", name[-10:] if len(name) < 300 else "xxx")


@pytest.mark.parametrize("name", DEVICES)
def test_devices(name: str) -> None:
    refused(run(opened, name), "InputError", name)


@pytest.mark.parametrize("name", ["bomb.png", "text bomb.png", "fifo.png", "image.eps", "half.jpg", "text.png"])
def test_settings_are_read_as_carefully(folder: Path, name: str) -> None:
    refused(run(settings_of, str(folder / name)), "InputError", name)


@pytest.mark.parametrize("name", ["a\x1b[31mb.png", "a\nb.png", "caf\udce9.png", "a\0b.png"])
def test_names_are_not_printed_raw(name: str) -> None:
    outcome = run(opened, name)
    refused(outcome, "InputError", ".png")
    assert outcome.message.isprintable()


LINES = {
    "no colon": "a" * 1_000_000,
    "colons": "a: " * 400_000,
    "quotes": 'a: "' * 300_000,
    "just short enough": "a" * MAX_CHARACTERS,
    "short colons": "a: b:" * (MAX_CHARACTERS // 5),
    "commas": "a," * (MAX_CHARACTERS // 2),
    "5,000 digits": "Steps: " + "9" * 5000,
    "a far line": "Steps: 1, Negative prompt from line: many",
    "half an escape": 'Steps: 3, X: "\\u12"',
    "an open quote": 'Steps: 3, X: "\\"',
    "guidance of NaN": "Steps: 3, CFG scale: nan",
    "guidance of infinity": "Steps: 3, CFG scale: 1e999",
    "negative steps": "Steps: -3",
    "4,000 digits": "Steps: " + "9" * 4000,
    "a seed of 4,000 digits": "Steps: 3, Seed: " + "9" * 4000,
    "a size of 4,000 digits": "Steps: 3, Size: " + "9" * 4000 + "x8",
    "no size": "Steps: 3, Size: 0x-8",
    "a line before the first": "Steps: 3, Negative prompt from line: -1",
}


def parsed(name: str) -> str:
    return GenerationSettings.from_text(LINES[name]).prompt


@pytest.mark.parametrize("name", LINES)
def test_hostile_settings(name: str) -> None:
    refused(run(parsed, name), "InputError", "settings")


@pytest.mark.parametrize("function", [opened, settings_of])
@pytest.mark.parametrize("path", [3, None, b"a.png", ["a.png"]], ids=str)
def test_what_is_no_path(path: Any, function: Callable[[str], Any]) -> None:
    refused(run(function, path), "InputError", "a file or folder", str(path))


def saved(case: str) -> None:
    image, path = {"path": (RAMP, 3), "image": (None, "/tmp/a.png"), "long": (RAMP, "/tmp/" + "x" * 300 + ".png")}[case]
    save_image(image, path)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("case", "error", "named"),
    [("path", "InputError", "3"), ("image", "InputError", "NoneType"), ("long", "OutputError", "xxx")],
)
def test_what_cannot_be_saved(case: str, error: str, named: str) -> None:
    refused(run(saved, case), error, named)


def swapped(path: str) -> None:
    """A file that another process replaces after it was looked at."""
    regular = os.stat(__file__)
    image_files.os = types.SimpleNamespace(**{**vars(os), "stat": lambda _: regular})  # type: ignore[attr-defined]
    open_image(path)


def test_a_pipe_in_the_place_of_a_file_that_was_looked_at(folder: Path) -> None:
    refused(run(swapped, str(folder / "fifo.png")), "InputError", "fifo.png", "a pipe")


# --- what is passed to the pipelines ---


def grey(value: float, mode: str) -> Image.Image:
    return Image.fromarray(np.full((8, 8), value, np.float32 if mode == "F" else np.int32))


BAD: dict[str, Any] = {
    "F beyond 255": lambda: grey(256, "F"),
    "F below 0": lambda: grey(-1, "F"),
    "F of NaN": lambda: grey(np.nan, "F"),
    "I beyond 16 bits": lambda: grey(65536, "I"),
    "I below 0": lambda: grey(-1, "I"),
    "too many pixels": lambda: Image.new("1", (8193, 8192)),
    "truncated and not yet decoded": lambda: Image.open(io.BytesIO(PNG[: len(PNG) - 30])),
    "floats to 255": lambda: np.full((8, 8, 3), 255.0),
    "floats from -255": lambda: np.full((8, 8, 3), -255.0),
    "floats to 2": lambda: torch.full((3, 8, 8), 2.0),
    "NaN": lambda: np.full((8, 8, 3), np.nan),
    "infinity": lambda: torch.full((3, 8, 8), torch.inf),
    "integers to 65535": lambda: np.full((8, 8, 3), 65535, np.uint16),
    "negative integers": lambda: torch.full((3, 8, 8), -1),
    "bool": lambda: np.ones((8, 8, 3), bool),
    "bool tensor": lambda: torch.ones(3, 8, 8, dtype=torch.bool),
    "objects": lambda: np.full((8, 8, 3), None),
    "texts": lambda: np.full((8, 8, 3), "x"),
    "complex": lambda: np.ones((8, 8, 3), complex),
    "complex tensor": lambda: torch.ones(3, 8, 8, dtype=torch.complex64),
    "meta": lambda: torch.ones(3, 8, 8, device="meta"),
    "sparse": lambda: torch.ones(3, 8, 8).to_sparse(),
    "no pixels": lambda: np.ones((0, 8, 3)),
    "no channels": lambda: np.ones((8, 8, 0)),
    "five channels": lambda: np.ones((8, 8, 5)),
    "two channels": lambda: torch.ones(2, 8, 8),
    "one dimension": lambda: np.ones(8),
    "five dimensions": lambda: torch.ones(1, 1, 3, 8, 8),
    "terabytes of one value": lambda: np.broadcast_to(np.float32(0), (1 << 20, 1024, 1024, 3)),
    "terabytes of one tensor": lambda: torch.zeros(1, 1, 1, 1).expand(1 << 20, 3, 1024, 1024),
    "one huge side": lambda: np.broadcast_to(np.uint16(0), (1 << 40, 8, 3)),
    "a billion channels": lambda: torch.zeros(1, 1, 1).expand(1 << 40, 8, 8),
    "float8": lambda: torch.zeros(3, 8, 8).to(torch.float8_e4m3fn),
    "quantized": lambda: torch.quantize_per_tensor(torch.zeros(3, 8, 8), 1.0, 0, torch.quint8),
    "dates": lambda: np.full((8, 8, 3), np.datetime64("2026-01-01")),
}


def preprocessed(case: str) -> None:
    ImageProcessor().preprocess(BAD[case]())


def referred_to(case: str) -> None:
    reference_image(BAD[case]())


@pytest.mark.parametrize("function", [preprocessed, referred_to])
@pytest.mark.parametrize("case", BAD)
def test_images_in_memory(case: str, function: Callable[[str], None]) -> None:
    refused(run(function, case), "InputError", "image")


SIZES: dict[str, Any] = {"0": 0, "-8": -8, "10**9": 10**9, "text": "8", "nan": float("nan"), "7.5": 7.5}


def resized(case: str) -> None:
    ImageProcessor().preprocess(RAMP.resize((8, 8)), height=SIZES[case])


@pytest.mark.parametrize("case", SIZES)
def test_sizes(case: str) -> None:
    refused(run(resized, case), "InputError", "height")


# --- what is unusual, and comes out right ---


def transparent_palette() -> Image.Image:
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putdata([0, 1])
    image.info["transparency"] = 0
    return image


def keyed_rgb() -> Image.Image:
    image = Image.new("RGB", (2, 1), (255, 0, 0))
    image.putpixel((1, 0), (0, 0, 255))
    image.info["transparency"] = (255, 0, 0)
    return image


def of_pixel(mode: str, value: Any) -> Image.Image:
    return Image.new(mode, (1, 1), value)


WHITE, BLUE = (255, 255, 255), (0, 0, 255)
RIGHT: dict[str, tuple[Callable[[], Image.Image], list[tuple[int, int, int]]]] = {
    "16-bit grey": (
        lambda: Image.fromarray(np.array([[0, 257, 32896, 65535]], np.uint16)),
        [(0, 0, 0), (1, 1, 1), (128, 128, 128), WHITE],
    ),
    "16-bit grey, big-endian": (lambda: of_pixel("I;16B", 25700), [(100, 100, 100)]),
    "I of 8 bits": (lambda: Image.fromarray(np.array([[0, 200, 255]], np.int32)), [(0,) * 3, (200,) * 3, WHITE]),
    "I of 16 bits": (lambda: Image.fromarray(np.array([[0, 25700, 65535]], np.int32)), [(0,) * 3, (100,) * 3, WHITE]),
    "F of shares": (lambda: Image.fromarray(np.array([[0, 0.4, 1]], np.float32)), [(0,) * 3, (102,) * 3, WHITE]),
    "F of levels": (lambda: Image.fromarray(np.array([[0, 102, 255]], np.float32)), [(0,) * 3, (102,) * 3, WHITE]),
    "CMYK": (lambda: of_pixel("CMYK", (0, 255, 255, 0)), [(255, 0, 0)]),
    "CMYK, key": (lambda: of_pixel("CMYK", (0, 0, 0, 255)), [(0, 0, 0)]),
    "palette": (lambda: RAMP.quantize(16).crop((0, 0, 1, 1)), [(0, 5, 10)]),
    "palette with a transparent entry": (transparent_palette, [WHITE, BLUE]),
    "RGB with a transparent colour": (keyed_rgb, [WHITE, BLUE]),
    "RGBA": (lambda: of_pixel("RGBA", (255, 0, 0, 128)), [(255, 127, 127)]),
    "RGBA, invisible": (lambda: of_pixel("RGBA", (0, 0, 0, 0)), [WHITE]),
    "RGBA, opaque": (lambda: of_pixel("RGBA", (1, 2, 3, 255)), [(1, 2, 3)]),
    "RGBa, premultiplied": (lambda: of_pixel("RGBA", (255, 0, 0, 128)).convert("RGBa"), [(255, 127, 127)]),
    "LA": (lambda: of_pixel("LA", (0, 128)), [(127, 127, 127)]),
    "La, premultiplied": (lambda: of_pixel("LA", (0, 128)).convert("La"), [(127, 127, 127)]),
    "one bit": (lambda: of_pixel("1", 1), [WHITE]),
    "L": (lambda: of_pixel("L", 77), [(77, 77, 77)]),
    "YCbCr": (lambda: of_pixel("YCbCr", (255, 128, 128)), [WHITE]),
    "HSV": (lambda: of_pixel("HSV", (0, 255, 255)), [(255, 0, 0)]),
}


@pytest.mark.parametrize("case", RIGHT)
def test_modes_come_out_right(case: str) -> None:
    make, expected = RIGHT[case]
    image = to_rgb(make())
    assert image.mode == "RGB"
    assert [image.getpixel((x, 0)) for x in range(image.width)] == expected


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_the_formats_that_are_read(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "image"
    path.write_bytes(encoded(Image.new("RGB", (16, 8), (200, 40, 40)), kind))
    image = open_image(path)
    assert (image.mode, image.size) == ("RGB", (16, 8))
    assert np.abs(np.asarray(image).astype(int) - (200, 40, 40)).max() <= 8


def test_16_bit_files_and_those_of_several_images(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 32896]], np.uint16)).save(tmp_path / "a.png")
    assert open_image(tmp_path / "a.png").tobytes() == bytes([0] * 3 + [128] * 3)
    first, second = Image.new("RGB", (16, 16), "red"), Image.new("RGB", (16, 16), "blue")
    first.save(tmp_path / "a.mpo", "MPO", save_all=True, append_images=[second])
    assert open_image(tmp_path / "a.mpo").getpixel((8, 8))[0] > 250  # type: ignore[index]
    first.save(tmp_path / "a.gif", save_all=True, append_images=[second])
    assert open_image(tmp_path / "a.gif").getpixel((8, 8)) == (255, 0, 0)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_files_are_upright(tmp_path: Path, kind: str, orientation: int) -> None:
    """One corner is white: orientation n says where, in the file, the corner at the upper left is (exiv2.org/tags)."""
    column, row = {1: (0, 0), 2: (1, 0), 3: (1, 1), 4: (0, 1), 5: (0, 0), 6: (0, 1), 7: (1, 1), 8: (1, 0)}[orientation]
    stored = Image.new("RGB", (32, 16))
    stored.paste("white", (16 * column, 8 * row, 16 * column + 16, 8 * row + 8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "image", kind, exif=exif)
    image = open_image(tmp_path / "image")
    assert image.size == ((32, 16) if orientation < 5 else (16, 32))
    assert image.getpixel((2, 2))[0] > 240  # type: ignore[index]
    assert image.getpixel((image.width - 3, image.height - 3))[0] < 15  # type: ignore[index]


def test_a_link_to_a_file_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(PNG)
    (tmp_path / "b.png").symlink_to("a.png")
    assert open_image(tmp_path / "b.png").tobytes() == RAMP.tobytes()


def test_floats_in_both_ranges_and_integers_are_the_same_image(caplog: pytest.LogCaptureFixture) -> None:
    levels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    expected = np.asarray(reference_image(Image.fromarray(levels)))
    for same in (levels, levels.astype(np.int64), levels / 255, levels / 127.5 - 1, levels.astype(">u2")):
        assert np.array_equal(np.asarray(reference_image(same)), expected)
    assert caplog.text.count("taken as in [-1, 1]") == 1


def test_settings_of_a_good_file_are_read(tmp_path: Path) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", "a cat\nSteps: 3, Seed: 1")
    RAMP.save(tmp_path / "a.png", pnginfo=info)
    assert read_settings(tmp_path / "a.png").steps == 3


def test_colour_profiles_do_no_harm(tmp_path: Path) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    RAMP.save(tmp_path / "a.png", icc_profile=profile)
    assert open_image(tmp_path / "a.png").tobytes() == RAMP.tobytes()


def read_damaged_exif(path: str, exif: bytes) -> Any:
    Image.new("RGB", (8, 8)).save(path, exif=exif)
    return read_settings(path)


@pytest.mark.parametrize("kind", ["jpg", "webp"])
@pytest.mark.parametrize(
    "exif", [b"M\x8fM\x00*\x00\x00\x00", b"MM\x00*\xff\xff\xff\xff", b"", b"II*\x00\x08\x00\x00\x00\xff\xff"]
)
def test_damaged_exif(tmp_path: Path, kind: str, exif: bytes) -> None:
    outcome = run(read_damaged_exif, str(tmp_path / f"x.{kind}"), b"Exif\0\0" + exif)
    refused(outcome, "InputError", "holds no generation settings")
