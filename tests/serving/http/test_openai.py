"""``/v1`` in the same process, over a service without a model."""

from __future__ import annotations

import asyncio
import base64
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image
from tests.serving.http.running import running

from impasto.pipelines.adapters import ChosenAdapter
from impasto.pipelines.image_files import GenerationSettings
from impasto.serving.http import uploads
from impasto.serving.http.app import create_app
from impasto.serving.http.errors import of_failure
from impasto.serving.http.settings import HttpSettings
from impasto.serving.image_settings import settings_of
from impasto.serving.job import Failed, Job
from impasto.serving.stub import SCENES, StubService


def call(method: str, path: str, service: StubService | None = None, settings: HttpSettings | None = None, **more: Any):
    """One request to an application of its own."""

    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(create_app(service or StubService(), settings), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, path, **more)

    return asyncio.run(send())


def image_of(item: dict[str, Any]) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(item["b64_json"])))


def test_one_request_after_the_other_is_decoded(monkeypatch: pytest.MonkeyPatch):
    """One that waited for its next image would keep the others of it: memory without bound."""
    model = replace(StubService().models["scenes"], most_images=3)
    decoded = list[str]()

    def decode(content: bytes, name: str, most_pixels: int) -> Image.Image:
        decoded.append(content.decode())
        return Image.new("RGB", (8, 8), "white")

    monkeypatch.setattr(uploads, "decode_upload", decode)
    app = create_app(StubService(models=[model]))
    app.state.context.decoding = asyncio.Semaphore(1)

    async def send() -> list[int]:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            edits = [
                [("image", ("image", f"{i}".encode()))] * count + [("mask", ("mask", f"{i}".encode()))]
                for i, count in enumerate((3, 3, 3, 4))
            ]
            answers = [client.post("/v1/images/edits", data={"prompt": "a"}, files=files) for files in edits]
            return [answer.status_code for answer in await asyncio.gather(*answers)]

    assert asyncio.run(send()) == [200, 200, 200, 400]
    assert sorted(decoded[::4]) == ["0", "1", "2"]  # none of the fourth, which are too many
    assert decoded == [each for each in decoded[::4] for _ in range(4)]


def test_images_have_the_seeds_that_follow_the_first_one():
    answer = call("POST", "/v1/images/generations", json={"prompt": "a cat", "n": 3, "seed": 7, "size": "48x32"})
    assert answer.status_code == 200
    body = answer.json()
    assert [item["seed"] for item in body["data"]] == [7, 8, 9]
    images = [image_of(item) for item in body["data"]]
    assert {image.size for image in images} == {(48, 32)}
    assert len({image.getpixel((0, 0)) for image in images}) == 3
    assert body["size"] == "48x32"
    assert body["usage"]["output_tokens"] == 3 * 6 * 4


def test_an_image_may_be_generated_at_its_own_size():
    service = StubService()
    for fields in ({}, {"use_resolution_binning": False}):
        assert call("POST", "/v1/images/generations", service, json={"prompt": "a", **fields}).status_code == 200
    image = io.BytesIO()
    Image.new("RGB", (16, 16)).save(image, "PNG")
    form = {"prompt": (None, "a"), "use_resolution_binning": (None, "false"), "image": ("a.png", image.getvalue())}
    assert call("POST", "/v1/images/edits", service, files=form).status_code == 200
    assert [job.binning for job in service.submitted] == [True, False, False]


def test_usage_is_that_of_the_transformer_at_the_size_that_is_generated():
    glm = replace(SCENES, family="GLM-Image", multiple=32, unit=16)
    large = replace(SCENES, unit=16, trained_side=256)
    for model, binned, tokens in ((glm, True, 64), (large, True, 256), (large, False, 64)):
        body = {"prompt": "a", "size": "128x128", "use_resolution_binning": binned}
        answer = call("POST", "/v1/images/generations", StubService(models=[model]), json=body)
        assert answer.json()["usage"]["output_tokens"] == tokens


