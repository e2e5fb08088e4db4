"""Quantized layers: near the float ones, undone bit by bit, and clean checkpoints.

Tolerances, relative, of a weight matrix drawn from a normal distribution: int8 with 127 levels up to the largest of a
row of some tens of weights (about 2.5 σ) rounds by up to 0.01 σ, 0.006 σ on average, and activations likewise; NF4 has
levels up to 0.3 σ apart, about 0.09 σ on average.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from impasto.errors import ConfigurationError, InputError, MissingDependencyError, ResourceError
from impasto.models.pixart.model import PixArtTransformer2DModel
from impasto.nn.machine import multiplies_int8_exactly
from impasto.pipelines.pixart import PixArtSigmaPipeline
from impasto.transforms import quantized_linear
from impasto.transforms.quantize import dequantize, quantize
from impasto.transforms.quantized_linear import SCHEMES, QuantizedLinear

from ..tiny import tiny_pipeline, tiny_text_encoder, tiny_transformer

LIBRARY = {
    "int8-weight-only": "torchao",
    "int8-dynamic": "torchao",
    "fp8": "torchao",
    "nf4": "bitsandbytes",
}
TOLERANCE = {"int8-weight-only": 0.01, "int8-dynamic": 0.02, "nf4": 0.15}
#: int8-dynamic is refused where an AVX2 machine is imitated; test_products_that_saturate_are_refused shows it.
EVERYWHERE = tuple(name for name in TOLERANCE if name != "int8-dynamic" or multiplies_int8_exactly())


@pytest.fixture(params=EVERYWHERE)
def method(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    pytest.importorskip(LIBRARY[name])
    return name


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return (
        torch.randn(2, 4, 8, 8, generator=generator),
        torch.randn(2, 5, 32, generator=generator),
        torch.tensor([500]),
    )


@torch.no_grad()
def output(model: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
    latents, text, timestep = inputs()
    out: Tensor = model(latents.to(dtype), text.to(dtype), timestep, return_dict=False)[0]
    return out


def distance(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


# --- near ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_is_near_the_float_one(method: Any, dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(64, 128))
    nn.init.normal_(model[0].weight)
    model.to(dtype)
    x = torch.randn(2, 20, 64).to(dtype)
    with torch.no_grad():
        expected = model(x)
        quantize(model, method)
        found = model(x)
    assert isinstance(model[0], QuantizedLinear)
    assert found.dtype == dtype
    assert found.shape == expected.shape
    rounding = 0.0 if dtype == torch.float32 else 0.008  # bfloat16's own
    assert 1e-4 < distance(found, expected) < TOLERANCE[method] + rounding


def test_a_model_is_near_the_float_one(method: Any) -> None:
    model = tiny_transformer(num_layers=3)
    expected = output(model)
    quantize(model, method)
    assert 1e-5 < distance(output(model), expected) < 2 * TOLERANCE[method]


def test_a_pipeline_generates_with_it(method: Any) -> None:
    pipe = tiny_pipeline(PixArtSigmaPipeline)
    call = {"prompt": ["a cat", "a dog"], "num_inference_steps": 2, "output_type": "latent", "guidance_scale": 1.0}
    plain = pipe(**call, generator=torch.Generator().manual_seed(0)).images
    with quantize(pipe.transformer, method):
        found = pipe(**call, generator=torch.Generator().manual_seed(0)).images
    assert 0 < distance(found, plain) < 0.3


def test_memory_is_saved(method: Any) -> None:
    model = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 256))
    before = sum(p.numel() * p.element_size() for p in model.parameters())
    quantize(model, method)
    tensors: list[Tensor] = [*model.buffers()]
    for parameter in model.parameters():
        parts = [getattr(parameter, name, None) for name in ("qdata", "scale", "zero_point")]
        held = [part for part in parts if part is not None]
        tensors += held or [parameter]
    after = sum(t.numel() * t.element_size() for t in tensors)
    bits = {"int8-weight-only": 8, "int8-dynamic": 8, "nf4": 4.5}[method]
    assert after / before == pytest.approx(bits / 32, rel=0.06)


# --- which layers ---


def kinds(model: nn.Module) -> dict[str, str]:
    return {name: type(module).__name__ for name, module in model.named_modules() if "Linear" in type(module).__name__}


def test_which_layers_stay() -> None:
    pytest.importorskip("torchao")
    model = tiny_transformer(num_layers=2)
    handle = quantize(model, "int8-weight-only", skip=["transformer_blocks.1", "ff.net.2"])
    found = {name for name, kind in kinds(model).items() if kind == "QuantizedLinear"}
    block = "transformer_blocks.0"
    attentions = {f"{block}.{a}.{n}" for a in ("attn1", "attn2") for n in ("to_q", "to_k", "to_v", "to_out.0")}
    assert found == attentions | {f"{block}.ff.net.0.proj"} == set(handle.layers)


def test_a_short_text_is_still_absorbed_with_dynamic_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchao")
    monkeypatch.setattr(quantized_linear, "multiplies_int8_exactly", lambda: True)  # nothing is multiplied
    model = tiny_transformer()
    quantize(model, "int8-dynamic")
    assert all("attn2" not in name for name, kind in kinds(model).items() if kind == "QuantizedLinear")


def test_sizes_that_the_products_do_not_support_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchao")
    monkeypatch.setattr(quantized_linear, "multiplies_int8_exactly", lambda: True)  # nothing is multiplied
    model = nn.Sequential(nn.Linear(24, 30), nn.Linear(32, 32))
    handle = quantize(model, "int8-dynamic")
    assert handle.layers == ("1",)
    with pytest.raises(ConfigurationError, match="no linear layer that 'int8-dynamic' supports"):
        quantize(nn.Sequential(nn.Linear(24, 30)), "int8-dynamic")


def test_a_layer_in_two_places_is_one_layer(method: Any) -> None:
    layer = nn.Linear(32, 32)
    model = nn.ModuleDict({"a": layer, "b": nn.Sequential(layer)})
    quantize(model, method)
    assert model["a"] is model["b"][0]
    dequantize(model)
    assert model["a"] is model["b"][0] is layer


def test_a_text_encoder_keeps_its_sensitive_layers() -> None:
    pytest.importorskip("torchao")
    encoder = tiny_text_encoder()
    tokens = torch.tensor([[3, 4, 5, 1]])
    with torch.no_grad():
        expected = encoder(tokens).last_hidden_state
        quantize(encoder, "int8-weight-only")
        found = encoder(tokens).last_hidden_state
    stay = {name.rpartition(".")[2] for name, kind in kinds(encoder).items() if kind == "Linear"}
    assert stay == {"wo"}
    assert 0 < distance(found, expected) < 0.05


# --- undo ---


def test_undo_is_bit_exact(method: Any) -> None:
    model = tiny_transformer()
    expected, state = output(model), copy.deepcopy(model.state_dict())
    layers, parameters = dict(model.named_modules()), dict(model.named_parameters())
    attributes = {name: set(vars(module)) for name, module in layers.items()}
    handle = quantize(model, method)
    assert not torch.equal(output(model), expected)
    handle.remove()
    assert torch.equal(output(model), expected)
    assert all(module is layers[name] for name, module in model.named_modules())
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    handle.remove()  # a second time does nothing
    assert torch.equal(output(model), expected)


def test_undo_leaves_what_was_put_in_its_place(method: Any) -> None:
    model = tiny_transformer()
    handle = quantize(model, method)
    mine = nn.Linear(24, 24)
    model.transformer_blocks[0].attn1.to_q = mine
    handle.remove()
    assert model.transformer_blocks[0].attn1.to_q is mine
    assert "QuantizedLinear" not in kinds(model).values()


def test_without_originals_nothing_is_undone_or_saved(method: Any) -> None:
    model = tiny_transformer()
    expected = output(model)
    handle = quantize(model, method, keep_originals=False)
    found = output(model)
    for action in (handle.remove, model.state_dict):
        with pytest.raises(ConfigurationError, match="not kept"):
            action()
    assert "QuantizedLinear" in kinds(model).values()
    model.to(torch.bfloat16)
    assert distance(output(model, torch.bfloat16), found) < 0.05
    model.load_state_dict(tiny_transformer(seed=0).state_dict())
    assert distance(output(model, torch.bfloat16), expected) < 2 * TOLERANCE[method] + 0.05


# --- loading, saving, moving, copying ---


def test_what_is_loaded_is_quantized(method: Any) -> None:
    model, other = tiny_transformer(), tiny_transformer(seed=5)
    quantize(model, method)
    assert model.load_state_dict(other.state_dict(), strict=True) == ([], [])
    quantized = output(model)
    expected = output(other)
    assert 1e-5 < distance(quantized, expected) < 2 * TOLERANCE[method]
    dequantize(model)
    assert torch.equal(output(model), expected)


def test_a_state_dict_with_a_hole_is_reported(method: Any) -> None:
    model = tiny_transformer()
    state = model.state_dict()
    quantize(model, method)
    del state["transformer_blocks.0.ff.net.2.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key.*transformer_blocks\.0\.ff\.net\.2\.weight"):
        model.load_state_dict(state)


def test_a_saved_pipeline_has_the_original_weights(method: Any, tmp_path: Path) -> None:
    pipe = tiny_pipeline(PixArtSigmaPipeline)
    expected = copy.deepcopy(pipe.transformer.state_dict())
    quantize(pipe.transformer, method)
    pipe.save_pretrained(tmp_path)
    loaded = PixArtTransformer2DModel.from_pretrained(tmp_path, subfolder="transformer").state_dict()
    assert list(loaded) == list(expected)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.items())


def test_what_is_saved_after_a_cast_has_one_dtype(method: Any, tmp_path: Path) -> None:
    model, plain = tiny_transformer(), tiny_transformer().to(torch.bfloat16)
    quantize(model, method)
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    loaded = PixArtTransformer2DModel.from_pretrained(tmp_path, dtype="auto").state_dict()
    assert {tensor.dtype for tensor in loaded.values()} == {torch.bfloat16}
    assert all(torch.equal(loaded[name], tensor) for name, tensor in plain.state_dict().items())
    dequantize(model.float())  # the cast took no digits of the originals
    layer = "transformer_blocks.0.ff.net.2.weight"
    assert torch.equal(model.state_dict()[layer], tiny_transformer().state_dict()[layer])


def test_a_cast_quantizes_anew_and_undo_gives_the_new_dtype(method: Any) -> None:
    model, plain = tiny_transformer(), tiny_transformer()
    quantize(model, method)
    model.to(torch.bfloat16)
    plain.to(torch.bfloat16)
    expected = output(plain, torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert distance(output(model, torch.bfloat16), expected) < 2 * TOLERANCE[method] + 0.02
    dequantize(model)
    assert torch.equal(output(model, torch.bfloat16), expected)


def test_a_copy_stands_alone(method: Any) -> None:
    model = tiny_transformer()
    plain = output(model)
    quantize(model, method)
    expected = output(model)
    copied = copy.deepcopy(model)
    for parameter in dict.fromkeys(p for m in model.modules() for p in m.parameters(recurse=False)):
        if parameter.is_floating_point() and type(parameter) is nn.Parameter:
            parameter.data.zero_()
    assert torch.equal(output(copied), expected)
    dequantize(copied)
    assert torch.equal(output(copied), plain)


def test_an_offloaded_pipeline_generates_the_same(method: Any) -> None:
    pipe = tiny_pipeline(PixArtSigmaPipeline)
    quantize(pipe.transformer, method)
    call = {"prompt": "a cat", "num_inference_steps": 2, "output_type": "latent"}
    expected = pipe(**call, generator=torch.Generator().manual_seed(0)).images
    pipe.enable_model_cpu_offload(device="cpu")
    assert torch.equal(pipe(**call, generator=torch.Generator().manual_seed(0)).images, expected)


# --- bad input ---


def test_fp8_without_a_gpu_names_the_alternative() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    model = tiny_transformer().to(torch.bfloat16)
    with pytest.raises(ResourceError, match=r"compute capability 8\.9.*Use 'int8-dynamic'"):
        quantize(model, "fp8")
    assert "QuantizedLinear" not in kinds(model).values()


def test_products_that_saturate_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized_linear, "multiplies_int8_exactly", lambda: False)
    model = tiny_transformer()
    with pytest.raises(ResourceError, match=r"exact products of int8.*use 'int8-weight-only'"):
        quantize(model, "int8-dynamic")
    assert "QuantizedLinear" not in kinds(model).values()


@pytest.mark.gpu
def test_fp8_on_a_gpu_that_has_it() -> None:
    pytest.importorskip("torchao")
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no float8 products here")
    model = nn.Sequential(nn.Linear(64, 128)).to("cuda", torch.bfloat16)
    x = torch.randn(20, 64).to("cuda", torch.bfloat16)
    with torch.no_grad():
        expected = model(x)
        with quantize(model, "fp8"):
            assert distance(model(x), expected) < 0.06  # three bits of mantissa in both factors
        assert torch.equal(model(x), expected)
    with pytest.raises(ConfigurationError, match="bfloat16 weights"):
        quantize(model.float(), "fp8")


@pytest.mark.parametrize("name", EVERYWHERE)
def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch, name: Any) -> None:
    def absent(module: str) -> Any:
        raise ImportError(module)

    monkeypatch.setattr("impasto.optional.import_module", absent)
    model = tiny_transformer()
    with pytest.raises(
        MissingDependencyError, match=rf"{LIBRARY[name]}, which is not installed: pip install 'impasto\[quantize\]'"
    ):
        quantize(model, name)
    assert "QuantizedLinear" not in kinds(model).values()


def test_importing_the_transforms_imports_no_library() -> None:
    source = Path(importlib.import_module("impasto.transforms.quantized_linear").__file__ or "").read_text()
    assert "\nimport torchao" not in source
    assert "\nimport bitsandbytes" not in source
    assert set(SCHEMES) == set(LIBRARY)


def hooked(model: PixArtTransformer2DModel) -> None:
    model.transformer_blocks[0].attn1.to_q.register_forward_hook(lambda *_: None)


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda model: quantize(model, "int8-weight-only"), r"transformer_blocks\.0\.attn1\.to_q is quantized already"),
        (lambda model: model.fuse_qkv_projections(), r"call unfuse_qkv_projections\(\)"),
        (hooked, r"transformer_blocks\.0\.attn1\.to_q has hooks"),
    ],
)
def test_what_cannot_be_quantized(prepare: Callable[[Any], Any], message: str) -> None:
    pytest.importorskip("torchao")
    model = tiny_transformer()
    prepare(model)
    before = kinds(model)
    with pytest.raises(ConfigurationError, match=message):
        quantize(model, "int8-weight-only")
    assert kinds(model) == before


def test_quantized_projections_are_not_fused() -> None:
    pytest.importorskip("torchao")
    model = tiny_transformer()
    quantize(model, "int8-weight-only")
    expected = output(model)
    with pytest.raises(ConfigurationError, match="QuantizedLinear is quantized and cannot be fused"):
        model.fuse_qkv_projections()
    assert torch.equal(output(model), expected)


def test_layers_are_quantized_to_another_device() -> None:
    pytest.importorskip("torchao")
    model = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64))
    quantize(model, "int8-weight-only", keep_originals=False, device=torch.device("meta"))
    assert [p.device.type for p in model.parameters()] == ["meta", "meta", "cpu", "cpu"]
    assert type(model.to("meta")[0]) is QuantizedLinear


def test_bad_arguments() -> None:
    with pytest.raises(InputError, match="no method 'int3'; use one of int8-weight-only"):
        quantize(tiny_transformer(), "int3")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="skip is a list of names"):
        quantize(tiny_transformer(), "nf4", skip="ff")
    with pytest.raises(InputError, match="takes a module with linear layers inside"):
        quantize(nn.Linear(2, 2), "nf4")
    with pytest.raises(InputError, match="not PixArtSigmaPipeline"):
        quantize(tiny_pipeline(PixArtSigmaPipeline), "nf4")
