"""Masks, images and tags as the clients of ``/sdapi`` give them."""

from __future__ import annotations

import base64
import io
from dataclasses import replace
from typing import Any

import pytest
from PIL import Image

from impasto.errors import InputError
from impasto.serving.http.a1111.fields import read_known
from impasto.serving.http.a1111.given import read_given, resized
from impasto.serving.http.a1111.prompts import without_tags
from impasto.serving.http.a1111.samplers import scheduler_of
from impasto.serving.http.errors import ApiError
from impasto.serving.http.fields import Adapters
from impasto.serving.stub import SCENES

STYLES = Adapters(("style", "ink"))


def text_of(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


IMAGE, MASK = Image.new("RGB", (16, 8), "blue"), Image.new("L", (16, 8))
MASK.paste(255, (0, 0, 8, 8))  # the left half


def given(**changes: Any) -> dict[str, Any]:
    return {"init_images": [text_of(IMAGE)], "mask": text_of(MASK), "mask_blur": 0} | changes


def masks(**changes: Any) -> list[bytes]:
    found, _, _ = read_given(SCENES, given(**changes), 1 << 20)
    return [one.mask or b"" for one in found]


def test_white_is_repainted():
    assert masks() == [(b"\xff" * 8 + bytes(8)) * 8]


def test_black_is_repainted_if_the_mask_is_inverted():
    assert masks(inpainting_mask_invert=True) == [(bytes(8) + b"\xff" * 8) * 8]


def test_what_is_transparent_is_kept():
    mask = Image.new("RGBA", (16, 8), (255, 255, 255, 0))
    mask.paste((255, 255, 255, 255), (0, 0, 8, 8))
    assert masks(mask=text_of(mask)) == masks()


def test_a_blurred_mask_falls_softly():
    (found,) = masks(mask_blur=2)
    row = list(found[:16])
    assert row == sorted(row, reverse=True)
    assert row[0] == 255
    assert row[15] == 0
    assert 0 < row[8] < row[7] < 255
    assert abs(row[7] + row[8] - 255) <= 2  # about the edge


def test_a_blur_across_alone():
    (found,) = masks(mask_blur_x=2, mask_blur_y=0, mask=text_of(MASK.rotate(180)))
    assert all(found[16 * y : 16 * y + 16] == found[:16] for y in range(8))


def test_a_mask_of_another_size_is_brought_to_that_of_the_image():
    assert masks(mask=text_of(MASK.resize((32, 16), Image.Resampling.NEAREST))) == masks()


def test_surroundings_alone_are_generated_at_the_requested_size():
    found, width, height = read_given(SCENES, given(width=64, height=32, inpaint_full_res_padding=3), 1 << 20)
    assert (width, height, found[0].padding) == (64, 32, 3)
    assert (found[0].images[0].width, found[0].images[0].height) == (16, 8)
    found, width, height = read_given(SCENES, given(width=64, height=32, inpaint_full_res=False), 1 << 20)
    assert (width, height, found[0].padding) == (64, 32, None)
    assert (found[0].images[0].width, found[0].images[0].height) == (64, 32)
    assert len(found[0].mask or b"") == 64 * 32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask": text_of(Image.new("L", (16, 8)))}, "selects nothing"),
        ({"mask": "/etc/passwd"}, "not base64"),
        ({"init_images": ["http://127.0.0.1/a.png"]}, "none is opened"),
        ({"init_images": ["file:///etc/passwd"]}, "none is opened"),
        ({"init_images": [base64.b64encode(b"GIF89a").decode()]}, "cannot be read as an image"),
        ({"init_images": [text_of(Image.new("L", (2000, 1000)))]}, "at most 1,048,576"),
        ({"init_images": [text_of(Image.new("L", (1000, 1000)))] * 9}, None),
        ({"width": 2000}, "too large"),
    ],
)
def test_what_cannot_be_used(changes: dict[str, Any], message: str | None):
    if message is None:
        assert len(read_given(SCENES, given(**changes), 1 << 20)[0]) == 9
        return
    with pytest.raises(InputError, match=message):
        read_given(SCENES, given(**changes), 1 << 20)


