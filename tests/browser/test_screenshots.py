"""The documentation's screenshots, of the bundled model: IMPASTO_SCREENSHOTS=docs/images make test-browser."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from .surfing import PHONE, Site, generate, ready

FOLDER = os.environ.get("IMPASTO_SCREENSHOTS")
pytestmark = [pytest.mark.browser, pytest.mark.skipif(FOLDER is None, reason="set IMPASTO_SCREENSHOTS to a folder")]
WIDE = (1280, 800)


@pytest.fixture(scope="module")
def site():
    command = [sys.executable, "-m", "impasto", "serve", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as server:
        assert server.stdout is not None
        for line in server.stdout:
            if found := re.search(r"http://[\d.]+:\d+", line):
                yield Site(None, found[0])
                break
        server.terminate()
        server.stdout.read()


def shoot(page, name):
    page.mouse.move(0, 0)
    page.evaluate("document.querySelector('.settings-scroll').scrollTo(0, 0); scrollTo(0, 0)")
    page.wait_for_timeout(300)
    path = Path(FOLDER or "") / f"page-{name}.png"
    page.screenshot(path=path)
    assert path.stat().st_size > 10_000


def test_generate_light(site, visit):
    page = ready(visit(site, WIDE))
    page.context.set_default_timeout(120_000)
    page.get_by_label("Number of images").select_option("2")
    for seed, prompt in ((11, "a green cone to the left of a yellow cube"), (7, "a red cube on top of a blue sphere")):
        generate(page, prompt, seed=seed)
    shoot(page, "generate")
    page.get_by_role("tab", name="Edit").click()
    page.get_by_role("list", name="History").get_by_role("button").first.click()
    page.get_by_role("button", name="Edit this image").click()
    page.get_by_label("Masked area").check()
    box = page.locator("#source-canvas").bounding_box()
    for x, y in ((0.15, 0.18), (0.9, 0.18), (0.9, 0.32), (0.15, 0.32), (0.15, 0.42), (0.9, 0.42)):
        page.mouse.move(box["x"] + box["width"] * x, box["y"] + box["height"] * y, steps=3)
        page.mouse.down()
    page.mouse.up()
    page.get_by_label("Number of images").select_option("1")
    generate(page, "a green cone on top of a blue sphere")
    shoot(page, "edit")


def test_grid_dark(site, visit):
    page = ready(visit(site, WIDE, dark=True))
    page.context.set_default_timeout(120_000)
    page.get_by_role("tab", name="Grid").click()
    page.get_by_label("Vary").select_option("Guidance")
    page.get_by_label("Values").fill("1, 1.5, 2, 3, 4.5, 6, 8, 10")
    generate(page, "a red cube on top of a blue sphere", seed=7)
    shoot(page, "grid")
    page.get_by_role("tab", name="Compare").click()
    page.get_by_label("Image B").check()
    page.get_by_label("Steps", exact=True).fill("5")
    page.get_by_label("Image A").check()
    page.get_by_role("button", name="Compare", exact=True).click()
    page.locator(".card button.frame").nth(1).wait_for()
    shoot(page, "compare")


def test_phone(site, visit):
    page = ready(visit(site, PHONE, device_scale_factor=2))
    page.context.set_default_timeout(120_000)
    generate(page, "a red cube on top of a blue sphere")
    shoot(page, "phone")
