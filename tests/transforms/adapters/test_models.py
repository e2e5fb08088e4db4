"""Adapters of single models: trained, quantized bases, saved for other libraries, and compared with peft's own."""

from __future__ import annotations

import copy
import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import diffusers
import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tests.tiny import tiny_transformer, tiny_vae
from tests.tiny_adapters import DIALECTS
from tests.tiny_glm import TRANSFORMER
from torch import Tensor, nn

import impasto
from impasto.errors import CheckpointError, ConfigurationError, InputError, MissingDependencyError
from impasto.nn.machine import multiplies_int8_exactly
from impasto.transforms.adapters import collect, save

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_out", "adaln_single.linear"]
CONFIGS: dict[str, Any] = {
    "lora": peft.LoraConfig(r=3, lora_alpha=6, target_modules=TARGETS, init_lora_weights=False),
    "rslora": peft.LoraConfig(r=3, lora_alpha=6, target_modules=TARGETS, init_lora_weights=False, use_rslora=True),
    "dora": peft.LoraConfig(r=3, lora_alpha=6, target_modules=TARGETS, init_lora_weights=False, use_dora=True),
    "lokr": peft.LoKrConfig(r=3, alpha=6, target_modules=TARGETS, init_weights=False, decompose_both=True),
    "lokr-whole": peft.LoKrConfig(r=16, alpha=8, target_modules=TARGETS, init_weights=False),
    "loha": peft.LoHaConfig(r=3, alpha=6, target_modules=TARGETS, init_weights=False),
}


def predict(model: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    latents, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 5, 32, generator=generator)
    output: Tensor = model(latents, text, torch.tensor([7, 500])).sample
    return output


def close(left: Tensor, right: Tensor, tolerance: float = 1e-5) -> bool:
    return float((left - right).detach().abs().max() / right.detach().abs().max()) <= tolerance


def with_adapter(kind: str) -> Any:
    model = tiny_transformer()
    torch.manual_seed(1)
    model.add_adapter(copy.deepcopy(CONFIGS[kind]))
    return model


@pytest.mark.parametrize("kind", CONFIGS)
def test_an_adapter_is_trained_saved_and_loaded(kind: str, tmp_path: Path) -> None:
    """As peft computes it on diffusers' model, with gradients of the adapter alone."""
    model = with_adapter(kind)
    theirs = diffusers.PixArtTransformer2DModel(**{k: v for k, v in model.config.items() if not k.startswith("_")})
    theirs.load_state_dict(tiny_transformer().state_dict())
    peft.inject_adapter_in_model(copy.deepcopy(CONFIGS[kind]), theirs.eval())
    with torch.no_grad():
        names = dict(theirs.named_parameters())
        for name, parameter in model.named_parameters():
            names[name].copy_(parameter)
    generator = torch.Generator().manual_seed(0)
    latents, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 5, 32, generator=generator)
    expected = theirs(latents, text, torch.tensor([7, 500]), {"resolution": None, "aspect_ratio": None}).sample
    output = predict(model)
    assert close(output, expected)
    (output**2).mean().backward()
    (expected**2).mean().backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert trained
    assert all("default" in name for name in trained)
    assert all(close(grad, names[name].grad, 1e-4) for name, grad in trained.items())

    with torch.no_grad():
        expected = predict(model)
        model.save_lora_adapter(tmp_path)
        loaded = tiny_transformer()
        loaded.load_lora_adapter(tmp_path)
        assert close(predict(loaded), expected, 1e-6)
        again = collect(loaded, "default_0")
    for name, layer in collect(model, "default").items():
        assert again[name].kind == layer.kind
        if layer.rank is not None:  # else alpha is in w1
            assert again[name].scale == pytest.approx(layer.scale)
            assert all(torch.equal(again[name].tensors[part], tensor) for part, tensor in layer.tensors.items())


