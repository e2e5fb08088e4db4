"""Our pipelines against those of diffusers: the same parts, the same arguments, the same pictures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from impasto.models.autoencoder.model import AutoencoderKL
from impasto.models.pixart.model import PixArtTransformer2DModel
from impasto.pipelines.pixart import PixArtAlphaPipeline, PixArtSigmaPipeline
from impasto.schedulers.ddim import DDIMScheduler
from impasto.schedulers.ddpm import DDPMScheduler
from impasto.schedulers.dpm_solver import DPMSolverMultistepScheduler
from impasto.schedulers.lcm import LCMScheduler

from ..tiny import tiny_pipeline, tiny_transformer, tiny_vae

# Warnings of NumPy about the foreign schedulers.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

RAGGED = ["a red cube on top of a blue sphere , a painting", "a cat"]
OUR_CLASSES = {"alpha": PixArtAlphaPipeline, "sigma": PixArtSigmaPipeline}
THEIR_CLASSES = {"alpha": diffusers.PixArtAlphaPipeline, "sigma": diffusers.PixArtSigmaPipeline}
SCHEDULERS = (DPMSolverMultistepScheduler, DDIMScheduler, DDPMScheduler, LCMScheduler)


def theirs_of(ours: Any) -> Any:
    """The diffusers pipeline with the same weights and configs."""
    family = "alpha" if isinstance(ours, PixArtAlphaPipeline) else "sigma"
    drop = {"use_linear_projection", "num_vector_embeds"}
    transformer = diffusers.PixArtTransformer2DModel(
        **{k: v for k, v in ours.transformer.config.items() if k not in drop}
    ).eval()
    transformer.load_state_dict(ours.transformer.state_dict())
    vae = diffusers.AutoencoderKL(**ours.vae.config).eval()
    vae.load_state_dict(ours.vae.state_dict())
    scheduler = ours.scheduler
    if isinstance(scheduler, SCHEDULERS):
        scheduler = getattr(diffusers, type(scheduler).__name__).from_config(dict(scheduler.config))
    else:
        scheduler = type(scheduler).from_config(scheduler.config)
    pipe = THEIR_CLASSES[family](ours.tokenizer, ours.text_encoder, vae, transformer, scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def distance(ours: Any, theirs: Any) -> float:
    """Relative error."""
    a, b = (torch.as_tensor(x).double() for x in (ours, theirs))
    assert a.shape == b.shape
    assert b.norm() > 0
    return float((a - b).norm() / b.norm())


def compare(ours: Any, theirs: Any, arguments: dict[str, Any], seed: int = 0) -> None:
    """Both draw alike, as latents and as arrays."""
    for output_type in ("latent", "np"):
        results = []
        for pipe in (ours, theirs):
            seeded = dict(arguments)
            count = seeded.pop("generators", None)
            if count is None:
                seeded["generator"] = torch.Generator().manual_seed(seed)
            else:
                seeded["generator"] = [torch.Generator().manual_seed(seed + i) for i in range(count)]
            results.append(pipe(**seeded, output_type=output_type).images)
        assert distance(*results) <= 1e-4


CALLS: dict[str, dict[str, Any]] = {
    "guided": {"prompt": "a red cube"},
    "empty": {"prompt": ""},
    "no guidance": {"prompt": "a red cube", "guidance_scale": 1.0},
    "ragged": {"prompt": RAGGED, "negative_prompt": "a grey sky and a wall"},
    "negatives": {"prompt": RAGGED, "negative_prompt": ["a photo of a dog", "dark"], "num_images_per_prompt": 2},
    "several": {"prompt": "A Cat &amp; a dog", "num_images_per_prompt": 3, "generators": 3},
    "raw": {"prompt": " A Happy FACE (2x3) ", "clean_caption": False},
    "wide": {"prompt": "a cat", "height": 8, "width": 24},
    "timesteps": {"prompt": "a cat", "timesteps": [900, 500, 250, 20]},
    "truncated": {"prompt": RAGGED, "max_sequence_length": 5},
    "steps": {"prompt": "a cat", "num_inference_steps": 16},
}


@pytest.fixture(scope="module", params=["alpha", "sigma"])
def pair(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    ours = tiny_pipeline(OUR_CLASSES[request.param])
    return ours, theirs_of(ours)


@pytest.mark.parametrize("name", CALLS)
def test_calls(pair: tuple[Any, Any], name: str) -> None:
    compare(*pair, {"num_inference_steps": 4, "use_resolution_binning": False, **CALLS[name]})


def test_given_latents_and_embeddings(pair: tuple[Any, Any]) -> None:
    ours, theirs = pair
    generator = torch.Generator().manual_seed(5)
    embeds, negative = torch.randn(2, 2, 7, 32, generator=generator)
    masks = torch.tensor([[[1, 1, 1, 1, 0, 0, 0], [1] * 7], [[1, 0, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0]]])
    compare(
        ours,
        theirs,
        {
            "negative_prompt": None,
            "prompt_embeds": embeds,
            "prompt_attention_mask": masks[0],
            "negative_prompt_embeds": negative,
            "negative_prompt_attention_mask": masks[1],
            "latents": torch.randn(2, 4, 8, 8, generator=generator),
            "num_inference_steps": 3,
            "use_resolution_binning": False,
        },
    )


def test_encode_prompt_has_the_same_tokens_in_the_same_places(pair: tuple[Any, Any]) -> None:
    ours, theirs = pair
    for arguments in ({}, {"num_images_per_prompt": 2, "negative_prompt": "dark"}, {"clean_caption": True}):
        with torch.no_grad():
            mine, expected = (pipe.encode_prompt(RAGGED, **arguments) for pipe in (ours, theirs))
        length = 120 if isinstance(ours, PixArtAlphaPipeline) else 300
        assert mine[0].shape == expected[0].shape == (len(mine[1]), length, 32)
        for i in (0, 2):
            assert torch.equal(mine[i + 1], expected[i + 1])
            mask = expected[i + 1][..., None]
            assert distance(mine[i] * mask, expected[i] * mask) <= 1e-5
    assert ours.encode_prompt("a cat", do_classifier_free_guidance=False)[2:] == (None, None)


def euler(name: str, **options: Any) -> Callable[[], Any]:
    return lambda: getattr(diffusers, name)(beta_start=0.0001, beta_end=0.02, beta_schedule="linear", **options)


FOREIGN = {
    "euler": euler("EulerDiscreteScheduler"),
    "euler trailing": euler("EulerDiscreteScheduler", timestep_spacing="trailing"),
    "euler ancestral": euler("EulerAncestralDiscreteScheduler"),
    "heun": euler("HeunDiscreteScheduler"),
    "unipc": euler("UniPCMultistepScheduler"),
    "unipc karras": euler("UniPCMultistepScheduler", use_karras_sigmas=True),
    "pndm": euler("PNDMScheduler"),
    "deis": euler("DEISMultistepScheduler"),
    "kdpm2": euler("KDPM2DiscreteScheduler"),
    "dpm single": euler("DPMSolverSinglestepScheduler"),
}


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("family", ["alpha", "sigma"])
def test_foreign_schedulers(family: str, name: str) -> None:
    ours = tiny_pipeline(OUR_CLASSES[family], scheduler=FOREIGN[name]())
    seen: list[list[tuple[int, float]]] = [[], []]
    theirs = theirs_of(ours)
    for pipe, calls in zip((ours, theirs), seen):
        compare_arguments = {
            "prompt": "a cat",
            "num_inference_steps": 4,
            "use_resolution_binning": False,
            "callback": lambda step, t, latents, calls=calls: calls.append((step, float(t))),
        }
        pipe(**compare_arguments, generator=torch.Generator().manual_seed(0), output_type="latent")
    assert seen[0] == seen[1]
    assert len(seen[0]) >= 4
    compare(ours, theirs, {"prompt": "a cat", "num_inference_steps": 4, "use_resolution_binning": False})


def test_foreign_timesteps_and_sigmas() -> None:
    ours = tiny_pipeline(PixArtSigmaPipeline, scheduler=FOREIGN["euler"]())
    theirs = theirs_of(ours)
    for custom in ({"timesteps": [900, 600, 30]}, {"sigmas": [10.0, 3.0, 0.5, 0.1]}):
        compare(ours, theirs, {"prompt": "a cat", "use_resolution_binning": False, **custom})


@pytest.mark.parametrize(
    ("family", "scheduler", "arguments"),
    [
        ("sigma", DDIMScheduler(clip_sample=False), {"eta": 0.0}),
        ("sigma", DDIMScheduler(clip_sample=False), {"eta": 0.7}),
        ("alpha", DDIMScheduler(clip_sample=False), {"eta": 1.0, "generators": 2}),
        ("alpha", DDPMScheduler(clip_sample=False), {"timesteps": [400], "guidance_scale": 1.0}),
        ("sigma", DDPMScheduler(clip_sample=False), {"timesteps": [400], "guidance_scale": 1.0}),
        ("alpha", DDPMScheduler(clip_sample=False), {"num_inference_steps": 1}),
        ("alpha", DDPMScheduler(), {}),
        ("alpha", LCMScheduler(), {"guidance_scale": 0.0}),
        ("sigma", LCMScheduler(), {"guidance_scale": 0.0, "generators": 2}),
        ("sigma", DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"), {}),
        ("sigma", DPMSolverMultistepScheduler(use_karras_sigmas=True, solver_order=3), {}),
    ],
    ids=str,
)
def test_our_schedulers(family: str, scheduler: Any, arguments: dict[str, Any]) -> None:
    ours = tiny_pipeline(OUR_CLASSES[family], scheduler=scheduler)
    call = {"prompt": RAGGED, "num_inference_steps": 4, "use_resolution_binning": False, **arguments}
    compare(ours, theirs_of(ours), call)


@pytest.mark.parametrize("size", [(None, None), (100, 400), (300, 210)])
@pytest.mark.parametrize("family", ["alpha", "sigma"])
def test_resolution_binning(family: str, size: tuple[int | None, int | None]) -> None:
    ours = tiny_pipeline(OUR_CLASSES[family], transformer=tiny_transformer(sample_size=32), vae=tiny_vae(levels=4))
    call = {"prompt": "a cat", "height": size[0], "width": size[1], "num_inference_steps": 2}
    compare(ours, theirs_of(ours), call)
    picture = ours(**call, output_type="pil").images[0]
    assert picture.size == (size[1] or 256, size[0] or 256)


def test_micro_conditions() -> None:
    transformer = tiny_transformer(sample_size=128, use_additional_conditions=True)
    ours = tiny_pipeline(PixArtAlphaPipeline, transformer=transformer, vae=tiny_vae(levels=4))
    theirs = theirs_of(ours)
    call = {"prompt": RAGGED, "height": 64, "width": 96, "num_inference_steps": 3, "use_resolution_binning": False}
    compare(ours, theirs, call)
    # The conditions have an effect at all: another size changes what a step predicts beyond its shape.
    with torch.no_grad():
        rows = [transformer.modulate(torch.tensor([5]), ours._conditions(torch.zeros(1, 4, h, 8))) for h in (8, 16)]
    assert not torch.allclose(rows[0].shared, rows[1].shared)


def test_foreign_parts_in_ours_and_ours_in_theirs() -> None:
    ours = tiny_pipeline(PixArtSigmaPipeline)
    theirs = theirs_of(ours)
    call = {"prompt": RAGGED, "num_inference_steps": 3, "use_resolution_binning": False}
    foreign = tiny_pipeline(PixArtSigmaPipeline, transformer=theirs.transformer, vae=theirs.vae)
    compare(foreign, theirs, call)
    shared = PixArtSigmaPipeline.from_pipe(theirs)
    shared.set_progress_bar_config(disable=True)
    compare(shared, ours, call)
    reverse = diffusers.PixArtSigmaPipeline(
        ours.tokenizer, ours.text_encoder, ours.vae, theirs.transformer, ours.scheduler
    )
    reverse.set_progress_bar_config(disable=True)
    compare(ours, reverse, call)


def test_foreign_transformer_with_micro_conditions() -> None:
    transformer = tiny_transformer(sample_size=128, use_additional_conditions=True)
    ours = tiny_pipeline(PixArtAlphaPipeline, transformer=transformer, vae=tiny_vae(levels=4))
    theirs = theirs_of(ours)
    foreign = PixArtAlphaPipeline.from_pipe(theirs)
    foreign.set_progress_bar_config(disable=True)
    call = {"prompt": RAGGED, "height": 64, "width": 64, "num_inference_steps": 2, "use_resolution_binning": False}
    compare(foreign, theirs, call)


def test_another_autoencoder_with_the_same_interface() -> None:
    torch.manual_seed(0)
    vae = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )
    ours = tiny_pipeline(PixArtSigmaPipeline, vae=vae)
    images = ours("a cat", num_inference_steps=2, output_type="pt").images
    assert images.shape == (1, 3, 16, 16)
    latents = ours("a cat", num_inference_steps=2, output_type="latent").images
    assert torch.isfinite(latents).all()


@pytest.mark.parametrize("family", ["alpha", "sigma"])
def test_folders_go_both_ways(family: str, tmp_path: Path) -> None:
    ours = tiny_pipeline(OUR_CLASSES[family])
    call = {"prompt": "a cat", "num_inference_steps": 3, "use_resolution_binning": False}

    def draw(pipe: Any) -> Tensor:
        pipe.set_progress_bar_config(disable=True)
        return pipe(**call, generator=torch.Generator().manual_seed(1), output_type="np").images

    expected = draw(ours)
    ours.save_pretrained(tmp_path / "ours", max_shard_size="20KB")
    assert len(list((tmp_path / "ours" / "transformer").glob("*.safetensors"))) > 1
    theirs = THEIR_CLASSES[family].from_pretrained(tmp_path / "ours")
    assert distance(draw(theirs), expected) <= 1e-4
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    again = OUR_CLASSES[family].from_pretrained(tmp_path / "theirs")
    assert isinstance(again.transformer, PixArtTransformer2DModel)
    assert isinstance(again.vae, AutoencoderKL)
    assert isinstance(again.scheduler, DPMSolverMultistepScheduler)
    for name in ("transformer", "vae", "text_encoder"):
        weights = getattr(again, name).state_dict()
        assert all(torch.equal(tensor, weights[key]) for key, tensor in getattr(ours, name).state_dict().items())
    # Mapped weights lie in memory as they do in the file; where products sum in another order for it, bits differ.
    assert distance(draw(again), expected) <= 1e-6


def test_a_variant_goes_both_ways(tmp_path: Path) -> None:
    ours = tiny_pipeline(PixArtSigmaPipeline)
    ours.save_pretrained(tmp_path / "ours", variant="fp16")
    theirs = diffusers.PixArtSigmaPipeline.from_pretrained(tmp_path / "ours", variant="fp16")
    theirs.save_pretrained(tmp_path / "theirs", variant="fp16")
    again = PixArtSigmaPipeline.from_pretrained(tmp_path / "theirs", variant="fp16")
    for name in ("transformer", "vae", "text_encoder"):
        expected = getattr(ours, name).state_dict()
        found = getattr(again, name).state_dict()
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[key], found[key]) for key in expected)
