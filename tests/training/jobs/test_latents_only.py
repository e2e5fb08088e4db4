"""Caches of latents alone, whose captions are encoded in training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from impasto.errors import ConfigurationError
from impasto.scenes.source import WORDINGS, ScenesSource
from impasto.training.data.cached import CachedSource
from impasto.training.launch import launch
from impasto.training.settings import recipe_files as recipes

from ...tiny import write_pipeline
from ..runs import rows
from .test_cache_command import run


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline, the configuration of a run that trains its text encoder on scenes, and a cache of their latents."""
    place = tmp_path_factory.mktemp("place")
    write_pipeline(place / "pipeline")
    options = {"count": 12, "seed": 5, "frames": [[16, 16], [24, 16]], "colourings": 2}
    content = {
        "steps": 2,
        "precision": "float32",
        "models": {"pipeline": str(place / "pipeline"), "text_encoder": {"train": True}},
        "data": {"sources": [{"kind": "scenes", "options": options}], "batch_size": 4, "sizes": [[16, 16], [24, 16]]},
        "log_every": 1,
    }
    (place / "config.yaml").write_text(recipes.text_of(recipes.checked(content, "test")))
    assert run("cache", str(place / "config.yaml"), str(place / "cache"), "--latents-only", "--device", "cpu") == 0
    return place


def cached(place: Path, *changes: str) -> Any:
    sets = [f"data.sources.0={{kind: cache, path: {place / 'cache'}}}", *changes]
    return recipes.read(str(place / "config.yaml"), sets)


def test_the_text_encoder_can_be_trained_from_latents(place: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    launch(cached(place), tmp_path)
    assert len(rows(tmp_path)) == 2
    before = load_file(place / "pipeline" / "text_encoder" / "model.safetensors")
    after = load_file(tmp_path / "result" / "text_encoder" / "model.safetensors")
    assert any(not before[name].equal(after[name].to(before[name].dtype)) for name in before if name in after)


def test_the_samples_are_those_of_the_source(place: Path) -> None:
    import numpy as np

    source = ScenesSource(count=12, seed=5, frames=[[16, 16], [24, 16]], colourings=2)
    cache = CachedSource(place / "cache")
    assert cache.empty is None
    for index in (0, 11):
        wordings = source.wordings(index)
        assert 1 < len(wordings) <= WORDINGS
        assert cache.captions(index).short == wordings
        sample = cache.read(index, source.size(index), np.random.default_rng(0))
        live = source.read(index, source.size(index), np.random.default_rng(0))
        assert sample.caption in wordings
        assert sample.text is None
        assert sample.labels is not None
        assert live.labels is not None
        assert sample.labels.equal(live.labels)
        assert sample.posterior is not None
        assert sample.posterior[0].shape[1:] == tuple(side // 2 for side in source.size(index))


def test_features_are_not_stored_while_the_text_encoder_is_trained(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("cache", str(place / "config.yaml"), str(tmp_path / "other"), "--device", "cpu") == 1
    assert "--latents-only" in capsys.readouterr().err


def test_stored_features_and_a_trained_text_encoder(place: Path, tmp_path: Path) -> None:
    frozen = ["--set", "models.text_encoder.train=false"]
    assert run("cache", str(place / "config.yaml"), str(tmp_path / "full"), "--device", "cpu", *frozen) == 0
    sets = [f"data.sources.0={{kind: cache, path: {tmp_path / 'full'}}}"]
    with pytest.raises(ConfigurationError, match="features of a frozen text encoder: do not train it"):
        launch(recipes.read(str(place / "config.yaml"), sets), tmp_path / "run")
