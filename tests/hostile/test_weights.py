"""Damaged weights: each is refused by the name of its file, before it costs anything."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.hostile.damages import BIN, HEADERS, KEY, NAME, PICKLES, SHARDS, TENSORS, Damage, header, pickled, sharded
from tests.hostile.sandbox import copy_of, edit_json, refused, run
from tests.tiny import tiny_transformer, tiny_vae

import impasto
from impasto.checkpoints.stored import first_non_finite, non_finite_parameter


def load(folder: Path, **options: Any) -> str:
    return type(impasto.PixArtTransformer2DModel.from_pretrained(folder, **options)).__name__


def load_strictly(folder: Path) -> str:
    return load(folder, use_safetensors=True)


def load_variant(folder: Path, variant: Any) -> str:
    return load(folder, variant=variant)


def load_vae(folder: Path) -> str:
    return type(impasto.AutoencoderKL.from_pretrained(folder)).__name__


@pytest.fixture
def folder(pixart_folder: Path, tmp_path: Path) -> Path:
    return copy_of(pixart_folder / "transformer", tmp_path / "transformer")


@pytest.mark.parametrize("damage", HEADERS.values(), ids=HEADERS)
def test_headers(folder: Path, damage: Damage) -> None:
    damage.apply(folder)
    refused(run(load, folder), damage.error, *damage.named)


@pytest.mark.parametrize("damage", TENSORS.values(), ids=TENSORS)
def test_tensors(folder: Path, damage: Damage) -> None:
    damage.apply(folder)
    refused(run(load, folder), damage.error, *damage.named)


@pytest.mark.parametrize("damage", SHARDS.values(), ids=SHARDS)
def test_shards(folder: Path, damage: Damage) -> None:
    damage.apply(folder)
    refused(run(load, folder), damage.error, *damage.named)


@pytest.mark.parametrize("damage", PICKLES.values(), ids=PICKLES)
def test_pickles(folder: Path, damage: Damage) -> None:
    damage.apply(folder)
    outcome = run(load, folder)
    refused(outcome, damage.error, *damage.named)
    assert "weights_only" not in outcome.message
    assert "code of a checkpoint" not in outcome.stdout + outcome.stderr


def test_a_pickle_is_not_asked_for(folder: Path) -> None:
    pickled()(folder)
    refused(run(load_strictly, folder), "CheckpointNotFoundError", NAME, BIN)


@pytest.mark.parametrize("variant", ["../../etc/passwd", "x" * 300, "a/b", "\0", "", 5, "\x1b[2J"], ids=ascii)
def test_a_variant_is_a_word(folder: Path, variant: Any) -> None:
    refused(run(load_variant, folder, variant), "InputError", "variant")


@pytest.mark.parametrize("name", [NAME, BIN, f"{NAME}.index.json"])
@pytest.mark.parametrize("kind", ["pipe", "folder", "link to nothing", "link in a circle"])
def test_what_is_no_file(folder: Path, name: str, kind: str) -> None:
    (folder / NAME).unlink()
    if kind == "pipe":
        os.mkfifo(folder / name)
    elif kind == "folder":
        (folder / name).mkdir()
    else:
        (folder / name).symlink_to("nothing" if kind == "link to nothing" else name)
    refused(run(load, folder), "CheckpointError", str(folder))


@pytest.mark.parametrize("blocks", [1, 3, 60_000])
def test_numbers_of_blocks_are_compared_before_building(folder: Path, blocks: int) -> None:
    edit_json(folder / "config.json", num_layers=blocks)
    refused(run(load, folder), "WeightsMismatchError", "config.json", "num_layers", str(blocks))


@pytest.mark.parametrize("values", [{"layers_per_block": 60_000}, {"layers_per_block": 2}])
def test_layers_of_an_autoencoder_are_compared_before_building(
    pixart_folder: Path, tmp_path: Path, values: dict[str, Any]
) -> None:
    folder = copy_of(pixart_folder / "vae", tmp_path / "vae")
    edit_json(folder / "config.json", **values)
    refused(run(load_vae, folder), "WeightsMismatchError", "config.json", "layers_per_block")


def test_a_tensor_under_an_old_and_a_new_name(pixart_folder: Path, tmp_path: Path) -> None:
    folder = copy_of(pixart_folder / "vae", tmp_path / "vae")
    content = load_file(folder / NAME)
    name = "encoder.mid_block.attentions.0.to_q.weight"
    save_file({**content, name.replace("to_q", "query"): content[name].clone()}, folder / NAME)
    refused(run(load_vae, folder), "WeightsMismatchError", NAME, "query.weight", "to_q.weight")


# --- what is good stays good ---


def _reordered(parsed: dict[str, Any]) -> None:
    items = sorted(parsed.items(), reverse=True)
    parsed.clear()
    parsed.update(items)


GOOD = {
    "as saved": lambda folder: None,
    "reordered header": header(_reordered),
    "metadata": header(lambda parsed: parsed.update(__metadata__={"format": "pt"})),
    "shards": sharded(lambda folder, index: None),
    "pickle": pickled(),
    "link, as in a hub's cache": lambda folder: (
        (folder / NAME).rename(folder.parent / "blob"),
        (folder / NAME).symlink_to("../blob"),
    ),
}


@pytest.mark.parametrize("change", GOOD.values(), ids=GOOD)
def test_good_weights_load(folder: Path, change: Any) -> None:
    change(folder)
    outcome = run(load, folder)
    assert outcome.value == "PixArtTransformer2DModel", outcome.trace


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_first_tensor_that_is_not_finite_is_found(tmp_path: Path, value: float, dtype: torch.dtype) -> None:
    good = torch.full((3, 5), torch.finfo(dtype).max, dtype=dtype)
    bad = good.clone()
    bad[1, 2] = value
    save_file({"a": good, "b": bad, "c": torch.zeros(0), "d": torch.tensor([1])}, tmp_path / "x.safetensors")
    save_file({"a": good, "c": torch.zeros(0), "d": torch.tensor([1])}, tmp_path / "y.safetensors")
    assert first_non_finite([tmp_path / "y.safetensors"]) is None
    assert first_non_finite([tmp_path / f"{name}.safetensors" for name in "yx"]) == (tmp_path / "x.safetensors", "b")


def test_the_first_parameter_that_is_not_finite_is_found() -> None:
    model = tiny_transformer()
    assert non_finite_parameter(model) is None
    with torch.no_grad():
        model.get_parameter(KEY)[3] = torch.nan
    assert non_finite_parameter(model) == KEY
    assert non_finite_parameter(tiny_vae()) is None
