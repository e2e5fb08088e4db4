"""Plans for GLM-Image: the prior quantized if it is too large, and how such a plan is followed."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GlmImageConfig, GlmImageForConditionalGeneration, T5Config, T5EncoderModel

from impasto import AutoencoderKL, GlmImagePipeline, GlmImageTransformer2DModel
from impasto.checks import parse_size
from impasto.errors import InputError, MissingDependencyError
from impasto.memory import plan as planner
from impasto.memory import streaming as moving
from impasto.memory.inspection import Component, Inspection, inspect_model
from impasto.memory.moving import is_settled
from impasto.memory.placement import OneAtATime
from impasto.memory.plan import BLOCKS, IN_TURN, RESIDENT, Budget, BudgetTooSmallError, MemoryPlan, plan_memory
from impasto.memory.streaming import Group
from impasto.models.base import Model
from impasto.pipelines import loading
from impasto.transforms.quantized_linear import QuantizedLinear

from ..tiny_glm import pipelines, prior_parts

VAE = {
    "block_out_channels": [128, 512, 1024, 1024],
    "layers_per_block": 3,
    "latent_channels": 16,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "mid_block_add_attention": False,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}


@functools.cache
def released(stored: str = "bfloat16") -> Inspection:
    """The shapes of the released checkpoint; nothing is allocated."""
    with torch.device("meta"):
        glyphs = T5Config(d_model=1472, d_kv=64, d_ff=3584, num_layers=12, num_heads=6, feed_forward_proj="gated-gelu")
        models: dict[str, nn.Module] = {
            "text_encoder": T5EncoderModel(glyphs),
            "vision_language_encoder": GlmImageForConditionalGeneration(GlmImageConfig()),
            "transformer": GlmImageTransformer2DModel(num_attention_heads=32, attention_head_dim=128),
            "vae": AutoencoderKL(**VAE),
        }
    components = {}
    for name, model in models.items():
        config: Any = model.config
        settings = dict(config) if isinstance(model, Model) else config.to_dict()
        tensors = {key: (stored, value.numel()) for key, value in model.state_dict().items()}
        components[name] = Component(name, type(model).__name__, settings, tensors, 0)
    return Inspection("GLM-Image", Path("GLM-Image"), "GlmImagePipeline", components)


def plan(size: int | str, device: str = "xpu", dtypes: dict[str, str] | None = None) -> MemoryPlan:
    return plan_memory(released(), Budget(size, device), dtypes, limited=False)


def chosen(made: MemoryPlan) -> dict[str, tuple[str, str]]:
    return {each.name: (each.dtype, each.way) for each in made.components.values()}


def test_the_sizes_are_those_of_the_release() -> None:
    parts = released().components
    assert 10.0e9 < parts["vision_language_encoder"].parameters < 10.5e9
    assert 6.9e9 < parts["transformer"].parameters < 6.95e9


def test_budgets_of_a_gpu() -> None:
    """24 GB hold the prior as it is and 16 GB its int8 weights, one component at a time; the transformer is exact."""
    large = chosen(plan("48GB"))
    assert {way for _, way in large.values()} == {RESIDENT}
    middle = chosen(plan("24GB"))
    assert middle["vision_language_encoder"] == ("bfloat16", IN_TURN)
    assert middle["transformer"] == ("bfloat16", IN_TURN)
    small = chosen(plan("16GB"))
    assert small["vision_language_encoder"] == ("int8", IN_TURN)
    assert small["transformer"] == ("bfloat16", BLOCKS)  # with an image to refer to, all of it would not fit
    least = chosen(plan("10GB"))
    assert least["vision_language_encoder"] == ("nf4", IN_TURN)
    for size in ("48GB", "24GB", "16GB", "10GB"):
        assert plan(size).peak <= plan(size).budget
    with pytest.raises(BudgetTooSmallError, match=r"the vision_language_encoder takes \(nf4, in turn\)"):
        plan("4GB")


def test_references_of_any_size_are_planned_for() -> None:
    def work(references: tuple[tuple[int, int], ...] | None, name: str = "transformer") -> int:
        budget = Budget("400GB", "xpu", 512, 512, 1, references)
        return plan_memory(released(), budget, limited=False).components[name].work

    kept = 2 * 30 * 4096 * 2  # k and v of a token in all layers, in bfloat16
    none, one, large = work(()), work(((512, 512),)), work(((2048, 2048),))
    assert one == work(None) == none + kept * 32**2
    assert large >= none + kept * 128**2  # 8 GB
    assert work(((2048, 2048), (2048, 2048))) == large + kept * 128**2
    for name in ("vae", "vision_language_encoder"):
        assert work((), name) <= work(((512, 512),), name) < work(((2048, 2048),), name)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"images": 0}, "images must be a whole number of 1 or more, not 0"),
        ({"images": "2"}, "images must be"),
        ({"height": 16.5}, "height must be"),
        ({"references": (512, 512)}, "references are pairs"),
        ({"references": ((0, 512),)}, "the height of reference 0 must be"),
        ({"device": "meta"}, "generates nothing"),
    ],
)
def test_budgets_for_impossible_images_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        plan_memory(released(), Budget(**{"size": "48GB", "device": "cpu", **wrong}), limited=False)


def test_both_large_models_are_quantized_on_request() -> None:
    asked = {"vision_language_encoder": "nf4", "transformer": "int8"}
    made = plan("16GB", dtypes=asked)
    assert chosen(made)["transformer"] == ("int8", IN_TURN)
    assert chosen(made)["vision_language_encoder"] == ("nf4", IN_TURN)
    weights = {each.name: each.weights for each in made.components.values()}
    assert 7.5e9 < weights["transformer"] < 9e9  # modulation and embeddings stay as they are
    assert 7e9 < weights["vision_language_encoder"] < 9e9  # as do the vision tower and the vocabulary
    assert chosen(plan("24GB", dtypes=asked)) != chosen(plan("24GB"))
    with pytest.raises(InputError, match="not with int8"):
        plan("24GB", dtypes={"vae": "int8"})


def test_on_a_cpu_stored_weights_stay_in_their_file() -> None:
    made = plan("16GB", device="cpu")
    assert {(each.loaded, each.way, each.weights) for each in made.components.values()} == {("bfloat16", RESIDENT, 0)}


@pytest.mark.long
@pytest.mark.parametrize("computes", ["bfloat16", "float32"])
@pytest.mark.parametrize(
    "asked", [{}, {"vision_language_encoder": "nf4"}, {"vision_language_encoder": "nf4", "transformer": "int8"}]
)
def test_no_plan_is_larger_than_its_budget(
    asked: dict[str, str], computes: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even if quantized weights stay in memory while the other components take turns."""
    monkeypatch.setattr(planner, "fast_dtype", lambda device: computes)
    for device in ("cpu", "xpu"):
        for size in ("6GB", "10GB", "12GB", "16GB", "24GB", "40GB"):
            enough = parse_size(size)
            try:
                plan(enough, device, asked)
            except BudgetTooSmallError as error:
                enough = error.smallest
            made = plan(enough, device, asked)
            assert made.peak <= enough, (device, size)
            assert enough >= parse_size(size)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pipe, _ = pipelines()
    for name, each in prior_parts().items():
        setattr(pipe, name, each)
    pipe.to(torch.bfloat16)
    path = tmp_path_factory.mktemp("glm")
    pipe.save_pretrained(path)
    return path


