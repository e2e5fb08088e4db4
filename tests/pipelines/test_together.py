"""Runs that share a forward pass: each is as it would be alone, whatever their sizes, steps, texts and guidance."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image

from impasto import DDIMScheduler, DPMSolverMultistepScheduler, PixArtSigmaPipeline
from impasto.pipelines import glm_image as glm_module
from impasto.pipelines import pixart as pixart_module
from impasto.pipelines.sampling import Edit, Run, advance
from impasto.transforms.step_cache import cache_steps

from ..tiny import tiny_pipeline
from ..tiny_glm import pipelines

#: Prompt, height and width of the latents, steps and guidance scale.
PIXART = [("a cat", (8, 8), 4, 4.5), ("a very large red cube on a blue ball", (4, 12), 6, 1.0), ("", (12, 6), 5, 2.0)]

GLM_IMAGE = [('"a"', (8, 12), 1.5), ('"long text"', (12, 8), 1.0), ("", (8, 8), 3.0)]


def pixart_runs(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> list[Run]:
    """Runs at different steps of their schedules."""
    monkeypatch.setattr(pixart_module, "denoising_steps", lambda pipe, begin: begin())
    runs = []
    for i, (prompt, size, steps, scale) in enumerate(PIXART):
        noise = torch.randn(1 + i % 2, 4, *size, generator=torch.Generator().manual_seed(i)).to(pipe.device)
        embeds = pipe.encode_prompt(prompt, num_images_per_prompt=len(noise))
        runs.append(pipe.denoise(noise, embeds, num_inference_steps=steps, guidance_scale=scale))
        for _ in range(i):
            advance([runs[-1]])
    return runs


def check(together: list[Run], apart: list[Run], steps: int) -> None:
    for _ in range(steps):
        advance(together)
        for run in apart:
            advance([run])
        for ours, alone in zip(together, apart, strict=True):
            assert ours.index == alone.index
            assert ((ours.latents - alone.latents).norm() / alone.latents.norm()).item() <= 1e-5


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("scheduler", [DDIMScheduler, DPMSolverMultistepScheduler])
@torch.no_grad()
def test_pixart_runs_share_a_forward(scheduler: Any, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny_pipeline(PixArtSigmaPipeline, scheduler=scheduler()).to(device)
    calls: list[int] = []
    denoise = pipe.transformer.denoise

    def counted(latents: Any, *others: Any) -> Any:  # a hook would expect tensors, and so an ordinary call
        calls.append(len(latents))
        return denoise(latents, *others)

    monkeypatch.setattr(pipe.transformer, "denoise", counted)
    together, apart = pixart_runs(pipe, monkeypatch), pixart_runs(pipe, monkeypatch)
    calls.clear()
    advance(together[:])
    assert calls == [2 * 1 + 2 + 2 * 1]  # images: two halves, one half of two, two halves
    for run in apart:
        advance([run])
    check(together, apart, 2)


@torch.no_grad()
def test_edits_share_a_forward_with_other_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Text to image, image to image and inpainting: each keeps its own start, image and mask."""
    pipe = tiny_pipeline(PixArtSigmaPipeline)
    monkeypatch.setattr(pixart_module, "denoising_steps", lambda pipe, begin: begin())
    embeds = pipe.encode_prompt("a cat")
    noise, image = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(8) < 4).float().expand(1, 1, 8, 8)

    def runs() -> list[Run]:
        edits = (None, Edit(image, 0.5), Edit(image, 0.75, mask))
        return [pipe.denoise(noise, embeds, num_inference_steps=8, edit=edit) for edit in edits]

    together = runs()
    assert [run.index for run in together] == [0, 4, 2]
    check(together, runs(), 4)


@torch.no_grad()
def test_glm_image_runs_share_a_forward_and_see_their_own_references(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, _ = pipelines()
    monkeypatch.setattr(glm_module, "denoising_steps", lambda pipe, begin: begin())

    def runs() -> list[Run]:
        found = []
        for i, (prompt, size, scale) in enumerate(
            [('"a"', (8, 12), 1.5), ('"long text"', (12, 8), 1.0), ("", (8, 8), 3.0)]
        ):
            height, width = (8 * side for side in size)
            ids = torch.full((1, size[0] * size[1] // 4), i)
            noise = torch.randn(1, 4, *size, generator=torch.Generator().manual_seed(i))
            references = None
            if i != 1:
                image = Image.new("RGB", (width, height), (200, 20 * i, 30))
                grid = torch.tensor([[1, size[0] // 2, size[1] // 2]])
                prior = pipe_prior(ids, [ids[0]], [grid])
                references = pipe.encode_references([[image]], prior)
            embeds = pipe.encode_prompt(prompt)
            found.append(pipe.denoise(noise, embeds, ids, references, num_inference_steps=4 + i, guidance_scale=scale))
            for _ in range(i):
                advance([found[-1]])
        return found

    check(runs(), runs(), 3)


def pipe_prior(*values: Any) -> Any:
    from impasto.models.glm_image.prior import PriorTokens

    return PriorTokens(*values)


@torch.no_grad()
def test_runs_with_a_step_cache_keep_to_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny_pipeline(PixArtSigmaPipeline, scheduler=DDIMScheduler())
    with cache_steps(pipe, "interval", interval=2):
        together, apart = pixart_runs(pipe, monkeypatch), pixart_runs(pipe, monkeypatch)
        assert not any(run.can_share for run in together)
        check(together, apart, 2)
