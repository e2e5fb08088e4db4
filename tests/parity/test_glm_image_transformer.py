"""GlmImageTransformer2DModel against the diffusers class, in float32, on configurations that cover every option."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from diffusers.models.transformers import transformer_glm_image as reference_module
from torch import Tensor

from impasto import GlmImageKVCache, GlmImageTransformer2DModel

BASE = {
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 3,
    "text_embed_dim": 20,
    "time_embed_dim": 16,
    "condition_dim": 6,
    "prior_vq_quantizer_codebook_size": 32,
}

OPTIONS: dict[str, dict[str, Any]] = {
    "base": {},
    "patch 1": {"patch_size": 1},
    "other channels out": {"out_channels": 6},
    "sixteen channels": {"in_channels": 16, "out_channels": 16},
    "one layer": {"num_layers": 1},
    "wide heads": {"attention_head_dim": 40, "num_attention_heads": 2},
    "text width": {"text_embed_dim": 8},
    "time width": {"time_embed_dim": 24},
    "condition width": {"condition_dim": 10},
    "codebook": {"prior_vq_quantizer_codebook_size": 100},
}


def relative(ours: Tensor, reference: Tensor) -> float:
    return ((ours - reference).norm() / reference.norm()).item()


def pair(**options: Any) -> tuple[GlmImageTransformer2DModel, Any]:
    torch.manual_seed(0)
    config = {**BASE, **options}
    reference = diffusers.GlmImageTransformer2DModel(**config).eval()
    ours = GlmImageTransformer2DModel(**config, pos_embed_max_size=64, sample_size=16).eval()
    ours.load_state_dict(reference.state_dict())
    return ours, reference


def arguments(model: GlmImageTransformer2DModel, batch: int = 2, height: int = 8, width: int = 12) -> dict[str, Any]:
    torch.manual_seed(1)
    tokens = height // model.patch_size * (width // model.patch_size)
    return {
        "hidden_states": torch.randn(batch, model.in_channels, height, width),
        "encoder_hidden_states": torch.randn(batch, 7, model.text_channels),
        "prior_token_id": torch.randint(0, model.codebook_size, (batch, tokens)),
        "prior_token_drop": torch.rand(batch, tokens) < 0.3,
        "timestep": torch.linspace(3, 998, batch),
        "target_size": torch.tensor([[1024.0, 768.0]]).repeat(batch, 1),
        "crop_coords": torch.tensor([[0.0, 16.0]]).repeat(batch, 1),
    }


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "gradients"])
def test_every_option(options: dict[str, Any], grad: bool) -> None:
    ours, reference = pair(**options)
    inputs = arguments(ours)
    with torch.set_grad_enabled(grad):
        assert relative(ours(**inputs).sample, reference(**inputs).sample) <= 1e-5


@pytest.mark.parametrize(("height", "width"), [(8, 8), (16, 4), (2, 2), (32, 32)])
def test_any_size(height: int, width: int) -> None:
    ours, reference = pair()
    inputs = arguments(ours, height=height, width=width)
    with torch.no_grad():
        assert relative(ours(**inputs).sample, reference(**inputs).sample) <= 1e-5


@pytest.mark.parametrize("drop", [False, True])
def test_priors_dropped_as_a_whole_and_no_text(drop: bool) -> None:
    ours, reference = pair()
    inputs = arguments(ours)
    inputs["prior_token_drop"] = torch.full_like(inputs["prior_token_drop"], drop)
    inputs["encoder_hidden_states"] = inputs["encoder_hidden_states"][:, :0]
    with torch.no_grad():
        expected = reference(**inputs).sample
        assert relative(ours(**inputs).sample, expected) <= 1e-5
        by_picture = inputs | {"prior_token_drop": torch.full((2,), drop)}
        assert relative(ours(**by_picture).sample, expected) <= 1e-5
        shared = inputs | {name: inputs[name][0] for name in ("prior_token_id", "prior_token_drop")}
        assert relative(ours(**shared).sample, reference(**shared).sample) <= 1e-5


def test_a_mask_of_ones_and_given_positions() -> None:
    ours, reference = pair()
    inputs = arguments(ours)
    positions = reference.rope(torch.zeros(1, 4, 12, 8))  # rows and columns the other way round
    inputs |= {"attention_mask": torch.ones(2, 7), "image_rotary_emb": positions}
    with torch.no_grad():
        expected = reference(**inputs).sample
        assert relative(ours(**inputs).sample, expected) <= 1e-5
        inputs["image_rotary_emb"] = [positions, positions]
        assert relative(ours(**inputs).sample, expected) <= 1e-5


def test_a_mask_discards_as_if_the_text_were_shorter() -> None:
    """The reference's own mask adds 1 to kept scores; cutting the text is what it should do."""
    ours, reference = pair()
    inputs = arguments(ours)
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[:, 4:] = 0
    shorter = inputs | {"encoder_hidden_states": inputs["encoder_hidden_states"][:, :4]}
    with torch.no_grad():
        expected = reference(**shorter).sample
        assert relative(ours(**inputs, attention_mask=mask).sample, expected) <= 1e-5
        bias = (1.0 - mask.float())[:, None] * -10000.0
        assert relative(ours(**inputs, attention_mask=bias).sample, expected) <= 1e-5
        assert relative(reference(**inputs, attention_mask=mask).sample, expected) > 1e-3  # the defect


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("batch", [2, 4])
def test_reference_images(samples: int, batch: int) -> None:
    ours, reference = pair()
    own, theirs = GlmImageKVCache(num_layers=2), reference_module.GlmImageKVCache(num_layers=2)
    with torch.no_grad():
        for model, cache in ((ours, own), (reference, theirs)):
            cache.set_mode("write")
            for sample in range(samples):
                for image in range(2):  # of the same sizes for all samples: the reference cannot join others
                    inputs = arguments(ours, batch=1, height=4 + 2 * image, width=4)
                    inputs["hidden_states"] = inputs["hidden_states"] + sample
                    inputs["encoder_hidden_states"] = inputs["encoder_hidden_states"][:, :0]
                    model(**{**inputs, "timestep": torch.zeros(1)}, kv_caches=cache)
                cache.next_sample()
        inputs = arguments(ours, batch=batch)
        plain = reference(**inputs).sample
        for mode in ("read", "skip"):
            own.set_mode(mode)
            theirs.set_mode(mode)
            expected = reference(**inputs, kv_caches=theirs).sample
            assert relative(ours(**inputs, kv_caches=own).sample, expected) <= 1e-5
            assert (relative(expected, plain) > 1e-3) == (mode == "read")
        own.clear()
        own.set_mode("read")
        assert relative(ours(**inputs, kv_caches=own).sample, plain) <= 1e-5


