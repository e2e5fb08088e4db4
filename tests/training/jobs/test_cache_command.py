"""``impasto cache``, and runs that train from what it has written."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from impasto.cli import app
from impasto.errors import ConfigurationError
from impasto.training.launch import launch
from impasto.training.settings import recipe_files as recipes

from ...tiny import tiny_text_encoder, tiny_vae, write_pipeline
from ..folders import write_images
from ..runs import rows


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline, a folder of images, and the configuration of a run on them, config.yaml."""
    place = tmp_path_factory.mktemp("place")
    write_pipeline(place / "pipeline")
    write_images(place / "images", 40, 24)
    source = {"path": str(place / "images"), "crop": 3, "flip": True}
    content = {
        "steps": 6,
        "precision": "float32",
        "models": {"pipeline": str(place / "pipeline")},
        "data": {"sources": [source], "batch_size": 8, "sizes": [[16, 16]]},
        "validation": {"count": 8},
        "log_every": 1,
    }
    (place / "config.yaml").write_text(recipes.text_of(recipes.checked(content, "test")))
    return place


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stop:
        app(list(arguments))
    return int(stop.value.code or 0)


def tensors(cache: Path) -> dict[str, Tensor]:
    """All tensors of a cache, by file and name."""
    found = {path.name: load_file(path) for path in cache.glob("*.safetensors")}
    return {f"{file} {name}": tensor for file, each in found.items() for name, tensor in each.items()}


def records(cache: Path) -> list[Any]:
    """All records of a cache, in the order of its samples."""
    lines = [json.loads(line) for path in cache.glob("index-*.jsonl") for line in path.read_text().splitlines()]
    return sorted((record for line in lines for record in line["samples"]), key=lambda record: record["index"])


def cached(place: Path, out: Path, **changes: Any) -> Any:
    sets = ["data.sources.0.kind=cache", f"data.sources.0.path={out}"]
    return recipes.read(str(place / "config.yaml"), [*sets, *(f"{name}={value}" for name, value in changes.items())])