@pytest.mark.parametrize("kind", CONFIGS)
def test_peft_loads_what_is_saved_in_its_form(kind: str, tmp_path: Path) -> None:
    model = with_adapter(kind)
    model.save_lora_adapter(tmp_path, weight_name="adapter_model.safetensors")
    with torch.no_grad():
        assert close(predict(peft.PeftModel.from_pretrained(tiny_transformer(), tmp_path)), predict(model), 1e-6)
        again = tiny_transformer()
        again.load_lora_adapter(tmp_path)
        assert close(predict(again), predict(model), 1e-6)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        names = set(file.keys())
    assert {"base_model.model.proj_out.alpha", "base_model.model.transformer_blocks.0.attn1.to_q.alpha"} <= names


def merged_as_comfyui(weight: Tensor, name: str, tensors: dict[str, Tensor]) -> Tensor:
    """A layer's weight with its adapter, by ComfyUI's rules; what is used is taken from the tensors."""

    def take(ending: str) -> Tensor | None:
        return tensors.pop(f"transformer.{name}.{ending}", None)

    alpha, dora = take("alpha"), take("dora_scale")
    take("lora_magnitude_vector")  # it reads dora_scale
    down, up = take("lora_A.weight"), take("lora_B.weight")
    change, rank = None, 0
    if down is not None and up is not None:
        change, rank = up @ down, len(down)
    halves = [take(f"hada_w{i}_{half}") for i in (1, 2) for half in "ab"]
    if all(half is not None for half in halves):
        change, rank = (halves[0] @ halves[1]) * (halves[2] @ halves[3]), len(halves[1])
    factors = []
    for i in (1, 2):
        whole, left, right = take(f"lokr_w{i}"), take(f"lokr_w{i}_a"), take(f"lokr_w{i}_b")
        if left is not None and right is not None:
            whole, rank = left @ right, len(right)
        factors.append(whole)
    if all(factor is not None for factor in factors):
        change = torch.kron(*factors)
    if change is None:
        return weight
    weight = weight + change * (float(alpha) / rank if alpha is not None and rank else 1.0)
    return weight if dora is None else weight * dora / weight.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("kind", CONFIGS)
def test_comfyui_reads_what_is_saved(kind: str, tmp_path: Path) -> None:
    """Its names are "transformer." before ours, and every tensor has a meaning there."""
    model = with_adapter(kind)
    tensors = load_file(save(tmp_path, {"transformer": model}, "default"))
    plain = tiny_transformer()
    with torch.no_grad():
        for name, module in plain.named_modules():
            if isinstance(module, nn.Linear):
                module.weight.copy_(merged_as_comfyui(module.weight, name, tensors))
        assert not tensors
        assert close(predict(plain), predict(model))


def glm_predict(model: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    latents, text = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 5, 16, generator=generator)
    prior, size = torch.arange(16).reshape(1, 16), torch.tensor([[64, 64]])
    arguments = (latents, text, prior, torch.tensor([False]), torch.tensor([400]), size, torch.zeros(1, 2))
    with torch.no_grad():
        output: Tensor = model(*arguments).sample
    return output


def test_diffusers_loads_an_adapter_of_glm_image(tmp_path: Path) -> None:
    theirs = diffusers.GlmImageTransformer2DModel(**TRANSFORMER).eval()
    ours = impasto.GlmImageTransformer2DModel(**TRANSFORMER).eval()
    ours.load_state_dict(theirs.state_dict())
    before = glm_predict(ours)
    targets = ["to_q", "to_out.0", "net.2", "norm1.linear"]
    ours.add_adapter(peft.LoraConfig(r=2, lora_alpha=8, target_modules=targets, init_lora_weights=False))
    ours.save_lora_adapter(tmp_path)
    theirs.load_lora_adapter(tmp_path, use_safetensors=True)
    assert not close(glm_predict(ours), before, 1e-2)
    assert close(glm_predict(ours), glm_predict(theirs))
    ours.fuse_lora()
    assert close(glm_predict(ours), glm_predict(theirs))
    theirs.save_lora_adapter(tmp_path / "theirs", adapter_name="default_0")
    ours.unfuse_lora()
    ours.unload_lora()
    assert torch.equal(glm_predict(ours), before)
    ours.load_lora_adapter(tmp_path / "theirs", prefix=None)
    assert close(glm_predict(ours), glm_predict(theirs))


