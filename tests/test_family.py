from __future__ import annotations

import inspect
from typing import Any

import pytest

from impasto import GlmImagePipeline, PixArtAlphaPipeline, PixArtSigmaPipeline
from impasto.family import ALPHA, GLM_IMAGE, SIGMA, Family, family_of


@pytest.mark.parametrize(
    ("pipeline", "family"), [(PixArtAlphaPipeline, ALPHA), (PixArtSigmaPipeline, SIGMA), (GlmImagePipeline, GLM_IMAGE)]
)
def test_documented_defaults_are_those_of_the_family(pipeline: Any, family: Family) -> None:
    assert family_of(pipeline.__name__) is family
    documented = {
        "max_sequence_length": family.text_tokens,
        "num_inference_steps": family.steps,
        "guidance_scale": family.guidance_scale,
    }
    found = [
        (name, parameter.default)
        for method in (pipeline.encode_prompt, pipeline.denoise, pipeline.__call__)
        for name, parameter in inspect.signature(method).parameters.items()
        if name in documented
    ]
    assert len(found) == 6
    assert [default for _, default in found] == [documented[name] for name, _ in found]


def test_families_by_the_name_of_a_class() -> None:
    assert family_of("PixArtAlphaImg2ImgPipeline") is ALPHA
    assert family_of("PixArtSigmaInpaintPipeline") is SIGMA
    assert family_of("AnotherPipeline") is SIGMA