def call(pipe: GlmImagePipeline, **changes: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    options: dict[str, Any] = {"height": 64, "width": 64, "num_inference_steps": 2, "output_type": "np", **changes}
    return pipe('a sign "open"', generator=generator, **options).images


def test_a_plan_generates_the_same(folder: Path) -> None:
    """Rotary frequencies are not rounded with the weights."""
    expected = call(GlmImagePipeline.from_pretrained(folder, dtype="float32"))
    planned = GlmImagePipeline.from_pretrained(folder, memory_budget="4GB", dtype="float32")
    assert abs(call(planned) - expected).max() < 1e-4
    low = GlmImagePipeline.from_pretrained(folder, memory_budget="4GB", dtype="bfloat16")
    frequencies = planned.components["vision_language_encoder"].model.language_model.rotary_emb.inv_freq.clone()
    with low.using("vision_language_encoder") as prior:
        assert torch.equal(prior.model.language_model.rotary_emb.inv_freq, frequencies)
        assert prior.dtype == torch.bfloat16
    assert inspect_model(str(folder)).components.keys() >= {"vision_language_encoder", "processor"}


def test_components_that_dtype_does_not_name_are_planned(folder: Path) -> None:
    def dtypes(asked: Any) -> dict[str, str]:
        pipe = GlmImagePipeline.from_pretrained(folder, memory_budget="4GB", dtype=asked)
        assert pipe.plan is not None
        return {each.name: each.loaded for each in pipe.plan.components.values()}

    assert dtypes({"vae": "float16"}) == {**dtypes(None), "vae": "float16"}
    assert set(dtypes({"default": "float16"}).values()) == {"float16"}


def test_weights_are_quantized_when_loading_and_used(folder: Path) -> None:
    pytest.importorskip("bitsandbytes")
    with pytest.raises(InputError, match=r"needs a memory_budget; without one, load it and call quantize"):
        GlmImagePipeline.from_pretrained(folder, dtype={"transformer": "nf4"})
    for wrong in ("int8", {"default": "int8"}, {"transfromer": "nf4"}):
        with pytest.raises(InputError, match="must be given by component name"):
            GlmImagePipeline.from_pretrained(folder, dtype=wrong, memory_budget="4GB")
    asked = {"vision_language_encoder": "nf4", "transformer": "nf4"}
    pipe = GlmImagePipeline.from_pretrained(folder, dtype=asked, memory_budget="4GB")
    prior, transformer = pipe.components["vision_language_encoder"], pipe.components["transformer"]
    assert isinstance(prior.model.language_model.layers[0].mlp.down_proj, QuantizedLinear)
    assert isinstance(transformer.transformer_blocks[0].attn1.to_q, QuantizedLinear)
    assert not any(isinstance(module, QuantizedLinear) for module in prior.model.visual.modules())
    assert call(pipe).shape == (1, 64, 64, 3)


def test_a_missing_library_is_named_before_anything_is_loaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "load_component", lambda *_: pytest.fail("loaded"))
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    with pytest.raises(MissingDependencyError, match=r"impasto\[quantize\]"):
        GlmImagePipeline.from_pretrained(folder, dtype={"transformer": "nf4"}, memory_budget="4GB")


