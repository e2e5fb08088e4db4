from __future__ import annotations

import copy
import json
import logging
import pickle
from pathlib import Path
from typing import Any

import pytest

from impasto.checkpoints.config import Config, Configurable, read_json, records_config, write_json
from impasto.errors import CheckpointError, CheckpointNotFoundError, ConfigurationError
from impasto.models.pixart.model import PixArtTransformer2DModel


class Thing(Configurable):
    ignored_config_keys = frozenset({"old", "legacy"})

    @records_config
    def __init__(self, size: int = 4, names: tuple[str, ...] = ("a", "b"), ratio: float | None = None, old: int = 0):
        if ratio is not None and ratio > size:
            raise ConfigurationError(f"Thing: ratio {ratio} exceeds size {size}; lower it")
        self.doubled = 2 * size


# The record


def test_every_argument_is_recorded_with_its_default() -> None:
    config = Thing(8, ratio=0.5).config
    assert dict(config) == {"size": 8, "names": ["a", "b"], "ratio": 0.5, "old": 0}
    assert config.size == config["size"] == config.get("size") == 8
    assert config.get("absent", 3) == 3
    assert "size" in config
    assert len(config) == 4


def test_what_is_not_there_and_what_is_read_only() -> None:
    config = Thing().config
    with pytest.raises(AttributeError, match="the config has no 'weight'; it has: size, names"):
        config.weight  # noqa: B018
    with pytest.raises(KeyError):
        config["weight"]
    with pytest.raises(ConfigurationError, match=r"config.size is read-only; construct a new module with size=3"):
        config.size = 3
    assert config.size == 4


def test_copies_and_pickles() -> None:
    config = Thing(5).config
    for twin in (copy.copy(config), copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert isinstance(twin, Config)
        assert twin == config


# Configs of others


def test_unknown_values_are_named_in_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "impasto"):
        thing = Thing.from_config({"size": 6, "colour": "red", "weight": 1, "legacy": 2, "_class_name": "Thing"})
    assert thing.config.size == 6
    assert [record.getMessage() for record in caplog.records] == [
        "Thing: unknown config values are ignored: colour, weight"
    ]


def test_overrides_replace_values_and_must_be_arguments() -> None:
    assert Thing.from_config({"size": 6}, size=7).doubled == 14
    assert Thing.from_config(Thing(3).config).doubled == 6
    with pytest.raises(ConfigurationError, match="Thing has no argument 'colour'; it takes: size, names, ratio, old"):
        Thing.from_config({}, colour="red")


def test_contradictory_values() -> None:
    with pytest.raises(ConfigurationError, match="ratio 9 exceeds size 6; lower it"):
        Thing.from_config({"size": 6, "ratio": 9})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_layers": "many"}, "num_layers must be a whole number from 1 to 65536, not 'many'"),
        ({"sample_size": [8, 8]}, r"sample_size must be a whole number from 1 to 65536, not \[8, 8\]"),
        ({"cross_attention_dim": 7}, "cross_attention_dim cannot be 7; make them equal"),
        ({"norm_eps": "small"}, "norm_eps must be a finite number above 0 .*, not 'small'"),
        ({"activation_fn": "none"}, "activation_fn 'none' is unknown; use one of"),
    ],
)
def test_values_that_no_model_can_have(values: dict[str, Any], message: str) -> None:
    config = {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 1, "cross_attention_dim": 24}
    with pytest.raises(ConfigurationError, match=message):
        PixArtTransformer2DModel.from_config({**config, "caption_channels": 10, "sample_size": 8, **values})


def test_a_value_of_the_wrong_type_says_how_to_go_on() -> None:
    with pytest.raises(ConfigurationError, match=r"Thing: ratio must be a finite number.*, not 'large'"):
        Thing.from_config({"size": 6, "ratio": "large"})


# Files


def test_saved_and_read_back(tmp_path: Path) -> None:
    Thing(6, ratio=0.25).save_config(tmp_path / "new" / "folder")
    content = Thing.load_config(tmp_path / "new" / "folder")
    assert content == {"_class_name": "Thing", "size": 6, "names": ["a", "b"], "ratio": 0.25}  # old has no meaning
    assert Thing.from_config(content).config == Thing(6, ratio=0.25).config
    Thing(old=3).save_config(tmp_path)
    assert Thing.load_config(tmp_path)["old"] == 3


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match=r"config.json does not exist; is .* the folder you meant\?"):
        Thing.load_config(tmp_path)


@pytest.mark.parametrize("content", [b"", b'{"size": ', b"\xff\xfe", b"{'size': 4}", b"[" * 100_000])
def test_damaged_json(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config.json is not readable JSON \(.*\); download or save it again"):
        Thing.load_config(tmp_path)


def test_json_that_is_no_object(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[1, 2]")
    with pytest.raises(CheckpointError, match=r"config.json should hold a JSON object, but holds a list"):
        Thing.load_config(tmp_path)


def test_infinity_is_read_as_in_published_schedulers(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"lambda_min_clipped": -Infinity}')
    assert read_json(tmp_path / "x.json") == {"lambda_min_clipped": -float("inf")}


def test_json_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["x.json"]
