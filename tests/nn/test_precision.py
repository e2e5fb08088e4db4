"""16-bit weights, float32 computation: as close to float64 as can be, everywhere, and never in anyone's way."""

from __future__ import annotations

import copy
import functools
import io
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import T5EncoderModel

from impasto import PixArtTransformer2DModel, compute_as_stored, compute_in_float32, quantize
from impasto.errors import InputError
from impasto.nn import machine, precision, widening
from impasto.nn.precision import adapt, checkpointed, computing, in_float32, precision_of, without_autocast

from ..tiny import tiny_text_encoder, tiny_transformer, tiny_vae

HALVES = [torch.bfloat16, torch.float16]
Call = Callable[[Any], Tensor]


@pytest.fixture
def without_native_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_multiplies", lambda dtype: False)


@pytest.fixture
def with_native_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "is_native", lambda dtype: True)


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).bfloat16()  # exact in all dtypes


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact.double()).norm() / exact.double().norm())


def dtype_of(model: nn.Module) -> torch.dtype:
    return next(model.parameters()).dtype


# --- models and how they are called ---

LATENTS, TEXT, IMAGE = (2, 4, 8, 8), (2, 9, 32), (1, 3, 32, 32)
IDS = torch.arange(3, 17).view(2, 7)


def denoise(model: Any) -> Tensor:
    to = dtype_of(model)
    mask = torch.ones(2, 9, dtype=to)
    mask[0, 5:] = 0
    conditions = {"resolution": None, "aspect_ratio": None}
    timestep = torch.tensor([10, 500])
    out: Tensor = model(
        random(*LATENTS).to(to), random(*TEXT).to(to), timestep, conditions, encoder_attention_mask=mask
    ).sample
    return out


def encode_text(model: Any) -> Tensor:
    out: Tensor = model(IDS, attention_mask=torch.ones_like(IDS)).last_hidden_state
    return out


def decode(model: Any) -> Tensor:
    out: Tensor = model.decode(random(1, 4, 8, 8).to(dtype_of(model))).sample
    return out


def encode(model: Any) -> Tensor:
    out: Tensor = model.encode(random(*IMAGE).to(dtype_of(model))).latent_dist.mean
    return out


def tiled(model: Any) -> Tensor:
    model.enable_tiling()
    return decode(model)


def foreign_transformer() -> nn.Module:
    config = dict(tiny_transformer().config)
    names = diffusers.PixArtTransformer2DModel.__init__.__wrapped__.__code__.co_varnames
    return diffusers.PixArtTransformer2DModel(**{name: value for name, value in config.items() if name in names})


def foreign_vae() -> nn.Module:
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return diffusers.AutoencoderKL(block_out_channels=(32, 64), layers_per_block=1, latent_channels=4, **blocks)


MODELS: dict[str, tuple[Callable[[], nn.Module], Call]] = {
    "transformer": (tiny_transformer, denoise),
    "diffusers transformer": (foreign_transformer, denoise),
    "T5": (tiny_text_encoder, encode_text),
    "decoder": (tiny_vae, decode),
    "tiled decoder": (tiny_vae, tiled),
    "encoder": (tiny_vae, encode),
    "diffusers decoder": (foreign_vae, decode),
    "diffusers encoder": (foreign_vae, encode),
}


@functools.cache
def _random_model(name: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return MODELS[name][0]().eval()


def random_model(name: str, dtype: torch.dtype) -> Any:
    return copy.deepcopy(_random_model(name)).to(dtype)


def small_layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 8))


def narrowed() -> nn.Sequential:
    """Layers that compute in float32 on every machine."""
    layers = small_layers().bfloat16()
    compute_in_float32(layers)
    return layers


# --- closer to float64 ---


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_it_is_at_least_as_close_to_float64_as_16_bit_arithmetic(name: str, dtype: torch.dtype) -> None:
    model, call = random_model(name, dtype), MODELS[name][1]
    exact = call(copy.deepcopy(model).double())
    with compute_as_stored(model):
        stored = error(call(model), exact)
    with compute_in_float32(model):
        found = call(model)
    assert found.dtype == dtype
    assert {p.dtype for p in model.parameters()} == {dtype}
    # What is left is the rounding of the output.
    assert error(found, exact) <= min(stored, 1.05 * error(exact.to(dtype), exact))


