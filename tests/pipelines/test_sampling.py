"""Runs: each owns its state, so loops take turns and threads share a pipeline, with the same images to the bit."""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

import impasto
from impasto import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    LCMScheduler,
    PixArtAlphaPipeline,
    PixArtSigmaImg2ImgPipeline,
    PixArtSigmaPipeline,
)
from impasto.pipelines.sampling import DenoisingStep, own_scheduler
from impasto.transforms.guidance_interval import guide_between
from impasto.transforms.step_cache import cache_steps

from ..tiny import tiny_pipeline, tiny_transformer, tiny_vae
from ..tiny_glm import pipelines, prior_parts

SCHEDULERS: dict[str, Callable[[], Any]] = {
    "DPM-Solver++": DPMSolverMultistepScheduler,
    "SDE DPM-Solver++": lambda: DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"),
    "DDIM": DDIMScheduler,
    "LCM": LCMScheduler,
    "DDPM": DDPMScheduler,
    "Euler": diffusers.EulerDiscreteScheduler,
    "Euler ancestral": diffusers.EulerAncestralDiscreteScheduler,
    "UniPC": diffusers.UniPCMultistepScheduler,
    "PNDM": diffusers.PNDMScheduler,
}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pixart(**parts: Any) -> PixArtSigmaPipeline:
    pipe = tiny_pipeline(PixArtSigmaPipeline, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pixart_loop(pipe: Any, prompt: str, steps: int, seed: int) -> Iterator[DenoisingStep]:
    noise = torch.randn(1, 4, 8, 8, generator=seeded(seed))
    with torch.no_grad():
        embeds = pipe.encode_prompt(prompt)
    return pipe.denoise(noise, embeds, num_inference_steps=steps, generator=seeded(seed), eta=0.5)  # type: ignore[no-any-return]


def glm_loop(pipe: Any, prompt: str, steps: int, seed: int) -> Iterator[DenoisingStep]:
    noise = torch.randn(1, 4, 8, 12, generator=seeded(seed))
    tokens = torch.randint(32, (1, 24), generator=seeded(seed))
    embeds = pipe.encode_prompt(prompt)
    return pipe.denoise(noise, embeds, tokens, num_inference_steps=steps, generator=seeded(seed))  # type: ignore[no-any-return]


def latents(steps: Iterator[DenoisingStep]) -> list[Tensor]:
    return [step.latents for step in steps]


def check_turns(loop: Callable[..., Iterator[DenoisingStep]], pipe: Any) -> None:
    both = (("a red cube", 8, 1), ("a cat", 5, 2))
    alone = [latents(loop(pipe, *which)) for which in both]
    assert [len(steps) for steps in alone] == [8, 5]
    pairs = list(zip_longest(*(loop(pipe, *which) for which in both)))
    for index, expected in enumerate(alone):
        found = [pair[index].latents for pair in pairs if pair[index] is not None]
        assert all(map(torch.equal, found, expected))


# --- turns ---


@pytest.mark.parametrize("name", SCHEDULERS)
def test_loops_of_one_pixart_pipeline_take_turns(name: str) -> None:
    pipe = pixart(scheduler=SCHEDULERS[name]())
    if name == "PNDM":  # has more calls than steps
        pairs = list(zip_longest(pixart_loop(pipe, "a cat", 5, 1), pixart_loop(pipe, "a red cube", 4, 2)))
        assert torch.equal(pairs[-1][0].latents, latents(pixart_loop(pipe, "a cat", 5, 1))[-1])
    else:
        check_turns(pixart_loop, pipe)


@pytest.mark.parametrize("ours", [True, False])
def test_loops_of_one_glm_image_pipeline_take_turns(ours: bool) -> None:
    pipe, _ = pipelines()
    if not ours:
        pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**pipe.scheduler.config)
    check_turns(glm_loop, pipe)


@pytest.mark.parametrize("method", ["interval", "taylor", "first-block"])
def test_a_step_cache_and_a_guidance_interval_are_decided_for_each_run(method: Any) -> None:
    glm, _ = pipelines()
    transformer = tiny_transformer(num_layers=3)
    for loop, pipe in ((pixart_loop, pixart(transformer=transformer, scheduler=DDIMScheduler())), (glm_loop, glm)):
        plain = latents(loop(pipe, "a red cube", 8, 1))[-1]
        with cache_steps(pipe, method), guide_between(pipe, 0.2, 0.8):
            assert not torch.equal(latents(loop(pipe, "a red cube", 8, 1))[-1], plain)
            check_turns(loop, pipe)
        assert torch.equal(latents(loop(pipe, "a red cube", 8, 1))[-1], plain)


