"""The gallery, and settings that come back out of images."""

from __future__ import annotations

import io

import pytest
from PIL import Image

from impasto.pipelines.image_files import GenerationSettings, save_image

from .surfing import PHONE, colour_of, generate, near, ready, stub_colour

pytestmark = pytest.mark.browser


@pytest.fixture
def full(page):
    """A page with three images in its history."""
    for seed, prompt in enumerate(("a cube", "a cone", "a torus")):
        generate(page, prompt, seed=seed, steps=2)
    return page


def thumbnails(page):
    return page.get_by_role("list", name="History").get_by_role("button")


def test_the_history_survives_a_reload(full):
    full.reload()
    ready(full)
    found = thumbnails(full)
    found.nth(2).wait_for()
    assert [found.nth(i).get_by_role("img").get_attribute("alt") for i in range(3)] == ["a torus", "a cone", "a cube"]
    assert near(colour_of(found.first), stub_colour("a torus", 2, 2))


def test_an_image_of_the_history_in_full(full):
    thumbnails(full).nth(1).click()
    viewer = full.get_by_role("dialog", name="Image")
    assert near(colour_of(viewer.get_by_role("img", name="a cone")), stub_colour("a cone", 1, 2))
    facts = viewer.locator("dl").inner_text().split()
    for name, value in (("Seed", "1"), ("Steps", "2"), ("Model", "scenes"), ("Guidance", "4.5")):
        assert facts[facts.index(name) + 1] == value
    viewer.get_by_role("button", name="Older").click()
    assert viewer.get_by_role("img", name="a cube").is_visible()
    assert viewer.get_by_role("button", name="Older").is_disabled()
    viewer.get_by_role("button", name="Newer").click()
    full.keyboard.press("ArrowLeft")
    assert viewer.get_by_role("img", name="a torus").is_visible()
    with full.expect_download() as download:
        viewer.get_by_role("link", name="Download").click()
    assert Image.open(download.value.path()).info["parameters"].startswith("a torus\nSteps: 2, Sampler: dpm++")
    full.keyboard.press("Escape")
    assert not viewer.is_visible()
    assert thumbnails(full).nth(1).evaluate("e => document.activeElement === e")


def test_settings_of_the_history_are_used_again(site, full):
    thumbnails(full).nth(2).click()
    full.get_by_role("button", name="Use settings").click()
    assert full.get_by_label("Prompt", exact=True).input_value() == "a cube"
    assert full.get_by_label("Seed", exact=True).input_value() == "0"
    full.locator("#generate").click()
    thumbnails(full).nth(3).wait_for()
    first, last = site.service.submitted[0], site.service.submitted[-1]
    assert (first.prompt, first.seed, first.steps) == (last.prompt, last.seed, last.steps)


def test_deleting_asks_first_and_lasts(full):
    thumbnails(full).first.click()
    viewer, question = full.get_by_role("dialog", name="Image"), full.get_by_role("dialog", name="Delete this image")
    viewer.get_by_role("button", name="Delete").click()
    question.get_by_role("button", name="Keep").click()
    assert thumbnails(full).count() == 3
    viewer.get_by_role("button", name="Delete").click()
    question.get_by_role("button", name="Delete").click()
    viewer.get_by_role("img", name="a cone").wait_for()
    viewer.get_by_role("button", name="Close").click()
    full.reload()
    ready(full)
    thumbnails(full).nth(1).wait_for()
    assert thumbnails(full).count() == 2
    full.get_by_role("button", name="Clear history").click()
    full.get_by_role("dialog").get_by_role("button", name="Delete").click()
    full.get_by_text("Images that you generate are kept here").wait_for()
    full.reload()
    ready(full)
    assert full.get_by_text("Images that you generate are kept here").is_visible()


def test_deleting_what_is_already_deleted_leaves_the_others(full):
    viewer, question = full.get_by_role("dialog", name="Image"), full.get_by_role("dialog", name="Delete this image")

    def delete():
        full.locator(".card button.frame").click()  # the last image stays on the stage
        viewer.get_by_role("img", name="a torus").wait_for()
        viewer.get_by_role("button", name="Delete").click()
        question.get_by_role("button", name="Delete").click()

    delete()
    viewer.get_by_role("img", name="a cone").wait_for()
    full.keyboard.press("Escape")
    delete()
    viewer.wait_for(state="hidden")
    assert thumbnails(full).count() == 2
    thumbnails(full).first.click()
    viewer.get_by_role("button", name="Older").click()
    assert viewer.get_by_role("img", name="a cube").is_visible()


