"""The documented surface of models that their mathematics does not need."""

from __future__ import annotations

import copy
import errno
import inspect
import pickle
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import accelerate
import diffusers
import pytest
import torch
from diffusers.training_utils import EMAModel, cast_training_params, compute_snr
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import impasto
from impasto.errors import ConfigurationError, InputError, OutputError
from impasto.files import write_file
from impasto.hooks import FirstBlockCacheConfig, TaylorSeerCacheConfig
from impasto.memory import streaming
from impasto.memory.moving import device_of
from impasto.models.autoencoder.model import AutoencoderKL
from impasto.models.compat.attention_processor import AttnProcessor2_0
from impasto.models.glm_image.model import GlmImageTransformer2DModel
from impasto.models.pixart.model import PixArtTransformer2DModel
from impasto.nn.attention import chosen_backend

from ..tiny import tiny_pipeline, tiny_text_encoder
from ..tiny_glm import prior_parts

PIXART: dict[str, Any] = {
    "num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 3, "cross_attention_dim": 24, "sample_size": 8,
    "caption_channels": 10, "use_additional_conditions": False,
}  # fmt: skip
GLM: dict[str, Any] = {
    "num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 3, "text_embed_dim": 10, "time_embed_dim": 12,
    "condition_dim": 4, "prior_vq_quantizer_codebook_size": 30,
}  # fmt: skip
VAE: dict[str, Any] = {
    "down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2,
    "block_out_channels": [8, 16], "norm_num_groups": 4, "sample_size": 16,
}  # fmt: skip


def pixart(**options: Any) -> PixArtTransformer2DModel:
    torch.manual_seed(0)
    return PixArtTransformer2DModel(**{**PIXART, **options}).eval()


def vae() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(**VAE).eval()


MODELS = {"pixart": pixart, "glm": lambda: GlmImageTransformer2DModel(**GLM).eval(), "vae": vae}
REFERENCES = {
    "pixart": lambda: diffusers.PixArtTransformer2DModel(**PIXART),
    "glm": lambda: diffusers.GlmImageTransformer2DModel(**GLM),
    "vae": lambda: diffusers.AutoencoderKL(**VAE),
}


def inputs() -> dict[str, Any]:
    torch.manual_seed(1)
    return {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "encoder_hidden_states": torch.randn(2, 5, 10),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]),
        "timestep": torch.tensor([7, 700]),
    }


def inputs_of(name: str) -> dict[str, Any]:
    if name == "pixart":
        return inputs()
    torch.manual_seed(1)
    if name == "vae":
        return {"sample": torch.randn(1, 3, 16, 16)}
    tokens = torch.arange(16)[None]
    sizes = {"target_size": torch.tensor([[64.0, 64.0]]), "crop_coords": torch.zeros(1, 2)}
    return {
        "hidden_states": torch.randn(1, 16, 8, 8), "encoder_hidden_states": torch.randn(1, 5, 10), **sizes,
        "prior_token_id": tokens, "prior_token_drop": tokens < 0, "timestep": torch.tensor([7]),
    }  # fmt: skip


def predict(model: nn.Module, name: str = "pixart", **changes: Any) -> Tensor:
    with torch.no_grad():
        sample: Tensor = model(**inputs_of(name), **changes).sample
        return sample


def distance(x: Tensor, y: Tensor) -> float:
    return float((x - y).norm() / y.norm())


# Facts


@pytest.mark.parametrize("name", MODELS)
def test_numbers_are_those_of_the_reference(name: str) -> None:
    model, reference = MODELS[name](), REFERENCES[name]()
    for one in (model, reference):
        next(one.parameters()).requires_grad_(False)
    for only_trainable in (False, True):
        for exclude in (False, True):
            assert model.num_parameters(only_trainable, exclude) == reference.num_parameters(only_trainable, exclude)
    assert model.get_memory_footprint(return_buffers=False) == reference.get_memory_footprint(return_buffers=False)
    model.register_buffer("more", torch.zeros(10))
    assert model.get_memory_footprint() == model.get_memory_footprint(return_buffers=False) + 40
    assert model._supports_gradient_checkpointing == reference._supports_gradient_checkpointing


