"""The official client of OpenAI, unchanged, against a server on a socket."""

from __future__ import annotations

import asyncio
import base64
import io
import threading
import time
from collections.abc import Iterator

import httpx
import openai
import pytest
from PIL import Image
from tests.serving.http.running import Running, running

from impasto.pipelines.image_files import settings_text
from impasto.serving.stub import StubService

KEY = "0123456789abcdefghij"


@pytest.fixture(scope="module")
def served() -> Iterator[Running]:
    with running(keys=(KEY,), deadline_seconds=100) as found:
        yield found


@pytest.fixture
def client(served: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key=KEY) as found:
        yield found


def opened(b64: str | None) -> Image.Image:
    assert b64 is not None
    return Image.open(io.BytesIO(base64.b64decode(b64)))


def png(image: Image.Image) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, "PNG")
    file.seek(0)
    return file


def test_generates_with_extensions(client: openai.OpenAI, served: Running):
    answer = client.images.generate(
        model="dall-e-3",
        prompt="a red cube",
        n=2,
        size="1024x1024",
        quality="hd",
        style="vivid",
        user="me",
        complexity="low",
        response_format="b64_json",
        extra_body={
            "seed": 5,
            "negative_prompt": "blue",
            "num_inference_steps": 3,
            "guidance_scale": 2,
            "scheduler": "ddim",
            "lora": [{"name": "style", "weight": 0.5}],
        },
    )
    assert answer.data is not None
    assert [opened(item.b64_json).size for item in answer.data] == [(1024, 1024)] * 2
    assert [item.seed for item in answer.data] == [5, 6]  # type: ignore[attr-defined]
    text = settings_text(opened(answer.data[1].b64_json))
    assert text is not None
    assert text.startswith("a red cube\nNegative prompt: blue\nSteps: 3, Sampler: ddim, CFG scale: 2.0, Seed: 6, ")
    assert "Lora: style 0.5" in text
    job = served.service.submitted[-1]
    assert (job.scheduler, job.guidance_scale, job.adapters[0]) == ("ddim", 2.0, ("style", 0.5))
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens


@pytest.mark.parametrize(("kind", "name"), [("jpeg", "JPEG"), ("webp", "WEBP"), ("png", "PNG")])
def test_output_formats(client: openai.OpenAI, kind: str, name: str):
    answer = client.images.generate(prompt="a", output_format=kind, output_compression=50)  # type: ignore[call-overload]
    image = opened(answer.data[0].b64_json)
    assert image.format == name
    text = settings_text(image)
    assert text is not None
    assert text.startswith("a\nSteps: 20")


def test_streams_partial_images(client: openai.OpenAI):
    events = list(client.images.generate(prompt="a", stream=True, partial_images=2, size="64x48"))
    assert [event.type for event in events] == ["image_generation.partial_image"] * 2 + ["image_generation.completed"]
    assert [event.partial_image_index for event in events[:2]] == [0, 1]  # type: ignore[union-attr]
    for event in events:
        assert opened(event.b64_json).size == (64, 48)
        assert (event.size, event.quality, event.background, event.output_format) == ("64x48", "high", "opaque", "png")
        assert event.created_at > 1_700_000_000
    assert events[-1].usage.output_tokens == 8 * 6  # type: ignore[union-attr]
    assert len({opened(event.b64_json).getpixel((0, 0)) for event in events}) == 3


def test_a_stream_that_fails_says_so():
    def refuse(content: bytes, media_type: str) -> bytes:
        raise RuntimeError("the key has expired")

    with running(signer=refuse) as served, openai.OpenAI(base_url=f"{served.url}/v1", api_key="none") as client:
        with pytest.raises(openai.APIError, match="the server failed; its log has the reason"):
            list(client.images.generate(prompt="a", stream=True))
        until(lambda: not served.service.unfinished)


def test_edits_an_image(client: openai.OpenAI, served: Running):
    image = Image.new("RGB", (80, 60), "red")
    answer = client.images.edit(image=png(image), prompt="blue", extra_body={"strength": 0.5, "seed": 3})
    assert answer.data is not None
    assert opened(answer.data[0].b64_json).size == (80, 60)
    job = served.service.submitted[-1]
    assert job.seed == 3
    assert job.given.strength == 0.5
    assert job.given.mask is None
    assert job.given.images[0].pixels == image.tobytes()


def test_a_mask_is_repainted_where_it_is_transparent(client: openai.OpenAI, served: Running):
    mask = Image.new("RGBA", (64, 64), (0, 0, 0, 255))
    mask.paste((255, 255, 255, 0), (0, 0, 32, 64))
    client.images.edit(image=png(Image.new("RGB", (64, 64))), mask=png(mask), prompt="a")
    given = served.service.submitted[-1].given
    assert given.strength == 1.0
    levels = Image.frombytes("L", (64, 64), given.mask)
    assert levels.getpixel((5, 5)) == 255
    assert levels.getpixel((40, 5)) == 0


def test_a_mask_without_transparency_is_repainted_where_it_is_white(client: openai.OpenAI, served: Running):
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 32, 64))
    lists = {"size": "32x32", "lora": '[{"name": "style"}]'}
    client.images.edit(image=[png(Image.new("RGB", (64, 64)))], mask=png(mask), prompt="a", extra_body=lists)
    job = served.service.submitted[-1]
    levels = Image.frombytes("L", (32, 32), job.given.mask)
    assert levels.getpixel((2, 2)) == 255
    assert levels.getpixel((20, 2)) == 0
    assert job.adapters[0] == ("style", 1.0)


