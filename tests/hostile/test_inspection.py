"""``impasto info`` trusts nothing: what loading refuses, it refuses, and it reads no weights unless it is asked to."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.hostile.damages import HEADERS, KEY, NAME, PICKLES, SHARDS, TENSORS, Damage, pickled, sharded
from tests.hostile.sandbox import copy_of, edit_json, refused, run
from tests.tiny import tiny_pipeline

import impasto
from impasto.memory.estimate import peak_memory
from impasto.memory.inspection import image_size, inspect_model
from impasto.pipelines.pixart import PixArtSigmaPipeline

ALL = {
    f"{kind}: {name}": damage
    for kind, table in {"header": HEADERS, "tensor": TENSORS, "shards": SHARDS, "pickle": PICKLES}.items()
    for name, damage in table.items()
}
INDEX = "model_index.json"


def info(folder: Any, deep: bool = False) -> list[str]:
    found = inspect_model(folder, deep=deep)
    peak_memory(found, "float32", one_at_a_time=True)
    return [f"{part.name}: {part.parameters}" for part in found.components.values()]


def sizes(transformer: dict[str, Any], vae: dict[str, Any]) -> tuple[int, int]:
    return image_size(transformer, vae)


@pytest.fixture
def folder(pixart_folder: Path, tmp_path: Path) -> Path:
    return copy_of(pixart_folder, tmp_path / "pixart")


@pytest.mark.parametrize("damage", ALL.values(), ids=ALL)
def test_weights(folder: Path, damage: Damage) -> None:
    damage.apply(folder / "transformer")
    refused(run(info, folder), damage.error, *damage.named)


@pytest.mark.parametrize("component", ["vae", "text_encoder"])
@pytest.mark.parametrize("kept", [0, 8, 100, -1])
def test_truncated_weights_of_each_component(folder: Path, component: str, kept: int) -> None:
    (path,) = (folder / component).glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:kept])
    refused(run(info, folder), "CheckpointError", component, path.name)


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("transformer/config.json", "sample_size", "16"),
        ("transformer/config.json", "sample_size", math.inf),
        ("transformer/config.json", "sample_size", [16, 16]),
        ("transformer/config.json", "patch_size", 0),
        ("transformer/config.json", "num_layers", 10**9),
        ("transformer/config.json", "num_layers", 5),
        ("transformer/config.json", "num_attention_heads", None),
        ("transformer/config.json", "attention_head_dim", "72"),
        ("transformer/config.json", "activation_fn", "unknown"),
        ("transformer/config.json", "norm_eps", math.nan),
        ("vae/config.json", "block_out_channels", 8),
        ("vae/config.json", "block_out_channels", []),
        ("vae/config.json", "block_out_channels", [8] * 2000),
        ("vae/config.json", "block_out_channels", ["8", "8"]),
        ("vae/config.json", "latent_channels", None),
        ("vae/config.json", "force_upcast", "no"),
        ("vae/config.json", "scaling_factor", math.nan),
        ("scheduler/scheduler_config.json", "num_train_timesteps", 10**9),
        ("scheduler/scheduler_config.json", "beta_schedule", "unknown"),
        ("scheduler/scheduler_config.json", "lambda_min_clipped", math.nan),
        ("text_encoder/config.json", "num_layers", 10**9),
        ("text_encoder/config.json", "num_layers", 5),
        ("text_encoder/config.json", "d_model", "32"),
        ("text_encoder/config.json", "num_heads", None),
    ],
)
def test_configs(folder: Path, file: str, key: str, value: Any) -> None:
    edit_json(folder / file, **{key: value})
    refused(run(info, folder), "ImpastoError", file, key)


@pytest.mark.parametrize("file", [INDEX, "transformer/config.json", "vae/config.json", "text_encoder/config.json"])
@pytest.mark.parametrize(
    "content",
    ["", "[]", "[" * 100_000, '{"a": 1, "a": 2}', f'{{"a": {"9" * 5000}}}', "pipe", "gone"],
    ids=lambda text: text[:10],
)
def test_files_of_json(folder: Path, file: str, content: str) -> None:
    path = folder / file
    path.unlink()
    if content == "pipe":
        os.mkfifo(path)
    elif content != "gone":
        path.write_text(content)
    refused(run(info, folder), "CheckpointError", Path(file).name)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"_class_name": ...}, "_class_name"),
        ({"_class_name": 5}, "_class_name"),
        ({"_class_name": "\x1b[2J"}, "_class_name"),
        ({"vae": ["diffusers"]}, "vae"),
        ({"vae": ["diffusers", 5]}, "vae"),
        ({"vae": ["diffusers", "AutoencoderKL", "x"]}, "vae"),
        ({"vae": ["diffusers", "UNet2DConditionModel"]}, "UNet2DConditionModel"),
        ({"vae": ["os", "system"]}, "system"),
        ({"text_encoder": ["transformers", "GlmImageForConditionalGeneration"]}, "GlmImageForConditionalGeneration"),
        ({"transformer": ["diffusers", "AutoencoderKL"]}, "AutoencoderKL"),
        ({"../../etc": ["diffusers", "AutoencoderKL"]}, "../../etc"),
        ({"/etc": ["diffusers", "AutoencoderKL"]}, "/etc"),
        ({"": ["diffusers", "AutoencoderKL"]}, INDEX),
        ({"\x1b[2J": ["diffusers", "AutoencoderKL"]}, "\\x1b[2J"),
    ],
    ids=str,
)
def test_indexes(folder: Path, changes: dict[str, Any], named: str) -> None:
    edit_json(folder / INDEX, **changes)
    outcome = run(info, folder)
    refused(outcome, "CheckpointError", named)
    assert "\x1b" not in outcome.message


@pytest.mark.parametrize("component", ["transformer", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_missing_component(folder: Path, component: str) -> None:
    (folder / component).rename(folder / "elsewhere")
    refused(run(info, folder), "CheckpointNotFoundError", component)


def test_a_component_that_the_pipeline_does_not_have_is_not_looked_at(folder: Path) -> None:
    expected = run(info, folder).value
    edit_json(folder / INDEX, safety_checker=["transformers", "Anything"])
    assert run(info, folder).value == expected


@pytest.mark.parametrize("file", ["spiece.model", "tokenizer_config.json", "tokenizer.json"])
def test_a_damaged_tokenizer(folder: Path, file: str) -> None:
    for path in (folder / "tokenizer").iterdir():
        if path.name in ("spiece.model", "tokenizer.json") and path.name != file:
            path.unlink()
    (folder / "tokenizer" / file).write_bytes(b"[1")
    refused(run(info, folder), "CheckpointError", "tokenizer")


@pytest.mark.parametrize(
    ("transformer", "vae", "named"),
    [
        ({"sample_size": 10**9}, {}, "sample_size"),
        ({"sample_size": "128"}, {}, "sample_size"),
        ({"sample_size": math.nan}, {}, "sample_size"),
        ({"patch_size": None}, {}, "patch_size"),
        ({"patch_size": 0}, {}, "patch_size"),
        ({}, {"block_out_channels": None}, "block_out_channels"),
        ({}, {"block_out_channels": []}, "block_out_channels"),
        ({}, {"block_out_channels": [8] * 10_000}, "block_out_channels"),
        ({}, {"block_out_channels": {"a": 1}}, "block_out_channels"),
    ],
)
def test_sizes_of_images(transformer: dict[str, Any], vae: dict[str, Any], named: str) -> None:
    refused(run(sizes, transformer, vae), "ConfigurationError", named)


@pytest.mark.parametrize("component", ["transformer", "vae", "text_encoder"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_all_weights_are_read_where_that_is_asked_for(folder: Path, component: str, value: float) -> None:
    (path,) = (folder / component).glob("*.safetensors")
    content = load_file(path)
    name = sorted(content)[-1]
    content[name].view(-1)[-1] = value
    save_file(content, path)
    assert run(info, folder).kind == "returned"
    refused(run(info, folder, True), "CheckpointError", str(path), name)


def test_deep_reading_finds_them_in_shards_and_pickles(folder: Path, tmp_path: Path) -> None:
    other = copy_of(folder, tmp_path / "other")
    for place in (folder, other):
        content = load_file(place / "transformer" / NAME)
        content[KEY][3] = torch.nan
        save_file(content, place / "transformer" / NAME)
    sharded(lambda *_: None)(folder / "transformer")
    refused(run(info, folder, True), "CheckpointError", "-of-", KEY)
    pickled()(other / "transformer")
    refused(run(info, other, True), "CheckpointError", ".bin", KEY)


# --- what is good stays good ---


@pytest.mark.parametrize("deep", [False, True])
def test_good_checkpoints(pixart_folder: Path, glm_folder: Path, deep: bool) -> None:
    for model in (pixart_folder, glm_folder, "builtin:scenes"):
        outcome = run(info, model, deep)
        assert outcome.kind == "returned", outcome.trace
        names = [key for key, value in _index(model).items() if isinstance(value, list)]
        assert [line.split(":")[0] for line in outcome.value] == names
        assert all(not line.endswith(": 0") for line in outcome.value if line.startswith(("transformer", "vae")))


def _index(model: Path | str) -> dict[str, Any]:
    root = Path(impasto.__file__).parent / "scenes" / "checkpoint" if isinstance(model, str) else model
    content: dict[str, Any] = json.loads((root / INDEX).read_text())
    return content


def test_a_good_variant_and_a_component_that_is_absent(tmp_path: Path) -> None:
    tiny_pipeline(PixArtSigmaPipeline).save_pretrained(tmp_path, variant="fp16", max_shard_size="30KB")
    edit_json(tmp_path / INDEX, text_encoder=[None, None])
    outcome = run(info, tmp_path)
    assert outcome.kind == "returned", outcome.trace
    assert not any(line.startswith("text_encoder") for line in outcome.value)