@torch.no_grad()
def test_it_is_what_float32_weights_of_the_same_numbers_give() -> None:
    """Up to the order of sums: blocks of a weight's rows are multiplied one after the other."""
    wide = nn.Linear(4096, 3000).bfloat16().float()
    narrow = copy.deepcopy(wide).bfloat16()
    convolution = nn.Conv2d(4, 8, 3).bfloat16().float().to(memory_format=torch.channels_last)
    for rows in (1, 20, 65, 300):
        x = random(rows, 4096).float()
        with in_float32():
            found = narrow(x[None])
        assert found.shape == (1, rows, 3000)
        torch.testing.assert_close(found[0], wide(x), rtol=1e-5, atol=1e-5)
    with in_float32():
        without_bias = F.linear(x, narrow.weight)
        image = random(1, 4, 8, 8).float()
        torch.testing.assert_close(copy.deepcopy(convolution).bfloat16()(image), convolution(image))
    torch.testing.assert_close(without_bias, F.linear(x, wide.weight), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_an_autoencoder_that_overflows_in_float16() -> None:
    vae = tiny_vae()
    vae.decoder.conv_in.weight.mul_(2e5)
    vae.half()
    latents = random(1, 4, 8, 8).half()
    with compute_as_stored(vae):
        assert not bool(vae.decode(latents).sample.isfinite().all())
    with compute_in_float32(vae), torch.autocast("cpu", torch.float16):  # which would narrow it again
        image = vae.decode(latents).sample
    assert image.dtype == torch.float16
    assert bool(image.isfinite().all())


# --- when ---


@torch.no_grad()
def test_it_is_automatic_where_products_are_not_native(without_native_products: None, tmp_path: Path) -> None:
    tiny_transformer().save_pretrained(tmp_path)
    for dtype in HALVES:
        model = PixArtTransformer2DModel.from_pretrained(tmp_path, dtype=dtype)
        assert precision_of(model) == "automatic"
        automatic = denoise(model)
        with compute_in_float32(model):
            assert torch.equal(denoise(model), automatic)
        with compute_as_stored(model):
            assert precision_of(model) == "as stored"
            adapt(model)  # a pipeline does not undo what was chosen
            assert not torch.equal(denoise(model), automatic)
        model.float()
        assert denoise(model).dtype == torch.float32


@torch.no_grad()
def test_nothing_changes_where_products_are_native(with_native_products: None) -> None:
    for dtype in HALVES:
        model = random_model("transformer", dtype)
        plain = denoise(model)
        adapt(model)
        assert precision_of(model) == "automatic"
        assert torch.equal(denoise(model), plain)


def test_what_is_chosen_is_on_record_and_undone() -> None:
    model = small_layers().bfloat16()
    assert precision_of(model) == "as stored"
    handle = compute_in_float32(model)
    assert precision_of(model) == "float32"
    with compute_as_stored(model):
        assert precision_of(model) == "as stored"
    assert precision_of(model) == "float32"
    handle.remove()
    assert precision_of(model) == "automatic"


def test_modules_that_other_libraries_have_placed_are_left_alone() -> None:
    for mark in ({"is_quantized": True}, {"hf_device_map": {"": "cpu"}}):
        model = narrowed()
        model.__dict__.update(mark)
        with pytest.raises(RuntimeError, match="dtype"):
            model(random(2, 8).float())


# --- in nobody's way ---


def test_an_adapted_module_is_one_of_its_class() -> None:
    model = tiny_transformer().bfloat16()
    compute_in_float32(model)
    adapt(model)
    cls = type(model)
    assert isinstance(model, PixArtTransformer2DModel)
    assert (cls.__name__, cls.__module__, cls.__mro__[1]) == (
        "PixArtTransformer2DModel",
        PixArtTransformer2DModel.__module__,
        PixArtTransformer2DModel,
    )
    other = tiny_transformer().bfloat16()
    adapt(other)
    assert type(other) is cls
    assert not {"forward", "__call__", "denoise"} & set(vars(model))
    assert type(model.proj_out) is nn.Linear


def test_float32_weights_leave_the_class_alone(without_native_products: None, tmp_path: Path) -> None:
    tiny_transformer().save_pretrained(tmp_path)
    model = PixArtTransformer2DModel.from_pretrained(tmp_path)
    assert type(model) is PixArtTransformer2DModel
    assert isinstance(PixArtTransformer2DModel.from_config(model.config), type(model))
    model.to(torch.bfloat16)
    assert precision_of(model) == "automatic"
    assert torch.equal(denoise(model), denoise(PixArtTransformer2DModel.from_pretrained(tmp_path, dtype="bfloat16")))
    encoder = tiny_text_encoder()
    adapt(encoder)
    assert type(encoder) is T5EncoderModel


def test_a_method_that_is_replaced_on_the_class_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    model, forward = tiny_transformer().bfloat16(), PixArtTransformer2DModel.forward
    compute_in_float32(model)
    expected = denoise(model)
    calls = []

    def counted(self: Any, *args: Any, **options: Any) -> Any:
        calls.append(self)
        return forward(self, *args, **options)

    monkeypatch.setattr(PixArtTransformer2DModel, "forward", counted)
    assert torch.equal(denoise(model), expected)
    assert calls == [model]


def test_copies_and_pickles() -> None:
    model = narrowed()
    x = random(2, 8)
    expected = model(x)
    copied = copy.deepcopy(model)
    assert precision_of(copied) == "float32"
    assert torch.equal(copied(x), expected)
    copied[0].weight.data.zero_()
    assert torch.equal(model(x), expected)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    restored = [pickle.loads(pickle.dumps(model)), pickle.loads(pickle.dumps(model, 1))]
    for twin in (*restored, torch.load(file, weights_only=False)):
        assert precision_of(twin) == "float32"
        assert torch.equal(twin(x), expected)
        assert b"_Adapted" not in pickle.dumps(twin)


def test_saved_files_are_16_bit_and_of_the_class(tmp_path: Path) -> None:
    for name, loader in (("transformer", PixArtTransformer2DModel), ("T5", type(tiny_text_encoder()))):
        model = random_model(name, torch.bfloat16)
        compute_in_float32(model)
        model.save_pretrained(tmp_path / name)
        loaded = loader.from_pretrained(tmp_path / name, torch_dtype="auto")
        assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    model.load_state_dict(loaded.state_dict())
    assert '"PixArtTransformer2DModel"' in (tmp_path / "transformer" / "config.json").read_text()
    assert '"T5EncoderModel"' in (tmp_path / "T5" / "config.json").read_text()


def test_autoencoders_keep_their_documented_outputs() -> None:
    for name in ("encoder", "diffusers encoder"):
        vae = random_model(name, torch.bfloat16)
        compute_in_float32(vae)
        output = vae.encode(random(*IMAGE))
        found = output.latent_dist
        assert {x.dtype for x in (found.mean, found.std, found.var, found.sample(), found.mode())} == {torch.bfloat16}
        assert isinstance(vae.encode(random(*IMAGE), return_dict=False), tuple)
        assert vae(random(*IMAGE)).sample.dtype == torch.bfloat16


@torch.no_grad()
def test_stages_keep_their_digits() -> None:
    model = random_model("transformer", torch.bfloat16)
    compute_in_float32(model)
    context = model.encode_context(random(*TEXT))
    modulation = model.modulate(torch.tensor([10, 500]))
    assert modulation.shared.dtype == torch.float32
    assert model.denoise(random(*LATENTS), context, modulation).dtype == torch.bfloat16
    whole = model(random(*LATENTS), random(*TEXT), torch.tensor([10, 500]), return_dict=False)[0]
    assert torch.equal(whole, model(random(*LATENTS), context, modulation, return_dict=False)[0])


@pytest.mark.parametrize("method", ["int8-weight-only", "int8-dynamic", "nf4"])
@torch.no_grad()
def test_quantized_layers_in_a_16_bit_model(method: Any) -> None:
    pytest.importorskip("torchao")
    pytest.importorskip("bitsandbytes")
    if method == "int8-dynamic" and not machine.multiplies_int8_exactly():
        pytest.skip("int8-dynamic needs exact products")
    exact = denoise(random_model("transformer", torch.float32))
    model = random_model("transformer", torch.bfloat16)
    quantize(model, method)
    with compute_as_stored(model):
        stored = error(denoise(model), exact)
    compute_in_float32(model)
    assert denoise(model).dtype == torch.bfloat16
    assert error(denoise(model), exact) < 1.05 * stored


def test_foreign_code_reads_dtypes_and_makes_tensors_of_them() -> None:
    weight = nn.Parameter(random(4, 4))
    with in_float32():
        assert weight.dtype == torch.float32
        made = [torch.zeros(2, dtype=weight.dtype), torch.zeros_like(weight), weight.new_ones(3), random(2).to(weight)]
        made += [weight + weight, torch.cat([weight, random(4, 4).float()]), F.embedding(torch.tensor([1]), weight)]
        made += [torch.einsum("ij,jk->ik", weight, weight), torch.ones(2).lerp(random(2), 0.5)]
        x = torch.ones(4)
        x += weight[0]
        x[:2] = weight[0, :2]
        x[torch.tensor([0, 1]),] = weight[1, :2]
        made.append(x.mul_(weight[1]))
        views = [weight.T, weight[0], weight.detach(), weight.view(2, 8), nn.Parameter(weight.data)]
        into = random(4, 4)
        into.copy_(torch.ones(4, 4))
        torch.mm(into, into, out=torch.empty(4, 4, dtype=torch.bfloat16))
    assert {tensor.dtype for tensor in made} == {torch.float32}
    assert {tensor.dtype for tensor in (*views, into, weight)} == {torch.bfloat16}
    with torch.inference_mode(), in_float32():
        first = F.linear(x[None], weight)  # the buffer of inference mode serves elsewhere, too
    with torch.no_grad(), in_float32():
        assert torch.equal(F.linear(x[None], weight), first)


# --- threads, modes, gradients ---


@torch.no_grad()
def test_the_default_dtype_does_not_change_the_buffer() -> None:
    layer, x = narrowed(), random(2, 8)
    expected = layer(x)
    widening._buffer.memory = None
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        assert torch.equal(layer(x), expected)
    finally:
        torch.set_default_dtype(before)


def test_threads_have_buffers_and_modes_of_their_own() -> None:
    layers = [narrowed() for _ in range(4)]
    for i, layer in enumerate(layers):
        layer[0].weight.data.mul_(i + 1)
    inputs = [random(n, 8) for n in range(1, 9)]
    jobs = [(layer, x) for layer in layers for x in inputs] * 10
    expected = [layer(x) for layer, x in jobs]
    plain = nn.Linear(8, 8).bfloat16()

    def run(job: tuple[nn.Module, Tensor]) -> Tensor:
        assert plain.weight.dtype == torch.bfloat16  # another thread's mode is not in force here
        found: Tensor = job[0](job[1])
        return found

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda job: run(job).detach(), jobs))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@torch.no_grad()
def test_an_error_ends_the_mode() -> None:
    model = narrowed()
    with pytest.raises(RuntimeError, match="shapes"):
        model(random(2, 3))
    assert model[0].weight.dtype == torch.bfloat16
    with computing(model):
        assert model[0].weight.dtype == torch.float32
        with computing(model), in_float32():
            pass
        assert model[0].weight.dtype == torch.float32
    assert model[0].weight.dtype == torch.bfloat16
    with without_autocast("cpu"):
        assert not torch.is_autocast_enabled("cpu")
    with torch.autocast("cpu", torch.bfloat16), without_autocast("cpu"):
        assert not torch.is_autocast_enabled("cpu")