def test_attributes_that_scripts_read() -> None:
    model, reference = pixart(), REFERENCES["pixart"]()
    for name in (
        "attention_head_dim",
        "height",
        "width",
        "inner_dim",
        "out_channels",
        "_skip_layerwise_casting_patterns",
    ):
        assert getattr(model, name) == getattr(reference, name)
    assert model._keep_in_fp32_modules is None
    assert model._supports_group_offloading
    assert {type(m).__name__ for m in model.modules()} >= set(model._no_split_modules) | set(model._repeated_blocks)


def test_the_constructor_of_glm_image_has_the_positions_of_the_reference() -> None:
    ours, theirs = (
        list(inspect.signature(cls).parameters.values())
        for cls in (GlmImageTransformer2DModel, diffusers.GlmImageTransformer2DModel)
    )
    positional = [p.name for p in ours if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == [p.name for p in theirs]
    assert [p.default for p in ours][: len(theirs)] == [p.default for p in theirs]
    assert {p.name for p in ours if p.kind is p.KEYWORD_ONLY} == {"pos_embed_max_size", "sample_size"}


# Training


@pytest.mark.parametrize("name", ["pixart", "vae"])
def test_a_checkpointing_function_of_ones_own(name: str) -> None:
    model, called = MODELS[name](), []

    def function(block: nn.Module, *arguments: Any) -> Any:
        called.append(block)
        return block(*arguments)

    call = dict(inputs()) if name == "pixart" else {"sample": torch.randn(1, 3, 16, 16)}
    assert not model.is_gradient_checkpointing
    model.enable_gradient_checkpointing(function)
    assert model.is_gradient_checkpointing
    model(**call).sample.sum().backward()
    assert len(called) == (3 if name == "pixart" else 6)
    with torch.no_grad():
        model(**call)
    model.disable_gradient_checkpointing()
    assert not model.is_gradient_checkpointing
    model(**call)
    assert len(called) == (3 if name == "pixart" else 6)


@pytest.mark.parametrize("name", MODELS)
def test_an_average_of_diffusers(name: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    average = EMAModel(
        model.parameters(), decay=0.5, use_ema_warmup=False, model_cls=type(model), model_config=model.config
    )
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    average.step(model.parameters())
    decay = average.cur_decay_value
    average.store(model.parameters())
    average.copy_to(model.parameters())
    for now, old in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(now.detach(), old + (1 - decay))
    average.restore(model.parameters())
    for now, old in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(now.detach(), old + 1.0)
    average.save_pretrained(tmp_path)
    loaded = EMAModel.from_pretrained(tmp_path, type(model))
    assert loaded.optimization_step == 1
    for mine, other in zip(average.shadow_params, loaded.shadow_params, strict=True):
        torch.testing.assert_close(mine, other)


def test_trainable_parameters_are_cast_and_signal_to_noise_ratios_computed() -> None:
    model = pixart().to(torch.bfloat16)
    model.requires_grad_(False)
    model.proj_out.requires_grad_(True)
    cast_training_params(model, torch.float32)
    assert model.proj_out.weight.dtype == torch.float32
    assert model.pos_embed.proj.weight.dtype == torch.bfloat16
    timesteps = torch.tensor([0, 500, 999])
    ours = compute_snr(impasto.DDPMScheduler(), timesteps)
    torch.testing.assert_close(ours, compute_snr(diffusers.DDPMScheduler(), timesteps))


# Copies and placement by others


@pytest.mark.parametrize("change", [None, "cast", "offload", "backend", "cache", "checkpointing"])
def test_copies_and_pickles(change: str | None) -> None:
    model = pixart()
    if change == "cast":
        model.enable_layerwise_casting()
    if change == "offload":
        model.enable_group_offload("cpu", num_blocks_per_group=1)
    if change == "backend":
        model.set_attention_backend("_native_math")
    if change == "checkpointing":
        model.enable_gradient_checkpointing()
    if change == "cache":
        model.enable_cache(diffusers.FirstBlockCacheConfig())
        model.disable_cache()
    expected = predict(model)
    copies = [copy.deepcopy(model)]
    if change != "cast":  # torch pickles no float8
        copies.append(pickle.loads(pickle.dumps(model)))
    with torch.no_grad():
        model.proj_out.weight.zero_()
    assert all(torch.equal(predict(one), expected) for one in copies)


def test_gated_activations_are_pickled() -> None:
    model = pixart(activation_fn="geglu")
    assert torch.equal(predict(pickle.loads(pickle.dumps(model))), predict(model))


@pytest.mark.long
def test_a_spawned_process_gets_a_model() -> None:
    model = pixart()
    context = torch.multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        results = pool.apply_async(predict, (model,))
        assert torch.equal(results.get(timeout=120), predict(model))


def test_dispatched_by_accelerate() -> None:
    model = pixart()
    expected = predict(model)
    blocks = {f"transformer_blocks.{i}": "cpu" for i in range(3)}
    rest = {name: "cpu" for name, _ in model.named_children() if name != "transformer_blocks"}
    placed = accelerate.dispatch_model(model, {**blocks, **rest, "scale_shift_table": "cpu"}, force_hooks=True)
    assert distance(predict(placed), expected) <= 1e-6


# Attention


def test_attention_backends() -> None:
    model = pixart()
    expected = predict(model)
    for name in ("native", "_native_math", "_native_flash", "flash", "XFORMERS"):
        model.set_attention_backend(name)
        assert distance(predict(model), expected) <= 1e-5
    with pytest.raises(InputError, match=r"there are native, _native_math.*did you mean .native"):
        model.set_attention_backend("nativ")
    with pytest.raises(InputError, match=r"there is no attention backend 'sage' here; there are"):
        model.set_attention_backend("sage")
    assert {attention._backend for _, attention in model._attentions} == {"xformers"}


def test_processors_that_cannot_be_called_change_nothing() -> None:
    model = pixart()
    own = nn.Identity()
    model.set_attn_processor(own)
    names = dict.fromkeys(model.attn_processors, AttnProcessor2_0())
    for bad in ("x", {**names, [*names][-1]: None}):
        with pytest.raises(InputError, match="an attention processor is called as"):
            model.set_attn_processor(bad)
        with pytest.raises(InputError, match="an attention processor is called as"):
            model.transformer_blocks[0].attn1.set_processor("x")
        assert all(processor is own for processor in model.attn_processors.values())


def test_a_chosen_backend_is_what_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = pixart(), []
    plain = nn.functional.scaled_dot_product_attention

    def look(*args: Any, **kwargs: Any) -> Tensor:
        seen.append((torch.backends.cuda.math_sdp_enabled(), torch.backends.cuda.flash_sdp_enabled()))
        return plain(*args, **kwargs)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", look)
    model.set_attention_backend("_native_math")
    predict(model)
    assert seen == [(True, False)] * 6  # attn1 and attn2 of three blocks
    seen.clear()
    model.reset_attention_backend()
    with impasto.attention_backend("_native_math"):
        predict(model)
    assert set(seen) == {(True, False)}
    seen.clear()
    predict(model)
    assert set(seen) == {(True, True)}


def flags() -> list[bool]:
    return [getattr(torch.backends.cuda, f"{name}_sdp_enabled")() for name in ("math", "flash", "mem_efficient")]


def test_a_backend_is_chosen_for_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    model, before, seen = pixart(), flags(), []
    plain, predicted = nn.functional.scaled_dot_product_attention, predict(model)

    def look(*args: Any, **kwargs: Any) -> Tensor:
        seen.append(flags()[1])
        return plain(*args, **kwargs)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", look)
    first, second = impasto.attention_backend("_native_math"), impasto.attention_backend("_native_math")
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as two:
        one.submit(first.__enter__).result()
        two.submit(second.__enter__).result()
        assert flags() == before
        predict(model)
        assert set(seen) == {True}
        seen.clear()
        one.submit(first.__exit__, None, None, None).result()
        assert distance(two.submit(predict, model).result(), predicted) <= 1e-5
        assert set(seen) == {False}
        two.submit(second.__exit__, None, None, None).result()
        seen.clear()
        two.submit(predict, model).result()
        assert set(seen) == {True}
    assert flags() == before


def test_backends_within_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = pixart(), []
    plain = nn.functional.scaled_dot_product_attention

    def look(*args: Any, **kwargs: Any) -> Tensor:
        seen.append(flags()[1:])
        return plain(*args, **kwargs)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", look)
    with impasto.attention_backend("_native_math"):
        with impasto.attention_backend("native"):
            predict(model)
        predict(model)
        model.set_attention_backend("_native_efficient")
        predict(model)
    assert [found for found, _ in groupby(seen)] == [[True, True], [False, False], [False, True]]


@pytest.mark.long
@pytest.mark.parametrize("of", ["model", "blocks"])
def test_compiled_attention_has_the_backend_in_force(of: str) -> None:
    torch._dynamo.reset()
    model, graphs = pixart(), []
    expected = predict(model)

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph.code)
        return graph

    compiled = model.compile if of == "model" else model.compile_repeated_blocks
    compiled(backend=backend, fullgraph=True)
    for name in ("native", "_native_math"):
        with impasto.attention_backend(name):
            assert distance(predict(model), expected) <= 1e-5
        assert ("sdpa_kernel" in graphs[-1]) == (name != "native")
    count = len(graphs)
    assert distance(predict(model), expected) <= 1e-5
    assert len(graphs) == count
    model.set_attention_backend("_native_math")
    assert distance(predict(model), expected) <= 1e-5
    assert "sdpa_kernel" in graphs[-1]


@pytest.mark.parametrize("own", [False, True])
def test_checkpointed_blocks_are_computed_again_by_the_same_backend(own: bool) -> None:
    model, seen = pixart(), []
    arguments = (partial(checkpoint, use_reentrant=False),) if own else ()
    model.enable_gradient_checkpointing(*arguments)
    model.transformer_blocks[0].ff.register_forward_hook(lambda *_: seen.append(chosen_backend()))
    with impasto.attention_backend("_native_math"):
        out = model(**inputs()).sample
    out.sum().backward()
    assert seen == ["_native_math"] * 2


@pytest.mark.parametrize("name", MODELS)
def test_switches_without_effect_are_accepted(name: str) -> None:
    model = MODELS[name]()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.enable_xformers_memory_efficient_attention(attention_op=None)
    model.set_use_memory_efficient_attention_xformers(True)
    model.disable_xformers_memory_efficient_attention()
    for kind in ("npu", "xla"):
        getattr(model, f"enable_{kind}_flash_attention")()
        getattr(model, f"set_use_{kind}_flash_attention")(True)
        getattr(model, f"disable_{kind}_flash_attention")()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with pytest.raises(ConfigurationError, match="enable_parallelism takes ContextParallelConfig"):
        model.enable_parallelism(config=None)


def test_blocks_are_compiled_one_by_one() -> None:
    model = pixart()
    expected = predict(model)
    model.compile_repeated_blocks(backend="eager", fullgraph=True)
    assert all(block._compiled_call_impl is not None for block in model.transformer_blocks)
    assert distance(predict(model), expected) <= 1e-5
    with pytest.raises(ConfigurationError, match="no repeated blocks"):
        vae().compile_repeated_blocks()


def test_dequantize() -> None:
    model = pixart()
    with pytest.MonkeyPatch.context() as patch:
        called: list[Any] = []
        patch.setattr(impasto, "dequantize", called.append, raising=False)
        model.dequantize()
    assert called == [model]


# Memory


def test_weights_are_stored_in_float8_and_cast_for_each_call() -> None:
    model = pixart().to(torch.bfloat16)
    expected, size = predict(model.float()), model.to(torch.bfloat16).get_memory_footprint()
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    assert dtypes["transformer_blocks.0.attn1.to_q.weight"] == torch.float8_e4m3fn
    assert dtypes["pos_embed.proj.weight"] == dtypes["adaln_single.linear.weight"] == torch.bfloat16
    assert dtypes["proj_out.weight"] == torch.bfloat16
    assert model.get_memory_footprint() < 0.8 * size
    assert model.dtype == torch.bfloat16
    cast = {k: v.to(torch.bfloat16) for k, v in inputs().items() if v.is_floating_point()}
    with torch.no_grad():
        output = model(**{**inputs(), **cast}).sample
    assert output.dtype == torch.bfloat16
    assert 1e-3 < distance(output.float(), expected) < 0.2
    rounded = pixart()
    for name, parameter in rounded.named_parameters():
        parameter.data = parameter.data.to(torch.bfloat16).to(dtypes[name]).to(torch.float32)
    assert distance(output.float(), predict(rounded)) < 0.02
    with pytest.raises(ConfigurationError, match="stored in a narrow dtype already"):
        model.enable_layerwise_casting()


@pytest.mark.parametrize("name", MODELS)
def test_every_layer_may_be_stored_in_float8(name: str) -> None:
    """Also one whose weight's dtype the model reads."""
    model = MODELS[name]()
    rounded = copy.deepcopy(model)
    layers = tuple(m for m in rounded.modules() if isinstance(m, nn.Linear | nn.Conv2d | nn.Embedding))
    for parameter in nn.ModuleList(layers).parameters():
        parameter.data = parameter.data.to(torch.float8_e4m3fn).float()
    impasto.apply_layerwise_casting(model, torch.float8_e4m3fn, torch.float32, None)
    assert {module.weight.dtype for module in model.modules() if isinstance(module, nn.Linear)} == {torch.float8_e4m3fn}
    output = predict(model, name)
    assert output.dtype == torch.float32
    assert distance(output, predict(rounded, name)) <= 1e-5


def test_a_text_encoder_is_stored_in_float8() -> None:
    encoder, ids = tiny_text_encoder(), torch.arange(5)[None]
    with torch.no_grad():
        expected = encoder(ids)[0]
        with impasto.apply_layerwise_casting(encoder, torch.float8_e4m3fn, torch.float32):
            dtypes = {name: parameter.dtype for name, parameter in encoder.named_parameters()}
            assert distance(encoder(ids)[0], expected) < 0.1
        narrow = {name for name, dtype in dtypes.items() if dtype == torch.float8_e4m3fn}
        assert any(name.endswith("wi_1.weight") for name in narrow)
        assert not any(name.endswith("wo.weight") for name in narrow)  # what it is given exceeds float8
        impasto.apply_layerwise_casting(encoder, torch.float8_e4m3fn, torch.float32, None)
        output = encoder(ids)[0]
    assert output.dtype == torch.float32
    assert bool(output.isfinite().all())


def test_layers_that_are_cast_train() -> None:
    model = pixart().train()
    model.pos_embed.requires_grad_(False)
    model.enable_layerwise_casting(torch.float16, torch.float32)
    wide = pixart().train()
    for parameter, narrow in zip(wide.parameters(), model.parameters(), strict=True):
        parameter.data = narrow.data.float()
    for each in (model, wide):
        each(**inputs()).sample.sum().backward()
    for (name, parameter), other in zip(model.named_parameters(), wide.parameters(), strict=True):
        if not parameter.requires_grad:
            assert parameter.grad is None
            continue
        assert parameter.grad is not None, name
        assert parameter.grad.dtype == parameter.dtype, name
        assert other.grad is not None
        torch.testing.assert_close(parameter.grad.float(), other.grad, rtol=2e-3, atol=2e-4)


def test_which_layers_are_cast_and_how_to_undo_it() -> None:
    model = vae()
    image = torch.randn(1, 3, 16, 16)
    skipped = ["encoder", "post_quant"]
    handle = impasto.apply_layerwise_casting(model, torch.float16, torch.float32, skipped, (nn.Linear, nn.GroupNorm))
    changed = {name for name, parameter in model.named_parameters() if parameter.dtype == torch.float16}
    cast = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    cast = [name for name in cast if name.startswith(("decoder", "quant_conv"))]
    assert changed == {f"{name}.{kind}" for name in cast for kind in ("weight", "bias")}
    with torch.no_grad():
        inside = model(image).sample
        handle.remove()
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        assert distance(model(image).sample, inside) <= 1e-5
    with pytest.raises(InputError, match="no layer"):
        impasto.apply_layerwise_casting(model, torch.float16, torch.float32, ".")
    with pytest.raises(InputError, match="storage_dtype must be"):
        impasto.apply_layerwise_casting(model, torch.int8, torch.float32)


@pytest.mark.parametrize(
    "options",
    [
        {"num_blocks_per_group": 1},
        {"num_blocks_per_group": 2, "use_stream": True, "record_stream": True, "low_cpu_mem_usage": True},
        {"offload_type": "leaf_level", "non_blocking": True},
        {"offload_type": "leaf_level", "offload_to_disk_path": True, "exclude_kwargs": ["timestep"]},
    ],
)
def test_group_offload(options: dict[str, Any], tmp_path: Path) -> None:
    model = pixart()
    expected = predict(model)
    if "offload_to_disk_path" in options:
        options = {**options, "offload_to_disk_path": str(tmp_path)}
    model.enable_group_offload(torch.device("cpu"), **options)
    assert torch.equal(predict(model), expected)
    with torch.no_grad():
        context = model.encode_context(inputs()["encoder_hidden_states"], inputs()["encoder_attention_mask"])
        again = model(inputs()["hidden_states"], context, model.modulate(inputs()["timestep"])).sample
    assert torch.equal(again, expected)
    with pytest.raises(ConfigurationError, match="offloaded already"):
        model.enable_group_offload("cpu", offload_type="leaf_level")
    if "offload_to_disk_path" in options:
        (file,) = tmp_path.iterdir()
        assert file.stat().st_size >= model.get_memory_footprint()
    handle = vars(model)["_group_offload"]
    handle.remove()
    assert torch.equal(predict(model), expected)
    assert not {"forward", "_onload_device", "_group_offload"} & set(vars(model))


def test_models_of_one_class_are_offloaded_to_one_folder(tmp_path: Path) -> None:
    models = [pixart(), pixart()]
    for parameter in models[1].parameters():
        parameter.data.mul_(1.5)
    expected = [predict(model) for model in models]
    for _ in range(2):  # the second time into the files that are read from
        options: Any = {"offload_type": "leaf_level", "offload_to_disk_path": str(tmp_path)}
        handles = [impasto.apply_group_offloading(model, "cpu", **options) for model in models]
        names = ["PixArtTransformer2DModel-2.safetensors", "PixArtTransformer2DModel.safetensors"]
        assert sorted(path.name for path in tmp_path.iterdir()) == names
        assert all(distance(predict(m), output) <= 1e-6 for m, output in zip(models, expected, strict=True))
        for handle in handles:
            handle.remove()
    for path in tmp_path.iterdir():  # as another process would
        write_file(path, b"of another process")
    assert all(distance(predict(m), output) <= 1e-6 for m, output in zip(models, expected, strict=True))


def test_a_full_disk_leaves_a_model_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    model = pixart()
    expected = predict(model)
    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OutputError, match="No space left on device"):
        impasto.apply_group_offloading(model, "cpu", offload_type="leaf_level", offload_to_disk_path=str(tmp_path))
    assert list(tmp_path.iterdir()) == []
    assert torch.equal(predict(model), expected)