def test_long_histories_are_loaded_piece_by_piece(page):
    page.evaluate(
        """async () => {
          const store = await import("./scripts/images/store.js");
          const blob = new Blob(["<svg xmlns='http://www.w3.org/2000/svg'/>"], {type: "image/svg+xml"});
          for (let i = 0; i < 60; i++) {
            const settings = {prompt: `image ${i}`, seed: i, width: 1, height: 1};
            await store.keep({blob, settings, seconds: 1, time: 0});
          }
        }"""
    )
    page.reload()
    ready(page)
    thumbnails(page).nth(47).wait_for()
    assert thumbnails(page).count() == 48
    page.get_by_role("button", name="Show more").evaluate("e => { e.click(); e.click(); }")  # twice at once
    thumbnails(page).nth(59).wait_for()
    assert thumbnails(page).count() == 60
    assert thumbnails(page).last.get_by_role("img").get_attribute("alt") == "image 0"
    assert not page.get_by_role("button", name="Show more").is_visible()


# --- settings inside files ---

SETTINGS = GenerationSettings(
    'a "red" cube, très grand\nNegative prompt: is not one 立方体', 12, "fog: thick", "ddim", 3.5, 99, 48, 96, "scenes",
    {"Lora": "style 0.8"},
)  # fmt: skip


def check_restored(page):
    page.get_by_text("Settings restored from the image.").first.wait_for()

    def value(label):
        return page.get_by_label(label, exact=True).input_value()

    assert value("Prompt") == SETTINGS.prompt
    assert value("Negative prompt") == "fog: thick"
    assert [value(name) for name in ("Steps", "Guidance", "Seed")] == ["12", "3.5", "99"]
    assert [value(name) for name in ("Width", "Height", "Scheduler")] == ["96", "48", "ddim"]
    assert page.get_by_label("style", exact=True).is_checked()
    assert value("Weight of style") == "0.8"


@pytest.mark.parametrize("kind", ["png", "jpg", "webp"])
def test_settings_are_restored_from_a_file(page, tmp_path, kind):
    path = tmp_path / f"image.{kind}"
    save_image(Image.new("RGB", (16, 16)), path, SETTINGS)
    page.get_by_label("Settings from an image").set_input_files(path)
    check_restored(page)


def drop(page, path, where="body"):
    """Drop a file as a person does."""
    import base64

    data = base64.b64encode(path.read_bytes()).decode()
    transfer = page.evaluate_handle(
        """([data, name]) => {
          const transfer = new DataTransfer();
          const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
          transfer.items.add(new File([bytes], name, {type: "image/png"}));
          return transfer;
        }""",
        [data, path.name],
    )
    page.dispatch_event(where, "dragover", {"dataTransfer": transfer})
    veil = page.get_by_text("Drop the image to restore its settings")
    shown = veil.is_visible()
    page.dispatch_event(where, "drop", {"dataTransfer": transfer})
    assert not veil.is_visible()
    return shown


def test_an_image_dropped_in_brings_its_settings(page, tmp_path):
    save_image(Image.new("RGB", (16, 16)), tmp_path / "image.png", SETTINGS)
    assert drop(page, tmp_path / "image.png")
    check_restored(page)


def test_files_without_settings_and_hostile_ones_change_nothing(page, tmp_path):
    page.get_by_label("Prompt", exact=True).fill("mine")
    whole = io.BytesIO()
    Image.new("RGB", (16, 16)).save(whole, "PNG")
    text = b"<script>alert(1)</script>\nSteps: 1e9, Size: 99999999999x1"
    contents = {
        "plain.png": whole.getvalue(),
        "cut.png": whole.getvalue()[:30],
        "empty.png": b"",
        "lies.png": whole.getvalue()[:33] + b"\xff\xff\xff\xfftEXtparameters\0" + text,
        "loop.jpg": b"\xff\xd8" + b"\xff\xe1\0\0" * 20,
        "text.webp": b"RIFF\xff\xff\xff\xffWEBPEXIF\xff\xff\xff\xffExif\0\0II*\0\xff\xff\xff\xff",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        page.get_by_label("Settings from an image").set_input_files(tmp_path / name)
        page.locator("#notice").get_by_text("holds no settings").wait_for()
        page.get_by_role("button", name="Dismiss").click()
    assert page.get_by_label("Prompt", exact=True).input_value() == "mine"


def test_the_viewer_fits_a_phone(site, visit):
    page = ready(visit(site, PHONE))
    generate(page, "a cube")
    page.locator(".card button.frame").click()
    for name in ("Use settings", "Edit this image", "Delete", "Close"):
        box = page.get_by_role("dialog").get_by_role("button", name=name).bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= PHONE[0]