def gradients(model: nn.Module) -> Iterator[Tensor]:
    for parameter in model.parameters():
        assert parameter.grad is not None
        yield parameter.grad


def test_gradients_are_those_of_float32() -> None:
    model, x = narrowed(), random(3, 8).requires_grad_()
    model(x).float().square().sum().backward()
    wide, y = small_layers().bfloat16().float(), random(3, 8).float().requires_grad_()
    wide(y).bfloat16().float().square().sum().backward()
    assert x.grad is not None
    assert y.grad is not None
    for found, exact in zip((x.grad, *gradients(model)), (y.grad, *gradients(wide)), strict=True):
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.float(), exact, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("name", ["transformer", "decoder"])
def test_gradient_checkpointing_computes_again_in_float32(name: str) -> None:
    call = MODELS[name][1]
    found = []
    own = functools.partial(checkpoint, use_reentrant=False)
    for arguments in (None, (), (own,)):
        model = random_model(name, torch.bfloat16)
        compute_in_float32(model)
        if arguments is not None:
            model.enable_gradient_checkpointing(*arguments)
        call(model).float().square().mean().backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    assert found[0]
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*found, strict=True))
    assert checkpointed(nn.Identity(), torch.ones(1)) == 1


def test_checkpointing_of_another_library_computes_as_stored() -> None:
    model = random_model("diffusers transformer", torch.bfloat16)
    compute_in_float32(model)
    model.train()
    model.enable_gradient_checkpointing()
    denoise(model).float().square().mean().backward()
    assert all(p.grad is not None for p in model.proj_out.parameters())


