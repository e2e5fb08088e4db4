"""Which of our methods a quantization config of another library asks for."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import transformers

from impasto.errors import InputError
from impasto.transforms.quantization_configs import configs_of, method_of


def test_bitsandbytes() -> None:
    for library in (diffusers, transformers):
        assert method_of(library.BitsAndBytesConfig(load_in_4bit=True)) == "nf4"
        assert method_of(library.BitsAndBytesConfig(load_in_8bit=True)) == "int8-weight-only"
        with pytest.raises(InputError, match="neither load_in_4bit nor load_in_8bit"):
            method_of(library.BitsAndBytesConfig())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Int8WeightOnlyConfig", "int8-weight-only"),
        ("Int8DynamicActivationInt8WeightConfig", "int8-dynamic"),
        ("Float8DynamicActivationFloat8WeightConfig", "fp8"),
    ],
)
def test_torchao(name: str, expected: str) -> None:
    api: Any = pytest.importorskip("torchao.quantization")
    assert method_of(diffusers.TorchAoConfig(getattr(api, name)())) == expected


def make(class_name: str, **attributes: Any) -> Any:
    """A config as older versions of the libraries have it."""
    return type(class_name, (), attributes)()


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (make("TorchAoConfig", quant_type="int8wo"), "int8-weight-only"),
        (make("TorchAoConfig", quant_type="int8_weight_only"), "int8-weight-only"),
        (make("TorchAoConfig", quant_type="int8dq"), "int8-dynamic"),
        (make("TorchAoConfig", quant_type="float8dq_e4m3_row"), "fp8"),
        (make("QuantoConfig", weights_dtype="int8"), "int8-weight-only"),
    ],
)
def test_names(config: Any, expected: str) -> None:
    assert method_of(config) == expected


@pytest.mark.parametrize(
    ("config", "asked"),
    [
        (make("TorchAoConfig", quant_type="uint4wo"), r"TorchAoConfig\('uint4wo'\)"),
        (make("QuantoConfig", weights_dtype="int2"), r"QuantoConfig\('int2'\)"),
        (make("GGUFQuantizationConfig"), "GGUFQuantizationConfig"),
    ],
)
def test_formats_without_a_counterpart(config: Any, asked: str) -> None:
    with pytest.raises(InputError, match=f"asks for {asked}, which has no counterpart here.*impasto.quantize"):
        method_of(config)


def test_the_components_of_a_pipeline_config() -> None:
    models = {"text_encoder": False, "vae": True, "transformer": True}
    config = diffusers.BitsAndBytesConfig(load_in_4bit=True)
    granular = diffusers.PipelineQuantizationConfig(quant_mapping={"transformer": config})
    assert configs_of(granular, models) == {"transformer": config}
    everywhere = {"quant_backend": "bitsandbytes_4bit", "quant_kwargs": {"load_in_4bit": True}}
    found = configs_of(diffusers.PipelineQuantizationConfig(**everywhere), models)
    assert list(found) == ["text_encoder", "transformer"]
    assert isinstance(found["text_encoder"], transformers.BitsAndBytesConfig)
    assert isinstance(found["transformer"], diffusers.BitsAndBytesConfig)
    one = diffusers.PipelineQuantizationConfig(**everywhere, components_to_quantize=["vae"])
    assert list(configs_of(one, models)) == ["vae"]
    wrong = diffusers.PipelineQuantizationConfig(**everywhere, components_to_quantize=["unet"])
    with pytest.raises(InputError, match="'unet'"):
        configs_of(wrong, models)