def test_a_call_in_a_callback_does_not_disturb_its_run() -> None:
    pipe = pixart(scheduler=DPMSolverMultistepScheduler())
    call: dict[str, Any] = {"prompt": "a cat", "output_type": "latent", "num_inference_steps": 5}
    alone = pipe(**call, generator=seeded(0)).images

    def preview(pipe: Any, *_: Any) -> None:
        pipe("a red cube", num_inference_steps=2, output_type="pt")

    assert torch.equal(pipe(**call, generator=seeded(0), callback_on_step_end=preview).images, alone)


# --- the pipeline's own scheduler ---


@pytest.mark.parametrize("name", ["DPM-Solver++", "LCM", "Euler", "UniPC"])
def test_the_scheduler_reads_as_that_of_the_last_run_and_no_run_reads_it(name: str) -> None:
    pipe = pixart(scheduler=SCHEDULERS[name]())
    call = {"output_type": "latent", "num_inference_steps": 4}
    expected = pipe("a cat", generator=seeded(0), **call).images
    reference = SCHEDULERS[name]()
    reference.set_timesteps(4)
    assert torch.equal(pipe.scheduler.timesteps, reference.timesteps)
    assert pipe.scheduler.num_inference_steps == 4
    if hasattr(reference, "sigmas"):
        assert torch.equal(pipe.scheduler.sigmas, reference.sigmas)

    def spoil(pipe: Any, *_: Any) -> None:
        pipe.scheduler.timesteps.zero_()
        pipe.scheduler.set_timesteps(7)

    assert torch.equal(pipe("a cat", generator=seeded(0), callback_on_step_end=spoil, **call).images, expected)
    assert torch.equal(pipe.scheduler.timesteps, reference.timesteps)  # read as the call's after it, too


def test_nothing_of_a_call_stays_in_the_pipeline() -> None:
    pipe = pixart()
    before = {name: id(value) for name, value in vars(pipe).items()}
    pipe("a cat", num_inference_steps=2, output_type="pt", callback_on_step_end=lambda *_: {})
    assert {name: id(value) for name, value in vars(pipe).items()} == before
    assert pipe.in_progress == []
    loop = pixart_loop(pipe, "a cat", 3, 0)
    next(loop)
    loop.close()  # type: ignore[attr-defined]
    assert pipe.in_progress == []
    copy.deepcopy(pipe)


# --- threads ---


def threaded(calls: list[Callable[[], Any]]) -> list[Any]:
    with ThreadPoolExecutor(4) as pool:
        return [future.result(timeout=120) for future in [pool.submit(call) for call in calls]]


@pytest.mark.long
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["DPM-Solver++", "DDIM"])
def test_four_threads_share_a_pixart_pipeline(name: str, dtype: torch.dtype) -> None:
    pipe = pixart(scheduler=SCHEDULERS[name](), vae=tiny_vae(force_upcast=True)).to(dtype)

    def call(i: int) -> Callable[[], Tensor]:
        prompt = ["a red cube", "a cat", "two dogs on a wall"][i % 3]
        steps, size = 2 + i % 5, 16 + 4 * (i % 2)
        arguments = {"height": size, "width": 16, "use_resolution_binning": False, "output_type": "pt"}
        return lambda: pipe(prompt, num_inference_steps=steps, generator=[seeded(i)], **arguments).images

    calls = [call(i) for i in range(32 if dtype == torch.float32 else 16)]
    expected = [one() for one in calls]
    assert all(map(torch.equal, threaded(calls), expected))
    assert pipe.vae.dtype == dtype


