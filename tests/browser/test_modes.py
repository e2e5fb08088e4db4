"""Editing, comparing, and grids."""

from __future__ import annotations

import pytest
from PIL import Image

from impasto.serving.http.settings import HttpSettings
from impasto.serving.stub import StubService

from .surfing import finished, generate, near, ready, serving
from .test_history import drop

pytestmark = pytest.mark.browser


@pytest.fixture
def original(tmp_path):
    path = tmp_path / "original.png"
    Image.new("RGB", (96, 64), (120, 160, 90)).save(path)
    return path


@pytest.fixture
def editing(page, original):
    """The Edit tab with an image."""
    page.get_by_role("tab", name="Edit").click()
    page.get_by_label("Choose an image").set_input_files(original)
    page.locator("#source-canvas").wait_for()
    return page


def masked(job):
    """Where the mask is set, as rows of 0 and 1."""
    rows = [job.given.mask[job.width * y : job.width * (y + 1)] for y in range(job.height)]
    return [[int(level > 127) for level in row] for row in rows]


def paint(page, *points):
    box = page.locator("#source-canvas").bounding_box()
    places = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in points]
    page.mouse.move(*places[0])
    page.mouse.down()
    for place in places[1:]:
        page.mouse.move(*place, steps=4)
    page.mouse.up()


def share(page):
    """How much of the canvas shows the mask's colour."""
    shot = page.evaluate(
        """() => {
          const canvas = document.getElementById("source-canvas");
          const {data} = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
          let count = 0;
          for (let i = 0; i < data.length; i += 4) if (data[i] > 180 && data[i + 1] < 130) count++;
          return count / (data.length / 4);
        }"""
    )
    return float(shot)


def test_the_whole_image_is_edited(site, editing):
    editing.get_by_label("Strength").fill("0.35")
    generate(editing, "a green hill", steps=2)
    (job,) = site.service.submitted
    assert (job.width, job.height, job.prompt) == (96, 64, "a green hill")
    (image,) = job.given.images
    assert (image.width, image.height, tuple(image.pixels[:3])) == (96, 64, (120, 160, 90))
    assert job.given.mask is None
    assert job.given.strength == 0.35
    assert not editing.get_by_label("Width", exact=True).is_visible()
    editing.locator(".card button.frame").click()
    assert "whole image, strength 0.35" in editing.locator("#viewer-settings").inner_text()


def test_what_is_painted_is_repainted(site, editing):
    editing.get_by_label("Masked area").check()
    editing.get_by_label("Brush size").fill("30")
    paint(editing, (0.1, 0.5), (0.4, 0.5))
    generate(editing, "a hole", steps=2)
    mask = masked(site.service.submitted[0])
    assert [mask[32][x] for x in (12, 36, 60, 90)] == [1, 1, 0, 0]
    assert [mask[y][24] for y in (4, 32, 60)] == [0, 1, 0]


def test_erase_undo_clear_and_invert(editing):
    editing.get_by_label("Masked area").check()
    undo, clear = (editing.get_by_role("button", name=name) for name in ("Undo", "Clear"))
    assert undo.is_disabled()
    assert share(editing) == 0
    paint(editing, (0.2, 0.5), (0.8, 0.5))
    painted = share(editing)
    assert 0.1 < painted < 0.3
    erase = editing.get_by_role("button", name="Erase")
    erase.click()
    assert erase.get_attribute("aria-pressed") == "true"
    paint(editing, (0.6, 0.5), (0.9, 0.5))
    assert 0.05 < share(editing) < painted - 0.03
    undo.click()
    assert share(editing) == pytest.approx(painted, abs=0.01)
    editing.get_by_role("button", name="Invert").click()
    assert share(editing) == pytest.approx(1 - painted, abs=0.04)
    clear.click()
    assert share(editing) == 0
    undo.click()
    undo.click()
    assert share(editing) == pytest.approx(painted, abs=0.01)