def test_an_autoencoder_has_adapters_too(tmp_path: Path) -> None:
    vae = tiny_vae()
    image = torch.randn(1, 3, 16, 16)
    config = peft.LoraConfig(r=2, target_modules=["conv1", "conv_out", "to_q", "to_out.0"], init_lora_weights=False)
    with torch.no_grad():
        before = vae(image).sample
        vae.add_adapter(config)
        adapted = vae(image).sample
        vae.enable_tiling()
        vae.fuse_lora()
        assert close(vae(image).sample, adapted)
        vae.save_lora_adapter(tmp_path)
        again = tiny_vae()
        again.load_lora_adapter(tmp_path)
        assert close(again(image).sample, adapted)
    assert not close(adapted, before, 1e-2)


@pytest.mark.parametrize("method", ["int8-weight-only", "int8-dynamic", "nf4"])
@pytest.mark.parametrize("dialect", ["onetrainer_comfy", "dora_rows", "dora_columns"])
def test_an_adapter_on_a_quantized_base(method: Any, dialect: str, tmp_path: Path) -> None:
    """It changes the quantized weights as it would change these if they were not quantized."""
    if method == "int8-dynamic" and not multiplies_int8_exactly():
        pytest.skip("int8-dynamic needs exact products")
    model = tiny_transformer(num_attention_heads=4, attention_head_dim=16, cross_attention_dim=64)
    base = copy.deepcopy(model)
    handle = impasto.quantize(model, method)
    with torch.no_grad():
        for name in handle.layers:
            base.get_parameter(f"{name}.weight").copy_(model.get_submodule(name).dequantize())
    written = DIALECTS[dialect]({"transformer": base, "text_encoder": _Text()})
    tensors = {name: x for name, x in written.tensors.items() if not name.startswith("text_encoders")}
    model.load_lora_adapter(tensors)
    merged = copy.deepcopy(base)
    for layer, delta in written.deltas["transformer"].items():
        merged.get_parameter(f"{layer}.weight").data += delta
    with torch.no_grad():
        tolerance = 3e-2 if method == "int8-dynamic" else 1e-4
        assert close(predict(model), predict(merged), tolerance)
    (predict(model) ** 2).mean().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(("lora_" in name) and grad is not None and bool(grad.abs().max() > 0) for name, grad in grads.items())
    if method == "nf4":
        base.load_lora_adapter(tensors)
        (predict(base) ** 2).mean().backward()
        theirs = dict(base.named_parameters())
        assert all(
            close(grad, theirs[name.replace(".base_layer.base_layer", ".base_layer")].grad, 1e-3)
            for name, grad in grads.items()
        )
    model.fuse_lora()
    with torch.no_grad():
        assert close(predict(model), predict(merged), 0.2)
    model.unfuse_lora()
    model.unload_lora()
    handle.remove()


@pytest.mark.parametrize("undone", [False, True])
def test_a_quantized_base_is_cast_or_restored_while_adapters_are_fused(undone: bool) -> None:
    def model(dtype: torch.dtype) -> Any:
        found = tiny_transformer(num_attention_heads=4, attention_head_dim=16, cross_attention_dim=64)
        found.load_lora_adapter(layer_of("transformer_blocks.0.attn1.to_q", 64, 0))
        return found.to(dtype)

    dtype = torch.float32 if undone else torch.bfloat16
    found, expected = model(torch.float32), model(dtype)
    with impasto.quantize(found, "nf4") if undone else nullcontext():
        if not undone:
            impasto.quantize(found, "nf4")
        found.fuse_lora()
        found.to(dtype)
    found.unfuse_lora()
    layer = found.transformer_blocks[0].attn1.to_q
    assert {p.dtype for p in layer.parameters() if p.is_floating_point()} == {dtype}
    with torch.no_grad():
        if undone:
            assert torch.equal(predict(found), predict(expected))
        else:
            inputs = torch.randn(2, 4, 8, 8).to(dtype), torch.randn(2, 5, 32).to(dtype), torch.tensor([7, 500])
            assert close(found(*inputs).sample.float(), expected(*inputs).sample.float(), 0.5)


