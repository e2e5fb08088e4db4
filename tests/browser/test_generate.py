"""The page: from a prompt to an image, with every control on the way."""

from __future__ import annotations

import re

import pytest

from impasto.pipelines.adapters import ChosenAdapter
from impasto.serving.http.settings import HttpSettings
from impasto.serving.stub import SCENES, StubService

from .surfing import DESKTOP, PHONE, colour_of, finished, generate, near, ready, serving, stub_colour

pytestmark = pytest.mark.browser


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_prompt_becomes_an_image_that_a_person_sees(site, visit, size, dark):
    page = ready(visit(site, size, dark))
    page.get_by_label("Prompt", exact=True).fill("a red cube")
    if not page.locator("#seed").is_visible():
        page.get_by_text("Options").click()
    page.get_by_label("Seed", exact=True).fill("7")
    page.get_by_role("button", name="Generate", exact=True).click()
    finished(page)
    image = page.get_by_role("list", name="Images").get_by_role("button", name="a red cube")
    assert near(colour_of(image), stub_colour("a red cube", 7, 20))
    assert page.get_by_text("Seed 7 · 64 × 64").is_visible()
    body = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (body == "rgb(22, 21, 19)") == dark


def test_every_control_reaches_the_server(site, page):
    page.get_by_label("Prompt", exact=True).fill("a blue cone")
    page.get_by_label("Negative prompt").fill("fog")
    page.get_by_label("Width", exact=True).fill("96")
    page.get_by_label("Height", exact=True).fill("48")
    page.get_by_label("Steps", exact=True).fill("3")
    page.get_by_label("Guidance", exact=True).fill("2.5")
    page.get_by_label("Scheduler").select_option(label="DDIM")
    page.get_by_label("Seed", exact=True).fill("41")
    page.get_by_label("style", exact=True).check()
    page.get_by_label("Weight of style").fill("0.5")
    page.get_by_label("Number of images").select_option("2")
    page.get_by_label("File format").select_option("JPEG")
    page.locator("#generate").click()
    finished(page)
    jobs = site.service.submitted
    assert [job.seed for job in jobs] == [41, 42]
    job = jobs[0]
    assert (job.prompt, job.negative_prompt, job.model) == ("a blue cone", "fog", "scenes")
    assert (job.width, job.height, job.steps, job.guidance_scale, job.scheduler) == (96, 48, 3, 2.5, "ddim")
    assert job.adapters == (ChosenAdapter("style", 0.5),)
    assert job.previews == 3
    with page.expect_download() as download:
        page.get_by_role("link", name="Download").first.click()
    assert download.value.suggested_filename == "impasto-41.jpg"
    with open(download.value.path(), "rb") as file:
        assert file.read(3) == b"\xff\xd8\xff"


def test_sliders_and_numbers_agree(page):
    page.get_by_label("Steps, slider").fill("33")
    assert page.get_by_label("Steps", exact=True).input_value() == "33"
    page.get_by_label("Guidance", exact=True).fill("7")
    assert page.get_by_label("Guidance, slider").input_value() == "7"


def test_sizes_by_aspect_ratio(page):
    def size():
        return tuple(int(page.get_by_label(side, exact=True).input_value()) for side in ("Width", "Height"))

    assert size() == (64, 64)
    assert page.get_by_role("radio", name="1:1").is_checked()
    page.get_by_role("radio", name="16:9").check()
    width, height = size()
    assert width % 8 == height % 8 == 0
    assert 1.5 < width / height < 2.1
    page.get_by_role("button", name="Swap width and height").click()
    assert size() == (height, width)
    assert page.get_by_role("radio", name="9:16").is_checked()


def test_another_model_brings_its_own_values(site, page):
    page.get_by_label("Model").select_option(label="glm (GLM-Image)")
    assert page.get_by_label("Width", exact=True).input_value() == "128"
    assert page.get_by_label("Steps", exact=True).input_value() == "30"
    assert not page.get_by_label("Scheduler").is_visible()
    generate(page)
    assert (site.service.submitted[0].model, site.service.submitted[0].scheduler) == ("glm", None)


@pytest.mark.parametrize(
    ("label", "value", "message"),
    [
        ("Prompt", " ", "Describe the image."),
        ("Width", "5000", "Each side has at most 1024 pixels."),
        ("Height", "4", "Each side needs at least 8 pixels."),
        ("Steps", "0", "from 1 to 200"),
        ("Guidance", "", "from 0 to 100"),
        ("Seed", "abc", "whole number"),
    ],
)
def test_what_is_wrong_is_said_where_it_is(site, page, label, value, message):
    page.get_by_label("Prompt", exact=True).fill("a cube")
    field = page.get_by_label(label, exact=True)
    field.fill(value)
    page.locator("#generate").click()
    problem = page.locator(".problem:visible")
    assert message in problem.inner_text()
    wrong = page.locator("[aria-invalid=true]")
    assert wrong.evaluate("e => document.activeElement === e")
    assert problem.get_attribute("id") in wrong.get_attribute("aria-describedby")
    assert not site.service.submitted


def test_seeds_are_random_unless_they_are_reused(site, page):
    generate(page)
    generate(page)
    first, second = (job.seed for job in site.service.submitted)
    assert first != second
    page.get_by_role("button", name="Reuse last").click()
    generate(page)
    assert site.service.submitted[2].seed == second
    page.get_by_role("button", name="Random").click()
    assert page.get_by_label("Seed", exact=True).input_value() == ""
    page.get_by_role("button", name="Reuse seed").click()
    assert page.get_by_label("Seed", exact=True).input_value() == str(second)