def test_a_mask_by_keyboard_alone(site, editing):
    editing.get_by_label("Masked area").focus()
    editing.get_by_label("Masked area").press(" ")
    editing.keyboard.press("Tab")
    canvas = editing.get_by_role("application")
    assert canvas.evaluate("e => document.activeElement === e")
    assert "space paints" in canvas.get_attribute("aria-label")
    size = editing.locator("#brush-size-value").inner_text()
    editing.keyboard.press("]")
    assert editing.locator("#brush-size-value").inner_text() != size
    editing.keyboard.down(" ")
    for _ in range(6):
        editing.keyboard.press("ArrowLeft")
    editing.keyboard.up(" ")
    once = share(editing)
    assert once > 0.05
    editing.keyboard.press("ArrowDown")
    editing.keyboard.press(" ")
    assert share(editing) > once
    editing.keyboard.press("Control+z")
    assert share(editing) == pytest.approx(once, abs=0.01)
    generate(editing, "a hole", steps=2)
    mask = masked(site.service.submitted[0])
    assert (mask[32][40], mask[32][80], mask[4][40]) == (1, 0, 0)


def test_what_is_missing_for_an_edit_is_said(site, page, original):
    page.get_by_role("tab", name="Edit").click()
    page.get_by_label("Prompt", exact=True).fill("a hill")
    page.locator("#generate").click()
    page.locator("#notice").get_by_text("Choose an image to edit.").wait_for()
    page.get_by_label("Choose an image").set_input_files(original)
    page.get_by_label("Masked area").check()
    page.locator("#generate").click()
    page.locator("#notice").get_by_text("Paint over what should change").wait_for()
    assert not site.service.submitted
    page.get_by_role("button", name="Remove the image").click()
    assert page.get_by_text("Drop an image here").is_visible()
    broken = original.with_name("broken.png")
    broken.write_bytes(b"no image")
    page.get_by_label("Choose an image").set_input_files(broken)
    page.locator("#notice").get_by_text("cannot be read as an image").wait_for()


def test_large_images_are_brought_to_what_the_model_takes(site, page, tmp_path):
    Image.new("RGB", (2000, 3000), (9, 99, 199)).save(tmp_path / "large.jpg")
    page.get_by_role("tab", name="Edit").click()
    drop(page, tmp_path / "large.jpg")
    page.locator("#source-canvas").wait_for()
    generate(page, "a hill", steps=1)
    job = site.service.submitted[0]
    assert job.width * job.height <= 1 << 20
    assert job.height <= 1024
    assert job.width % 8 == job.height % 8 == 0
    assert job.width / job.height == pytest.approx(2 / 3, abs=0.02)
    assert near(job.given.images[0].pixels[:3], (9, 99, 199))


def test_references(site, page, original, tmp_path):
    other = tmp_path / "other.png"
    Image.new("RGB", (32, 32), (200, 10, 10)).save(other)
    page.get_by_label("Model").select_option("glm")
    page.get_by_role("tab", name="Edit").click()
    page.get_by_label("Choose an image").set_input_files(original)
    page.get_by_label("Add references").set_input_files([other, other, other, other])
    page.locator("#notice").get_by_text("at most 4 images").wait_for()
    assert page.get_by_role("list", name="More references").get_by_role("img").count() == 3
    page.get_by_role("button", name="Remove reference 3").click()
    assert not page.get_by_label("Strength").is_visible()
    assert not page.get_by_label("Masked area").is_visible()
    page.get_by_label("Width", exact=True).fill("256")
    generate(page, "both together", steps=2)
    (job,) = site.service.submitted
    assert [image.pixels[:3] for image in job.given.images] == [bytes((120, 160, 90)), *[bytes((200, 10, 10))] * 2]
    assert (job.model, job.width, job.height) == ("glm", 256, 128)


def test_an_image_from_the_history_is_edited(site, page):
    generate(page, "a cube", seed=3, steps=2)
    page.locator(".card").get_by_role("button", name="Edit").click()
    assert page.get_by_role("tab", name="Edit").get_attribute("aria-selected") == "true"
    page.locator("#source-canvas").wait_for()
    generate(page, "a cone", steps=2)
    page.get_by_role("list", name="History").get_by_role("button").nth(1).click()
    page.get_by_role("button", name="Edit this image").click()
    generate(page, "a torus", steps=2)
    first, second, third = site.service.submitted
    assert first.given is None
    assert second.given.images == third.given.images
    page.get_by_role("tab", name="Generate").click()
    assert page.locator(".card").get_by_text("Seed 3").is_visible()