def test_an_adapter_on_weights_in_a_narrow_dtype() -> None:
    pair = layer_of("transformer_blocks.0.attn1.to_q", 24, 0)
    expected, model = tiny_transformer(), tiny_transformer()
    expected.load_lora_adapter(pair)
    model.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    model.load_lora_adapter(pair)
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_k"]), "new")
    model.set_adapters(["default_0", "new"])
    assert {p.dtype for name, p in model.named_parameters() if "lora_" in name} == {torch.float32}
    with torch.no_grad():
        assert close(predict(model), predict(expected), 0.1)
    with pytest.raises(ConfigurationError, match=r"stored in a narrow dtype, .* disable_layerwise_casting\(\)"):
        model.fuse_lora()


def test_unfusing_a_model_that_was_cast_layer_by_layer_meanwhile() -> None:
    model = tiny_transformer()
    model.load_lora_adapter(layer_of("transformer_blocks.0.attn1.to_q", 24, 0))
    expected = predict(model)
    model.fuse_lora()
    model.enable_layerwise_casting(torch.float8_e4m3fn, torch.bfloat16)
    model.unfuse_lora()
    layer = model.transformer_blocks[0].attn1.to_q
    assert {p.dtype for p in layer.parameters()} == {torch.float32}
    assert close(predict(model), expected, 0.1)


class _Text(nn.Module):
    def get_parameter(self, name: str) -> nn.Parameter:
        return nn.Parameter(torch.zeros(8, 8))


def test_what_needs_ordinary_weights_says_so() -> None:
    model = tiny_transformer(num_attention_heads=4, attention_head_dim=16, cross_attention_dim=64)
    written = DIALECTS["lycoris_lokr"]({"transformer": model, "text_encoder": nn.Module()})
    impasto.quantize(model, "nf4", keep_originals=False)
    with pytest.raises(ConfigurationError, match=r"LoKr adapter needs ordinary weights, and .* is quantized"):
        model.load_lora_adapter(written.tensors)
    adapted = tiny_transformer()
    adapted.load_lora_adapter(DIALECTS["lycoris_lokr"]({"transformer": adapted}).tensors)
    with pytest.raises(ConfigurationError, match=r"has a LoKr or LoHa adapter, which needs its weight; fuse it first"):
        impasto.quantize(adapted, "int8-weight-only")
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(ConfigurationError, match=r"quantized and its original weight was not kept"):
        model.fuse_lora()


def test_one_file_for_several_components_and_names_that_are_wrong(tmp_path: Path) -> None:
    model = with_adapter("lora")
    with pytest.raises(InputError, match=r"no adapter 'other' in transformer; there are: default"):
        save(tmp_path, {"transformer": model}, "other")
    with pytest.raises(InputError, match="pickles are read, never written"):
        model.save_lora_adapter(tmp_path, safe_serialization=False)
    with pytest.raises(InputError, match="pickles are read, never written"):
        model.save_lora_adapter(tmp_path, weight_name="x.bin")
    with pytest.raises(InputError, match=r"a config of peft, such as LoraConfig, not by \{'r': 2\}"):
        model.add_adapter({"r": 2}, "x")
    with pytest.raises(InputError, match=r"not added: Target modules .*to_z.* not found"):
        model.add_adapter(peft.LoraConfig(target_modules=["to_z"]), "x")
    assert model.active_adapters() == ["default"]
    with pytest.raises(InputError, match="no adapter"):
        tiny_transformer().set_adapters("x")
    assert [*tmp_path.iterdir()] == []


