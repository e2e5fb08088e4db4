"""The records of a batch: what they may say, and that everything is checked before anything is generated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from impasto.errors import InputError
from impasto.serving.batch.records import Options, Record, read_records
from impasto.serving.batch.run import in_order, part_of
from impasto.serving.stub import SCENES


def write(folder: Path, *records: Any) -> Path:
    path = folder / "prompts.jsonl"
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return path


def read(folder: Path, *records: Any, seed: int = 0) -> list[Record]:
    return read_records(write(folder, *records), SCENES, Options(seed))


def test_settings_and_their_defaults(tmp_path: Path) -> None:
    Image.new("RGB", (48, 32)).save(tmp_path / "room.png")
    Image.new("L", (48, 32)).save(tmp_path / "mask.png")
    edit = {"prompt": "a cat", "image": "room.png", "mask": "mask.png", "id": "edit-1"}
    full = {
        "prompt": "a dog",
        "negative_prompt": "rain",
        "size": "128x64",
        "num_inference_steps": 5,
        "guidance_scale": 2,
        "seed": 9,
        "scheduler": "ddim",
        "lora": None,
    }
    plain, edited, other = read(tmp_path, {"prompt": "a cube"}, "", edit, full, seed=100)
    assert (plain.id, plain.index, plain.seed, plain.steps, plain.width) == ("000000", 0, 100, 20, 64)
    assert (edited.id, edited.seed, edited.strength) == ("edit-1", 101, 1.0)
    assert (edited.width, edited.height, edited.images) == (48, 32, (tmp_path / "room.png",))
    assert (other.width, other.height, other.steps, other.guidance_scale, other.seed) == (128, 64, 5, 2.0, 9)
    assert other.settings()["scheduler"] == "ddim"
    assert plain.settings() == {
        "prompt": "a cube",
        "width": 64,
        "height": 64,
        "num_inference_steps": 20,
        "guidance_scale": 4.5,
        "seed": 100,
    }
    assert plain.key("m") != plain.key("n")
    assert plain.key("m") != other.key("m")


def test_paths_hold_in_other_working_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (48, 32)).save(tmp_path / "photos" / "room.png")
    write_adapter(tmp_path / "style.safetensors")
    write(tmp_path, {"prompt": "a cat", "image": "photos/room.png", "lora": "style.safetensors:0.5"})
    monkeypatch.chdir(tmp_path)
    (here,) = read_records(Path("prompts.jsonl"), SCENES)
    monkeypatch.chdir(tmp_path / "photos")
    (there,) = read_records(Path("../prompts.jsonl"), SCENES)
    assert here == there
    assert here.images == (tmp_path / "photos" / "room.png",)
    assert here.adapters == ((str(tmp_path / "style.safetensors"), 0.5),)
    assert here.settings()["image"] == ["photos/room.png"]
    assert here.settings()["lora"] == ["style.safetensors:0.5"]
    (tmp_path.parent / "moved").mkdir()
    moved = tmp_path.rename(tmp_path.parent / "moved" / "batch")
    (elsewhere,) = read_records(moved / "prompts.jsonl", SCENES)
    assert elsewhere.key("m") == here.key("m")


def write_adapter(path: Path, **defaults: Any) -> None:
    save_file({"x.weight": torch.zeros(1)}, path, {"impasto_generation": json.dumps(defaults)})


def test_adapters_say_how_to_generate(tmp_path: Path) -> None:
    write_adapter(tmp_path / "plain.safetensors")
    write_adapter(tmp_path / "few.safetensors", scheduler="lcm", steps=4, guidance_scale=1.0)
    write_adapter(tmp_path / "other.safetensors", scheduler="other", steps=7)
    path = write(
        tmp_path,
        {"prompt": "x", "lora": "plain.safetensors"},
        {"prompt": "x", "lora": ["plain.safetensors", "few.safetensors:0.5"]},
        {"prompt": "x", "lora": "few.safetensors", "num_inference_steps": 6, "scheduler": "ddim"},
        {"prompt": "x", "lora": "other.safetensors"},
    )

    def found(options: Options) -> list[tuple[int, float, str | None]]:
        return [(each.steps, each.guidance_scale, each.scheduler) for each in read_records(path, SCENES, options)]

    assert found(Options()) == [(20, 4.5, None), (4, 1.0, "lcm"), (6, 1.0, "ddim"), (7, 4.5, None)]
    assert found(Options(0, 8, 3.0)) == [(8, 3.0, None), (8, 3.0, "lcm"), (6, 3.0, "ddim"), (8, 3.0, None)]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("{", "line 2: it is no JSON"),
        ("[1]", "it is no object"),
        ({"prompt": " "}, "its prompt is empty"),
        ({}, "prompt must be a string, not None"),
        ({"prompt": "x", "promt": "y"}, "it has 'promt'; did you mean 'prompt'?"),
        ({"prompt": "x", "steps": 3}, "it has 'steps'; "),
        ({"prompt": "x", "size": "64"}, 'give size as in "1024x768"'),
        ({"prompt": "x", "size": "64x64", "width": 64}, "its size is size, and width or height"),
        ({"prompt": "x", "width": 64}, "one of width and height"),
        ({"prompt": "x", "size": "4096x4096"}, "pixels are more than"),
        ({"prompt": "x", "seed": -1}, "seed must be a whole number"),
        ({"prompt": "x", "num_inference_steps": True}, "num_inference_steps must be"),
        ({"prompt": "x", "scheduler": "euler"}, "its scheduler is 'euler'; scenes takes dpm++, ddim, ddpm, lcm"),
        ({"prompt": "x", "id": "../up"}, "an id is up to 95 letters, digits, - and _"),
        ({"prompt": "x", "id": "a" * 96}, "an id is up to 95 letters, digits, - and _"),
        ({"prompt": "x", "id": "first"}, "its id 'first' is that of line 1 too"),
        ({"prompt": "x", "id": "First"}, "its id 'First' is that of line 1 too; ids must differ in more than case"),
        ({"prompt": "x", "image": "gone.png"}, "does not exist"),
        ({"prompt": "x", "mask": "prompts.jsonl"}, "it has a mask or a strength but no image"),
        ({"prompt": "x", "image": "prompts.jsonl"}, "prompts.jsonl"),
        ({"prompt": "x", "lora": "gone.safetensors"}, "gone.safetensors"),
    ],
)
def test_what_is_refused(record: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        read(tmp_path, {"prompt": "a cube", "id": "first"}, record, {"prompt": "a cone"})
    assert message in str(caught.value)
    assert "line 2: " in str(caught.value)


def test_all_faults_are_reported_at_once(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"line 1: .*; line 3: .*; and 5 more"):
        read(tmp_path, {"prompt": ""}, {"prompt": "fine"}, *[{"prompt": "x", "width": 1}] * 9)
    with pytest.raises(InputError, match="has no records"):
        read(tmp_path, "", "")
    with pytest.raises(InputError, match="cannot be read"):
        read_records(tmp_path / "none.jsonl", SCENES)


def test_the_order_is_by_cost_and_shards_are_alike(tmp_path: Path) -> None:
    records = [{"prompt": "x", "num_inference_steps": 1 + i % 7, "size": f"{16 * (1 + i % 3)}x32"} for i in range(42)]
    found = in_order(read(tmp_path, *records))
    costs = [record.steps * record.width for record in found]
    assert costs == sorted(costs, reverse=True)
    shards = [part_of(found, (i, 4)) for i in range(1, 5)]
    assert sorted(record.index for shard in shards for record in shard) == list(range(42))
    sums = [sum(record.steps * record.width for record in shard) for shard in shards]
    assert max(sums) <= 1.2 * min(sums)
