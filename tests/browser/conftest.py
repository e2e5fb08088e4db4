"""A server with its page, and a real browser in front of it.

What the browser requests from anywhere else, and every error of the page, fails the test.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from impasto.serving.stub import SCENES, StubService

from .surfing import DESKTOP, GLM, Site, ready, serving

OFFLINE = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--force-color-profile=srgb",
]


def find_browser() -> str | None:
    return os.environ.get("IMPASTO_BROWSER") or shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright; see make test-browser")
    path = find_browser()
    if path is None:
        pytest.skip("needs chromium; see make test-browser")
    with api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=path, args=OFFLINE)
        yield found
        found.close()


@pytest.fixture
def site() -> Iterator[Site]:
    """A server without a model: its images have one colour, which depends on prompt, seed and step."""
    yield from serving(StubService(models=(SCENES, GLM)))


@pytest.fixture
def visit(browser: Any) -> Iterator[Callable[..., Any]]:
    """Open the page of a site as a new visitor."""
    contexts, problems = [], []

    def watch(page: Any, url: str) -> None:
        page.on("pageerror", lambda error: problems.append(f"error: {error}"))
        page.on("console", lambda line: problems.append(line.text) if "Security Policy" in line.text else None)
        page.on(
            "request",
            lambda request: None if request.url.startswith((url, "blob:", "data:")) else problems.append(request.url),
        )

    def visit(site: Site, size: tuple[int, int] = DESKTOP, dark: bool = False, path: str = "/", **more: Any) -> Any:
        scheme = "dark" if dark else "light"
        context = browser.new_context(
            viewport={"width": size[0], "height": size[1]}, color_scheme=scheme, reduced_motion="reduce", **more
        )
        context.set_default_timeout(15_000)
        contexts.append(context)
        page = context.new_page()
        watch(page, site.url)
        page.goto(site.url + path)
        return page

    yield visit
    for context in contexts:
        context.close()
    assert not problems


@pytest.fixture
def page(site: Site, visit: Callable[..., Any]) -> Any:
    """The page on a desktop, ready."""
    return ready(visit(site))
