"""What the page does without what it counts on: storage, an answer, a model, a connection that lasts."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from impasto.pipelines.image_files import GenerationSettings, save_image

from .surfing import generate, ready
from .test_history import thumbnails

pytestmark = pytest.mark.browser

BLOCKED = """
  for (const name of ["localStorage", "sessionStorage"]) {
    Object.defineProperty(window, name, { get() { throw new DOMException("denied", "SecurityError"); } });
  }
"""
FULL = 'Storage.prototype.setItem = () => { throw new DOMException("full", "QuotaExceededError"); };'


def again(page, script):
    """Load the page again after a script."""
    page.add_init_script(script)
    page.reload()
    return page


@pytest.mark.parametrize("script", [BLOCKED, FULL], ids=["blocked", "full"])
def test_it_works_where_the_browser_keeps_no_choices(site, page, script):
    again(page, script)
    ready(page)
    toggle = page.get_by_role("button", name="Theme")
    for choice in ("light", "dark", "system"):
        toggle.click()
        assert toggle.get_attribute("aria-label") == f"Theme: {choice}"
    generate(page, "a cube", steps=2)
    assert site.service.submitted[0].prompt == "a cube"


# --- the history ---


def test_an_image_counts_as_kept_when_its_transaction_is_complete(page):
    again(page, """
      const add = IDBObjectStore.prototype.add;
      IDBObjectStore.prototype.add = function (entry) {
        const request = add.call(this, entry);
        request.addEventListener("success", () => this.transaction.abort());
        return request;
      };
    """)  # fmt: skip
    ready(page)
    generate(page, "a cube", steps=2)
    page.get_by_text("This browser does not keep the history.").first.wait_for()
    assert thumbnails(page).count() == 1


@pytest.mark.parametrize("by", ["another tab", "the person"])
def test_the_history_goes_on_after_its_data_are_cleared(site, page, by):
    generate(page, "a cube", steps=2)
    thumbnails(page).first.wait_for()
    if by == "another tab":
        page.evaluate("""() => new Promise((resolve, reject) => {
          const request = indexedDB.deleteDatabase("impasto");
          request.onsuccess = resolve;
          request.onblocked = () => reject(new Error("blocked"));
        })""")
    else:
        session = page.context.new_cdp_session(page)
        session.send("Storage.clearDataForOrigin", {"origin": site.url, "storageTypes": "indexeddb"})
        page.wait_for_timeout(300)  # until the page hears of it
    generate(page, "a cone", steps=2)
    thumbnails(page).nth(1).wait_for()
    assert not page.locator("#notice").is_visible()
    page.reload()
    thumbnails(page).first.wait_for()
    assert [image.get_attribute("alt") for image in thumbnails(page).get_by_role("img").all()] == ["a cone"]


def test_an_image_that_cannot_be_deleted_stays(page):
    generate(page, "a cube", steps=2)
    page.evaluate("""() => {
      IDBObjectStore.prototype.delete = () => { throw new DOMException("no", "InvalidStateError"); };
    }""")
    thumbnails(page).first.click()
    page.get_by_role("dialog", name="Image").get_by_role("button", name="Delete").click()
    page.get_by_role("dialog", name="Delete this image").get_by_role("button", name="Delete").click()
    page.locator("#notice").get_by_text("could not delete the image").wait_for()
    assert thumbnails(page).count() == 1


# --- the server ---


def test_the_button_asks_again_what_the_server_serves(site, visit):
    page = visit(site)
    page.route("**/v1/models", lambda route: route.abort())
    page.evaluate("localStorage.setItem('impasto-settings', JSON.stringify({prompt: 'older', steps: 3}))")
    page.reload()
    notice = page.locator("#notice").get_by_text("does not answer")
    notice.wait_for()
    page.get_by_role("button", name="Reset").click()
    page.get_by_role("tab", name="Compare").click()
    page.get_by_label("Image B", exact=True).check()
    page.get_by_label("Image A", exact=True).check()
    page.get_by_role("button", name="Copy A to B").click()
    page.get_by_role("tab", name="Generate").click()
    page.get_by_label("Prompt", exact=True).fill("a cube")
    page.get_by_role("button", name="Dismiss").click()
    page.locator("#generate").click()
    notice.wait_for()
    assert not site.service.submitted
    page.unroute("**/v1/models")
    page.locator("#generate").click()
    page.locator(".card button.frame").wait_for()
    (job,) = site.service.submitted
    assert (job.prompt, job.model, job.steps) == ("a cube", "scenes", 3)


def test_a_connection_that_is_cut_is_reported_in_words(page):
    page.evaluate("""() => {
      const real = window.fetch;
      const cut = () => new ReadableStream({ start(stream) { stream.error(new TypeError("network error")); } });
      window.fetch = async (path, options) => (
        path.includes("generations") ? new Response(cut()) : real(path, options)
      );
    }""")
    generate(page)
    assert page.locator(".card .status").inner_text() == "The connection ended before the image was done."


READ = """async (pieces) => {
  const { events } = await import("./scripts/api/sse.js");
  const parts = pieces.flatMap(([text, times]) => Array(times).fill(text)), encoder = new TextEncoder();
  const body = new ReadableStream({ pull(stream) {
    if (parts.length) stream.enqueue(encoder.encode(parts.shift()));
    else stream.close();
  } });
  const start = performance.now(), found = [];
  for await (const event of events(new Response(body))) found.push(event);
  const sizes = found.map((event) => JSON.stringify(event).length);
  return { found: sizes.some((size) => size > 1000) ? null : found, sizes, milliseconds: performance.now() - start };
}"""


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"], ids=["lf", "crlf", "cr"])
def test_events_are_found_wherever_the_stream_is_cut(page, end):
    text = f': progress {{"step": 1}}{end}{end}{end}data: {{"a":{end}data: 2}}{end}{end}data: {{"b": 3}}{end}{end}'
    whole = [{"type": "progress", "step": 1}, {"a": 2}, {"b": 3}]
    for size in (1, 2, 3, 5, 7, len(text)):
        parts = [[text[i : i + size], 1] for i in range(0, len(text), size)]
        assert page.evaluate(READ, parts)["found"] == whole, size


def test_a_long_event_takes_time_in_proportion(page):
    answer = page.evaluate(READ, [['data: "', 1], ["x" * (1 << 14), 2000], ['"\n\n', 1]])
    assert answer["sizes"] == [(2000 << 14) + 2]
    assert answer["milliseconds"] < 5000


# --- a model that is not served ---

BIG = {
    "prompt": "a cube", "negative": "fog", "model": "big", "width": 2048, "height": 2048, "steps": 300, "guidance": 150,
    "scheduler": "ddim", "seed": "12", "adapters": [{"name": "style", "weight": 1}], "count": 2, "format": "webp",
}  # fmt: skip


def check_common(page):
    def values(*names):
        return [page.get_by_label(name, exact=True).input_value() for name in names]

    assert values("Prompt", "Negative prompt", "Seed") == ["a cube", "fog", "12"]
    assert values("Model", "Width", "Height", "Steps") == ["scenes", "64", "64", "20"]
    assert values("Guidance", "Scheduler") == ["4.5", "dpm++"]
    assert not page.get_by_label("style", exact=True).is_checked()


def test_stored_settings_of_another_server_leave_the_form_usable(site, page):
    page.evaluate("text => localStorage.setItem('impasto-settings', text)", json.dumps(BIG))
    page.reload()
    ready(page)
    check_common(page)
    assert page.get_by_label("Number of images").input_value() == "2"
    page.locator("#generate").click()
    page.locator(".card button.frame").nth(1).wait_for()
    assert [job.seed for job in site.service.submitted] == [12, 13]


def test_a_file_of_a_model_that_is_not_served_brings_what_fits(page, tmp_path):
    settings = GenerationSettings("a cube", 150, "fog", "ddim", 9, 12, 2048, 2048, "big", {"Lora": "style 1"})
    save_image(Image.new("RGB", (16, 16)), tmp_path / "image.png", settings)
    page.get_by_label("Settings from an image").set_input_files(tmp_path / "image.png")
    page.locator("#notice").get_by_text("the model big, which is not served here").wait_for()
    check_common(page)


# --- what the API takes ---


def test_seeds_are_as_large_as_in_the_api(site, page):
    page.get_by_label("Number of images").select_option("2")
    for seed in (2**32 - 1, 2**53 - 1):
        generate(page, "a cube", steps=2, seed=seed)
    assert sorted(job.seed for job in site.service.submitted) == [0, 2**32 - 1, 2**32, 2**53 - 1]
    page.get_by_label("Seed", exact=True).fill(str(2**53))
    page.locator("#generate").click()
    assert str(2**53 - 1) in page.locator("#seed-error").inner_text()
    page.get_by_label("Seed", exact=True).fill("")
    page.get_by_role("tab", name="Grid").click()
    page.get_by_label("Values").fill(f"{2**53 - 2}-{2**53 - 1}")
    page.locator("#generate").click()
    page.locator(".card button.frame").nth(1).wait_for()
    assert sorted(job.seed for job in site.service.submitted)[-2:] == [2**53 - 1] * 2
    assert 2**53 - 2 in [job.seed for job in site.service.submitted]


@pytest.mark.parametrize("weight", [-4.33, 7, 0.333])
def test_a_restored_weight_is_not_changed_and_its_tag_is_no_text(site, page, tmp_path, weight):
    prompt = f"a cube <lora:style:{weight}>"
    settings = GenerationSettings(prompt, 2, "", "ddim", 3, 12, 64, 64, "scenes", {"Lora": f"style {weight}"})
    save_image(Image.new("RGB", (16, 16)), tmp_path / "image.png", settings)
    page.get_by_label("Settings from an image").set_input_files(tmp_path / "image.png")
    page.locator("#notice").get_by_text("Settings restored").wait_for()
    page.locator("#generate").click()
    page.locator(".card button.frame").wait_for()
    (job,) = site.service.submitted
    assert job.prompt == "a cube"
    assert [tuple(adapter) for adapter in job.adapters] == [("style", weight)]
