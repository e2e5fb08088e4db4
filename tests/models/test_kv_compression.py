"""Compressed keys and values, and q/k normalization, against plain float64 formulas and the plain model."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import impasto
from impasto.errors import ConfigurationError, InputError
from impasto.models.pixart.blocks import Attention
from impasto.models.pixart.kv_compression import KVCompression, Sampling, compress_keys
from impasto.models.pixart.model import PixArtTransformer2DModel
from impasto.nn.precision import compute_as_stored, compute_in_float32

from ..tiny import tiny_transformer, write_pipeline

SAMPLINGS: list[Sampling] = ["conv", "ave", "uniform", "uniform_every"]


def compressed_formula(module: KVCompression, x: Tensor, rows: int, columns: int) -> Tensor:
    """Token by token, in float64."""
    x, r = x.double(), module.factor
    if module.sampling == "uniform_every":
        return torch.stack([x[:, i] for i in range(0, x.shape[1], r)], dim=1)
    whole = module.sampling != "uniform"
    tops = range(0, rows - r + 1 if whole else rows, r)
    lefts = range(0, columns - r + 1 if whole else columns, r)
    if module.sampling != "conv":
        return torch.stack([x[:, top * columns + left] for top in tops for left in lefts], dim=1)
    kept = []
    for top in tops:
        for left in lefts:
            places = [((top + i) * columns + left + j, i, j) for i in range(r) for j in range(r)]
            mixed = module.conv.bias.double() + sum(
                x[:, n] * module.conv.weight[:, 0, i, j].double() for n, i, j in places
            )
            centred = mixed - mixed.mean(dim=-1, keepdim=True)
            normed = centred / (centred.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt()
            kept.append(normed * module.norm.weight.double() + module.norm.bias.double())
    return torch.stack(kept, dim=1)


def randomized(module: torch.nn.Module) -> Any:
    torch.manual_seed(3)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return module.eval()


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize(("grid", "factor"), [((4, 6), 2), ((6, 9), 3), ((5, 7), 2)], ids=["even", "by 3", "odd"])
def test_each_sampling_is_its_formula(sampling: Sampling, grid: tuple[int, int], factor: int) -> None:
    module = randomized(KVCompression(12, sampling, factor))
    x = torch.randn(2, grid[0] * grid[1], 12)
    expected = compressed_formula(module, x, *grid)
    with torch.no_grad():
        ours = module(x, grid)
    assert ours.shape == expected.shape
    assert torch.allclose(ours.double(), expected, atol=1e-5)


def attention_formula(attention: Attention, x: Tensor, grid: tuple[int, int]) -> Tensor:
    """The whole of self-attention with q/k normalization and compression, in float64."""
    linear = {
        name: (m.weight.double(), m.bias.double()) for name, m in attention.named_modules() if hasattr(m, "weight")
    }
    q, k, v = (F.linear(x.double(), *linear[name]) for name in ("to_q", "to_k", "to_v"))
    if attention.q_norm is not None:
        q, k = (F.layer_norm(y, y.shape[-1:], *linear[name]) for y, name in ((q, "q_norm"), (k, "k_norm")))
    if attention.kv_compression is not None:
        k, v = (compressed_formula(attention.kv_compression, y, *grid) for y in (k, v))
    heads = []
    for query, key, value in zip(*(y.chunk(attention.heads, dim=-1) for y in (q, k, v)), strict=True):
        heads.append(torch.softmax(query @ key.mT / query.shape[-1] ** 0.5, dim=-1) @ value)
    return F.linear(torch.cat(heads, dim=-1), *linear["to_out.0"])


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("sampling", [None, *SAMPLINGS])
def test_attention_is_its_formula(sampling: Sampling | None, qk_norm: bool) -> None:
    compression = None if sampling is None else KVCompression(24, sampling, 2)
    attention: Attention = randomized(Attention(24, None, 2, True, 0.0, False, qk_norm, compression))
    x = torch.randn(2, 24, 24) * 0.1
    with torch.no_grad():
        ours = attention(x, None, None, [(4, 6)])
    expected = attention_formula(attention, x, (4, 6))
    assert ((ours - expected).norm() / expected.norm()).item() < 1e-5


def compressed(sampling: Sampling | None, **options: Any) -> PixArtTransformer2DModel:
    model = tiny_transformer(kv_compression=sampling, num_layers=3, kv_compression_layers=[0, 2], **options)
    torch.manual_seed(4)
    for block in (model.transformer_blocks[0], model.transformer_blocks[2]):
        for parameter in block.attn1.kv_compression.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def inputs(*sizes: tuple[int, int]) -> dict[str, Any]:
    torch.manual_seed(5)
    latents = [torch.randn(4, *size) for size in sizes]
    return {
        "hidden_states": latents,
        "encoder_hidden_states": torch.randn(len(sizes), 5, 32),
        "timestep": torch.linspace(7, 900, len(sizes)),
    }


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("how", ["eager", "gradients", "hooks", "fused", "checkpointing"])
def test_images_of_several_sizes_are_each_as_alone(sampling: Sampling, how: str) -> None:
    model = compressed(sampling, qk_norm=True)
    given = inputs((8, 12), (10, 6), (8, 12), (16, 16))
    if how == "hooks":
        model.transformer_blocks[1].attn1.register_forward_hook(lambda *_: None)
    if how == "fused":
        model.fuse_qkv_projections()
    if how == "checkpointing":
        model.enable_gradient_checkpointing()
    with torch.set_grad_enabled(how in ("gradients", "checkpointing")):
        together = model(**given).sample
        for i, image in enumerate(given["hidden_states"]):
            alone = model(image[None], given["encoder_hidden_states"][i : i + 1], given["timestep"][i : i + 1]).sample
            assert torch.allclose(together[i], alone[0], atol=1e-5)
    if how == "checkpointing":
        sum(image.square().sum() for image in together).backward()
        assert all(p.grad is not None for p in model.transformer_blocks[2].attn1.parameters())


def test_compiled_blocks_compute_the_same() -> None:
    model, given = compress_keys(tiny_transformer(num_layers=1), "conv", 2, [0]), inputs((8, 12), (8, 8))
    with torch.no_grad():
        expected = model(**given).sample
        model.transformer_blocks[0].compile(backend="eager")
        found = model(**given).sample
    assert all(torch.allclose(ours, theirs, atol=1e-5) for ours, theirs in zip(found, expected, strict=True))


@pytest.mark.parametrize("how", [compute_in_float32, compute_as_stored])
def test_16_bit_weights_stay_close(how: Any) -> None:
    model = compressed("conv", qk_norm=True)
    given = inputs((8, 12), (8, 12))
    narrow = copy.deepcopy(model).bfloat16()
    how(narrow)
    rounded = {
        name: [x.bfloat16() for x in value] if isinstance(value, list) else value.bfloat16()
        for name, value in given.items()
    }
    with torch.no_grad():
        expected, ours = (torch.stack(m(**x).sample).float() for m, x in ((model, given), (narrow, rounded)))
    assert ((ours - expected).norm() / expected.norm()).item() < 0.03


# The start of training


def test_conv_starts_as_the_layer_normalization_of_the_mean() -> None:
    module, x = KVCompression(12, "conv", 2), torch.randn(2, 24, 12)
    blocks = x.unflatten(1, (2, 2, 3, 2))  # [B, 2, 2, 3, 2, D]
    expected = F.layer_norm(blocks.double().mean(dim=(2, 4)).flatten(1, 2), (12,), eps=1e-5)
    with torch.no_grad():
        assert torch.allclose(module(x, (4, 6)).double(), expected, atol=1e-6)


def test_a_plain_model_becomes_a_compressed_one_and_keeps_its_weights() -> None:
    plain = tiny_transformer(num_layers=4)
    given = inputs((8, 12))
    with torch.no_grad():
        before = plain(**given).sample[0]
    changed = compress_keys(copy.deepcopy(plain))
    stored = plain.state_dict()
    assert all(torch.equal(tensor, changed.state_dict()[name]) for name, tensor in stored.items())
    assert {name.split(".")[1] for name in changed.state_dict() if name not in stored} == {"2", "3"}
    assert changed.config.kv_compression == "conv"
    with torch.no_grad():
        after = changed(**given).sample[0]
    assert 1e-3 < ((after - before).norm() / before.norm()).item() < 1.0
    with pytest.raises(ConfigurationError, match="compressed already"):
        compress_keys(changed)


def test_a_compressed_model_is_built_from_its_config_and_saved_with_it(tmp_path: Path, caplog: Any) -> None:
    changed = compress_keys(tiny_transformer(qk_norm=True), "uniform", 2, [1])
    changed.save_pretrained(tmp_path)
    assert "diffusers has no kv_compression" in caplog.text
    loaded = PixArtTransformer2DModel.from_pretrained(tmp_path)
    assert loaded.config.kv_compression_layers == [1]
    with torch.no_grad():
        ours, expected = (model(**inputs((8, 12))).sample[0] for model in (loaded, changed))
    assert torch.allclose(ours, expected, atol=1e-6)
    with pytest.raises(ConfigurationError, match="diffusers has no kv_compression"):
        impasto.to_diffusers(changed)


def test_the_config_of_an_ordinary_model_is_unchanged(tmp_path: Path) -> None:
    tiny_transformer().save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert not stored.keys() & PixArtTransformer2DModel.not_in_diffusers


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_compression": "mean"}, "must be one of 'conv'"),
        ({"kv_compression": "conv", "kv_compression_factor": 1}, "factor must be 2 or more"),
        ({"kv_compression": "conv", "kv_compression_layers": [2]}, "layers are 0 to 1"),
        ({"kv_compression": "conv", "kv_compression_layers": []}, "leave kv_compression away"),
        ({"kv_compression_layers": [1]}, "needs kv_compression"),
    ],
)
def test_arguments_that_cannot_be_used(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        tiny_transformer(**options)
    if options.get("kv_compression"):
        named = {key.removeprefix("kv_compression_"): value for key, value in options.items()}
        with pytest.raises(ConfigurationError, match=message):
            compress_keys(tiny_transformer(), named.pop("kv_compression"), **named)


def test_what_cannot_know_of_the_compression_is_refused() -> None:
    model, given = compressed("conv"), inputs((8, 12), (8, 12))
    latents = torch.stack(given.pop("hidden_states"))
    with pytest.raises(InputError, match="attention_mask masks image tokens"):
        model(latents, **given, attention_mask=torch.ones(2, 24))
    with pytest.raises(InputError, match="too small"):
        model(latents[:, :, :2], **given)
    model.set_attn_processor(lambda attn, hidden_states, **_: hidden_states)
    with pytest.raises(ConfigurationError, match="set_default_attn_processor"):
        model(latents, **given)


# Around the model


def test_a_pipeline_with_a_compressed_transformer_is_planned_loaded_and_generates(tmp_path: Path) -> None:
    transformer = compress_keys(tiny_transformer(num_layers=3), "conv")
    write_pipeline(tmp_path, transformer=transformer)
    pipe = impasto.PixArtSigmaPipeline.from_pretrained(tmp_path, memory_budget="4GB")
    pipe.set_progress_bar_config(disable=True)
    assert pipe.transformer.config.kv_compression == "conv"
    arguments = {"height": 20, "width": 12, "num_inference_steps": 2, "use_resolution_binning": False}
    plain = pipe("x", **arguments, generator=torch.Generator().manual_seed(0), output_type="np").images
    with impasto.cache_steps(pipe, "interval"):
        cached = pipe("x", **arguments, generator=torch.Generator().manual_seed(0), output_type="np").images
    impasto.quantize(pipe.transformer, "int8-weight-only")
    close = pipe("x", **arguments, generator=torch.Generator().manual_seed(0), output_type="np").images
    assert plain.shape == cached.shape == (1, 20, 12, 3)
    assert abs(plain - close).max() < 0.2


def test_the_new_weights_and_the_old_ones_are_trained() -> None:
    model = compress_keys(tiny_transformer(), "conv", 2, [0]).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(4):
        loss = sum(image.square().mean() for image in model(**inputs((8, 12), (10, 6))).sample)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.transformer_blocks[0].attn1.parameters())
