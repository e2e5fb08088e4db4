"""What is loaded and saved beyond plain components: variants, adapters, quantized weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import peft
import pytest
import torch
import transformers

from impasto.checkpoints.stored import WEIGHTS_NAME
from impasto.errors import CheckpointError, CheckpointNotFoundError, ConfigurationError, InputError
from impasto.memory.inspection import inspect_components
from impasto.models.pixart.model import PixArtTransformer2DModel
from impasto.pipelines import loading
from impasto.pipelines.pixart import PixArtSigmaPipeline
from impasto.transforms.layerwise_casting import apply_layerwise_casting
from impasto.transforms.quantize import quantize
from impasto.transforms.quantized_linear import QuantizedLinear

from ..tiny import tiny_pipeline, tiny_transformer, write_pipeline


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pipeline(tmp_path_factory.mktemp("checkpoint"))


# --- variants ---


@pytest.fixture
def mixed(folder: Path, tmp_path: Path) -> Path:
    """Only the transformer has float16 files, beside the others; its weights are twice those."""
    copy = Path(shutil.copytree(folder, tmp_path / "mixed"))
    model = PixArtTransformer2DModel.from_pretrained(copy, subfolder="transformer")
    with torch.no_grad():
        model.proj_out.weight.mul_(2)
    model.half().save_pretrained(copy / "transformer", variant="fp16")
    return copy


def test_a_variant_is_taken_where_there_is_one(mixed: Path, folder: Path) -> None:
    found = PixArtSigmaPipeline.from_pretrained(mixed, variant="fp16", torch_dtype="auto")
    plain = PixArtSigmaPipeline.from_pretrained(folder, torch_dtype="auto")
    assert (found.transformer.dtype, found.vae.dtype) == (torch.float16, torch.float32)
    assert torch.allclose(found.transformer.proj_out.weight.float(), 2 * plain.transformer.proj_out.weight, rtol=1e-2)
    assert torch.equal(found.vae.encoder.conv_in.weight, plain.vae.encoder.conv_in.weight)


def test_a_variant_that_no_component_has_is_an_error(mixed: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match=r"no weights of the variant 'bf16'.*Leave variant out"):
        PixArtSigmaPipeline.from_pretrained(mixed, variant="bf16")
    pipe = PixArtSigmaPipeline.from_pretrained(mixed, variant="bf16", transformer=None, vae=None, text_encoder=None)
    assert pipe.scheduler is not None
    with pytest.raises(CheckpointNotFoundError, match="holds no weights"):
        PixArtTransformer2DModel.from_pretrained(mixed, subfolder="vae", variant="fp16")


def test_a_memory_budget_reads_the_same_files(mixed: Path) -> None:
    index = {"transformer": ["diffusers", "PixArtTransformer2DModel"], "vae": ["diffusers", "AutoencoderKL"]}
    found = inspect_components(mixed, "PixArtSigmaPipeline", index, "fp16").components
    assert [path.name for path in found["transformer"].weights] == [f"{WEIGHTS_NAME}.fp16.safetensors"]
    assert [path.name for path in found["vae"].weights] == [f"{WEIGHTS_NAME}.safetensors"]


def asked_of_the_hub(monkeypatch: pytest.MonkeyPatch, root: Path, load: Any) -> list[list[str]]:
    asked: list[list[str]] = []

    def resolve(model: Any, *, allow_patterns: list[str], **_: Any) -> Path:
        if str(model) != "owner/name":
            return Path(model)
        asked.append(allow_patterns)
        return root

    monkeypatch.setattr(loading.hub, "resolve", resolve)
    load()
    monkeypatch.undo()
    return asked


def test_only_what_has_no_variant_is_asked_for_without_it(mixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = asked_of_the_hub(
        monkeypatch, mixed, lambda: PixArtSigmaPipeline.from_pretrained("owner/name", variant="fp16")
    )
    weights = {pattern for patterns in asked for pattern in patterns if WEIGHTS_NAME in pattern and "*" not in pattern}
    assert f"transformer/{WEIGHTS_NAME}.fp16.safetensors" in weights
    assert f"vae/{WEIGHTS_NAME}.safetensors" in weights
    assert f"transformer/{WEIGHTS_NAME}.safetensors" not in weights
    assert f"transformer/{WEIGHTS_NAME}.fp16.bin" not in weights


def test_a_model_alone_asks_for_one_form_of_its_weights(mixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = asked_of_the_hub(
        monkeypatch,
        mixed,
        lambda: PixArtTransformer2DModel.from_pretrained("owner/name", subfolder="transformer", variant="fp16"),
    )
    (patterns,) = asked
    assert f"transformer/{WEIGHTS_NAME}.fp16.safetensors" in patterns
    assert "transformer/*.json" in patterns
    assert not any(pattern.endswith((f"{WEIGHTS_NAME}.safetensors", ".bin")) for pattern in patterns)


def test_download_fetches_and_returns_the_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Any] = []
    asked = asked_of_the_hub(
        monkeypatch, folder, lambda: found.append(PixArtSigmaPipeline.download("owner/name", text_encoder=None))
    )
    assert found == [folder]
    folders = {pattern.split("/")[0] for patterns in asked for pattern in patterns if "/" in pattern}
    assert folders == {"vae", "transformer", "scheduler", "tokenizer"}
    assert PixArtSigmaPipeline.download(folder) == folder


# --- adapters ---


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


LORA = peft.LoraConfig(r=2, target_modules=["to_q"])


@pytest.mark.parametrize("how", ["wrapped", "injected", "text encoder"])
def test_adapters_are_not_saved_over_a_good_folder(folder: Path, tmp_path: Path, how: str) -> None:
    target = Path(shutil.copytree(folder, tmp_path / "good"))
    pipe = tiny_pipeline(PixArtSigmaPipeline)
    if how == "wrapped":
        pipe.transformer = peft.get_peft_model(pipe.transformer, LORA)
    elif how == "injected":
        peft.inject_adapter_in_model(LORA, pipe.transformer)
    else:
        pipe.text_encoder = peft.get_peft_model(pipe.text_encoder, peft.LoraConfig(r=2, target_modules=["q"]))
    before = contents(target)
    with pytest.raises(ConfigurationError, match=r"was not saved.*(fuse_lora|merge_and_unload)\(\)"):
        pipe.save_pretrained(target)
    if how == "injected":
        with pytest.raises(ConfigurationError, match=r"was not saved.*fuse_lora\(\)"):
            pipe.transformer.save_pretrained(target / "transformer")
    assert contents(target) == before


def test_merged_adapters_are_saved(tmp_path: Path) -> None:
    pipe = tiny_pipeline(PixArtSigmaPipeline, text_encoder=None, tokenizer=None, vae=None)
    wrapped = peft.get_peft_model(pipe.transformer, LORA)
    pipe.transformer = wrapped.merge_and_unload()
    pipe.save_pretrained(tmp_path)
    assert PixArtSigmaPipeline.from_pretrained(tmp_path).transformer is not None


def test_a_model_with_other_layers_than_its_config_says_is_not_saved(tmp_path: Path) -> None:
    model = tiny_transformer()
    model.proj_out = torch.nn.Sequential(model.proj_out)
    with pytest.raises(ConfigurationError, match=r"was not saved.*proj_out.0.weight"):
        model.save_pretrained(tmp_path / "x")
    assert not (tmp_path / "x").exists()


# --- layerwise casting ---


@pytest.mark.parametrize("how", ["transformer", "text encoder", "float16", "to"])
def test_weights_in_a_narrow_dtype_are_not_saved_over_a_good_folder(folder: Path, tmp_path: Path, how: str) -> None:
    target = Path(shutil.copytree(folder, tmp_path / "good"))
    pipe = PixArtSigmaPipeline.from_pretrained(target)
    expected = r"narrow dtype and cannot be saved; .*disable_layerwise_casting\(\).*remove\(\)"
    if how == "transformer":
        pipe.transformer.enable_layerwise_casting()
    elif how == "text encoder":
        casting = apply_layerwise_casting(pipe.text_encoder, torch.float8_e4m3fn, torch.float32)
    elif how == "float16":  # these load, but as layers of two dtypes
        pipe.transformer.enable_layerwise_casting(torch.float16)
    else:
        pipe.transformer.to(torch.float8_e4m3fn)
        expected = r"was not saved.* is torch.float8_e4m3fn, not one of .*\.to\(torch.bfloat16\)"
    before = contents(target)
    with pytest.raises(ConfigurationError, match=expected):
        pipe.save_pretrained(target)
    if how == "text encoder":
        casting.remove()
    else:
        with pytest.raises(ConfigurationError, match=expected):
            pipe.transformer.save_pretrained(target / "transformer")
        pipe.transformer.disable_layerwise_casting()
        pipe.transformer.to(torch.bfloat16)
    assert contents(target) == before
    pipe.save_pretrained(target)
    again = PixArtSigmaPipeline.from_pretrained(target, torch_dtype="auto")
    assert again.transformer.dtype == pipe.transformer.dtype


# --- quantized weights ---


def quantized_layers(module: Any) -> set[str]:
    return {type(layer).__name__ for layer in module.modules()} & {"QuantizedLinear", "Linear4bit"}


def test_a_model_is_quantized_as_its_config_asks(folder: Path, tmp_path: Path) -> None:
    config = diffusers.BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["attn1"])
    model = PixArtTransformer2DModel.from_pretrained(folder, subfolder="transformer", quantization_config=config)
    block = model.transformer_blocks[0]
    assert isinstance(block.attn2.to_q, QuantizedLinear)
    assert not isinstance(block.attn1.to_q, QuantizedLinear)
    model.save_pretrained(tmp_path)  # the original weights
    expected = PixArtTransformer2DModel.from_pretrained(folder, subfolder="transformer").state_dict()
    found = PixArtTransformer2DModel.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_whole_pipeline_is_quantized_and_saved(folder: Path, tmp_path: Path) -> None:
    config = diffusers.PipelineQuantizationConfig(
        quant_backend="bitsandbytes_4bit",
        quant_kwargs={"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    )
    pipe = PixArtSigmaPipeline.from_pretrained(folder, quantization_config=config)
    assert quantized_layers(pipe.transformer) == {"QuantizedLinear"}
    assert quantized_layers(pipe.text_encoder) == {"Linear4bit"}
    assert quantized_layers(pipe.vae) == set()
    pipe.save_pretrained(tmp_path)
    again = PixArtSigmaPipeline.from_pretrained(tmp_path)
    assert quantized_layers(again.transformer) == set()  # the originals were saved
    assert quantized_layers(again.text_encoder) == {"Linear4bit"}  # transformers saves them as they are
    int8 = {"transformer": diffusers.BitsAndBytesConfig(load_in_8bit=True)}
    other = PixArtSigmaPipeline.from_pretrained(tmp_path, quantization_config=int8)
    assert quantized_layers(other.transformer) == {"QuantizedLinear"}


@pytest.mark.parametrize("library", [diffusers, transformers])
def test_text_encoders_take_configs_of_both_libraries(folder: Path, library: Any) -> None:
    mapping = {"text_encoder": library.BitsAndBytesConfig(load_in_4bit=True)}
    pipe = PixArtSigmaPipeline.from_pretrained(folder, quantization_config=mapping, transformer=None, vae=None)
    assert quantized_layers(pipe.text_encoder) == {"Linear4bit"}


def test_quantized_weights_without_the_originals_are_not_saved(tmp_path: Path) -> None:
    pipe = tiny_pipeline(PixArtSigmaPipeline)
    quantize(pipe.transformer, "nf4", keep_originals=False)
    for save in (pipe.save_pretrained, pipe.transformer.save_pretrained):
        with pytest.raises(ConfigurationError, match="original weights were not kept"):
            save(tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_weights_that_another_library_has_quantized(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "transformer", tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": {"quant_method": "torchao"}}))
    with pytest.raises(CheckpointError, match=r"quantized by another library.*quantization_config"):
        PixArtTransformer2DModel.from_pretrained(tmp_path / "model")


def test_wrong_quantization_configs_say_what_to_do(folder: Path) -> None:
    config = diffusers.BitsAndBytesConfig(load_in_4bit=True)
    for wrong, expected in (
        (config, "PipelineQuantizationConfig, or a dict of configs by component"),
        ({"unet": config}, "'unet', which is not loaded"),
        ({"scheduler": config}, "use text_encoder, vae, transformer"),
        ({"transformer": SimpleNamespace()}, "asks for SimpleNamespace"),
    ):
        with pytest.raises(InputError, match=expected):
            PixArtSigmaPipeline.from_pretrained(folder, quantization_config=wrong)
    with pytest.raises(InputError, match="memory_budget chooses what is quantized"):
        PixArtSigmaPipeline.from_pretrained(folder, quantization_config={}, memory_budget="4GB")


def test_to_takes_torch_dtype() -> None:
    pipe = tiny_pipeline(PixArtSigmaPipeline)
    assert pipe.to(torch_dtype=torch.bfloat16).dtype == torch.bfloat16
    with pytest.raises(InputError, match="two values for dtype"):
        pipe.to(torch.float16, torch_dtype=torch.float32)