def test_adapters_of_edits_are_a_text(client: openai.OpenAI):
    image = png(Image.new("RGB", (64, 64)))
    with pytest.raises(openai.BadRequestError, match="did you mean lora as a JSON text"):
        client.images.edit(image=image, prompt="a", extra_body={"lora": [{"name": "style"}]})


def test_edits_stream(client: openai.OpenAI):
    image = png(Image.new("RGB", (64, 64)))
    events = list(client.images.edit(image=image, prompt="a", stream=True, partial_images=1))
    assert [event.type for event in events] == ["image_edit.partial_image", "image_edit.completed"]


def test_errors_are_those_of_the_client(client: openai.OpenAI):
    with pytest.raises(openai.BadRequestError) as bad:
        client.images.generate(prompt="a", extra_body={"guidance": 3})
    assert bad.value.param == "guidance"
    assert bad.value.code == "unknown_parameter"
    assert "did you mean 'guidance_scale'?" in bad.value.message
    with pytest.raises(openai.NotFoundError):
        client.images.generate(prompt="a", model="gpt-image-1")
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").images.generate(prompt="a")


def test_lists_models(client: openai.OpenAI):
    assert [model.id for model in client.models.list()] == ["scenes"]
    found = client.models.retrieve("dall-e-3")
    assert (found.id, found.owned_by) == ("scenes", "impasto")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("scene")


class Full(StubService):
    """Refuses the first requests."""

    refusals = 2

    def submit(self, jobs):  # type: ignore[no-untyped-def]
        self.waiting = 0 if self.refusals else 64
        self.refusals = max(0, self.refusals - 1)
        return super().submit(jobs)


def test_retries_when_the_queue_is_full(monkeypatch: pytest.MonkeyPatch):
    waits: list[float] = []
    monkeypatch.setattr("time.sleep", waits.append)
    service = Full()
    with running(service) as served, openai.OpenAI(base_url=f"{served.url}/v1", api_key="none") as client:
        assert client.images.generate(prompt="a").data
        service.refusals = 2
        with pytest.raises(openai.RateLimitError) as full:
            client.with_options(max_retries=0).images.generate(prompt="a")
        assert full.value.response.headers["retry-after"] == "2"
        assert full.value.code == "queue_full"
    assert 2 in [round(wait) for wait in waits]  # as the header says


def test_a_client_that_leaves_ends_its_job():
    service = StubService(seconds=0.05)
    body = {"prompt": "a", "num_inference_steps": 200}
    with running(service) as served, httpx.Client(timeout=httpx.Timeout(5, read=0.2)) as client:
        with pytest.raises(httpx.ReadTimeout):
            client.post(f"{served.url}/v1/images/generations", json=body)
        until(lambda: not service.unfinished)
    assert len(service.submitted) == 1


def test_a_client_that_leaves_a_stream_ends_its_job():
    service = StubService(seconds=0.05)
    body = {"prompt": "a", "num_inference_steps": 200, "stream": True}
    with running(service) as served, httpx.stream("POST", f"{served.url}/v1/images/generations", json=body) as answer:
        texts = answer.iter_text()
        assert next(texts).startswith(': progress {"step": 0, "steps": 200')
        assert service.unfinished
        answer.close()
        until(lambda: not service.unfinished)


def test_a_server_that_ends_finishes_what_it_has_accepted():
    service = StubService(seconds=0.02)
    found = []
    with running(service) as served:
        url = f"{served.url}/v1/images/generations"
        thread = threading.Thread(target=lambda: found.append(httpx.post(url, json={"prompt": "a"})))
        with httpx.Client() as client:
            assert client.get(f"{served.url}/ready").status_code == 200
            thread.start()
            until(lambda: service.unfinished)
            served.server.end()
            until(lambda: not service.ready)
            refused = client.post(url, json={"prompt": "b"})
            assert refused.status_code == 503
            assert refused.headers["retry-after"] == "5"
            assert client.get(f"{served.url}/ready").status_code == 503
            assert client.get(f"{served.url}/health").status_code == 200
        thread.join(20)
    assert found[0].status_code == 200


def test_what_is_not_done_when_the_server_ends_is_answered():
    service, found = StubService(seconds=0.05), list[httpx.Response]()
    with running(service) as served:
        served.server.drain_seconds = 0.1
        url = f"{served.url}/v1/images/generations"
        body = {"prompt": "a", "num_inference_steps": 200}
        thread = threading.Thread(target=lambda: found.append(httpx.post(url, json=body, timeout=60)))
        thread.start()
        until(lambda: service.unfinished)
        served.server.end()
        thread.join(20)
    assert found[0].status_code == 503
    assert found[0].json()["error"]["code"] == "generation_shutdown"


def until(condition) -> None:  # type: ignore[no-untyped-def]
    """Wait for a condition, 10 seconds at most."""
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_asynchronous_client(served: Running):
    async def generate() -> int:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key=KEY) as client:
            answers = await asyncio.gather(*(client.images.generate(prompt=str(i)) for i in range(8)))
        return sum(len(answer.data or []) for answer in answers)

    assert asyncio.run(generate()) == 8