def test_a_copy_has_adapters_of_its_own() -> None:
    model = with_adapter("lora")
    model.fuse_lora()
    copied = copy.deepcopy(model)
    with torch.no_grad():
        expected = predict(tiny_transformer())
        copied.unfuse_lora()
        copied.set_adapters("default", 0.0)
        assert close(predict(copied), expected)
        copied.unload_lora()
        assert torch.equal(predict(copied), expected)
        assert not close(predict(model), expected, 1e-2)
    model.unfuse_lora()
    assert model.active_adapters() == ["default"]


def test_without_peft_the_error_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'impasto\[adapters\]'"):
        tiny_transformer().load_lora_adapter(PAIR)


def test_given_alphas_count_first() -> None:
    model = tiny_transformer()
    written = DIALECTS["onetrainer_comfy"]({"transformer": model, "text_encoder": _Text()})
    tensors = {name: x for name, x in written.tensors.items() if not name.startswith("text_encoders")}
    model.load_lora_adapter(tensors, adapter_name="all", alpha=4)
    model.load_lora_adapter(tensors, adapter_name="one", network_alphas={"proj_out": 6.0})
    assert {layer.scale for layer in collect(model, "all").values()} == {2.0}
    scales = {name: layer.scale for name, layer in collect(model, "one").items()}
    assert scales.pop("proj_out") == 3.0
    assert set(scales.values()) == {1.5}
    with pytest.raises(InputError, match=r"layers that the adapter does not have: proj_in"):
        model.load_lora_adapter(tensors, alpha={"proj_in": 1.0})
    whole = lokr_of({"transformer_blocks.0.attn1.to_q": (3, 3)})
    model.load_lora_adapter(whole, adapter_name="whole", alpha=16)
    assert [layer.scale for layer in collect(model, "whole").values()] == [1.0]  # it has no rank to divide by


PAIR = {
    "transformer.proj_out.lora_A.weight": torch.ones(2, 24),
    "transformer.proj_out.lora_B.weight": torch.ones(32, 2),
}
HOSTILE: dict[str, tuple[dict[str, Tensor], str]] = {
    "nan": ({**PAIR, "transformer.proj_out.lora_A.weight": torch.full((2, 24), torch.nan)}, "NaN or infinite"),
    "half": ({"transformer.proj_out.lora_A.weight": torch.ones(2, 24)}, "proj_out lacks B"),
    "integers": (
        {**PAIR, "transformer.proj_out.lora_A.weight": torch.ones(2, 24, dtype=torch.int64)},
        "floating-point",
    ),
    "empty": ({**PAIR, "transformer.proj_out.lora_A.weight": torch.ones(0, 24)}, "is empty"),
    "a model": ({"proj_out.weight": torch.ones(32, 24)}, r"1 tensors are no adapter's \(proj_out.weight\)"),
    "nothing": ({}, "it has no tensors"),
    "two kinds": (
        {**PAIR, "transformer.proj_out.diff": torch.ones(32, 24)},
        "full and lora, and should be of one kind",
    ),
    "alphas": ({**PAIR, "transformer.proj_out.alpha": torch.ones(3)}, "should be one number"),
    "alpha": ({**PAIR, "transformer.proj_out.alpha": torch.tensor(1e9)}, "alpha of .*proj_out must be a finite number"),
    "norms": ({**PAIR, "transformer.proj_out.dora_scale": torch.ones(3, 3)}, "norms of .* have shape"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_damaged_adapters_are_refused(case: str, tmp_path: Path) -> None:
    model = tiny_transformer()
    layers = list(model.modules())
    tensors, words = HOSTILE[case]
    save_file(tensors, tmp_path / "x.safetensors")
    torch.save(tensors, tmp_path / "x.bin")
    for name in ("x.safetensors", "x.bin"):
        with pytest.raises(CheckpointError, match=words):
            model.load_lora_adapter(tmp_path / name)
    assert list(model.modules()) == layers


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ({"lora_adapter_metadata": "{"}, "lora_adapter_metadata in its header is not JSON"),
        ({"lora_adapter_metadata": '{"transformer.lora_alpha": "8"}'}, "alpha must be a finite number"),
        ({"lora_adapter_metadata": '{"transformer.alpha_pattern": {"(a+)+$": 8}}'}, r"by the expression '\(a\+\)\+\$'"),
        ({"impasto_generation": '{"steps": -4}'}, "steps must be a whole number"),
        ({"impasto_generation": "[4]"}, "is not an object"),
    ],
)
def test_damaged_headers_are_refused(header: dict[str, str], words: str, tmp_path: Path) -> None:
    save_file(PAIR, tmp_path / "x.safetensors", header)
    with pytest.raises(CheckpointError, match=words):
        tiny_transformer().load_lora_adapter(tmp_path / "x.safetensors")


