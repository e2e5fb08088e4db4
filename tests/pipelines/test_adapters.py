"""Adapters of pipelines: generated images are those of merged weights, however they are generated."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests import tiny_glm
from tests.tiny import tiny_pipeline
from tests.tiny_adapters import DIALECTS, Written
from torch import Tensor

import impasto
from impasto.checkpoints.adapters.file import AdapterDefaults
from impasto.errors import ConfigurationError, InputError, WeightsMismatchError
from impasto.memory.plan import Budget
from impasto.pipelines.adapters import ChosenAdapter, adapter_defaults, apply_adapters
from impasto.pipelines.pixart import PixArtSigmaPipeline
from impasto.transforms.adapters import save

PROMPTS = ["a red cube", "a blue sphere on a wall"]


def write(pipe: Any, folder: Path, dialect: str = "onetrainer_comfy") -> tuple[Path, Written]:
    written = DIALECTS[dialect]({"transformer": pipe.transformer, "text_encoder": pipe.text_encoder})
    file = folder / f"{dialect}.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in written.tensors.items()}, file, written.header)
    return file, written


def merged(pipe: Any, *changes: tuple[Written, float]) -> Any:
    """A pipeline with the changes of adapters, times their weights, added to its weights."""
    new = copy.deepcopy(pipe)
    for written, weight in changes:
        for component, deltas in written.deltas.items():
            for layer, delta in deltas.items():
                getattr(new, component).get_parameter(f"{layer}.weight").data += weight * delta
    return new


def generate(pipe: Any, prompts: list[str] = PROMPTS, **options: Any) -> Tensor:
    generators = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
    given = {"num_inference_steps": 3, "output_type": "latent", "use_resolution_binning": False, **options}
    images: Tensor = pipe(prompts, generator=generators, **given).images
    return images


def close(left: Tensor, right: Tensor, tolerance: float = 2e-5) -> bool:
    return float((left - right).abs().max() / right.abs().max()) <= tolerance


@pytest.fixture
def pipe() -> Any:
    return tiny_pipeline(PixArtSigmaPipeline)


def compiled(pipe: Any) -> None:
    pipe.compile(backend="eager")


def cached(pipe: Any) -> None:
    impasto.cache_steps(pipe.transformer, "interval", interval=2)


def offloaded(pipe: Any) -> None:
    pipe.enable_model_cpu_offload(device="cpu")


def block_by_block(pipe: Any) -> None:
    pipe.enable_sequential_cpu_offload(device="cpu")


def casting(pipe: Any) -> None:
    pipe.transformer.enable_layerwise_casting(torch.float16, torch.float32, [])


def plain(pipe: Any) -> None:
    pass


@pytest.mark.parametrize("way", [plain, compiled, cached, offloaded, block_by_block, casting])
def test_images_are_those_of_merged_weights(way: Callable[[Any], None], pipe: Any, tmp_path: Path) -> None:
    file, written = write(pipe, tmp_path)
    reference = merged(pipe, (written, 1.0))
    if way in (compiled, casting):
        pipe.load_lora_weights(file)
        way(pipe)
    else:
        way(pipe)
        generate(pipe)
        pipe.load_lora_weights(file)
    if way is not casting:  # it rounds the weights, and those of an adapter by themselves
        way(reference)
    expected = generate(reference)
    assert close(generate(pipe), expected, 5e-2 if way is casting else 2e-5)
    assert not close(generate(tiny_pipeline(PixArtSigmaPipeline)), expected, 1e-2)


def test_images_of_several_sizes_at_once(pipe: Any, tmp_path: Path) -> None:
    file, written = write(pipe, tmp_path)
    reference = merged(pipe, (written, 1.0)).transformer
    pipe.load_lora_weights(file)
    latents = [torch.randn(4, 8, 8), torch.randn(4, 4, 12), torch.randn(4, 6, 4)]
    text, mask, time = torch.randn(3, 6, 32), torch.ones(3, 6), torch.tensor([3, 400, 900])
    mask[1, 4:] = 0
    with torch.no_grad():
        pairs = zip(
            *(m(latents, text, time, encoder_attention_mask=mask).sample for m in (pipe.transformer, reference))
        )
        assert all(close(*pair) for pair in pairs)


def test_several_adapters_have_weights_by_component_and_layer(pipe: Any, tmp_path: Path) -> None:
    first, one = write(pipe, tmp_path, "onetrainer_comfy")
    second, two = write(pipe, tmp_path, "diffusers")
    third, three = write(pipe, tmp_path, "lycoris_lokr")
    untouched = copy.deepcopy(pipe)
    for name, file in (("one", first), ("two", second), ("three", third)):
        pipe.load_lora_weights(str(file), adapter_name=name)
    assert pipe.get_list_adapters() == {"transformer": ["one", "two", "three"], "text_encoder": ["one", "two"]}

    pipe.set_adapters(["one", "two", "three"], [0.7, -0.3, 0.2])
    assert pipe.get_active_adapters() == ["one", "two", "three"]
    expected = generate(merged(untouched, (one, 0.7), (two, -0.3), (three, 0.2)))
    assert close(generate(pipe), expected)
    pipe.fuse_lora()
    assert pipe.fused_loras == {"one", "two", "three"}
    assert pipe.num_fused_loras == 3
    assert close(generate(pipe), expected)
    with pytest.raises(ConfigurationError, match=r"one, two, three is fused .*unfuse_lora\(\) first"):
        pipe.set_adapters("one")
    pipe.unfuse_lora()

    part = Written(two.tensors, {"transformer": two.deltas["transformer"]})
    pipe.set_adapters("two", {"transformer": 0.5, "text_encoder": 0.0})
    assert close(generate(pipe), generate(merged(untouched, (part, 0.5))))
    some = {name: delta for name, delta in one.deltas["transformer"].items() if "attn1" in name}
    pipe.set_adapters("one", {"transformer": {"attn1": 1.0, "": 0.0}, "text_encoder": 0.0})
    assert close(generate(pipe), generate(merged(untouched, (Written({}, {"transformer": some}), 1.0))))

    pipe.delete_adapters("two")
    pipe.set_adapters("three")
    assert pipe.get_list_adapters() == {"transformer": ["one", "three"], "text_encoder": ["one"]}
    assert close(generate(pipe), generate(merged(untouched, (three, 1.0))))
    pipe.disable_lora()
    assert close(generate(pipe), generate(untouched))
    pipe.enable_lora()
    pipe.unload_lora_weights()
    assert torch.equal(generate(pipe), generate(untouched))
    assert pipe.get_list_adapters() == {}


def test_after_deletion_all_components_have_the_same_active_adapters(pipe: Any, tmp_path: Path) -> None:
    layers = {"transformer": "proj_out", "text_encoder": "encoder.block.0.layer.0.SelfAttention.q"}
    files = {}
    for component, layer in layers.items():
        out, inputs = getattr(pipe, component).get_submodule(layer).weight.shape
        shapes = {"A": (2, inputs), "B": (out, 2)}
        files[component] = {f"{component}.{layer}.lora_{x}.weight": torch.randn(*s) for x, s in shapes.items()}
    both = {**files["transformer"], **files["text_encoder"]}
    for name, tensors in (("b", files["transformer"]), ("c", files["text_encoder"]), ("a", both)):
        pipe.load_lora_weights(tensors, adapter_name=name)
    pipe.set_adapters("a")
    pipe.delete_adapters("a")
    assert pipe.get_active_adapters() == ["b"]
    pipe.load_lora_weights(both, adapter_name="a")
    pipe.set_adapters(["a", "b"])
    pipe.delete_adapters("a")
    assert pipe.get_active_adapters() == ["b"]


def test_comfyui_reads_the_text_encoder_only_by_its_own_names(pipe: Any, tmp_path: Path, caplog: Any) -> None:
    """Its names are "text_encoders." and the name of its T5; what we have read from them computes the same."""
    file, _ = write(pipe, tmp_path, "diffusers")
    pipe.load_lora_weights(file)
    expected = generate(pipe)
    with caplog.at_level("INFO", logger="impasto"):
        pipe.save_adapter(tmp_path / "diffusers")
        assert "ComfyUI reads the text encoder's layers only if they are saved with comfyui=True" in caplog.text
        caplog.clear()
        pipe.save_adapter(tmp_path / "comfyui", comfyui=True)
        assert "ComfyUI" not in caplog.text
    own, theirs = (
        {
            name.partition(".encoder.")[0]
            for name in load_file(path / "pytorch_lora_weights.safetensors")
            if ".encoder." in name
        }
        for path in (tmp_path / "diffusers", tmp_path / "comfyui")
    )
    assert (own, theirs) == ({"text_encoder"}, {"text_encoders.t5xxl.transformer"})
    pipe.unload_lora_weights()
    pipe.load_lora_weights(tmp_path / "comfyui")
    assert pipe.get_list_adapters() == {"transformer": ["default_0"], "text_encoder": ["default_0"]}
    assert close(generate(pipe), expected)
    parts = {"text_encoder": pipe.text_encoder}
    with pytest.raises(InputError, match="which ComfyUI reads for transformers only"):
        save(tmp_path, parts, "default_0", weight_name="adapter_model.safetensors", comfyui=True)


def test_fused_layers_are_plain_and_unfusing_and_unloading_are_exact(pipe: Any, tmp_path: Path) -> None:
    before, weights = generate(pipe), copy.deepcopy(pipe.transformer.state_dict())
    layers = dict(pipe.transformer.named_modules())
    pipe.load_lora_weights(write(pipe, tmp_path)[0])
    adapted = generate(pipe)
    pipe.fuse_lora(lora_scale=0.5)
    kinds = {name: type(layer) for name, layer in pipe.transformer.named_modules()}
    assert kinds == {name: type(layer) for name, layer in layers.items()}
    pipe.unfuse_lora()
    assert torch.equal(generate(pipe), adapted)
    pipe.unload_lora_weights()
    assert torch.equal(generate(pipe), before)
    assert dict(pipe.transformer.named_modules()) == layers
    assert all(torch.equal(tensor, weights[name]) for name, tensor in pipe.transformer.state_dict().items())
    assert all(parameter.requires_grad for parameter in pipe.transformer.parameters())


def test_fused_weights_can_be_kept_and_saved(pipe: Any, tmp_path: Path) -> None:
    file, written = write(pipe, tmp_path)
    expected = generate(merged(pipe, (written, 1.0)))
    pipe.load_lora_weights(file)
    with pytest.raises(ConfigurationError, match=r"not saved: it has adapters.*fuse_lora\(\)"):
        pipe.save_pretrained(tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    pipe.fuse_lora()
    pipe.save_pretrained(tmp_path / "fused")
    pipe.unload_lora_weights()
    pipe.save_pretrained(tmp_path / "kept")
    for name in ("fused", "kept"):
        loaded = PixArtSigmaPipeline.from_pretrained(tmp_path / name)
        loaded.set_progress_bar_config(disable=True)
        assert close(generate(loaded), expected)


def test_the_prompt_cache_knows_adapters_of_the_text_encoder(pipe: Any, tmp_path: Path) -> None:
    """Also the kept embedding of the empty prompt."""
    file, _ = write(pipe, tmp_path, "diffusers")
    pipe.enable_prompt_cache(tmp_path / "cache")

    def embeds() -> list[Tensor]:
        found = pipe.encode_prompt("a cat")
        return [found[0], found[2]]

    before = embeds()
    pipe.load_lora_weights(file, adapter_name="one")
    full = embeds()
    pipe.set_adapters("one", 0.5)
    half = embeds()
    pipe.disable_lora()
    off = embeds()
    pipe.enable_lora()
    pipe.fuse_lora()
    fused = embeds()
    for i in range(2):
        assert not close(full[i], before[i], 1e-3)
        assert not close(half[i], full[i], 1e-3)
        assert close(off[i], before[i], 1e-6)
        assert close(fused[i], half[i], 1e-5)


def test_an_adapter_for_another_model_names_its_layers_and_changes_nothing(pipe: Any, tmp_path: Path) -> None:
    _, written = write(pipe, tmp_path, "diffusers")
    own = list(pipe.transformer.modules())
    strange = {
        "layers": ({"transformer.transformer_blocks.7.attn1.to_q.lora_A.weight": torch.ones(2, 24)}, "blocks.7.attn1"),
        "shape": ({"transformer.proj_out.lora_A.weight": torch.ones(2, 25)}, r"proj_out is for a weight of \[32, 25\]"),
        "text": ({"text_encoder.encoder.block.9.layer.0.SelfAttention.q.lora_A.weight": torch.ones(2, 32)}, "block.9"),
        "factors": ({"transformer.proj_out.lora_A.weight": torch.ones(3, 24)}, "do not fit each other"),
    }
    for case, (tensors, words) in strange.items():
        others = {name.replace("lora_A", "lora_B"): torch.ones(32, 2) for name in tensors}
        changed = tmp_path / f"{case}.safetensors"
        save_file({**{name: x.contiguous() for name, x in written.tensors.items()}, **tensors, **others}, changed)
        with pytest.raises(WeightsMismatchError, match=rf"(?s){words}.*nothing was loaded"):
            pipe.load_lora_weights(changed)
        assert list(pipe.transformer.modules()) == own
        assert pipe.get_list_adapters() == {}


def test_keywords_and_names_are_checked(pipe: Any, tmp_path: Path) -> None:
    file, _ = write(pipe, tmp_path)
    with pytest.raises(InputError, match="no argument 'adapter_nam'; did you mean 'adapter_name"):
        pipe.load_lora_weights(file, adapter_nam="x")
    with pytest.raises(InputError, match="no adapter; load one"):
        pipe.fuse_lora()
    pipe.load_lora_weights(file, adapter_name="a")
    with pytest.raises(InputError, match="has an adapter 'a' already"):
        pipe.load_lora_weights(file, adapter_name="a")
    for call, words in (
        (lambda: pipe.set_adapters("b"), "no adapter 'b'; it has a"),
        (lambda: pipe.set_adapters(["a"], [1.0, 2.0]), "1 adapters and 2 weights"),
        (lambda: pipe.set_adapters("a", float("nan")), "finite"),
        (lambda: pipe.set_adapters("a", {"unet": 1.0}), r"by component \(transformer, text_encoder\), not for 'unet'"),
        (lambda: pipe.fuse_lora(components=["vae"]), "not in 'vae'"),
        (lambda: pipe.delete_adapters("b"), "no adapter 'b'"),
    ):
        with pytest.raises(InputError, match=words):
            call()


def test_a_pipeline_without_a_text_encoder_leaves_out_what_is_for_it(pipe: Any, tmp_path: Path, caplog: Any) -> None:
    file, _ = write(pipe, tmp_path, "diffusers")
    pipe.text_encoder = None
    pipe.load_lora_weights(file)
    assert pipe.get_list_adapters() == {"transformer": ["default_0"]}
    assert "2 layers for the text_encoder have no effect" in caplog.text


def test_chosen_adapters_are_applied_and_say_how_to_generate(pipe: Any, tmp_path: Path) -> None:
    file, written = write(pipe, tmp_path)
    pipe.load_lora_weights(file)
    few = AdapterDefaults(scheduler="lcm", steps=4, guidance_scale=1.0)
    saved = pipe.save_adapter(tmp_path, weight_name="few.safetensors", defaults=few)
    pipe.unload_lora_weights()
    chosen = [ChosenAdapter.parse(str(file)), ChosenAdapter.parse(f"{saved}:0.5")]
    assert chosen == [ChosenAdapter(str(file), 1.0), ChosenAdapter(str(saved), 0.5)]
    assert adapter_defaults(chosen) == few
    expected = generate(merged(pipe, (written, 1.5)))
    apply_adapters(pipe, chosen)
    assert close(generate(pipe), expected)
    assert pipe.get_list_adapters() == {}


@pytest.mark.parametrize("has_room", [True, False])
def test_adapters_are_fused_if_the_budget_has_room(has_room: bool, tmp_path: Path) -> None:
    pipe = tiny_pipeline(PixArtSigmaPipeline)
    file, written = write(pipe, tmp_path)
    pipe.save_pretrained(tmp_path / "model")
    expected = generate(merged(pipe, (written, 0.5)))
    pipe = PixArtSigmaPipeline.from_pretrained(tmp_path / "model", dtype="float32", memory_budget=Budget("4GB", "cpu"))
    assert not any(each.weights for each in pipe.plan.components.values()), "they stay in their file"
    pipe.plan = replace(pipe.plan, budget=pipe.plan.peak + (10_000_000 if has_room else 10_000))
    apply_adapters(pipe, [ChosenAdapter(str(file), 0.5)])
    assert close(generate(pipe), expected)
    assert bool(pipe.get_list_adapters()) != has_room


def test_hotswapped_adapters_keep_compiled_blocks(pipe: Any, tmp_path: Path) -> None:
    first, one = write(pipe, tmp_path, "onetrainer_diffusers")
    second, two = write(pipe, tmp_path, "peft")
    untouched = copy.deepcopy(pipe)
    pipe.enable_lora_hotswap(target_rank=5)
    pipe.load_lora_weights(first, adapter_name="style")
    assert close(generate(pipe), generate(merged(untouched, (one, 1.0))))
    layer = pipe.transformer.transformer_blocks[0].attn1.to_q
    factors = layer.lora_A["style"].weight, layer.scaling["style"]
    pipe.load_lora_weights(second, adapter_name="style", hotswap=True, alpha=3)
    assert layer.lora_A["style"].weight is factors[0]
    assert layer.scaling["style"] == factors[1]
    assert layer.lora_A["style"].weight.shape[0] == 5
    assert close(generate(pipe), generate(merged(untouched, (two, 1.0))))


def test_a_hotswapped_adapter_leaves_nothing_of_the_one_before(pipe: Any, tmp_path: Path) -> None:
    both = load_file(write(pipe, tmp_path, "diffusers")[0])
    one = {name: 2 * tensor for name, tensor in both.items() if name.startswith("transformer.")}
    expected = copy.deepcopy(pipe)
    expected.load_lora_weights(one)
    pipe.load_lora_weights(both, adapter_name="style")
    assert set(pipe.get_list_adapters()) == {"transformer", "text_encoder"}
    pipe.load_lora_weights(one, adapter_name="style", hotswap=True)
    assert close(generate(pipe), generate(expected))


def test_a_hotswap_that_fails_in_one_component_changes_none(pipe: Any, tmp_path: Path) -> None:
    both = load_file(write(pipe, tmp_path, "diffusers")[0])
    # Of twice the rank in the text encoder.
    higher = {
        name: 2 * tensor
        if name.startswith("transformer.")
        else torch.cat([tensor, tensor], dim=0 if "lora_A" in name else 1)
        for name, tensor in both.items()
    }
    prepared, expected = copy.deepcopy(pipe), copy.deepcopy(pipe)
    pipe.load_lora_weights(both, adapter_name="style")
    before = generate(pipe)
    with pytest.raises(WeightsMismatchError, match="have a lower rank"):
        pipe.load_lora_weights(higher, adapter_name="style", hotswap=True)
    assert torch.equal(generate(pipe), before)
    prepared.enable_lora_hotswap(target_rank=4)  # also in the text encoder
    prepared.load_lora_weights(both, adapter_name="style")
    prepared.load_lora_weights(higher, adapter_name="style", hotswap=True)
    expected.load_lora_weights(higher)
    assert close(generate(prepared), generate(expected))


def test_a_dora_is_not_hotswapped_for_less(pipe: Any) -> None:
    """The norms that it has learned would stay."""
    layers = ["transformer_blocks.0.attn1.to_q", "transformer_blocks.1.attn1.to_q"]
    config = peft.LoraConfig(r=2, target_modules=layers, init_lora_weights=False, use_dora=True)
    pipe.transformer.add_adapter(config, "style")
    tensors = pipe.transformer.state_dict()
    kept = {name.replace(".style", ""): tensor for name, tensor in tensors.items() if ".lora_" in name}
    pipe.load_lora_weights(kept, adapter_name="style", hotswap=True)
    less = {name: tensor for name, tensor in kept.items() if "blocks.0" in name}
    with pytest.raises(WeightsMismatchError, match="DoRA on one side"):
        pipe.load_lora_weights(less, adapter_name="style", hotswap=True)


def test_glm_image_has_adapters_in_transformer_and_glyph_encoder(tmp_path: Path) -> None:
    pipe, _ = tiny_glm.pipelines()
    pipe.set_progress_bar_config(disable=True)
    layers = {
        "transformer": "transformer_blocks.1.attn1.to_v",
        "text_encoder": "encoder.block.0.layer.0.SelfAttention.v",
    }
    tensors = {}
    for component, layer in layers.items():
        out, inputs = getattr(pipe, component).get_submodule(layer).weight.shape
        shapes = {"A": (2, inputs), "B": (out, 2)}
        tensors |= {f"{component}.{layer}.lora_{x}.weight": torch.randn(*shape) for x, shape in shapes.items()}

    def image(**options: Any) -> Tensor:
        given = {"num_inference_steps": 2, "output_type": "latent", "height": 64, "width": 64, **options}
        prior = torch.arange(16)[None] % 32
        generator = torch.Generator().manual_seed(0)
        return pipe("a 'cat'", prior_token_ids=prior, generator=generator, **given).images  # type: ignore[no-any-return]

    before = image()
    pipe.load_lora_weights(tensors, adapter_name="x")
    adapted = image()
    pipe.set_adapters("x", {"transformer": 0.0})
    only_text = image()
    assert not close(adapted, before, 1e-3)
    assert not close(only_text, before, 1e-6)
    with pytest.raises(InputError, match="set_adapters"):
        image(attention_kwargs={"scale": 0.5})
    pipe.set_adapters("x")
    pipe.fuse_lora()
    assert close(image(), adapted)
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    assert torch.equal(image(), before)