def test_models_without_masks_or_edits():
    with pytest.raises(InputError, match="takes no mask"):
        read_given(replace(SCENES, masks=False), given(), 1 << 20)
    with pytest.raises(InputError, match="edits no images"):
        read_given(replace(SCENES, edits=False), given(), 1 << 20)


def test_resize_modes():
    image = Image.new("RGB", (12, 4), "red")
    image.paste("blue", (4, 0, 8, 4))  # red, blue, red
    stretched, cropped, filled = (resized(image, 8, 8, mode) for mode in range(3))
    assert {one.size for one in (stretched, cropped, filled)} == {(8, 8)}

    def colours(found: Image.Image, *places: tuple[int, int]) -> str:
        return "".join("r" if red > 200 else "b" if blue > 200 else "?" for red, _, blue in map(found.getpixel, places))

    assert colours(stretched, (0, 4), (4, 4), (7, 4)) == "rbr"
    assert colours(cropped, (1, 4), (4, 4), (6, 4)) == "bbb"  # the middle four of twelve columns
    assert colours(filled, (4, 0), (4, 4), (4, 7)) == "bbb"  # edges are continued
    assert colours(filled, (0, 0), (0, 4), (0, 7)) == "rrr"
    tall = resized(Image.new("L", (4, 12), 9), 30, 7, 2)
    assert (tall.size, tall.getextrema()) == ((30, 7), (9, 9))


@pytest.mark.parametrize(
    ("prompt", "plain", "chosen"),
    [
        ("a cat", "a cat", []),
        ("a cat <lora:style:0.8>", "a cat", [("style", 0.8)]),
        ("<lora:style>a cat<lyco:ink:0.2:0.5>", "a cat", [("style", 1.0), ("ink", 0.5)]),
        ("a <lora:style:te=0.1:unet=-0.5> cat", "a  cat", [("style", -0.5)]),
        ("a < b > c", "a < b > c", []),
    ],
)
def test_tags(prompt: str, plain: str, chosen: list[tuple[str, float]]):
    assert without_tags(prompt, STYLES) == (plain, chosen)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("<lora:stile:1>", "did you mean 'style"),
        ("<lora:style:x>", "must be a number"),
        ("<lora:style:nan>", "must be a number"),
        ("<lora:style:11>", "from -10 to 10"),
        ("<hypernet:old:1>", "hypernetwork"),
        ("<lora:style>" * 5, "at most 4"),
    ],
)
def test_tags_that_cannot_be_used(prompt: str, message: str):
    with pytest.raises(InputError, match=message):
        without_tags(prompt, STYLES)


def test_sampler_names():
    names = {
        "Euler a": None,
        "Euler": "ddim",
        "DPM++ 2M Karras": "dpm++",
        "unipc": "dpm++",
        "LCM": "lcm",
        "ddpm": "ddpm",
    }
    assert {name: scheduler_of(name, SCENES) for name in names} == names
    assert scheduler_of("Euler", replace(SCENES, schedulers=())) is None
    with pytest.raises(ApiError, match="did you mean 'DPM") as caught:
        scheduler_of("DPM+ 2M", SCENES)
    assert caught.value.status_code == 404


def test_what_is_switched_off_is_accepted_and_the_unknown_ignored():
    body = {
        "enable_hr": False, "script_name": None, "tiling": 0, "subseed_strength": 0.0, "hr_scale": 2, "eta": 1,
        "alwayson_scripts": {
            "ADetailer": {"args": [False]}, "ControlNet": {"args": []}, "x": {"args": [{"enabled": False}]}
        },
    }  # fmt: skip
    assert read_known({}, body) == {}