@pytest.mark.parametrize("rank", [-4, "4"])
def test_a_rank_that_is_none_is_refused(rank: Any, tmp_path: Path) -> None:
    written = DIALECTS["lycoris_lokr"]({"transformer": tiny_transformer(), "text_encoder": nn.Module()}).tensors
    tensors = {name: tensor for name, tensor in written.items() if not name.endswith("alpha")}
    config = {"transformer.peft_type": "LOKR", "transformer.r": rank, "transformer.alpha": 2}
    header = {"lora_adapter_metadata": json.dumps({**config, "transformer.use_rslora": True})}
    save_file(tensors, tmp_path / "x.safetensors", header)
    with pytest.raises(CheckpointError, match="r must be a finite number"):
        tiny_transformer().load_lora_adapter(tmp_path / "x.safetensors")


def test_a_pickle_runs_no_code_and_a_damaged_file_is_refused(tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({**PAIR, "x": Attack()}, tmp_path / "x.bin")
    (tmp_path / "y.safetensors").write_bytes(b"\x10" * 100)
    for name in ("x.bin", "y.safetensors", "z.safetensors"):
        with pytest.raises(CheckpointError):
            tiny_transformer().load_lora_adapter(tmp_path / name)
    assert not (tmp_path / "ran").exists()


def test_training_can_go_on_after_an_adapter_was_loaded_and_unloaded() -> None:
    model = tiny_transformer()
    model.proj_out.weight.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    model.load_lora_adapter(PAIR)
    model.unload_lora()
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags


def layer_of(name: str, size: int, seed: int) -> dict[str, Tensor]:
    """A LoRA of one layer of a tiny transformer."""
    torch.manual_seed(seed)
    return {
        f"transformer.{name}.lora_A.weight": torch.randn(2, size),
        f"transformer.{name}.lora_B.weight": torch.randn(size, 2),
    }


def test_after_deletion_all_layers_have_the_same_active_adapters() -> None:
    """B is on one layer, C on another, A on both: peft would let B act on the first and C on the second."""
    first, second = (layer_of(f"transformer_blocks.{i}.attn1.to_q", 24, i) for i in range(2))
    model, expected = tiny_transformer(), tiny_transformer()
    for name, tensors in (("B", first), ("C", second), ("A", {**first, **second})):
        model.load_lora_adapter(tensors, adapter_name=name)
    expected.load_lora_adapter(first, adapter_name="B")
    model.set_adapter("A")
    model.delete_adapters("A")
    assert model.active_adapters() == ["B"]
    with torch.no_grad():
        assert close(predict(model), predict(expected))
    model.load_lora_adapter({**first, **second}, adapter_name="A")
    model.set_adapter(["C", "A"])
    model.delete_adapters("A")
    assert model.active_adapters() == ["C"]
    model.set_adapter("B")
    model.delete_adapters("C")
    assert model.active_adapters() == ["B"]


def convolution(norms: Tensor, name: str, out: int = 24) -> dict[str, Tensor]:
    """A DoRA of the patch embedding, of 4 inputs."""
    torch.manual_seed(0)
    return {
        "transformer.pos_embed.proj.lora_A.weight": torch.randn(2, 4, 2, 2),
        "transformer.pos_embed.proj.lora_B.weight": torch.randn(out, 2, 1, 1),
        f"transformer.pos_embed.proj.{name}": norms,
    }


def test_dora_of_a_convolution_has_norms_of_outputs_or_of_inputs(tmp_path: Path) -> None:
    weight = tiny_transformer().pos_embed.proj.weight.detach()
    for rest, shape, name in (
        ((1, 2, 3), (1, 24, 1, 1), "lora_magnitude_vector"),
        ((0, 2, 3), (1, 4, 1, 1), "dora_scale"),
    ):
        norms = torch.rand(shape) + 1
        tensors = convolution(norms, name)
        model = tiny_transformer()
        model.load_lora_adapter(tensors)
        a, b = (tensors[f"transformer.pos_embed.proj.lora_{x}.weight"].flatten(1) for x in "AB")
        changed = weight + (b @ a).reshape(weight.shape)
        own = norms.reshape(-1, 1, 1, 1) if shape[1] == 24 else norms
        model.fuse_lora()
        fused = model.pos_embed.proj.weight.detach()
        assert close(fused, changed * own / torch.linalg.vector_norm(changed, dim=rest, keepdim=True))


def test_peft_loads_a_dora_of_a_convolution(tmp_path: Path) -> None:
    model = tiny_transformer()
    model.load_lora_adapter(convolution(torch.rand(1, 24, 1, 1) + 1, "lora_magnitude_vector"), adapter_name="default")
    model.save_lora_adapter(tmp_path, weight_name="adapter_model.safetensors")
    with torch.no_grad():
        assert close(predict(peft.PeftModel.from_pretrained(tiny_transformer(), tmp_path)), predict(model), 1e-6)


def lokr_of(first: dict[str, tuple[int, int]]) -> dict[str, Tensor]:
    """A LoKr as SimpleTuner writes it, from the shapes of the first matrices."""
    torch.manual_seed(0)
    tensors = {}
    for i, (name, (a, b)) in enumerate(first.items()):
        out, inputs = tiny_transformer().get_parameter(f"{name}.weight").shape
        key = f"lycoris_{name.replace('.', '_')}"
        tensors |= {f"{key}.lokr_w1": torch.randn(a, b), f"{key}.alpha": torch.tensor(1.0)}
        if i % 2:
            tensors |= {f"{key}.lokr_w2_a": torch.randn(out // a, 1), f"{key}.lokr_w2_b": torch.randn(1, inputs // b)}
        else:
            tensors[f"{key}.lokr_w2"] = torch.randn(out // a, inputs // b)
    return tensors


def test_a_lokr_of_any_factor_is_saved_in_pefts_form_if_peft_can_make_it(tmp_path: Path) -> None:
    model, names = tiny_transformer(), [f"transformer_blocks.0.attn1.to_{x}" for x in "qkv"]
    model.load_lora_adapter(lokr_of(dict.fromkeys(names, (3, 3))), adapter_name="same")
    model.save_lora_adapter(tmp_path, "same", weight_name="adapter_model.safetensors")
    assert json.loads((tmp_path / "adapter_config.json").read_text())["decompose_factor"] == 3
    with torch.no_grad():
        assert close(predict(peft.PeftModel.from_pretrained(tiny_transformer(), tmp_path)), predict(model), 1e-6)
    model.load_lora_adapter(lokr_of({names[0]: (3, 3), names[1]: (12, 2)}), adapter_name="other")
    with pytest.raises(InputError, match=r"adapter other has matrices of other shapes than peft makes"):
        model.save_lora_adapter(tmp_path / "other", "other", weight_name="adapter_model.safetensors")
    assert not (tmp_path / "other").exists()
    with torch.no_grad():
        expected = predict(model)
        model.save_lora_adapter(tmp_path / "other", "other")
        again = tiny_transformer()
        again.load_lora_adapter(tmp_path / "other")
        assert close(predict(again), expected, 1e-6)
