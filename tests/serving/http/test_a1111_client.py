"""``webuiapi``, unchanged, against a server on a socket."""

from __future__ import annotations

import asyncio
import base64
import io
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import httpx
import pytest
import webuiapi
from PIL import Image, PngImagePlugin
from tests.serving.http.running import Running, running

from impasto.serving.http.a1111.calls import Call, Session
from impasto.serving.job import Job
from impasto.serving.service import Generation
from impasto.serving.stub import StubService

KEY = "0123456789abcdefghij"


@pytest.fixture(scope="module")
def served() -> Iterator[Running]:
    with running() as found:
        yield found


@pytest.fixture
def client(served: Running) -> webuiapi.WebUIApi:
    served.service.submitted.clear()
    return webuiapi.WebUIApi(port=served.port)


def test_generates_with_the_46_fields_that_it_sends(client: webuiapi.WebUIApi, served: Running):
    found = client.txt2img(prompt="a red cube <lora:style:0.8>", negative_prompt="blue", seed=7, batch_size=2, n_iter=2)
    assert [image.size for image in found.images] == [(512, 512)] * 4
    assert len({image.getpixel((0, 0)) for image in found.images}) == 4
    assert found.info["all_seeds"] == [7, 8, 9, 10]
    assert found.info["all_prompts"] == ["a red cube <lora:style:0.8>"] * 4
    assert found.info["sampler_name"] == "Euler a"
    assert found.parameters["cfg_scale"] == 7.0
    jobs = served.service.submitted
    assert [job.seed for job in jobs] == [7, 8, 9, 10]
    assert {(job.prompt, job.negative_prompt, job.guidance_scale, job.scheduler) for job in jobs} == {
        ("a red cube", "blue", 7.0, None)
    }
    assert jobs[0].adapters == (("style", 0.8),)
    assert found.image.info["parameters"] == found.info["infotexts"][0]


def test_a_seed_of_minus_one_is_random_and_reported(client: webuiapi.WebUIApi):
    seeds = {client.txt2img(prompt="a", width=8, height=8).info["seed"] for _ in range(3)}
    assert len(seeds) == 3
    assert min(seeds) >= 0


def test_settings_come_back_from_the_image(client: webuiapi.WebUIApi):
    found = client.txt2img(prompt="a cube, large", seed=3, steps=5, width=16, height=24, sampler_name="DDIM")
    read = client.png_info(found.image)
    assert read.info == found.info["infotexts"][0]
    assert read.parameters["Prompt"] == "a cube, large"
    assert {name: read.parameters[name] for name in ("Steps", "Seed", "Sampler", "Size-1", "Size-2")} == {
        "Steps": "5", "Seed": "3", "Sampler": "ddim", "Size-1": "16", "Size-2": "24",
    }  # fmt: skip
    assert client.png_info(Image.new("RGB", (4, 4))).info == ""


def test_what_no_answer_can_hold_is_left_out(client: webuiapi.WebUIApi):
    body = b'{"prompt": "a", "override_settings": {"sd_model_checkpoint": "scenes", "x": "\\ud800", "y": 1e999}}'
    headers = {"Content-Type": "application/json"}
    answer = client.session.post(f"{client.baseurl}/txt2img", data=body, headers=headers)
    assert answer.json()["parameters"]["override_settings"] == {"sd_model_checkpoint": "scenes"}
    texts = PngImagePlugin.PngInfo()
    texts.add_text("parameters", 'a\nb\nSteps: 5, Model: "\\ud800\\u00e9"')
    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, "PNG", pnginfo=texts)
    image = {"image": base64.b64encode(file.getvalue()).decode()}
    answer = client.session.post(f"{client.baseurl}/png-info", json=image)
    assert answer.json()["parameters"] == {"Prompt": "a\nb", "Negative prompt": "", "Steps": "5", "Model": "?é"}


def test_edits_an_image(client: webuiapi.WebUIApi, served: Running):
    blue = Image.new("RGB", (32, 32), "blue")
    found = client.img2img([blue], prompt="a", width=16, height=8, denoising_strength=0.6, batch_size=2)
    assert [image.size for image in found.images] == [(16, 8)] * 2
    assert found.info["denoising_strength"] == 0.6
    given = [job.given for job in served.service.submitted]
    assert given[0] == given[1]
    assert (given[0].strength, given[0].mask, given[0].padding) == (0.6, None, None)
    assert given[0].images[0].pixels == bytes((0, 0, 255)) * 128


def test_repaints_what_is_white(client: webuiapi.WebUIApi, served: Running):
    mask = Image.new("L", (32, 32))
    mask.paste(255, (16, 0, 32, 32))
    common: dict[str, Any] = {"images": [Image.new("RGB", (32, 32), "blue")], "mask_image": mask, "mask_blur": 0}
    found = client.img2img(**common, width=16, height=16, inpaint_full_res_padding=4)
    assert found.image.size == (32, 32)  # the surroundings of the mask are generated at 16 x 16, and pasted back
    job = served.service.submitted[-1]
    assert (job.width, job.height, job.given.padding) == (16, 16, 4)
    assert job.given.mask == (bytes(16) + b"\xff" * 16) * 32
    found = client.img2img(**common, width=16, height=16, inpaint_full_res=False, inpainting_mask_invert=1)
    assert found.image.size == (16, 16)
    levels = served.service.submitted[-1].given.mask
    assert (levels[0], levels[15]) == (255, 0)


