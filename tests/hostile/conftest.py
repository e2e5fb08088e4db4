"""Small good checkpoints, made once, to be copied and damaged."""

from __future__ import annotations

from pathlib import Path

import pytest

from impasto import GlmImagePipeline

from ..tiny import write_pipeline
from ..tiny_glm import pipelines, prior_parts


@pytest.fixture(scope="session")
def pixart_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PixArt-Σ, whose tokenizer is a tokenizer.json."""
    return write_pipeline(tmp_path_factory.mktemp("pixart"))


@pytest.fixture(scope="session")
def glm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GLM-Image with its prior."""
    folder = tmp_path_factory.mktemp("glm")
    without_prior, _ = pipelines()
    GlmImagePipeline(**{**without_prior.components, **prior_parts()}).save_pretrained(folder)
    return folder
