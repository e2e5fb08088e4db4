from __future__ import annotations

import copy
import json
import logging
import operator
import pickle
from pathlib import Path
from typing import Any

import pytest

import impasto.checkpoints.config as config_file
from impasto.checkpoints.config import Config, Configurable, read_json, records_config, write_json
from impasto.errors import CheckpointError, CheckpointNotFoundError, ConfigurationError, InputError
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
    recorded = {"size": 8, "names": ["a", "b"], "ratio": 0.5}  # old has no effect
    assert dict(config) == {**recorded, "_use_default_values": ["names"]}
    assert dict(Thing(8, ["a"], 0.5, 1).config) == {"size": 8, "names": ["a"], "ratio": 0.5, "old": 1}  # type: ignore[arg-type]
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


def test_it_is_a_dict() -> None:
    config = Thing(8).config
    assert isinstance(config, dict)
    assert json.loads(json.dumps(config)) == config == {**config}
    assert (config | {"size": 9}).size == ({"size": 9, "x": 1} | config).x + 8 == 9
    assert sorted(config.keys()) == ["_use_default_values", "names", "ratio", "size"]
    changed = config.copy()
    changed["size"] = 9
    assert config.size == 8


def test_every_change_is_refused() -> None:
    config = Thing(8).config
    changes: list[Any] = [
        lambda: config.__setitem__("size", 9),
        lambda: config.__delitem__("size"),
        lambda: operator.ior(config, {"size": 9}),
        lambda: config.pop("size"),
        config.popitem,
        config.clear,
        lambda: config.update(size=9),
        lambda: config.setdefault("new", 9),
        lambda: setattr(config, "size", 9),
        lambda: delattr(config, "size"),
    ]
    for change in changes:
        with pytest.raises(ConfigurationError, match="read-only; construct a new module with"):
            change()
    assert config == Thing(8).config


def test_a_record_can_be_replaced_but_not_the_object() -> None:
    thing = Thing(8)
    thing.register_to_config(size=9, origin="here")
    assert (thing.config.size, thing.config.origin, thing.doubled) == (9, "here", 16)
    thing._internal_dict = {"size": 3}  # type: ignore[assignment]
    assert thing.config == thing._internal_dict == {"size": 3}
    assert isinstance(thing.config, Config)


def test_private_keywords_are_recorded_only() -> None:
    first = Thing.from_config({"size": 6, "_class_name": "Other", "_diffusers_version": "0.1"})
    assert first.config._class_name == "Thing"
    again = Thing(**first.config)
    assert again.config == first.config
    assert again.doubled == 12


# Configs of others


def test_unknown_values_are_named_in_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "impasto"):
        thing = Thing.from_config({"size": 6, "colour": "red", "weight": 1, "legacy": 2, "_class_name": "Thing"})
    assert thing.config.size == 6
    assert [record.getMessage() for record in caplog.records] == [
        "Thing: unknown config values are ignored: colour, weight"
    ]


@pytest.mark.parametrize("key", ["self", "cls", "config", "values", "config_dict", "return_unused_kwargs"])
def test_keys_with_names_of_parameters_are_ordinary_ones(key: str) -> None:
    thing, rest = Thing.from_config({"size": 6, key: 3}, return_unused_kwargs=True)
    assert thing.config.size == 6
    assert thing.config[key] == rest[key] == 3


def test_overrides_replace_values_and_must_be_arguments() -> None:
    assert Thing.from_config({"size": 6}, size=7).doubled == 14
    assert Thing.from_config(Thing(3).config).doubled == 6
    with pytest.raises(ConfigurationError, match="Thing has no argument 'colour'; it takes: size, names, ratio, old"):
        Thing.from_config({}, colour="red")
    with pytest.raises(ConfigurationError, match=r"no argument 'ration'; did you mean 'ratio'\?"):
        Thing.from_config({}, ration=2)


def test_defaults_of_another_class_do_not_override_ours() -> None:
    assert Thing.from_config({"size": 6, "ratio": 2.0, "_use_default_values": ["size"]}).config.size == 4
    assert Thing.from_config({"size": 6, "_use_default_values": "damaged"}).config.size == 6