def test_settings_in_an_image_say_that_it_has_its_own_size():
    adapters = tuple(ChosenAdapter(name) for name in ("my-lora-v1.5", "a/style.safetensors", "builtin:few", "a/b.v2"))
    job = Job("1", "scenes", "a", width=64, height=64, binning=False, adapters=adapters)
    extra = GenerationSettings.from_text(settings_of(job, "ddim").to_text()).extra
    assert extra["Binning"] == "off"
    assert extra["Lora"] == "my-lora-v1.5 1; style 1; few 1; b.v2 1"
    assert "Binning" not in settings_of(replace(job, binning=True), "ddim").extra


@pytest.mark.parametrize("reason", ["engine", "deadline", "shutdown", "input"])
def test_what_would_fail_again_is_not_to_be_repeated(reason: Any):
    error = of_failure(Failed("1", reason, "no"))
    assert (error.headers or {}).get("x-should-retry") == ("false" if reason in ("engine", "deadline") else None)


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({}, "prompt", "prompt is missing"),
        ({"prompt": " "}, "prompt", "empty"),
        ({"prompt": "a", "promt": 1}, "promt", "did you mean 'prompt"),
        ({"prompt": "a", "n": 11}, "n", "from 1 to 10"),
        ({"prompt": "a", "n": True}, "n", "whole number"),
        ({"prompt": "a", "size": "2048x8"}, "size", "1 to 1024"),
        ({"prompt": "a", "use_resolution_binning": "no"}, "use_resolution_binning", "true or false"),
        ({"prompt": "a", "response_format": "url"}, "response_format", "start the server with --storage FOLDER"),
        ({"prompt": "a", "steps": 5}, "steps", "did you mean num_inference_steps?"),
        ({"prompt": "a", "width": 64}, "width", "did you mean size, as in 256x256?"),
        ({"prompt": "a", "cfg_scale": 5}, "cfg_scale", "did you mean 'guidance_scale'?"),
        ({"prompt": "a", "stream": True, "n": 2}, "n", "one image"),
        ({"prompt": "a", "lora": [{"name": "styl"}]}, "lora", "did you mean 'style"),
    ],
)
def test_what_cannot_be_used_is_named(body: dict[str, Any], param: str, message: str):
    answer = call("POST", "/v1/images/generations", json=body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == param
    assert message in error["message"]
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("path", "asked", "other"),
    [
        ("/v1/images/generations", {"prompt": "a", "lora": [{"name": "few"}]}, {"num_inference_steps": 9}),
        ("/sdapi/v1/txt2img", {"prompt": "a <lora:few:1>", "width": 64, "height": 64}, {"steps": 9}),
    ],
)
def test_a_few_step_adapter_says_how_to_generate_unless_the_client_does(
    path: str, asked: dict[str, Any], other: dict[str, Any]
):
    service = StubService()
    service.adapters = {"few": "builtin:scenes-lcm"}
    for given in ({}, other, {"guidance_scale" if "v1/images" in path else "cfg_scale": 3.0}):
        assert call("POST", path, service, json={**asked, **given}).status_code == 200
    found = [(job.scheduler, job.steps, job.guidance_scale) for job in service.submitted]
    assert found == [("lcm", 4, 1.0), ("lcm", 9, 1.0), ("lcm", 4, 3.0)]
    listed = call("GET", "/v1/models", service).json()["adapters"]
    assert {"id": "few", "object": "adapter", "steps": 4, "guidance_scale": 1.0, "scheduler": "lcm"} in listed


def test_what_answers_get_answers_head(tmp_path: Path):
    with running(storage=tmp_path / "images") as served, httpx.Client(base_url=served.url) as client:
        body = {"prompt": "a", "response_format": "url"}
        stored = client.post("/v1/images/generations", json=body).json()["data"][0]["url"]
        for path in ("/health", "/ready", "/v1/models", "/v1/models/scenes", "/sdapi/v1/options", "/", stored):
            head, get = client.head(path), client.get(path)
            assert (head.status_code, head.content) == (200, b"")
            assert head.headers["content-length"] == str(len(get.content))
        assert client.head("/v1/models/none").status_code == 404
        assert client.head("/v1/images/generations").headers["allow"] == "POST"
        served.service.ready = False
        assert client.head("/ready").status_code == 503
        described = client.get("/openapi.json").json()["paths"].values()
        assert {method for operations in described for method in operations} == {"get", "post"}