def test_a_run_from_the_cache_equals_a_run_from_images(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, out = str(place / "config.yaml"), tmp_path / "cache"
    for part in ("2/2", "1/2"):
        assert run("cache", config, str(out), "--shard", part, "--device", "cpu") == 0
    assert capsys.readouterr().out == f"{out}: 40 samples (chunks: 0 skipped, 1 written; 0 broken samples)\n" * 2
    launch(recipes.read(config), tmp_path / "live")
    launch(cached(place, out), tmp_path / "cached")
    live, stored = rows(tmp_path / "live"), rows(tmp_path / "cached")
    assert len(live) == len(stored) >= 6
    for a, b in zip(live, stored):
        for name in ("loss", "validation"):
            assert a.get(name, 0) == pytest.approx(b.get(name, 0), rel=1e-6)
    assert (tmp_path / "live" / "sizes").is_dir()  # what was measured, for the next start


def test_a_cache_of_other_models_is_refused(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "cache"
    assert run("cache", str(place / "config.yaml"), str(out), "--device", "cpu") == 0
    capsys.readouterr()
    tiny_text_encoder(seed=5).save_pretrained(tmp_path / "other" / "text_encoder")
    start = f"models.text_encoder.start_from={tmp_path / 'other' / 'text_encoder'}"
    assert run("cache", str(place / "config.yaml"), str(out), "--set", start) == 1
    assert "is a cache with another text_encoder; choose another folder" in capsys.readouterr().err
    tiny_vae(seed=5).save_pretrained(tmp_path / "other" / "vae")
    with pytest.raises(ConfigurationError, match="was made with another autoencoder, or in another precision"):
        launch(cached(place, out, **{"models.vae.start_from": tmp_path / "other" / "vae"}), tmp_path / "run")


def test_a_cache_of_other_settings_is_refused(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "cache"
    assert run("cache", str(place / "config.yaml"), str(out), "--device", "cpu") == 0
    for change, message in (
        ({"objective.tokens": 7}, "tokens 300, and here it is 7"),
        ({"objective.clean_captions": True}, "with clean False"),
        ({"data.max_upscale": 1.5}, "with max_upscale 2.0"),
        ({"data.max_crop": 0.3}, "with max_crop 0.5"),
        ({"data.sizes": [[16, 32]]}, r"sizes \[\[16, 16\]\], and here it is \[\[16, 32\]\]"),
        ({"data.sources.0.crop": 2}, "crop of the cache .* is 3, not 2"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            launch(cached(place, out, **change), tmp_path / "run")
    other = tmp_path / "other"
    tiny_text_encoder(seed=5).save_pretrained(other / "encoder" / "text_encoder")
    start = f"models.text_encoder.start_from={other / 'encoder' / 'text_encoder'}"
    assert run("cache", str(place / "config.yaml"), str(other / "cache"), "--device", "cpu", "--set", start) == 0
    held = f"{{count: 4, source: {{kind: cache, path: {other / 'cache'}}}}}"
    with pytest.raises(ConfigurationError, match="different text encoders"):
        launch(cached(place, out, validation=held), tmp_path / "run")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--set", "models.text_encoder.train=true"], "the text_encoder is trained here"),
        (["--set", "adapter.text_encoder_rank=4"], "the text_encoder is trained here"),
        (["--set", "objective={kind: autoencoder}"], "autoencoder reads its data itself"),
        (["--set", "data.sources.0.crop=random"], "random crops cannot be cached"),
        (["--set", "data.sources.0.kind=cache"], "a source is a cache already"),
        (["--set", "data.sources.0.path=missing"], "the folder of images missing does not exist"),
        (["--shard", "3/2"], "--shard must be like 1/4"),
        (["--dtype", "int4"], "dtype must be one of float32, bfloat16, float16"),
        (["--shard", "1/2", "--ray", "auto"], "--shard and --ray contradict each other"),
    ],
)
def test_what_is_refused(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert run("cache", str(place / "config.yaml"), str(tmp_path / "cache"), *options) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "cache" / "cache.json").exists()


def test_images_of_a_class_are_generated_first(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = f"{{path: {tmp_path / 'class'}, caption: a dog, crop: %s, generate: {{count: 2, steps: 1}}}}"
    command = ["cache", str(place / "config.yaml"), str(tmp_path / "cache"), "--device", "cpu", "--set"]
    assert run(*command, f"data.sources=[{source % 'random'}]") == 1
    assert "random crops cannot be cached" in capsys.readouterr().err
    assert run(*command, f"data.sources=[{source % 'centre'}]", "--shard", "1/2") == 1
    assert "class lacks 2 images of its class, which one process has to generate first" in capsys.readouterr().err
    assert not (tmp_path / "class").exists()
    assert run(*command, f"data.sources=[{source % 'centre'}]") == 0
    assert len(list((tmp_path / "class").iterdir())) == 2
    assert [record["captions"] for record in records(tmp_path / "cache")] == [[["a dog"], []]] * 2
    assert run(*command, f"data.sources=[{source % 'centre'}]", "--shard", "1/2") == 0


@pytest.mark.cluster
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs Ray")
def test_ray_writes_the_same_cache(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(place / "config.yaml")
    command = ["--set", "data.sources.0.crop=2", "--device", "cpu"]
    assert run("cache", config, str(tmp_path / "plain"), *command) == 0
    assert run("cache", config, str(tmp_path / "ray"), *command, "--ray", "local", "--actors", "2") == 0
    assert "2 written, 0 skipped" in capsys.readouterr().out
    # Actors have one thread, and another number of threads rounds differently.
    found, expected = tensors(tmp_path / "ray"), tensors(tmp_path / "plain")
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6)
    assert records(tmp_path / "ray") == records(tmp_path / "plain")
    assert json.loads((tmp_path / "ray" / "cache.json").read_text())["samples"] == 40
    assert run("cache", config, str(tmp_path / "ray"), *command, "--ray", "local") == 0
    assert "0 written, 2 skipped" in capsys.readouterr().out