def test_values_as_a1111_takes_them(client: webuiapi.WebUIApi, served: Running):
    texts = {"steps": "12", "cfg_scale": "7", "width": "16", "height": " 8", "seed": "5", "enable_hr": "false"}
    found = client.post_and_get_api_result(f"{client.baseurl}/txt2img", {"prompt": "a", **texts}, False)
    assert found.image.size == (16, 8)
    assert (found.info["steps"], found.info["cfg_scale"], found.info["seed"]) == (12, 7.0, 5)

    image = webuiapi.b64_img(Image.new("RGB", (16, 8), "blue"))
    texts = {"resize_mode": "1", "mask_blur": "4", "inpaint_full_res": "0", "send_images": "true"}
    for mask in ("", None):
        body = {"init_images": [image], "mask": mask, "denoising_strength": 0, "steps": 20, **texts}
        assert client.post_and_get_api_result(f"{client.baseurl}/img2img", body, False).image.size == (16, 8)
        given = served.service.submitted[-1].given
        assert (given.mask, given.strength) == (None, 0)
    assert client.post_and_get_api_result(f"{client.baseurl}/txt2img", {"send_images": 0}, False).images == []


def test_lists(client: webuiapi.WebUIApi):
    assert client.util_get_model_names() == ["scenes"]
    assert client.get_sd_models()[0]["title"] == "scenes"
    assert client.get_loras()[0]["name"] == "style"
    samplers = {one["name"]: one["options"]["scheduler"] for one in client.get_samplers()}
    assert (samplers["DPM++ 2M"], samplers["Euler"], samplers["LCM"]) == ("dpm++", "ddim", "lcm")
    assert client.util_get_scheduler_names() == ["automatic"]
    assert client.get_scripts() == {"txt2img": [], "img2img": []}
    assert [one["name"] for one in client.get_upscalers()] == ["None"]
    assert client.get_embeddings()["loaded"] == {}
    assert client.get_cmd_flags()["api"] is True
    assert "ram" in client.get_memory()
    for empty in (
        client.get_latent_upscale_modes, client.get_sd_vae, client.get_hypernetworks, client.get_face_restorers,
        client.get_realesrgan_models, client.get_prompt_styles, client.get_artists, client.get_artist_categories,
    ):  # fmt: skip
        assert empty() == []
    assert client.refresh_checkpoints() == {}
    client.util_wait_for_ready(check_interval=0.01)


@pytest.mark.parametrize(
    ("changes", "status", "message"),
    [
        ({"sampler_name": "DPM++ 4M"}, 404, "Sampler not found"),
        ({"enable_hr": True}, 400, "enable_hr is True"),
        ({"script_name": "x/y/z plot"}, 400, "no scripts"),
        ({"restore_faces": True}, 400, "no restoration of faces"),
        ({"alwayson_scripts": {"ControlNet": {"args": [{"image": "x"}]}}}, 400, "'ControlNet'"),
        ({"override_settings": {"sd_model_checkpoint": "scene"}}, 404, "did you mean 'scenes"),
        ({"prompt": "a <lora:styl:1>"}, 400, "did you mean 'style"),
        ({"prompt": "<lora:style:much>"}, 400, "must be a number"),
        ({"steps": 201}, 400, "from 1 to 200"),
        ({"batch_size": 4, "n_iter": 3}, 400, "at most 10 images"),
        ({"width": 2048}, 400, "width must be a whole number from 1 to 1024"),
        ({"cfg_scale": "high"}, 400, "cfg_scale"),
        ({"steps": "2.5"}, 400, "steps must be a whole number"),
        ({"enable_hr": "true"}, 400, "enable_hr is 'true'"),
    ],
)
def test_refusals(client: webuiapi.WebUIApi, changes: dict[str, Any], status: int, message: str):
    with pytest.raises(RuntimeError) as caught:
        client.txt2img(**{"prompt": "a", "width": 8, "height": 8} | changes)
    assert caught.value.args[0] == status
    assert message in caught.value.args[1]
    assert '"detail"' in caught.value.args[1]  # where its clients look