def test_gradients_agree() -> None:
    ours, reference = pair()
    inputs = arguments(ours)
    for model in (ours, reference):
        model(**inputs).sample.square().mean().backward()
    theirs = dict(reference.named_parameters())
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None, name
        assert relative(parameter.grad, theirs[name].grad) <= 1e-4, name


def test_folders_both_ways(tmp_path: Any) -> None:
    ours, reference = pair()
    inputs = arguments(ours)
    reference.save_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    with torch.no_grad():
        expected = reference(**inputs).sample
        loaded = GlmImageTransformer2DModel.from_pretrained(tmp_path / "theirs")
        assert relative(loaded(**inputs).sample, expected) <= 1e-5
        back = diffusers.GlmImageTransformer2DModel.from_pretrained(tmp_path / "ours")
        assert relative(back(**inputs).sample, expected) <= 1e-5


def test_the_released_size_on_the_meta_device() -> None:
    released = {"num_attention_heads": 32, "attention_head_dim": 128}
    with torch.device("meta"):
        ours = GlmImageTransformer2DModel(**released)
        reference = diffusers.GlmImageTransformer2DModel(**released)
    assert {name: x.shape for name, x in ours.state_dict().items()} == {
        name: x.shape for name, x in reference.state_dict().items()
    }
    assert round(ours.num_parameters() / 1e9, 2) == 6.93