def test_a_language_model_generates_as_without_offloading() -> None:
    """It is asked what its ``forward`` takes."""
    encoder = prior_parts()["vision_language_encoder"]
    ids = torch.arange(5, 11)[None]
    options: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 3, "do_sample": False}
    signature, expected = inspect.signature(encoder.forward), encoder.generate(input_ids=ids, **options)
    with impasto.apply_group_offloading(encoder, "cpu", offload_type="leaf_level"):
        assert inspect.signature(encoder.forward) == signature
        assert torch.equal(encoder.generate(input_ids=ids, **options), expected)


def test_group_offload_brings_blocks_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """With copies on the CPU in place of those on a device."""
    monkeypatch.setattr(streaming.Group, "_copy", lambda _, slot: slot.read().clone())
    monkeypatch.setattr(streaming, "_is_the_same", lambda copy, host: copy is host)
    model = pixart()
    expected = predict(model)
    weights = [block.ff.net[2].weight for block in model.transformer_blocks]
    on_host = [weight.data_ptr() for weight in weights]
    present: list[list[bool]] = []

    def look(*_: Any) -> None:
        present.append([weight.data_ptr() != host for weight, host in zip(weights, on_host, strict=True)])

    for block in model.transformer_blocks:
        block.ff.register_forward_pre_hook(look)
    model.enable_group_offload("cpu", num_blocks_per_group=2)
    assert torch.equal(predict(model), expected)
    assert present == [[True, True, False]] * 2 + [[False, False, True]]
    assert [weight.data_ptr() for weight in weights] == on_host


