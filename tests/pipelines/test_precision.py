"""Pipelines of 16-bit components on a processor without 16-bit products."""

from __future__ import annotations

import copy
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

from impasto import PixArtSigmaPipeline, compute_as_stored, compute_in_float32
from impasto.nn import machine
from impasto.nn.precision import precision_of

from ..tiny import tiny_pipeline
from ..tiny_glm import pipelines, prior_parts

HALVES = [torch.bfloat16, torch.float16]
MODULES = ("text_encoder", "transformer", "vae")


@pytest.fixture
def without_native_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_multiplies", lambda dtype: False)


def generate(pipe: Any) -> Tensor:
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    images: Tensor = pipe("a cat", num_inference_steps=2, latents=noise.to(pipe.dtype), output_type="pt").images
    return images.float()


@pytest.mark.usefixtures("without_native_products")
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_component_computes_in_float32(dtype: torch.dtype) -> None:
    pipe = tiny_pipeline(PixArtSigmaPipeline).to(dtype)
    seen: dict[str, set[torch.dtype]] = {}
    inside = {
        "text_encoder": pipe.text_encoder.encoder.final_layer_norm,
        "transformer": pipe.transformer.transformer_blocks[0],
        "vae": pipe.vae.decoder.mid_block,
    }
    for name, module in inside.items():
        module.register_forward_hook(lambda m, args, out, name=name: seen.setdefault(name, set()).add(out.dtype))
    found = generate(pipe)
    assert seen == {name: {torch.float32} for name in MODULES}
    assert {precision_of(getattr(pipe, name)) for name in MODULES} == {"automatic"}
    exact = generate(tiny_pipeline(PixArtSigmaPipeline).to(dtype).to(torch.float32))
    stored = tiny_pipeline(PixArtSigmaPipeline).to(dtype)
    for name in MODULES:
        compute_as_stored(getattr(stored, name))
    assert (found - exact).abs().mean() < (generate(stored) - exact).abs().mean()


@pytest.mark.usefixtures("without_native_products")
@pytest.mark.parametrize("method", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_offloads_generate_the_same(method: str) -> None:
    expected = generate(tiny_pipeline(PixArtSigmaPipeline).to(torch.bfloat16))
    pipe = tiny_pipeline(PixArtSigmaPipeline).to(torch.bfloat16)
    getattr(pipe, method)(device="cpu")
    assert torch.equal(generate(pipe), expected)


@pytest.mark.usefixtures("without_native_products")
def test_components_of_another_library() -> None:
    ours = tiny_pipeline(PixArtSigmaPipeline).to(torch.bfloat16)
    vae = diffusers.AutoencoderKL(**dict(ours.vae.config)).to(torch.bfloat16)
    vae.load_state_dict(ours.vae.state_dict())
    pipe = PixArtSigmaPipeline(**{**ours.components, "vae": vae})
    torch.testing.assert_close(generate(pipe), generate(ours), rtol=0, atol=0.02)
    assert isinstance(vae, diffusers.AutoencoderKL)
    assert precision_of(vae) == "automatic"


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_the_prior_of_glm_image_is_closer_to_float64(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its scores, which code of ours computes from the weights of layers of transformers."""
    pipe, _ = pipelines()
    for name, component in prior_parts().items():
        setattr(pipe, name, component)
    prior: nn.Module = pipe.components["vision_language_encoder"].to(dtype)
    scores: list[Tensor] = []
    monkeypatch.setattr(pipe, "_check_output", lambda name, output: scores.append(output.double()))

    def ask(model: nn.Module) -> None:
        pipe.vision_language_encoder = model
        pipe.generate_prior_tokens("a sign", height=64, width=64, generator=torch.Generator().manual_seed(0))

    ask(copy.deepcopy(prior).double())
    with compute_as_stored(prior):
        ask(prior)
    with compute_in_float32(prior):
        ask(prior)
    exact, stored, found = scores
    assert (found - exact).norm() < 0.01 * (stored - exact).norm()