def test_keys_are_passwords_and_options_belong_to_a_key():
    other = "abcdefghij0123456789"
    with running(_two_models(), keys=(KEY, other)) as served:
        stranger = webuiapi.WebUIApi(port=served.port)
        with pytest.raises(RuntimeError, match=r"401.*detail"):
            stranger.txt2img(prompt="a")
        clients = [webuiapi.WebUIApi(port=served.port, username="me", password=key) for key in (KEY, other)]
        assert [client.util_get_current_model() for client in clients] == ["scenes", "scenes"]
        clients[0].util_set_model("small")
        assert [client.util_get_current_model() for client in clients] == ["small", "scenes"]
        found = [client.txt2img(prompt="a", width=8, height=8).info["sd_model_name"] for client in clients]
        assert found == ["small", "scenes"]
        chosen = clients[1].txt2img(prompt="a", override_settings={"sd_model_checkpoint": "small.safetensors"})
        assert chosen.info["sd_model_name"] == "small"
        assert "not served" in clients[0].set_options({"sd_model_checkpoint": "none"})["detail"]
        assert clients[0].util_get_current_model() == "small"
        # A session is that of the key, however it is sent.
        clients[0].set_auth("another", KEY)
        assert clients[0].util_get_current_model() == "small"
        answer = httpx.get(f"{served.url}/sdapi/v1/options", headers={"Authorization": f"Bearer {KEY}"})
        assert answer.json()["sd_model_checkpoint"] == "small"


def _two_models() -> StubService:
    scenes = StubService().models["scenes"]
    return StubService(models=[scenes, replace(scenes, name="small")])


def test_progress_skip_and_interrupt():
    with running(StubService(seconds=0.02)) as served:
        client = webuiapi.WebUIApi(port=served.port)
        idle = client.get_progress()
        assert (idle["progress"], idle["eta_relative"], idle["state"]["job_count"]) == (0.0, 0.0, 0)

        results: list[Any] = []
        work = threading.Thread(
            target=lambda: results.append(client.txt2img(prompt="a", steps=150, n_iter=3, width=8, height=8, seed=1))
        )
        work.start()
        other = webuiapi.WebUIApi(port=served.port)
        # A preview is there after a quarter of the steps.
        found = _until(other.get_progress, lambda answer: answer["current_image"] is not None)
        assert 0 < found["progress"] < 1
        assert found["eta_relative"] > 0
        assert found["state"]["job_count"] == 3
        assert found["state"]["sampling_steps"] == 150
        assert other.custom_get("sdapi/v1/progress?skip_current_image=true")["current_image"] is None
        other.skip()
        found = _until(other.get_progress, lambda answer: answer["state"]["job_no"] == 1)
        assert found["state"]["skipped"] is True
        assert found["state"]["interrupted"] is False
        other.interrupt()
        work.join(20)
        assert len(results[0].images) == 3  # previews of what was ended
        assert not served.service.unfinished
        assert other.get_progress()["progress"] == 0.0


class Halved(StubService):
    """An edit that takes half of the steps that were asked for, as its strength says."""

    def submit(self, jobs: Sequence[Job]) -> list[Generation]:
        return super().submit([replace(job, steps=job.steps // 2) for job in jobs])


def test_the_progress_of_an_edit_is_that_of_the_steps_it_takes():
    job = Job("1", "scenes", "a", steps=20)
    call, session = Call("img2img", [job]), Session()
    session.calls.append(call)
    (generation,) = Halved().submit([job])

    async def watch() -> list[tuple[float, int, int]]:
        found = []
        waiting = asyncio.ensure_future(call._follow(generation))
        while not waiting.done():
            answer = await session.progress(False)
            found.append((answer["progress"], answer["state"]["sampling_step"], answer["state"]["sampling_steps"]))
            await asyncio.sleep(0)
        return found

    found = asyncio.run(watch())
    assert (0.5, 5, 10) in found
    assert found[-1] == (1.0, 10, 10)


def test_an_interrupt_before_the_first_preview():
    """Clients take the first image of an answer: it is one in which nothing is to be seen yet."""
    with running(StubService(seconds=0.02)) as served:
        client, results = webuiapi.WebUIApi(port=served.port), list[Any]()
        image, mask = Image.new("RGB", (16, 8)), Image.new("L", (16, 8), 255)
        edit: dict[str, Any] = {"images": [image], "mask_image": mask}
        for work in (
            lambda: client.txt2img(prompt="a", steps=200, batch_size=2, width=32, height=24, seed=3),
            lambda: client.img2img(prompt="a", steps=200, width=32, height=32, **edit),
        ):
            client.set_options({"live_previews_enable": False})
            thread = threading.Thread(target=lambda work=work: results.append(work()))
            thread.start()
            _until(client.get_progress, lambda answer: answer["state"]["sampling_step"] > 0)
            client.interrupt()
            thread.join(20)
    assert [result.image.size for result in results] == [(32, 24), (16, 8)]
    assert [len(result.images) for result in results] == [1, 1]
    assert results[0].image.getpixel((0, 0)) == (128, 128, 128)
    assert results[0].info["all_seeds"] == [3]


def _until(ask: Callable[[], Any], done: Callable[[Any], bool]) -> Any:
    end = time.monotonic() + 20
    while time.monotonic() < end:
        answer = ask()
        if done(answer):
            return answer
        time.sleep(0.005)
    raise AssertionError(f"it did not happen: {answer}")