@pytest.mark.parametrize("method", ["int8-weight-only", "nf4"])
def test_quantized_components_are_moved(folder: Path, method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Int8 weights are tensors of another library's class: they are copied like others, and are put back."""
    pytest.importorskip("torchao")
    pytest.importorskip("bitsandbytes")
    from impasto import quantize

    pipe = GlmImagePipeline.from_pretrained(folder, dtype="bfloat16")
    quantize(pipe.transformer, method)
    assert not is_settled(pipe.transformer)
    layer = pipe.transformer.transformer_blocks[0].attn1.to_q
    on_host, bias = layer.weight, layer.bias.data_ptr()
    expected = call(pipe)

    # As to another device: nothing is the same afterwards.
    monkeypatch.setattr(Group, "_copy", lambda group, slot: slot.read().clone())
    monkeypatch.setattr(moving, "_is_the_same", lambda *_: False)
    pipe.enable_sequential_cpu_offload()
    seen: list[bool] = []
    hook = layer.register_forward_pre_hook(
        lambda *_: seen.append(layer.weight is on_host and layer.bias.data_ptr() == bias)
    )
    assert abs(call(pipe) - expected).max() == 0
    hook.remove()
    assert seen
    assert not any(seen)
    assert layer.weight is on_host or torch.equal(layer.weight.dequantize(), on_host.dequantize())
    assert layer.bias.data_ptr() == bias


def test_components_take_turns_on_an_accelerator(folder: Path) -> None:
    pipe = GlmImagePipeline.from_pretrained(folder, dtype="bfloat16")
    assert pipe.to("meta") is pipe
    assert isinstance(pipe.placement, OneAtATime)
    assert pipe.device.type == "meta"
    for each in (pipe.transformer, pipe.vae, pipe.components["vision_language_encoder"]):
        assert {parameter.device.type for parameter in each.parameters()} == {"cpu"}
    assert pipe.placement.visit_of(pipe.transformer).blocks is None
    pipe.to("cpu")
    assert not isinstance(pipe.placement, OneAtATime)
    assert pipe.to("meta", torch.float32).dtype == torch.float32
    assert pipe.to(torch.bfloat16).dtype == torch.bfloat16
    assert isinstance(pipe.placement, OneAtATime)
    whole = GlmImagePipeline.from_pretrained(folder, dtype="bfloat16", device_map="meta")
    assert {parameter.device.type for parameter in whole.transformer.parameters()} == {"meta"}


def test_offloads_generate_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = call(GlmImagePipeline.from_pretrained(folder))
    monkeypatch.setattr(Group, "_copy", lambda group, slot: slot.read().clone())  # as to another device
    for method in ("enable_model_cpu_offload", "enable_sequential_cpu_offload", "enable_group_offload"):
        pipe = GlmImagePipeline.from_pretrained(folder)
        getattr(pipe, method)()
        prior = pipe.components["vision_language_encoder"]
        on_host = prior.lm_head.weight.data_ptr()
        assert isinstance(pipe.placement, OneAtATime)
        assert pipe.placement.visit_of(prior).blocks is None  # each token needs all of them
        assert abs(call(pipe) - expected).max() == 0, method
        assert prior.lm_head.weight.data_ptr() == on_host
        with pipe.using("vision_language_encoder"):
            assert prior.lm_head.weight.data_ptr() != on_host
