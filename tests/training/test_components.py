"""The models of a run fit each other, the pipeline that they come from, and the sizes of the images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from impasto.errors import ConfigurationError
from impasto.family import ALPHA, SIGMA
from impasto.pipelines.pixart import PixArtAlphaPipeline
from impasto.training.assembly.components import family_of_models, load, load_encoders
from impasto.training.assembly.fitting import check_fit
from impasto.training.settings import recipe_files as recipes
from impasto.training.settings.configuration import Configuration, ModelSettings

from ..tiny import write_pipeline

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline of each family."""
    place = tmp_path_factory.mktemp("place")
    write_pipeline(place / "sigma")
    write_pipeline(place / "alpha", PixArtAlphaPipeline)
    return place


def models(pipeline: Path | None, **given: Any) -> ModelSettings:
    return ModelSettings(pipeline=None if pipeline is None else str(pipeline), **given)


def test_the_family_is_that_of_the_pipeline(place: Path) -> None:
    assert family_of_models(models(place / "alpha")) is ALPHA
    assert family_of_models(models(place / "alpha", family="alpha")) is ALPHA
    assert family_of_models(models(place / "sigma")) is SIGMA
    assert family_of_models(models(None)) is SIGMA
    assert family_of_models(models(None, family="alpha")) is ALPHA


def test_another_family_than_that_of_the_pipeline_is_refused(place: Path) -> None:
    for pipeline, family in (("alpha", "sigma"), ("sigma", "alpha"), ("sigma", "glm-image")):
        with pytest.raises(ConfigurationError, match=rf"models.family: .*{pipeline} is a PixArt.*set it to {pipeline}"):
            family_of_models(models(place / pipeline, family=family))
    # A stage starts from the last one, or from nothing, and has only the other components of the pipeline.
    start = {"start_from": "runs/pixart-alpha-align/result"}
    assert family_of_models(models(place / "sigma", family="alpha", transformer=start)) is ALPHA
    with pytest.raises(ConfigurationError, match="set it to sigma"):
        family_of_models(models(place / "sigma", family="glm-image", transformer=start))


def configuration(place: Path, size: list[int], **changes: Any) -> Configuration:
    content: dict[str, Any] = {
        "steps": 1,
        "models": {"pipeline": str(place / "sigma")},
        "data": {"sources": [{"path": "images"}], "batch_size": 2, "sizes": [[16, 16], size]},
    }
    return recipes.checked({**content, **changes}, "test")


@pytest.mark.parametrize(
    ("size", "changes", "message"),
    [
        ([18, 16], {}, r"data.sizes: the sides of \[18, 16\] must be multiples of 4 px .* size is \[16, 16\]"),
        ([16, 1], {}, r"nearest size is \[16, 4\]"),
        ([16, 15], {"objective": {"kind": "autoencoder"}}, r"multiples of 2 px .*; the nearest size is \[16, 16\]"),
    ],
)
def test_sizes_that_the_models_cannot_take_are_refused(
    size: list[int], changes: dict[str, Any], message: str, place: Path
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        load(configuration(place, size, **changes), CPU)
    load(configuration(place, [4, 64]), CPU)


def test_buckets_of_a_base_that_the_models_cannot_take_are_refused(place: Path) -> None:
    """Those of 256 px are multiples of 16, and GLM-Image's prior has tokens of 32 px."""
    found = load(configuration(place, [16, 16]), CPU)
    data = {"sources": [{"path": "images"}], "batch_size": 2, "base": 256}
    wanted = recipes.checked({"steps": 1, "data": data}, "test")
    check_fit(wanted, found.transformer, found.vae)
    with pytest.raises(ConfigurationError, match=r"data.base: .* multiples of 32 px for these models; give data.sizes"):
        check_fit(wanted, found.transformer, found.vae, is_glm_image=True)


def test_sizes_that_the_autoencoder_cannot_take_are_not_cached(place: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"data.sizes: .* multiples of 2 px"):
        load_encoders(configuration(place, [16, 15]), CPU)


def test_an_autoencoder_of_other_latents_is_refused(place: Path) -> None:
    other = {"config": {"in_channels": 8}, "start_from": str(place / "sigma")}
    with pytest.raises(ConfigurationError, match=r"models.vae: its latents have 4 channels .* takes 8 "):
        load(configuration(place, [16, 8], models={"pipeline": str(place / "sigma"), "transformer": other}), CPU)


@pytest.mark.parametrize(
    ("name", "config", "changes"),
    [
        ("vae", {"scaling_factor": 0.13}, {}),
        ("text_encoder", {"num_layers": 1}, {}),
        ("transformer", {"sample_size": 4}, {"adapter": {"rank": 2}}),
        ("transformer", {"sample_size": 4}, {"objective": {"kind": "lcm"}}),
        ("transformer", {"sample_size": 4}, {"objective": {"kind": "textual-inversion", "token": "<x>"}}),
    ],
)
def test_a_model_that_is_not_trained_is_not_a_new_one(
    name: str, config: dict[str, Any], changes: dict[str, Any], place: Path
) -> None:
    given = {"pipeline": str(place / "sigma"), name: {"config": config}}
    with pytest.raises(ConfigurationError, match=rf"models\.{name}: a config alone .* give start_from"):
        load(configuration(place, [16, 8], models=given, **changes), CPU)


def test_a_config_changes_a_stored_model(place: Path) -> None:
    vae = {"start_from": str(place / "sigma"), "config": {"scaling_factor": 0.13}}
    found, stored = (
        load(configuration(place, [16, 8], models={"pipeline": str(place / "sigma"), **given}), CPU).vae
        for given in ({"vae": vae}, {})
    )
    assert (found.config.scaling_factor, stored.config.scaling_factor) == (0.13, 0.7)
    assert torch.equal(found.decoder.conv_in.weight, stored.decoder.conv_in.weight)
