"""Image to image and inpainting against a loop written by hand, with the parts of diffusers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from impasto.pipelines.pixart_edits import (
    PixArtAlphaImg2ImgPipeline,
    PixArtAlphaInpaintPipeline,
    PixArtSigmaImg2ImgPipeline,
    PixArtSigmaInpaintPipeline,
)
from impasto.schedulers.ddim import DDIMScheduler
from impasto.schedulers.ddpm import DDPMScheduler
from impasto.schedulers.dpm_solver import DPMSolverMultistepScheduler
from impasto.schedulers.flow_match_euler import FlowMatchEulerDiscreteScheduler
from impasto.schedulers.lcm import LCMScheduler

from ..tiny import tiny_pipeline, tiny_transformer, tiny_vae
from .test_pipelines import distance

# Warnings of NumPy about the foreign schedulers.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

#: Ours, and schedulers of diffusers that ours are to work with: an order of 2, a warm-up, scaled inputs.
SCHEDULERS: dict[str, Callable[[], Any]] = {
    "ddim": DDIMScheduler,
    "ddpm": DDPMScheduler,
    "dpm++": DPMSolverMultistepScheduler,
    "dpm++ sde": lambda: DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"),
    "dpm++ flow": lambda: DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"),
    "lcm": LCMScheduler,
    "flow": FlowMatchEulerDiscreteScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "heun": diffusers.HeunDiscreteScheduler,
    "pndm": lambda: diffusers.PNDMScheduler(skip_prk_steps=True),
    "their flow": diffusers.FlowMatchEulerDiscreteScheduler,
}
MAIN = ("ddim", "dpm++", "lcm")
#: [1, 1, 16, 16]; the latents of the tiny autoencoder are half as wide.
HARD = torch.zeros(1, 1, 16, 16)
HARD[..., 4:12, 6:14] = 1.0
SOFT = torch.linspace(0, 1, 8).repeat_interleave(2).expand(1, 1, 16, 16)


def images_of(count: int) -> Tensor:
    """[count, 3, 16, 16] in [0, 1]."""
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(3))


def by_hand(
    ours: Any,
    prompts: list[str],
    images: Tensor,
    strength: float,
    steps: int,
    guidance: float,
    mask: Tensor | None = None,
    eta: float | None = None,
) -> Tensor:
    """What a user of diffusers would write; returns images [B, 3, H, W] in [0, 1]."""
    alpha = isinstance(ours, PixArtAlphaImg2ImgPipeline | PixArtAlphaInpaintPipeline)
    drop = {"use_linear_projection", "num_vector_embeds"}
    transformer = diffusers.PixArtTransformer2DModel(
        **{k: v for k, v in ours.transformer.config.items() if k not in drop}
    ).eval()
    transformer.load_state_dict(ours.transformer.state_dict())
    vae = diffusers.AutoencoderKL(**ours.vae.config).eval()
    vae.load_state_dict(ours.vae.state_dict())
    scheduler = getattr(diffusers, type(ours.scheduler).__name__).from_config(dict(ours.scheduler.config))
    cls = diffusers.PixArtAlphaPipeline if alpha else diffusers.PixArtSigmaPipeline
    pipe = cls(ours.tokenizer, ours.text_encoder, vae, transformer, scheduler)

    generator = torch.Generator().manual_seed(7)
    guided = guidance > 1
    text, text_mask, negative, negative_mask = pipe.encode_prompt(
        prompts, guided, clean_caption=False, max_sequence_length=120 if alpha else 300
    )
    if guided:
        text, text_mask = torch.cat([negative, text]), torch.cat([negative_mask, text_mask])
    z = vae.encode(images * 2 - 1).latent_dist.sample(generator) * vae.config.scaling_factor
    noise = randn_tensor(z.shape, generator=generator)
    scheduler.set_timesteps(steps)
    first = (steps - min(int(steps * strength), steps)) * scheduler.order
    timesteps = scheduler.timesteps[first:]
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(first)

    def add_noise(t: Tensor) -> Tensor:
        if hasattr(scheduler, "add_noise"):
            return scheduler.add_noise(z, noise, t)
        return scheduler.scale_noise(z, t, noise)

    x = add_noise(timesteps[:1].repeat(len(z)))
    if mask is not None:
        kept = torch.nn.functional.interpolate(mask, scale_factor=0.5)
        if strength == 1.0:
            x = noise * getattr(scheduler, "init_noise_sigma", 1.0)
    conditions = {"resolution": None, "aspect_ratio": None}
    if transformer.config.use_additional_conditions:
        conditions = {"resolution": torch.full((len(text), 2), 16.0), "aspect_ratio": torch.ones(len(text), 1)}
    options: dict[str, Any] = {"eta": eta} if eta is not None else {}
    if isinstance(
        scheduler, diffusers.DDIMScheduler | diffusers.DDPMScheduler | diffusers.LCMScheduler
    ) or scheduler.config.get("algorithm_type", "").startswith("sde"):
        options["generator"] = generator
    for i, t in enumerate(timesteps):
        model_input = torch.cat([x] * (2 if guided else 1))
        if hasattr(scheduler, "scale_model_input"):
            model_input = scheduler.scale_model_input(model_input, t)
        predicted = transformer(
            model_input,
            encoder_hidden_states=text,
            encoder_attention_mask=text_mask,
            timestep=t.expand(len(model_input)),
            added_cond_kwargs=conditions,
        ).sample.chunk(2, dim=1)[0]
        if guided:
            low, high = predicted.chunk(2)
            predicted = low + guidance * (high - low)
        x = scheduler.step(predicted, t, x, **options, return_dict=False)[0]
        if mask is not None:
            known = add_noise(timesteps[i + 1 : i + 2]) if i + 1 < len(timesteps) else z
            x = (1 - kept) * known + kept * x
    return vae.decode(x / vae.config.scaling_factor).sample.mul(0.5).add(0.5).clamp(0, 1)


def ours_of(
    ours: Any, prompts: list[str], images: Tensor, strength: float, steps: int, guidance: float, **options: Any
):
    return ours(
        prompts,
        images,
        strength=strength,
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=torch.Generator().manual_seed(7),
        clean_caption=False,
        output_type="pt",
        **options,
    ).images


@pytest.mark.parametrize("guidance", [1.0, 4.5])
@pytest.mark.parametrize("strength", [0.25, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("scheduler", MAIN)
@torch.no_grad()
def test_image_to_image(scheduler: str, strength: float, guidance: float) -> None:
    ours = tiny_pipeline(PixArtSigmaImg2ImgPipeline, scheduler=SCHEDULERS[scheduler]())
    arguments = (ours, ["a red cube"], images_of(1), strength, 8, guidance)
    assert distance(ours_of(*arguments), by_hand(*arguments)) <= 1e-4


@pytest.mark.parametrize("strength", [0.6, 1.0])
@pytest.mark.parametrize("mask", [HARD, SOFT], ids=["hard", "soft"])
@pytest.mark.parametrize("guidance", [1.0, 4.5])
@pytest.mark.parametrize("scheduler", MAIN)
@torch.no_grad()
def test_inpainting(scheduler: str, guidance: float, mask: Tensor, strength: float) -> None:
    ours = tiny_pipeline(PixArtSigmaInpaintPipeline, scheduler=SCHEDULERS[scheduler]())
    arguments = (ours, ["a red cube"], images_of(1), strength, 8, guidance)
    assert distance(ours_of(*arguments, mask_image=mask), by_hand(*arguments, mask)) <= 1e-4


@pytest.mark.parametrize("scheduler", [name for name in SCHEDULERS if name not in MAIN])
@torch.no_grad()
def test_other_schedulers(scheduler: str) -> None:
    made = SCHEDULERS[scheduler]()
    arguments = (["a red cube"], images_of(1), 0.6, 8, 3.0)
    change = tiny_pipeline(PixArtSigmaImg2ImgPipeline, scheduler=made)
    assert distance(ours_of(change, *arguments), by_hand(change, *arguments)) <= 1e-4
    repaint = PixArtSigmaInpaintPipeline.from_pipe(change)
    repaint.set_progress_bar_config(disable=True)
    assert distance(ours_of(repaint, *arguments, mask_image=HARD), by_hand(repaint, *arguments, HARD)) <= 1e-4


@torch.no_grad()
def test_batches_micro_conditions_and_the_noise_of_ddim() -> None:
    """One generator means one draw over the batch, of the autoencoder and of the noise."""
    parts = {"transformer": tiny_transformer(use_additional_conditions=True), "vae": tiny_vae(scaling_factor=0.18215)}
    prompts, images = ["a red cube on top of a blue sphere", "a cat"], images_of(2)
    for cls, mask in ((PixArtAlphaImg2ImgPipeline, None), (PixArtAlphaInpaintPipeline, HARD)):
        ours = tiny_pipeline(cls, scheduler=DDIMScheduler(), **parts)
        arguments = (ours, prompts, images, 0.7, 6, 2.0)
        options = {} if mask is None else {"mask_image": mask}
        assert distance(ours_of(*arguments, eta=0.5, **options), by_hand(*arguments, mask, eta=0.5)) <= 1e-4