@pytest.fixture
def slow():
    yield from serving(StubService(seconds=0.3))


def test_progress_and_previews_while_it_denoises(slow, visit):
    page = ready(visit(slow))
    for label, value in (("Prompt", "a sphere"), ("Seed", "5"), ("Steps", "12")):
        page.get_by_label(label, exact=True).fill(value)
    page.locator("#generate").click()
    preview = page.get_by_role("img", name="Preview")
    preview.wait_for()
    status = page.locator(".card .status").inner_text()
    assert "of 12" in status
    assert "s left" in status
    bar = page.get_by_role("progressbar")
    assert 0 < bar.evaluate("e => e.position") < 1
    shown = colour_of(preview)
    assert any(near(shown, stub_colour("a sphere", 5, step)) for step in range(1, 12))
    finished(page)
    assert near(colour_of(page.locator(".card .frame")), stub_colour("a sphere", 5, 12))
    assert bar.count() == 0


def cancelled(slow, visit):
    """The page with an image that was cancelled."""
    page = ready(visit(slow))
    page.get_by_label("Prompt", exact=True).fill("a sphere")
    page.locator("#generate").click()
    page.get_by_text(re.compile(r"Step \d+ of 20")).wait_for()
    page.locator(".card").get_by_role("button", name="Cancel").click()
    page.locator(".card").get_by_text("Cancelled").wait_for()
    return page


def test_cancel_ends_it_on_the_server_and_it_can_be_tried_again(slow, visit):
    page = cancelled(slow, visit)
    page.wait_for_timeout(700)
    assert not slow.service.unfinished
    slow.service.seconds = 0
    page.get_by_role("button", name="Try again").click()
    finished(page)
    first, second = slow.service.submitted
    assert (first.seed, first.prompt) == (second.seed, second.prompt)
    assert page.locator(".card button.frame").is_visible()


def test_the_button_works_after_one_was_tried_again_while_others_were_prepared(slow, visit):
    page = cancelled(slow, visit)
    slow.service.seconds = 0
    page.evaluate("""() => {
        const again = [...document.querySelectorAll(".card button")].find((b) => b.textContent === "Try again");
        document.querySelector("#generate").click();
        again.click();
    }""")
    finished(page)
    before = len(slow.service.submitted)
    generate(page)
    assert len(slow.service.submitted) == before + 1


def test_cancel_of_all(slow, visit):
    page = ready(visit(slow))
    page.get_by_label("Prompt", exact=True).fill("a sphere")
    page.get_by_label("Number of images").select_option("4")
    page.locator("#generate").click()
    page.get_by_text(re.compile(r"Step \d+ of 20")).first.wait_for()
    page.locator("#cancel-all").click()
    page.locator(".card.failed").nth(3).wait_for()
    assert page.locator(".card .status").all_inner_texts() == ["Cancelled"] * 4


def test_a_busy_server_is_asked_again(site, page):
    site.service.waiting = 0
    page.get_by_label("Prompt", exact=True).fill("a sphere")
    page.locator("#generate").click()
    page.get_by_text("The server is busy. Trying again in 2 s").wait_for()
    site.service.waiting = 8
    finished(page)
    assert page.locator(".card button.frame").is_visible()


def test_what_the_server_refuses_is_shown(site, page):
    answer = {"error": {"message": "the prompt <b>is</b> too long", "type": "x", "param": None, "code": None}}
    page.route("**/v1/images/generations", lambda route: route.fulfill(status=400, json=answer))
    generate(page)
    assert page.locator(".card .status").inner_text() == "the prompt <b>is</b> too long"
    assert page.get_by_role("button", name="Try again").is_visible()


def test_a_server_that_is_gone_is_reported(page):
    page.route("**/v1/images/generations", lambda route: route.abort())
    generate(page)
    assert "does not answer" in page.locator(".card .status").inner_text()


def test_choices_survive_a_reload_and_can_be_reset(page):
    page.get_by_label("Prompt", exact=True).fill("a torus")
    page.get_by_label("Steps", exact=True).fill("9")
    page.get_by_label("style", exact=True).check()
    page.reload()
    ready(page)
    assert page.get_by_label("Prompt", exact=True).input_value() == "a torus"
    assert page.get_by_label("Steps", exact=True).input_value() == "9"
    assert page.get_by_label("style", exact=True).is_checked()
    page.get_by_role("button", name="Reset").click()
    assert page.get_by_label("Prompt", exact=True).input_value() == ""
    assert page.get_by_label("Steps", exact=True).input_value() == "20"
    assert not page.get_by_label("style", exact=True).is_checked()


def test_a_server_with_keys_asks_for_one(visit):
    key = "k" * 20
    for site in serving(StubService(models=(SCENES,)), HttpSettings(keys=(key,))):
        page = visit(site)
        dialog = page.get_by_role("dialog", name="This server asks for a key")
        dialog.wait_for()
        dialog.get_by_label("API key").fill("wrong")
        dialog.get_by_role("button", name="Continue").click()
        page.get_by_text("This key is not valid.").wait_for()
        for _ in range(3):
            page.keyboard.press("Escape")
        dialog.get_by_label("API key").fill(key)
        dialog.get_by_label("API key").press("Enter")
        ready(page)
        generate(page)
        assert len(site.service.submitted) == 1
        page.reload()
        ready(page)
        assert not dialog.is_visible()
        assert key not in page.evaluate("JSON.stringify(localStorage)")
        page.get_by_role("button", name="Forget key").click()
        dialog.wait_for()
