"""What callbacks read and change: guidance, interruption, both halves of the embeddings, alone and in threads."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import diffusers.callbacks
import pytest
import torch
from torch import Tensor

import impasto
from impasto import DDIMScheduler, PixArtAlphaPipeline, PixArtSigmaImg2ImgPipeline, PixArtSigmaPipeline
from impasto.callbacks import MultiPipelineCallbacks, PipelineCallback, SDCFGCutoffCallback
from impasto.errors import ConfigurationError, InputError
from impasto.pipelines.sampling import Run

from ..tiny import tiny_pipeline
from ..tiny_glm import pipelines

STEPS = 4


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pixart(cls: Any = PixArtSigmaPipeline) -> Any:
    return tiny_pipeline(cls, scheduler=DDIMScheduler(clip_sample=False))


def edits() -> tuple[Any, dict[str, Any]]:
    image = torch.rand(1, 3, 16, 16, generator=seeded(5))
    return pixart(PixArtSigmaImg2ImgPipeline), {"prompt": "a cat", "image": image, "strength": 0.5}


def repaint() -> tuple[Any, dict[str, Any]]:
    image, mask = torch.rand(1, 3, 16, 16, generator=seeded(5)), torch.zeros(1, 1, 16, 16)
    mask[..., :8] = 1.0
    return pixart(impasto.PixArtSigmaInpaintPipeline), {"prompt": "a cat", "image": image, "mask_image": mask}


def glm() -> tuple[Any, dict[str, Any]]:
    given = {"height": 64, "width": 96, "prior_token_ids": torch.zeros(1, 24, dtype=torch.long)}
    return pipelines()[0], {"prompt": 'a sign "open"', **given}


#: A pipeline and the arguments of its calls.
KINDS: dict[str, Callable[[], tuple[Any, dict[str, Any]]]] = {
    "sigma": lambda: (pixart(), {"prompt": "a cat"}),
    "alpha": lambda: (pixart(PixArtAlphaPipeline), {"prompt": "a cat"}),
    "batch": lambda: (pixart(), {"prompt": ["a cat", "a red cube"], "num_images_per_prompt": 2}),
    "img2img": edits,
    "inpaint": repaint,
    "glm": glm,
}


def call(pipe: Any, arguments: dict[str, Any], **options: Any) -> Any:
    settings = {"num_inference_steps": STEPS, "guidance_scale": 3.0, "output_type": "latent", "generator": seeded()}
    return pipe(**{**settings, **arguments, **options}).images


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> tuple[Any, dict[str, Any]]:
    return KINDS[request.param]()


@pytest.fixture
def scales(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The guidance scale of each step that is taken, as the run uses it."""
    found: list[float] = []
    plain = Run.inputs

    def inputs(run: Run) -> Any:
        found.append(run.guidance[run.index])
        x, halves = plain(run)
        assert sum(half.copies for half in halves) == (2 if found[-1] > 1 else 1)
        return x, halves

    monkeypatch.setattr(Run, "inputs", inputs)
    return found