def test_what_is_unused_is_kept_and_returned(caplog: pytest.LogCaptureFixture) -> None:
    config = {"size": 6, "colour": "red", "_class_name": "Other", "secret": object()}
    thing, unused = Thing.from_config(config, True, weight=1, ratio=0.5)
    assert unused == {"colour": "red", "weight": 1, "_class_name": "Thing"}
    assert (thing.config.colour, thing.config.ratio, "weight" in thing.config) == ("red", 0.5, False)
    values, unused, kept = Thing.extract_init_dict(config, weight=1)
    assert (values, unused) == ({"size": 6}, {"colour": "red", "weight": 1})
    assert kept == {"colour": "red", "_class_name": "Other"}


def test_registering_for_automatic_classes_has_no_effect() -> None:
    before = Thing().to_json_string()
    Thing.register_for_auto_class()
    assert Thing().to_json_string() == before
    with pytest.raises(InputError, match="must be 'AutoModel', not 'AutoPipeline'"):
        Thing.register_for_auto_class("AutoPipeline")
    assert (Thing.has_compatibles, Thing.ignore_for_config) == (False, [])


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
    private = {"_class_name": "Thing", "_diffusers_version": "0.42.1"}
    assert content == {**private, "size": 6, "names": ["a", "b"], "ratio": 0.25}  # old has no meaning
    assert Thing.from_config(content).config == content
    Thing(old=3).save_config(tmp_path)
    assert Thing.load_config(tmp_path)["old"] == 3


def test_configs_are_found_in_subfolders_files_and_snapshots(tmp_path: Path) -> None:
    snapshot = tmp_path / "snapshots" / ("a" * 40)
    Thing(6).save_config(snapshot / "thing")
    content = Thing.load_config(snapshot, subfolder="thing", force_download=False, proxies=None, mirror="x")
    assert content["size"] == 6
    assert Thing.load_config(snapshot / "thing" / "config.json") == content
    assert Thing.get_config_dict(str(snapshot / "thing")) == content
    assert Thing.load_config(snapshot, True, True, subfolder="thing", weight=2) == (content, {"weight": 2}, "a" * 40)
    Thing(6).save_config(tmp_path)
    assert Thing.load_config(tmp_path, return_commit_hash=True) == (content, None)
    with pytest.raises(InputError, match=r"load_config has no argument 'subfoldr'; did you mean 'subfolder'\?"):
        Thing.load_config(tmp_path, subfoldr="thing")


def test_the_text_of_the_file(tmp_path: Path) -> None:
    thing = Thing.from_config({"size": 6, "colour": "red", "_name_or_path": "/home/me"})
    text = thing.to_json_string()
    thing.save_config(tmp_path)
    thing.to_json_file(tmp_path / "copy.json")
    assert json.loads(text) == Thing.load_config(tmp_path) == read_json(tmp_path / "copy.json")
    assert list(json.loads(text)) == ["_class_name", "_diffusers_version", "colour", "names", "ratio", "size"]
    assert (tmp_path / "copy.json").read_text() == text


def test_uploading_a_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def push_saved(saved: Any, folder: Path, files: list[str], options: dict[str, Any]) -> None:
        assert (folder / files[0]).is_file()
        calls.append((files, options))

    monkeypatch.setattr(config_file, "push_saved", push_saved)
    Thing().save_config(tmp_path / "mine", push_to_hub=True, private=True)
    Thing().save_config(tmp_path / "mine", True, repo_id="me/thing", commit_message="New")
    Thing().save_config(tmp_path / "mine")
    assert calls == [
        (["config.json"], {"private": True}),
        (["config.json"], {"repo_id": "me/thing", "commit_message": "New"}),
    ]
    with pytest.raises(InputError, match="no argument 'privat'"):
        Thing().save_config(tmp_path / "mine", True, privat=True)


def test_a_path_is_taken_for_its_config(tmp_path: Path) -> None:
    """As averages of diffusers' EMAModel are loaded, whose state is in the config."""
    thing = Thing(6)
    thing.register_to_config(decay=0.5)
    thing.save_config(tmp_path / "sub")
    loaded, unused = Thing.from_config(tmp_path, return_unused_kwargs=True, subfolder="sub")  # type: ignore[call-overload]
    assert (loaded.config.size, unused["decay"]) == (6, 0.5)


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