def test_a_model_that_is_offloaded_computes_on_its_device() -> None:
    model = pixart()
    vars(model)["_onload_device"] = torch.device("meta")
    assert model.device == device_of(model) == torch.device("meta")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "needs num_blocks_per_group"),
        ({"offload_type": "layer"}, "offload_type must be"),
        ({"num_blocks_per_group": 0}, "num_blocks_per_group"),
        ({"num_blocks_per_group": 1, "record_stream": True}, "needs use_stream"),
        ({"num_blocks_per_group": 1, "offload_device": "cuda"}, "use 'cpu'"),
    ],
)
def test_bad_arguments_of_group_offload(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        pixart().enable_group_offload("cpu", **options)


# Caching


def test_first_block_cache_by_the_config_of_diffusers() -> None:
    model = pixart()
    expected = predict(model)
    model.enable_cache(diffusers.FirstBlockCacheConfig(threshold=10.0))
    assert model.is_cache_enabled
    for name in ("cond", "uncond"):
        for _ in range(3):
            with model.cache_context(name):
                assert distance(predict(model), expected) <= 1e-5  # the same step again: the residual is exact
    assert (model.step_cache.computed, model.step_cache.reused) == (2, 4)
    model._reset_stateful_cache()
    with model.cache_context("cond"):
        predict(model)
    assert model.step_cache.computed == 3
    with pytest.raises(ConfigurationError, match="disable_cache"):
        model.enable_cache(diffusers.FirstBlockCacheConfig())
    model.disable_cache()
    assert not model.is_cache_enabled
    with model.cache_context("cond"):
        assert torch.equal(predict(model), expected)


def test_other_cache_configs() -> None:
    model = pixart()
    model.enable_cache(diffusers.TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=2))
    rule = model.step_cache.rule
    assert (rule.method, rule.interval, rule.first) == ("taylor", 2, 2)
    model.disable_cache()
    model.enable_cache(diffusers.TaylorSeerCacheConfig(max_order=0, cache_interval=3))
    assert model.step_cache.rule.method == "interval"
    model.disable_cache()
    for config in (
        diffusers.PyramidAttentionBroadcastConfig(spatial_attention_block_skip_range=2),
        diffusers.FasterCacheConfig(),
        diffusers.TaylorSeerCacheConfig(max_order=2),
        diffusers.TaylorSeerCacheConfig(disable_cache_after_step=7),
    ):
        with pytest.raises(ConfigurationError, match=f"{type(config).__name__} has no counterpart"):
            model.enable_cache(config)
        assert not model.is_cache_enabled