@pytest.mark.long
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("calls", [32, pytest.param(8, id="8 with the prior")])
def test_four_threads_share_a_glm_image_pipeline(calls: int, dtype: torch.dtype) -> None:
    pipe, _ = pipelines()
    pipe.set_progress_bar_config(disable=True)
    prior: dict[str, Tensor] = {"prior_token_ids": torch.zeros(1, 24, dtype=torch.long)}
    if calls == 8:
        prior = {}
        for name, part in prior_parts().items():
            setattr(pipe, name, part)
    pipe.to(dtype)

    def call(i: int) -> Callable[[], Tensor]:
        arguments = {"height": 64, "width": 96, "output_type": "pt", "num_inference_steps": 2 + i % 4, **prior}
        return lambda: pipe(f'"{"abc"[i % 3]}"', generator=seeded(i), **arguments).images

    each = [call(i) for i in range(calls if dtype == torch.float32 else calls // 2)]
    expected = [one() for one in each]
    assert all(map(torch.equal, threaded(each), expected))


def test_under_offload_calls_wait_for_each_other() -> None:
    pipe = pixart(scheduler=DDIMScheduler())
    call: dict[str, Any] = {"output_type": "pt", "num_inference_steps": 3}
    expected = [pipe("a cat", generator=seeded(i), **call).images for i in range(6)]
    pipe.enable_sequential_cpu_offload(device="cpu")
    inside: list[int] = []

    def watch(_: Any, step: int, *__: Any) -> None:
        inside.append(threading.get_ident())

    calls = [
        lambda i=i: pipe("a cat", generator=seeded(i), callback_on_step_end=watch, **call).images for i in range(6)
    ]
    assert all(map(torch.equal, threaded(calls), expected))
    assert all(len({*inside[i : i + 3]}) == 1 for i in range(0, 18, 3))  # no call in the middle of another


def test_a_schedule_may_be_shown_while_a_scheduler_is_copied() -> None:
    """Many times, with a thread switch at nearly every instruction: the race is a matter of a few of them."""
    interval, cpu = sys.getswitchinterval(), torch.device("cpu")
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(50):
            scheduler = DDIMScheduler()
            copies = threaded([lambda s=scheduler: own_scheduler(s, cpu, num_inference_steps=4) for _ in range(16)])
            assert all(own.num_inference_steps == 4 for own in [scheduler, *copies])
    finally:
        sys.setswitchinterval(interval)


# --- interruption ---


def test_a_callback_interrupts_its_own_run_only() -> None:
    pipe = pixart(scheduler=DDIMScheduler())
    ready = threading.Barrier(2, timeout=60)
    steps: dict[str, int] = {"stopped": 0, "other": 0}

    def call(name: str) -> Tensor:
        def count(pipe: Any, step: int, *_: Any) -> None:
            steps[name] += 1
            if step == 0:
                ready.wait()
            if name == "stopped" and step == 1:
                pipe.interrupt = True
                assert pipe.interrupt

        return pipe("a cat", num_inference_steps=6, callback_on_step_end=count, output_type="pt").images

    images = threaded([lambda: call("stopped"), lambda: call("other")])
    assert steps == {"stopped": 2, "other": 6}
    assert all(image.isfinite().all() for image in images)  # what there was is decoded
    pipe("a cat", num_inference_steps=2, output_type="latent")  # either of the two may have been the last call
    assert not pipe.interrupt


def test_an_interruption_from_elsewhere_ends_all_runs() -> None:
    pipe = pixart(scheduler=DDIMScheduler())
    started, go = threading.Barrier(3, timeout=60), threading.Event()
    steps: list[int] = []

    def hold(_: Any, step: int, *__: Any) -> None:
        steps.append(step)
        if step == 1:
            started.wait()
            assert go.wait(60)

    loop = pixart_loop(pipe, "a cat", 5, 0)
    next(loop)
    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(pipe, "a cat", num_inference_steps=5, callback_on_step_end=hold) for _ in range(2)]
        started.wait()
        pipe.interrupt = True
        go.set()
        for future in futures:
            future.result(timeout=60)
    assert sorted(steps) == [0, 0, 1, 1]
    assert list(loop) == []
    assert pipe.interrupt  # of the last one, until the next begins
    assert len(latents(pixart_loop(pipe, "a cat", 3, 0))) == 3


# --- the autoencoder ---


class Overflowing(nn.Module):
    """A float16 autoencoder that overflows in 16 bits."""

    def __init__(self) -> None:
        super().__init__()
        self.config = {"block_out_channels": [1, 1], "scaling_factor": 1.0, "force_upcast": True}
        self.conv = nn.Conv2d(4, 3, 1)
        nn.init.constant_(self.conv.weight, 3e4)
        nn.init.zeros_(self.conv.bias)

    def decode(self, z: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        return (self.conv(z) / 1e6,)


@pytest.mark.parametrize("autocast", [None, torch.float16, torch.bfloat16])
def test_a_float16_autoencoder_that_overflows_works_under_any_autocast(autocast: torch.dtype | None) -> None:
    pipe = pixart(vae=Overflowing().half())
    weight = pipe.vae.conv.weight
    z = torch.full((1, 4, 8, 8), 3.0)
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        image = pipe.decode(z)
    assert torch.equal(image, torch.full((1, 3, 8, 8), 12 * float(weight[0, 0]) / 1e6))
    assert pipe.vae.conv.weight is weight
    assert weight.dtype == torch.float16


# --- other libraries' transformers ---


@pytest.mark.parametrize("alpha", [True, False])
def test_a_foreign_transformer_runs_as_it_is(alpha: bool) -> None:
    cls = PixArtAlphaPipeline if alpha else PixArtSigmaPipeline
    ours = tiny_transformer(use_additional_conditions=alpha)
    theirs = diffusers.PixArtTransformer2DModel.from_config(dict(ours.config))
    theirs.load_state_dict(ours.state_dict())
    calls: list[int] = []
    theirs.register_forward_hook(lambda *_: calls.append(1))
    call: dict[str, Any] = {"num_inference_steps": 3, "output_type": "latent"}
    expected, found = (
        tiny_pipeline(cls, transformer=transformer)("a cat", generator=seeded(0), **call).images
        for transformer in (ours, theirs.eval())
    )
    assert len(calls) == 3
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_one_step_model_returns_the_original_sample() -> None:
    pipe = tiny_pipeline(PixArtAlphaPipeline, scheduler=DDPMScheduler())
    latents = torch.randn(1, 4, 8, 8, generator=seeded(0))
    call: dict[str, Any] = {"latents": latents, "guidance_scale": 1.0, "output_type": "latent", "timesteps": [400]}
    found = pipe("a cat", **call, generator=seeded(1)).images
    embeds = pipe.encode_prompt("a cat", False, clean_caption=True, max_sequence_length=120)
    with torch.no_grad():
        output = pipe.transformer(latents, embeds[0], torch.tensor([400]), encoder_attention_mask=embeds[1])[0]
    scheduler = DDPMScheduler()
    scheduler.set_timesteps(timesteps=[400])
    expected = scheduler.step(output[:, :4], 400, latents, generator=seeded(1)).pred_original_sample
    assert expected is not None
    torch.testing.assert_close(found, expected)


def test_negative_prompts_of_another_length_for_a_foreign_call() -> None:
    pipe = tiny_pipeline(PixArtSigmaPipeline)
    embeds, mask, *_ = pipe.encode_prompt("a dog", max_sequence_length=20)
    arguments: dict[str, Any] = {"negative_prompt": None, "num_inference_steps": 2, "output_type": "latent"}
    arguments |= {"negative_prompt_embeds": embeds, "negative_prompt_attention_mask": mask}
    found = []
    for _ in range(2):
        found.append(pipe("a cat", **arguments, generator=torch.Generator().manual_seed(0)).images)
        pipe.transformer.register_forward_hook(lambda *_: None)  # whose calls get the documented tensors
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)


def test_flow_matching_of_another_library() -> None:
    images = []
    for library in (diffusers, impasto):
        pipe = tiny_pipeline(PixArtSigmaPipeline, scheduler=library.FlowMatchEulerDiscreteScheduler())
        images.append(pipe("a cat", num_inference_steps=2, output_type="latent", generator=seeded(0)).images)
        assert pipe.prepare_latents(1, 4, 16, 16, torch.float32, "cpu", seeded(0)).shape == (1, 4, 8, 8)
    torch.testing.assert_close(images[0], images[1], rtol=1e-4, atol=1e-4)


def test_a_last_sigma_of_zero_is_no_step() -> None:
    pipe = tiny_pipeline(PixArtSigmaImg2ImgPipeline, scheduler=DPMSolverMultistepScheduler())
    taken: dict[bool, list[list[float]]] = {True: [], False: []}
    for strength in (0.34, 0.67, 1.0):
        for ends in (True, False):
            seen: list[float] = []
            pipe(
                "a cat",
                torch.rand(1, 3, 16, 16, generator=seeded(0)),
                strength=strength,
                sigmas=[10.0, 3.0, 1.0, 0.0] if ends else [10.0, 3.0, 1.0],
                output_type="latent",
                callback=lambda i, t, latents, seen=seen: seen.append(float(t)),
            )
            taken[ends].append(seen)
    assert taken[True] == taken[False]
    assert [len(seen) for seen in taken[True]] == [1, 2, 3]
