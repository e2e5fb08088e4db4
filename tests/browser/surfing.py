"""What tests of the page have in common: a server in a thread, and what a person does and sees."""

from __future__ import annotations

import hashlib
import io
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import uvicorn
from PIL import Image

from impasto.serving.http.app import create_app
from impasto.serving.http.settings import HttpSettings
from impasto.serving.stub import SCENES

PHONE, DESKTOP = (390, 844), (1440, 900)
GLM = replace(
    SCENES, name="glm", family="GLM-Image", width=128, height=128, multiple=32, steps=30, guidance_scale=1.5,
    scheduler="", schedulers=(), masks=False, most_images=4,
)  # fmt: skip


@dataclass
class Site:
    """A running server."""

    service: Any
    url: str


def serving(service: Any, settings: HttpSettings | None = None) -> Iterator[Site]:
    """Serve on a free port until the test ends."""
    config = uvicorn.Config(create_app(service, settings), port=0, log_level="error", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield Site(service, f"http://127.0.0.1:{port}")
    server.should_exit = True
    thread.join(10)


def ready(page: Any) -> Any:
    page.locator("#model option").first.wait_for(state="attached")
    return page


def generate(page: Any, prompt: str = "a red cube", **fields: Any) -> None:
    """Fill in the form, press the button, and wait for all images."""
    page.get_by_label("Prompt", exact=True).fill(prompt)
    for label, value in fields.items():
        page.get_by_label(label.capitalize(), exact=True).fill(str(value))
    page.locator("#generate").click()
    finished(page)


def finished(page: Any) -> None:
    page.locator("#cancel-all").wait_for(state="hidden")
    page.locator(".card:not(.running)").first.wait_for()


def colour_of(image: Any) -> tuple[int, ...]:
    """What a person sees in the middle of an element."""
    shot = Image.open(io.BytesIO(image.screenshot())).convert("RGB")
    return shot.getpixel((shot.width // 2, shot.height // 2))  # type: ignore[return-value]


def stub_colour(prompt: str, seed: int, step: int) -> tuple[int, ...]:
    """The colour of the stub's image."""
    return tuple(hashlib.sha256(f"{prompt} {seed} {step}".encode()).digest()[:3])


def near(colour: tuple[int, ...], other: tuple[int, ...], by: int = 6) -> bool:
    return all(abs(one - two) <= by for one, two in zip(colour, other))