def test_a_cache_that_is_enabled_on_the_transformer_acts_in_pipelines_and_configs_of_ours_work() -> None:
    pipe = tiny_pipeline(impasto.PixArtSigmaPipeline)
    options: dict[str, Any] = {"num_inference_steps": 4, "output_type": "latent", "guidance_scale": 2.0}

    def generate() -> Tensor:
        latents: Tensor = pipe("a cat", generator=torch.Generator().manual_seed(0), **options).images
        return latents

    expected = generate()
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=100.0))
    cached = generate()
    assert (pipe.transformer.step_cache.computed, pipe.transformer.step_cache.reused) == (2, 2)
    assert not torch.equal(cached, expected)
    pipe.transformer.disable_cache()
    assert torch.equal(generate(), expected)
    pipe.transformer.enable_cache(TaylorSeerCacheConfig(cache_interval=2))
    assert pipe.transformer.step_cache.rule.first == 3


@pytest.mark.parametrize("where", ["caption_projection", "adaln_single", "transformer_blocks.0.attn2.to_k"])
def test_hooks_fire_at_every_step_of_a_pipeline(where: str) -> None:
    pipe = tiny_pipeline(impasto.PixArtSigmaPipeline)
    options: dict[str, Any] = {"num_inference_steps": 4, "output_type": "latent", "guidance_scale": 2.0}
    expected = pipe("a cat", generator=torch.Generator().manual_seed(0), **options).images
    calls: list[int] = []
    pipe.transformer.get_submodule(where).register_forward_hook(lambda *_: calls.append(1))
    latents = pipe("a cat", generator=torch.Generator().manual_seed(0), **options).images
    assert len(calls) == 4
    assert distance(latents, expected) <= 1e-5


