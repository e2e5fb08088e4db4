"""Small good checkpoints, made once, to be copied and damaged."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import pytest

from impasto import GlmImagePipeline

from ..tiny import write_pipeline
from ..tiny_glm import pipelines, prior_parts

#: Of a test with more cases than this, one in five is in the default run, and the others in ``pytest -m slow``.
MANY = 12


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    cases: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        if item.path.parent == Path(__file__).parent:
            cases[item.nodeid.partition("[")[0]].append(item)
    for several in cases.values():
        for i, item in enumerate(several):
            if len(several) > MANY and i % 5:
                item.add_marker(pytest.mark.slow)


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
