"""For everyone: by keyboard, by screen reader, on narrow screens, in light and dark; and for no foreign code."""

from __future__ import annotations

import re

import pytest

from .surfing import DESKTOP, PHONE, generate, near, ready
from .test_history import thumbnails

pytestmark = pytest.mark.browser
TABS = ["Generate", "Edit", "Compare", "Grid"]


def violations(page):
    """What axe-core finds, in words."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    found = axe.Axe().run(page, options={"resultTypes": ["violations"]}).response["violations"]
    return [f"{rule['id']}: {node['target']} {node['failureSummary']}" for rule in found for node in rule["nodes"]]


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_accessibility_tree_of_every_tab(site, visit, tmp_path, size, dark):
    from PIL import Image

    page = ready(visit(site, size, dark))
    page.locator("#more").evaluate("e => { e.open = true; }")
    Image.new("RGB", (64, 64), "green").save(tmp_path / "green.png")
    for tab in TABS:
        page.get_by_role("tab", name=tab).click()
        if tab == "Edit":
            page.get_by_label("Choose an image").set_input_files(tmp_path / "green.png")
            page.get_by_label("Masked area").check()
        assert violations(page) == [], tab
        assert not re.search(r"- (button|textbox|slider|checkbox|radio|combobox|img|spinbutton|tab)$",
                             page.locator("body").aria_snapshot(), re.M), tab  # fmt: skip
    page.get_by_role("tab", name="Generate").click()
    generate(page, "a cube", steps=1)
    thumbnails(page).first.wait_for()
    assert violations(page) == []
    page.locator(".card button.frame").click()
    assert violations(page) == []


def test_tabs_by_arrow_keys(page):
    page.get_by_role("tab", name="Generate").focus()
    right, left = "ArrowRight", "ArrowLeft"
    for key, name in ((right, "Edit"), ("End", "Grid"), (right, "Generate"), (left, "Grid"), ("Home", "Generate")):
        page.keyboard.press(key)
        tab = page.get_by_role("tab", name=name)
        assert tab.get_attribute("aria-selected") == "true"
        assert tab.evaluate("e => document.activeElement === e")
        assert page.get_by_role("tabpanel", name=name).is_visible()


def test_an_image_by_keyboard_alone(site, page):
    page.keyboard.press("Tab")
    assert page.get_by_role("link", name="Skip to the images").evaluate("e => document.activeElement === e")
    order = []
    for _ in range(12):
        page.keyboard.press("Tab")
        order.append(page.evaluate("document.activeElement.id || document.activeElement.name"))
    assert order[:4] == ["tab-generate", "theme", "prompt", "negative"]
    page.locator("#prompt").focus()
    page.keyboard.type("a cube")
    page.keyboard.press("Control+Enter")
    image = page.locator(".card button.frame")
    image.wait_for()
    page.get_by_role("link", name="Skip to the images").focus()
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    assert image.evaluate("e => document.activeElement === e")
    page.keyboard.press("Enter")
    assert page.get_by_role("dialog", name="Image").is_visible()


def test_what_happens_is_announced(page):
    page.evaluate(
        """() => {
          const live = document.getElementById("live"), body = document.body;
          new MutationObserver(() => { body.dataset.said = (body.dataset.said ?? "") + live.textContent; })
            .observe(live, {childList: true, characterData: true, subtree: true});
        }"""
    )
    assert page.locator("#live[role=status]").get_attribute("aria-live") == "polite"
    generate(page, "a cube", steps=1)
    # By selectors: wait_for_function evaluates texts in the page, which the policy forbids from the second look on.
    page.locator("body[data-said*='The image is done']").wait_for(state="attached")


def test_every_focus_is_seen(page):
    """An outline where the focus is, on everything that takes it."""
    seen = 0
    for _ in range(30):
        page.keyboard.press("Tab")
        shown = page.evaluate(
            """() => {
              const element = document.activeElement;
              if (element === document.body) return null;
              const shows = (e) => {
                const style = getComputedStyle(e);
                return style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 2;
              };
              const near = [element, element.nextElementSibling, element.parentElement];
              return near.some((e) => e && shows(e)) || element.outerHTML;
            }"""
        )
        if shown is not None:
            assert shown is True
            seen += 1
    assert seen > 15


@pytest.mark.parametrize("width", [320, 390, 700, 1000, 1280, 2200])
def test_nothing_is_wider_than_the_screen(site, visit, width):
    page = ready(visit(site, (width, 800)))
    page.locator("#more").evaluate("e => { e.open = true; }")
    generate(page, "word" * 60, steps=1)
    for tab in TABS:
        page.get_by_role("tab", name=tab).click()
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), tab
    page.get_by_role("tab", name="Generate").click()
    for control in ("#generate", "#steps-range", "#seed-random"):
        box = page.locator(control).bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= width


def test_a_phone_sees_the_button_and_folds_the_options(site, visit):
    page = ready(visit(site, PHONE))
    assert not page.get_by_label("Steps", exact=True).is_visible()
    assert page.get_by_text("64 × 64 · 20 steps").is_visible()
    page.get_by_text("Options", exact=True).click()
    box = page.locator("#generate").bounding_box()
    assert box["y"] + box["height"] <= PHONE[1]
    assert box["height"] >= 44


def test_light_and_dark(site, visit):
    def ground(page):
        colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
        return tuple(int(part) for part in re.findall(r"\d+", colour))

    light, dark = (246, 244, 239), (22, 21, 19)
    page = ready(visit(site))
    toggle = page.get_by_role("button", name="Theme")
    assert near(ground(page), light)
    assert toggle.get_attribute("aria-label") == "Theme: system"
    page.emulate_media(color_scheme="dark")
    page.locator("html[data-theme=dark]").wait_for(state="attached")
    toggle.click()
    assert near(ground(page), light)
    toggle.click()
    page.emulate_media(color_scheme="light")
    page.reload()
    assert near(ground(page), dark)
    toggle.click()
    assert near(ground(page), light)


# --- no foreign code ---


def test_the_policy_allows_nothing_foreign(site, visit):
    page = visit(site)
    policy = page.request.get(site.url).headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    sources = {word for word in policy.replace(";", "").split() if set(word) & set(":'*.")}
    assert sources == {"'self'", "'none'", "blob:", "data:"}


def test_texts_are_never_markup(page):
    hostile = "<img src=x onerror=\"document.title='owned'\"><b>bold</b>"
    generate(page, hostile, steps=1)
    page.locator(".card button.frame").click()
    assert page.locator("#viewer-prompt").inner_text() == hostile
    assert page.locator("#viewer b, #viewer img[src=x]").count() == 0
    assert page.title() == "Impasto"


def test_scripts_put_no_texts_into_markup():
    from impasto.serving.http.app import PAGE

    scripts = {path.name: path.read_text("utf-8") for path in PAGE.rglob("*.js")}
    assert len(scripts) > 15
    for name, script in scripts.items():
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function", script), (
            name
        )
    everything = " ".join(path.read_text("utf-8") for path in PAGE.rglob("*") if path.is_file())
    addresses = set(re.findall(r"https?://[^\s)\"']+", everything))
    comments = {line for script in scripts.values() for line in script.splitlines() if line.lstrip().startswith("//")}
    loaded = {address for address in addresses if "www.w3.org/2000/svg" not in address}
    assert all(any(address in line for line in comments) for address in loaded)
