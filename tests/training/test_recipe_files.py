"""Configurations: read, changed on the command line, checked, written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from impasto.errors import CheckpointNotFoundError, InputError
from impasto.training import recipe_files as recipes
from impasto.training.config import differences
from impasto.training.configuration import Configuration, TextToImageSettings

SMALL = """
steps: 10
optimizer: {name: muon, rate: 1e-3}
data:
  sources: [{path: images}]
  batch_size: 4
  sizes: [[16, 16]]
"""


def written(folder: Path, text: str = SMALL) -> str:
    path = folder / "small.yaml"
    path.write_text(text)
    return str(path)


def test_a_configuration_is_read_and_written_again(tmp_path: Path) -> None:
    first = recipes.read(written(tmp_path))
    assert first.optimizer.rate == 1e-3
    assert isinstance(first.objective, TextToImageSettings)
    again = recipes.read(written(tmp_path, recipes.text_of(first)))
    assert again == first


def test_values_are_set_on_the_command_line(tmp_path: Path) -> None:
    changes = ["steps=20", "optimizer.rate=2e-5", "data.sources.0.path=other", "samples.prompts=[a red cube, b]"]
    changed = recipes.read(written(tmp_path), [*changes, "objective.kind=text-to-image", "schedule.warmup=5"])
    assert (changed.steps, changed.optimizer.rate, changed.optimizer.name) == (20, 2e-5, "muon")
    assert changed.data.sources[0].path == "other"
    assert changed.samples is not None
    assert changed.samples.prompts == ["a red cube", "b"]
    assert changed.schedule.warmup == 5


WRONG: dict[str, tuple[str, str]] = {
    "an unknown key": ("optimiser: {rate: 1}", "there is no 'optimiser' here; did you mean optimizer"),
    "an unknown key inside": ("optimizer: {rates: {}, lr: 1}", r"optimizer: there is no 'lr' here; there are .*rate"),
    "an unknown key in a list": (
        "data: {sources: [{pth: x}]}",
        r"data.sources.0: there is no 'pth' here; did you mean p",
    ),
    "a word for a number": ("steps: many", "steps: .*many"),
    "no steps": ("steps: null", "steps"),
    "a rate of zero": ("optimizer: {rate: 0}", "optimizer.rate: .*greater than 0"),
    "an unknown optimizer": ("optimizer: {name: adam}", "optimizer.name: .*'muon'"),
    "an unknown objective": ("objective: {kind: paint}", "objective: .*paint"),
    "a key of another objective": ("objective: {kind: autoencoder, tokens: 3}", "objective: there is no 'tokens' here"),
    "both sizes": ("data: {base: 512}", "data: give either base"),
    "a base without buckets": ("data: {base: 300, sizes: null}", "data.base: .*300"),
    "both share and repeats": (
        "data: {sources: [{path: a, share: 1}, {path: b, share: 1, repeats: 2}]}",
        "share and repeats contradict",
    ),
    "one share": ("data: {sources: [{path: a, share: 1}, {path: b}]}", "a share for each source, or for none"),
    "a folder without a path": (
        "data: {sources: [{kind: folder}]}",
        "data.sources.0: .*folder needs its path",
    ),
    "packed batches": ("data: {pack_pixels: 1000}", "data.pack_pixels: no objective takes"),
    "GLM-Image without its objective": ("models: {family: glm-image, pipeline: x}", "belong together"),
    "a cache and a trained text encoder": (
        "{data: {sources: [{kind: cache, path: x}]}, models: {text_encoder: {train: true}}}",
        "a cache has the features of a frozen text encoder",
    ),
    "not a number": ("optimizer: {rate: .nan}", "optimizer.rate"),
}


@pytest.mark.parametrize("name", list(WRONG))
def test_errors_name_the_key(name: str, tmp_path: Path) -> None:
    import yaml

    extra, message = WRONG[name]
    content: dict[str, Any] = yaml.safe_load(SMALL)
    for key, value in yaml.safe_load(extra).items():
        content[key] = {**content[key], **value} if isinstance(content.get(key), dict) else value
    content["optimizer"]["rate"] = float(content["optimizer"]["rate"])
    with pytest.raises(InputError, match=message) as caught:
        recipes.read(written(tmp_path, yaml.safe_dump(content)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: [1", "not valid YAML"),
        ("- 1", "not a mapping"),
        ("", "not a mapping"),
        ("steps: 1\nsteps: 2", "twice"),
        ("a: &x [1]\nb: *x", "aliases"),
        ("!!python/object/apply:os.mkdir [made]", "not valid YAML"),
        ("{" * 5000, "not valid YAML"),
    ],
)
def test_files_that_are_no_configuration(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        recipes.read(written(tmp_path, text))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("steps", "a.b=value"),
        ("=3", "a.b=value"),
        ("steps.more=3", "there is a value"),
        ("data.sources.1.path=x", "'1' is not one of the 1 entries"),
        ("optimizer.rate=[1", "--set optimizer.rate is not valid YAML"),
        ("optimizer.speed=1", "there is no 'speed' here"),
    ],
)
def test_changes_that_cannot_be_made(change: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        recipes.read(written(tmp_path), [change])


def test_unknown_names_and_files() -> None:
    with pytest.raises(CheckpointNotFoundError, match=r"no recipe 'fintune'.*finetune"):
        recipes.read("fintune")
    with pytest.raises(CheckpointNotFoundError, match="cannot be read"):
        recipes.read("nowhere.yaml")


@pytest.mark.parametrize("name", list(recipes.recipes()))
def test_recipes_of_the_package_are_valid_and_described(name: str) -> None:
    assert 20 < len(recipes.recipes()[name]) < 110
    configuration = recipes.read(name)
    assert isinstance(configuration, Configuration)


def test_differences_are_named_by_their_keys() -> None:
    one = {"steps": 1, "optimizer": {"rate": 1, "eps": 0}, "only": 3}
    other = {"steps": 1, "optimizer": {"rate": 2, "eps": 0}}
    assert differences(one, other) == {"optimizer.rate": (1, 2), "only": (3, None)}