def test_a_callback_turns_guidance_off_and_on(kind: tuple[Any, dict[str, Any]], scales: list[float]) -> None:
    pipe, arguments = kind

    def change(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe._guidance_scale = [0.0, 5.0, 1.0][min(step, 2)]
        return tensors

    changed = call(pipe, arguments, callback_on_step_end=change)
    count = pipe.num_timesteps
    assert scales == [3.0, 0.0, 5.0, 1.0][:count]
    assert not torch.equal(changed, call(pipe, arguments))


@pytest.mark.parametrize("module", [diffusers.callbacks, impasto.callbacks], ids=["theirs", "ours"])
def test_the_cutoff_of_guidance(module: Any, kind: tuple[Any, dict[str, Any]], scales: list[float]) -> None:
    pipe, arguments = kind
    cutoff = module.SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=0)
    found = call(pipe, arguments, callback_on_step_end=cutoff)
    count = pipe.num_timesteps
    assert scales == [3.0] + [0.0] * (count - 1)
    assert pipe.guidance_scale == 0.0
    assert not pipe.do_classifier_free_guidance

    def off(pipe: Any, step: int, *_: Any) -> None:  # the same, without touching the embeddings
        pipe._guidance_scale = 0.0

    assert torch.equal(call(pipe, arguments, callback_on_step_end=off), found)
    scales.clear()
    call(pipe, arguments, callback_on_step_end=module.SDCFGCutoffCallback(cutoff_step_ratio=0.5))
    assert scales == [3.0] * (count // 2 + 1) + [0.0] * (count - count // 2 - 1)


@pytest.mark.parametrize("module", [diffusers.callbacks, impasto.callbacks], ids=["theirs", "ours"])
def test_several_callbacks(module: Any) -> None:
    class Double(module.PipelineCallback):  # type: ignore[misc]
        tensor_inputs: ClassVar = ["latents"]

        def callback_fn(self, pipeline: Any, step: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            if step == STEPS - 1:
                tensors["latents"] = tensors["latents"] * 2
            return tensors

    pipe, arguments = pixart(), {"prompt": "a cat"}
    cutoff = module.SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=1)
    alone = call(pipe, arguments, callback_on_step_end=cutoff)
    both = call(pipe, arguments, callback_on_step_end=module.MultiPipelineCallbacks([cutoff, Double()]))
    assert torch.equal(both, 2 * alone)


def test_the_facts_of_a_call(kind: tuple[Any, dict[str, Any]]) -> None:
    pipe, arguments = kind
    assert (pipe.guidance_scale, pipe.num_timesteps, pipe.current_timestep, pipe.attention_kwargs) == (None,) * 4
    seen: list[Any] = []

    def read(pipe: Any, step: int, timestep: Tensor, tensors: Any) -> None:
        seen.append((pipe.num_timesteps, pipe.guidance_scale, pipe.do_classifier_free_guidance, pipe.interrupt))
        assert pipe.current_timestep == timestep

    call(pipe, arguments, callback_on_step_end=read)
    count = len(seen)
    assert seen == [(count, 3.0, True, False)] * count
    assert (pipe.num_timesteps, pipe.guidance_scale, pipe.do_classifier_free_guidance) == (count, 3.0, True)
    assert pipe.current_timestep is None
    call(pipe, arguments, guidance_scale=1.0)
    assert not pipe.do_classifier_free_guidance
    assert (pipe._num_timesteps, pipe._guidance_scale) == (count, 1.0)


def test_attention_kwargs_are_those_of_the_call() -> None:
    pipe, arguments = glm()
    call(pipe, arguments, attention_kwargs={"scale": 1.0})
    assert pipe.attention_kwargs == {"scale": 1.0}


def test_interruption_by_the_private_name(kind: tuple[Any, dict[str, Any]]) -> None:
    pipe, arguments = kind
    steps: list[Tensor] = []

    def stop(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        steps.append(tensors["latents"])
        pipe._interrupt = True
        assert pipe.interrupt
        return tensors

    assert torch.equal(call(pipe, arguments, callback_on_step_end=stop), steps[-1])
    assert len(steps) == 1


# --- embeddings ---


def swapped(form: str, embeds: Tensor, batch: int) -> Tensor:
    return embeds if form == "both" else embeds[-batch:]


@pytest.mark.parametrize("form", ["both", "positive"])
def test_embeddings_are_handed_over_as_both_halves(kind: tuple[Any, dict[str, Any]], form: str) -> None:
    """Handed back as they came or without their first half, they change nothing; changed, they change the image."""
    pipe, arguments = kind
    masked = "prompt_attention_mask" in pipe._callback_tensor_inputs
    names = ["prompt_embeds", *(["prompt_attention_mask"] if masked else [])]
    rows: list[int] = []

    def unchanged(pipe: Any, step: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        rows.append(len(tensors["prompt_embeds"]))
        return {name: swapped(form, value, rows[-1] // 2).clone() for name, value in tensors.items()}

    options = {"callback_on_step_end_tensor_inputs": names}
    plain = call(pipe, arguments)
    torch.testing.assert_close(
        call(pipe, arguments, callback_on_step_end=unchanged, **options), plain, rtol=1e-5, atol=1e-5
    )
    assert set(rows) == {2 * len(plain)}

    def scaled(pipe: Any, step: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        embeds = tensors["prompt_embeds"]
        assert len(embeds) == (2 if pipe.do_classifier_free_guidance else 1) * len(plain)
        return {"prompt_embeds": swapped(form, embeds * 1.5, len(embeds) // 2)} if step == 0 else {}

    changed = call(pipe, arguments, callback_on_step_end=scaled, **options)
    assert not torch.allclose(changed, plain, atol=1e-4)


def test_halves_are_negative_then_positive() -> None:
    pipe = pixart()
    with torch.no_grad():
        embeds = pipe.encode_prompt(["a cat", "a dog"], negative_prompt="a cube", clean_caption=True)
    expected = torch.cat([embeds.negative_prompt_embeds, embeds.prompt_embeds])
    masks = torch.cat([embeds.negative_prompt_attention_mask, embeds.prompt_attention_mask])

    def check(pipe: Any, step: int, t: Any, tensors: dict[str, Any]) -> None:
        assert torch.equal(tensors["prompt_embeds"], expected)
        assert torch.equal(tensors["prompt_attention_mask"], masks)
        assert torch.equal(tensors["negative_prompt_embeds"], embeds.negative_prompt_embeds)

    names = ["prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds"]
    arguments = {"prompt": ["a cat", "a dog"], "negative_prompt": "a cube"}
    call(pipe, arguments, callback_on_step_end=check, callback_on_step_end_tensor_inputs=names)


@pytest.mark.parametrize("longer", [0, 6])
def test_halves_of_different_lengths(longer: int) -> None:
    """What is handed over is padded to one length; what comes back fits its own mask again."""
    pipe = pixart()
    with torch.no_grad():
        found = pipe.encode_prompt("grey", do_classifier_free_guidance=False, max_sequence_length=6 + longer)
    given = {
        "prompt": "a cat",
        "max_sequence_length": 9,
        "negative_prompt_embeds": found.prompt_embeds,
        "negative_prompt_attention_mask": found.prompt_attention_mask,
    }
    pipe = pixart(PixArtAlphaPipeline)
    names = {"callback_on_step_end_tensor_inputs": ["prompt_embeds"]}

    def scaled(pipe: Any, step: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        return {"prompt_embeds": tensors["prompt_embeds"] * 1.0}

    plain = call(pipe, given)
    assert torch.equal(call(pipe, given, callback_on_step_end=scaled, **names), plain)
    call(pipe, given, callback_on_step_end=SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=0))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_embeddings_that_are_changed_in_place_are_used(mode: Any, scale: float) -> None:
    pipe = pixart()

    def change(pipe: Any, step: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        tensors["prompt_embeds"].mul_(1.5 if step == 0 else 1.0)
        return tensors

    def replace(pipe: Any, step: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        return {"prompt_embeds": tensors["prompt_embeds"] * 1.5} if step == 0 else {}

    names = {"callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    with mode():
        plain, *found = (
            call(pipe, {"prompt": "a cat"}, guidance_scale=scale, callback_on_step_end=one, **names)
            for one in (None, change, replace)
        )
    assert torch.equal(*found)
    assert not torch.equal(plain, found[0])


def test_one_row_for_all_images() -> None:
    pipe = pixart()
    other = pipe.encode_prompt("a dog").prompt_embeds
    names = {"callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    prompts = {"prompt": ["a cat", "a red cube"]}

    def one(pipe: Any, step: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        return {"prompt_embeds": other}

    def both(pipe: Any, step: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        return {"prompt_embeds": other.repeat(2, 1, 1)}

    found = [call(pipe, prompts, callback_on_step_end=each, **names) for each in (one, both)]
    assert torch.equal(*found)
    for rows in (3, 5):
        with pytest.raises(InputError, match="prompt_embeds that callback_on_step_end returned"):
            call(pipe, prompts, callback_on_step_end=lambda *_, n=rows: {"prompt_embeds": other.repeat(n, 1, 1)})
    with pytest.raises(InputError, match="prompt_embeds that callback_on_step_end returned"):
        call(  # there is no negative half
            pipe, prompts, guidance_scale=1.0, callback_on_step_end=lambda *_: {"prompt_embeds": other.repeat(4, 1, 1)}
        )


def test_without_negative_embeddings_a_scale_has_no_effect() -> None:
    pipe = pixart()

    def raise_it(pipe: Any, *_: Any) -> None:
        pipe._guidance_scale = 7.0

    plain = call(pipe, {"prompt": "a cat"}, guidance_scale=1.0)
    assert torch.equal(call(pipe, {"prompt": "a cat"}, guidance_scale=1.0, callback_on_step_end=raise_it), plain)


# --- whose call it is ---


def test_threads_read_and_change_their_own_calls(scales: list[float]) -> None:
    pipe = pixart()
    ready = threading.Barrier(3, timeout=60)

    def run(steps: int) -> tuple[Any, ...]:
        seen = set()

        def change(pipe: Any, step: int, *_: Any) -> None:
            ready.wait() if step < 3 else None
            seen.add((pipe.num_timesteps, pipe.guidance_scale))
            pipe._guidance_scale = float(steps)

        call(pipe, {"prompt": "a cat"}, num_inference_steps=steps, callback_on_step_end=change)
        ready.wait()
        return seen, pipe.num_timesteps, pipe.guidance_scale

    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(run, (3, 4, 5)))
    assert found == [({(n, 3.0), (n, float(n))}, n, float(n)) for n in (3, 4, 5)]
    assert pipe.num_timesteps in (3, 4, 5)  # of a thread without a call of its own: the latest


def test_a_call_in_a_callback_has_facts_of_its_own() -> None:
    pipe = pixart()
    counts: list[Any] = []

    def preview(pipe: Any, step: int, *_: Any) -> None:
        call(pipe, {"prompt": "a dog"}, num_inference_steps=2, guidance_scale=1.0)
        for _step in pipe.denoise(torch.randn(1, 4, 8, 8), pipe.encode_prompt("a dog"), num_inference_steps=3):
            pass
        counts.append((pipe.num_timesteps, pipe.guidance_scale))

    call(pipe, {"prompt": "a cat"}, callback_on_step_end=preview)
    assert counts == [(STEPS, 3.0)] * STEPS


def test_a_loop_that_its_caller_drives(scales: list[float]) -> None:
    pipe = pixart()
    call(pipe, {"prompt": "a cat"}, num_inference_steps=2)
    scales.clear()
    with torch.no_grad():
        embeds = pipe.encode_prompt("a cat")
    for step in pipe.denoise(torch.randn(1, 4, 8, 8), embeds, num_inference_steps=3, guidance_scale=2.0):
        assert (pipe.num_timesteps, pipe.current_timestep) == (3, step.timestep)
        pipe._guidance_scale = 1.0
    assert scales == [2.0, 1.0, 1.0]
    assert (pipe.num_timesteps, pipe.guidance_scale) == (3, 1.0)


def test_a_loop_whose_negative_embeddings_come_and_go(scales: list[float]) -> None:
    pipe = pixart()
    with torch.no_grad():
        embeds = pipe.encode_prompt("a cat")
    alone = embeds._replace(negative_prompt_embeds=None, negative_prompt_attention_mask=None)
    for step in pipe.denoise(torch.randn(1, 4, 8, 8), embeds, num_inference_steps=3, guidance_scale=2.0):
        step.embeds = alone if step.index == 0 else embeds
    assert scales == [2.0, 1.0, 2.0]


def test_a_scale_for_loops_by_hand() -> None:
    pipe = pixart()
    pipe._guidance_scale = 7.5
    assert pipe.guidance_scale == 7.5
    assert pipe.do_classifier_free_guidance
    with pytest.raises(InputError, match="guidance_scale"):
        pipe._guidance_scale = float("nan")


# --- impasto.callbacks ---


def test_what_callbacks_refuse() -> None:
    assert {"cutoff_step_ratio": 0.25, "cutoff_step_index": None}.items() <= SDCFGCutoffCallback(0.25).config.items()
    for ratio, index in ((None, None), (0.5, 2)):
        with pytest.raises(ConfigurationError, match="either cutoff_step_ratio or cutoff_step_index"):
            SDCFGCutoffCallback(ratio, index)
    with pytest.raises(ConfigurationError, match="cutoff_step_ratio"):
        SDCFGCutoffCallback(1.5)
    with pytest.raises(InputError, match="tensor_inputs"):
        MultiPipelineCallbacks([print])
    with pytest.raises(NotImplementedError, match="callback_fn"):
        PipelineCallback()(None, 0, None, {})


def test_a_scale_that_one_thread_sets_is_not_that_of_another() -> None:
    pipe = tiny_pipeline(PixArtSigmaPipeline, scheduler=DDIMScheduler())
    noise, embeds = torch.randn(1, 4, 8, 8), pipe.encode_prompt("a cat")
    mine = pipe.denoise(noise, embeds, num_inference_steps=3, guidance_scale=4.5)
    next(mine)

    def elsewhere() -> float | None:
        theirs = pipe.denoise(noise, embeds, num_inference_steps=3, guidance_scale=4.5)
        next(theirs)
        pipe._guidance_scale = 1.0
        return pipe.guidance_scale

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(elsewhere).result(timeout=60) == 1.0
    assert pipe.guidance_scale == 4.5
    *_, last = mine
    *_, expected = pipe.denoise(noise, embeds, num_inference_steps=3, guidance_scale=4.5)
    assert torch.equal(last.latents, expected.latents)


@pytest.mark.long
def test_a_loop_that_is_left_open_ends_with_the_process() -> None:
    script = """
import torch
from impasto import DDIMScheduler, PixArtSigmaPipeline
from tests.tiny import tiny_pipeline
pipe = tiny_pipeline(PixArtSigmaPipeline, scheduler=DDIMScheduler())
loop = pipe.denoise(torch.randn(1, 4, 8, 8), pipe.encode_prompt("a cat"), num_inference_steps=3)
next(loop)
"""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_a_callback_among_several_may_return_some_tensors_or_none() -> None:
    class Silent(PipelineCallback):
        tensor_inputs: ClassVar = ["latents"]

        def callback_fn(self, pipeline: Any, step: int, t: Any, tensors: dict[str, Any]) -> Any:
            return None if step else {"latents": tensors["latents"]}

    pipe, arguments = pixart(), {"prompt": "a cat"}
    cutoff = SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=1)
    alone = call(pipe, arguments, callback_on_step_end=cutoff)
    assert torch.equal(call(pipe, arguments, callback_on_step_end=MultiPipelineCallbacks([Silent(), cutoff])), alone)