def test_two_settings_side_by_side(site, page):
    page.get_by_label("Prompt", exact=True).fill("a cube")
    page.get_by_label("Steps", exact=True).fill("2")
    page.get_by_role("tab", name="Compare").click()
    assert page.get_by_text("Both are the same").is_visible()
    page.get_by_label("Image B").check()
    page.get_by_label("Guidance", exact=True).fill("8")
    page.get_by_label("Scheduler").select_option("ddim")
    assert page.get_by_text("Different: guidance, scheduler").is_visible()
    page.get_by_label("Image A").check()
    assert page.get_by_label("Guidance", exact=True).input_value() == "4.5"
    page.get_by_role("button", name="Compare").click()
    finished(page)
    a, b = site.service.submitted
    assert (a.seed, a.guidance_scale, a.scheduler) == (b.seed, 4.5, "dpm++")
    assert (b.guidance_scale, b.scheduler) == (8, "ddim")
    titles = page.locator(".card .title").all_inner_texts()
    assert titles == ["Image A · guidance 4.5 · dpm++", "Image B · guidance 8 · ddim"]
    one, other = (page.locator(".card").nth(i).bounding_box() for i in range(2))
    assert one["y"] == other["y"]
    assert one["x"] + one["width"] <= other["x"]
    page.get_by_role("button", name="Copy A to B").click()
    assert page.get_by_text("Both are the same").is_visible()


@pytest.mark.parametrize(
    ("axis", "text", "field", "values"),
    [
        ("Seed", "3-5, 9", "seed", [3, 4, 5, 9]),
        ("Guidance", "1 2.5, 7", "guidance_scale", [1, 2.5, 7]),
        ("Steps", "1-3", "steps", [1, 2, 3]),
    ],
)
def test_a_grid(site, page, axis, text, field, values):
    page.get_by_role("tab", name="Grid").click()
    page.get_by_label("Vary").select_option(axis)
    page.get_by_label("Values").fill(text)
    generate(page, "a cube")
    jobs = sorted(site.service.submitted, key=lambda job: getattr(job, field))
    assert [getattr(job, field) for job in jobs] == values
    assert len({job.seed for job in jobs}) == (len(values) if axis == "Seed" else 1)
    assert page.locator(".card .title").all_inner_texts() == [f"{axis} {value:g}" for value in values]
    assert page.locator(".card button.frame").count() == len(values)


@pytest.mark.parametrize(
    ("axis", "text", "message"),
    [
        ("Seed", "1-99", "At most 36 images."),
        ("Guidance", "1, x", "“x” is not a number from 0 to 100"),
        ("Steps", "2.5", "is not a whole number from 1 to 200"),
        ("Steps", "", "Give at least one value."),
    ],
)
def test_values_of_a_grid_that_cannot_be(site, page, axis, text, message):
    page.get_by_role("tab", name="Grid").click()
    page.get_by_label("Prompt", exact=True).fill("a cube")
    page.get_by_label("Vary").select_option(axis)
    page.get_by_label("Values").fill(text)
    page.locator("#generate").click()
    assert message in page.locator(".problem:visible").inner_text()
    assert page.get_by_label("Values").evaluate("e => document.activeElement === e")
    assert not site.service.submitted


def test_a_grid_has_no_more_steps_than_the_server_allows(visit):
    for site in serving(StubService(), HttpSettings(max_steps=30)):
        page = ready(visit(site))
        page.get_by_role("tab", name="Grid").click()
        page.get_by_label("Prompt", exact=True).fill("a cube")
        page.get_by_label("Vary").select_option("Steps")
        page.get_by_label("Values").fill("10, 40")
        page.locator("#generate").click()
        assert "“40” is not a whole number from 1 to 30" in page.locator(".problem:visible").inner_text()
        assert not site.service.submitted


def test_the_address_says_the_tab(site, visit):
    page = ready(visit(site, path="/#grid"))
    assert page.get_by_role("tab", name="Grid").get_attribute("aria-selected") == "true"
    assert page.get_by_label("Values").is_visible()