# --- graphs ---


@torch.no_grad()
def test_compiled_and_exported() -> None:
    model, x = narrowed(), random(2, 8)
    expected = model(x)
    close = {"rtol": 0.0, "atol": 0.01}
    torch.testing.assert_close(torch.compile(model, backend="eager")(x), expected, **close)
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), expected, **close)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), expected, **close)
    torch.testing.assert_close(torch.jit.trace(model, (x,))(x), expected, **close)
    model[0].compile(backend="eager")
    torch.testing.assert_close(model(x), expected, **close)
    wide = small_layers()
    adapt(wide)  # without effect
    compiled = torch.compile(wide, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x.float()), wide(x.float()), **close)
    wrapped = torch.compile(small_layers().bfloat16(), backend="eager")
    adapt(wrapped)
    assert precision_of(wrapped._orig_mod) == "automatic"


def test_the_rules_of_functions_are_kept() -> None:
    """Each function's rule is looked up by name once."""
    with in_float32():
        torch.ones(2).tanh()
    assert torch.Tensor.tanh in widening._known


@pytest.mark.parametrize("choose", [compute_in_float32, compute_as_stored])
def test_something_else_than_a_module_is_refused(choose: Any) -> None:
    with pytest.raises(InputError, match=r"a module such as pipe\.vae, not for 'transformer'"):
        choose("transformer")
