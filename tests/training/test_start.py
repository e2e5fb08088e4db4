"""A stage starts from the last one's weights: what changes the output, and what does not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from impasto.errors import ConfigurationError, WeightsMismatchError
from impasto.models.pixart.model import PixArtTransformer2DModel
from impasto.nn.embeddings import sincos_2d
from impasto.training.assembly.start import start_stage

from ..tiny import tiny_transformer

LATENTS = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(2))
TEXT = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stage")
    tiny_transformer().save_pretrained(folder)
    return folder


def start(source: Path, **changes: Any) -> PixArtTransformer2DModel:
    return start_stage(PixArtTransformer2DModel, source, changes)


@torch.no_grad()
def run(model: PixArtTransformer2DModel, latents: Tensor = LATENTS, **conditions: Tensor) -> Tensor:
    output: Tensor = model(latents, TEXT, torch.tensor([10, 700]), added_cond_kwargs=conditions).sample
    return output


def test_the_same_configuration_is_the_same_model(source: Path) -> None:
    model = start(source)
    expected = tiny_transformer().config
    assert all(model.config[name] == value for name, value in expected.items() if not name.startswith("_"))
    assert torch.equal(run(model), run(tiny_transformer()))
    assert all(parameter.dtype == torch.float32 and parameter.requires_grad for parameter in model.parameters())


def test_positions_are_interpolated_unless_their_scale_is_given(source: Path) -> None:
    larger = start(source, sample_size=16)
    assert (larger.interpolation_scale, larger.base_size) == (2.0, 8)
    assert start(source, sample_size=16, interpolation_scale=1).interpolation_scale == 1
    before, after = tiny_transformer(), larger
    coarse = sincos_2d(24, 4, 4, before.base_size, before.interpolation_scale, torch.device("cpu"))
    fine = sincos_2d(24, 8, 8, after.base_size, after.interpolation_scale, torch.device("cpu"))
    every_second = fine.view(8, 8, 24)[::2, ::2].flatten(0, 1)
    assert torch.allclose(every_second, coarse.view(16, 24), atol=1e-6)


def test_new_micro_conditions_have_no_effect_yet_and_learn(source: Path) -> None:
    model = start(source, use_additional_conditions=True)
    sizes = {"resolution": torch.tensor([[512.0, 512], [300, 700]]), "aspect_ratio": torch.tensor([[1.0], [0.43]])}
    assert torch.equal(run(model, **sizes), run(tiny_transformer()))
    model(LATENTS, TEXT, torch.tensor([10, 700]), added_cond_kwargs=sizes).sample.square().mean().backward()
    embedder = model.adaln_single.emb.resolution_embedder
    gradient = embedder.linear_2.weight.grad
    assert gradient is not None
    assert bool(gradient.any())


def test_a_learned_variance_starts_halfway_and_keeps_the_prediction(tmp_path: Path) -> None:
    plain = tiny_transformer(out_channels=4)
    plain.save_pretrained(tmp_path)
    model = start(tmp_path, out_channels=8)
    mean, variance = run(model).chunk(2, dim=1)
    assert torch.allclose(mean, run(plain), atol=1e-6)
    assert not variance.any()
    model.save_pretrained(tmp_path)
    assert torch.allclose(run(start(tmp_path, out_channels=4)), run(plain), atol=1e-6)


def test_other_latent_channels_get_new_outer_layers(source: Path) -> None:
    model = start(source, in_channels=6, out_channels=12)
    assert not run(model, torch.randn(2, 6, 8, 8)).any()
    bound = (6 / (6 * 4 + 24)) ** 0.5  # of Xavier's uniform distribution
    weight = model.pos_embed.proj.weight
    assert 0.9 * bound < float(weight.abs().max()) <= bound
    assert torch.equal(start(source, in_channels=6, out_channels=12).pos_embed.proj.weight, weight)
    kept = tiny_transformer().transformer_blocks.state_dict()
    assert all(torch.equal(value, kept[name]) for name, value in model.transformer_blocks.state_dict().items())


def test_what_does_not_fit_is_named(source: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsMismatchError, match=r"num_layers asks for 3"):
        start(source, num_layers=3)
    with pytest.raises(WeightsMismatchError, match=r"adaln_single\.linear\.bias \[144\] would have to be"):
        start(source, num_attention_heads=4, cross_attention_dim=48)
    with pytest.raises(WeightsMismatchError, match=r"caption_projection\.linear_1\.weight"):
        start(source, caption_channels=16)
    with pytest.raises(ConfigurationError, match="sampel_size"):
        start(source, sampel_size=16)
    start(source, use_additional_conditions=True).save_pretrained(tmp_path)
    with pytest.raises(WeightsMismatchError, match=r"resolution_embedder.*unknown"):
        start(tmp_path, use_additional_conditions=False)


def test_normalized_queries_and_compressed_keys_start_as_documented(source: Path) -> None:
    model = start(source, qk_norm=True, kv_compression="conv", kv_compression_layers=[1])
    plain, compressed = (block.attn1 for block in model.transformer_blocks)
    assert plain.kv_compression is None
    x = torch.randn(1, 16, 24)
    assert torch.equal(plain.q_norm(x), torch.nn.functional.layer_norm(x, (24,)))
    mean = x.view(1, 2, 2, 2, 2, 24).mean((2, 4)).view(1, 4, 24)
    expected = torch.nn.functional.layer_norm(mean, (24,))
    torch.testing.assert_close(compressed.kv_compression(x, (4, 4)), expected, rtol=0, atol=1e-5)
    fresh = PixArtTransformer2DModel(**dict(model.config)).transformer_blocks[1].attn1.kv_compression
    for name, value in compressed.kv_compression.state_dict().items():
        assert torch.equal(value, fresh.state_dict()[name]), name
    sampled = start(source, kv_compression="uniform", kv_compression_layers=[1])
    assert sampled.state_dict().keys() == tiny_transformer().state_dict().keys()