# The autoencoder's blended tiles


@pytest.mark.parametrize("size", [(40, 24), (16, 16), (8, 8)])
@pytest.mark.parametrize("factor", [0.25, 0.5, 0.0])
def test_blended_tiles_are_those_of_the_reference(size: tuple[int, int], factor: float) -> None:
    model, reference = vae(), diffusers.AutoencoderKL(**VAE).eval()
    reference.load_state_dict(model.state_dict())
    image, latents = torch.randn(2, 3, *size), torch.randn(2, 4, *(side // 2 for side in size))
    for one in (model, reference):
        assert (one.tile_sample_min_size, one.tile_latent_min_size, one.tile_overlap_factor) == (16, 8, 0.25)
        one.tile_overlap_factor = factor
    with torch.no_grad():
        torch.testing.assert_close(model.tiled_decode(latents).sample, reference.tiled_decode(latents).sample)
        ours, theirs = model.tiled_encode(image, return_dict=False)[0], reference.tiled_encode(image).latent_dist
        torch.testing.assert_close(ours.parameters, theirs.parameters)
        model.tile_latent_min_size, model.tile_sample_min_size = 64, 128  # one tile
        torch.testing.assert_close(model.tiled_decode(latents)[0], model.decode(latents)[0])


@pytest.mark.parametrize("extent", [0, 1, 3, 100])
def test_blending(extent: int) -> None:
    a, b = torch.randn(2, 3, 8, 6), torch.randn(2, 3, 8, 6)
    for name in ("blend_v", "blend_h"):
        ours = getattr(vae(), name)(a, b.clone(), extent)
        torch.testing.assert_close(ours, getattr(REFERENCES["vae"](), name)(a, b.clone(), extent))


# On a GPU


def on_gpu(model: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
    moved = {n: x.cuda().to(dtype) if x.is_floating_point() else x.cuda() for n, x in inputs().items()}
    with torch.no_grad():
        sample: Tensor = model(**moved).sample
        return sample.float().cpu()


@pytest.mark.gpu
@pytest.mark.parametrize("disk", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"num_blocks_per_group": 1},
        {"num_blocks_per_group": 2, "use_stream": True},
        {"offload_type": "leaf_level", "use_stream": True, "record_stream": True, "non_blocking": True},
        {"num_blocks_per_group": 1, "use_stream": True, "low_cpu_mem_usage": True},
    ],
    ids=str,
)
def test_group_offload_to_a_gpu(options: dict[str, Any], disk: bool, tmp_path: Path) -> None:
    model = pixart()
    expected = predict(model)
    if disk:
        options = {**options, "offload_to_disk_path": str(tmp_path)}
    model.enable_group_offload(torch.device("cuda"), **options)
    for _ in range(2):
        assert distance(on_gpu(model), expected) <= 1e-4
    assert {p.device.type for p in model.transformer_blocks.parameters()} == {"cpu"}


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["native", "_native_flash", "_native_efficient", "_native_cudnn", "_native_math"])
def test_attention_backends_on_a_gpu(name: str) -> None:
    model = pixart(attention_head_dim=16, cross_attention_dim=32)
    expected = predict(model)
    model.to("cuda", torch.bfloat16)
    model.set_attention_backend(name)
    assert distance(on_gpu(model, torch.bfloat16), expected) <= 3e-2


@pytest.mark.gpu
def test_float8_weights_on_a_gpu() -> None:
    model = pixart()
    expected = predict(model)
    model.to("cuda", torch.bfloat16).enable_layerwise_casting(torch.float8_e4m3fn, torch.bfloat16)
    assert distance(on_gpu(model, torch.bfloat16), expected) <= 0.1


@pytest.mark.gpu
def test_a_training_step_on_a_gpu() -> None:
    """Padded text is masked there, and dropped on the CPU."""
    gradients = []
    for device in ("cpu", "cuda"):
        model = pixart().to(device).train()
        model(**{name: x.to(device) for name, x in inputs().items()}).sample.square().sum().backward()
        gradients.append({name: p.grad.cpu() for name, p in model.named_parameters()})
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-2, atol=1e-3)
