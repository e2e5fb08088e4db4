"""The example of a real data set, ``examples/emoji``, on a small synthetic one."""

from __future__ import annotations

import io
import json
import runpy
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import T5Tokenizer

from impasto.cli import app
from impasto.errors import InputError, OutputError
from impasto.training.launch import launch
from impasto.training.settings import recipe_files

EXAMPLE = Path(__file__).parents[1] / "examples" / "emoji"
ANIMALS, FACES = 3, 0
#: Code points, label, tags, group, color.
EMOJI = [
    ("1F600", "grinning face", ["face", "smile"], FACES, "gold"),
    ("2764-FE0F", "red heart", ["heart", "love"], FACES, "red"),
    ("1F44B", "waving hand", [], FACES, "orange"),
    ("1F408", "cat", ["pet"], ANIMALS, "brown"),
    ("1F407", "rabbit", ["bunny", "pet"], ANIMALS, "gray"),
    ("1F99C", "parrot", ["bird"], ANIMALS, "green"),
]
DARK = {"label": "waving hand: dark skin tone", "hexcode": "1F44B-1F3FF", "tone": 5}


def load(name: str) -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLE / f"{name}.py"))


def webp(color: str) -> bytes:
    """A transparent image with a square in the middle."""
    image = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    image.paste(Image.new("RGBA", (32, 32), color), (16, 16))
    stream = io.BytesIO()
    image.save(stream, "WEBP", lossless=True)
    return stream.getvalue()


def write_archive(path: Path, contents: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        link = tarfile.TarInfo("package/assets/1f600-1f3fb.webp")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    return path


@pytest.fixture
def archives(tmp_path: Path) -> list[str]:
    """Arguments of ``prepare.py``, in a folder that is the working one."""
    images = {f"package/assets/{code.lower()}.webp": webp(color) for code, *_, color in EMOJI}
    images |= {"package/assets/1f44b-1f3ff.webp": webp("black"), "package/assets/ffff.webp": webp("white")}
    images |= {"package/../../outside.webp": webp("white"), "package/package.json": b"{}"}
    entries: list[dict[str, Any]] = [
        {"hexcode": code, "label": label, "tags": tags, "group": group} for code, label, tags, group, _ in EMOJI
    ]
    entries[2]["skins"] = [DARK]
    entries.append({"hexcode": "1F1E6", "label": "regional indicator A"})  # without an image
    groups = {"groups": {str(FACES): "smileys-emotion", str(ANIMALS): "animals-nature"}}
    names = {
        "package/en/data.json": json.dumps(entries).encode(),
        "package/meta/groups.json": json.dumps(groups).encode(),
    }
    first, second = write_archive(tmp_path / "images.tgz", images), write_archive(tmp_path / "names.tgz", names)
    return ["--images", str(first), "--names", str(second), "--any-version"]


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_data_set_has_the_images_with_names(archives: list[str], tmp_path: Path) -> None:
    main = load("prepare")["main"]
    main([str(tmp_path / "data"), *archives])
    found = records(tmp_path / "data" / "metadata.jsonl")
    assert [record["text"] for record in found] == [label for _, label, *_ in EMOJI]
    assert found[1]["file_name"] == "images/2764.png"
    assert found[0]["long_caption"] == "grinning face: face, smile"
    assert found[2]["long_caption"] == "waving hand"
    assert [record["text"] for record in records(tmp_path / "data" / "animals.jsonl")] == ["cat", "rabbit", "parrot"]
    with Image.open(tmp_path / "data" / "images" / "2764.png") as image:
        assert image.size == (128, 128)
        assert image.mode == "RGBA"
        assert image.getpixel((0, 0))[3] == 0  # type: ignore[index]
        assert image.getpixel((64, 64)) == (255, 0, 0, 255)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "images.tgz", "names.tgz"]
    assert len(list((tmp_path / "data" / "images").iterdir())) == 6

    main([str(tmp_path / "tones"), *archives, "--skin-tones", "--size", "32"])
    tone = records(tmp_path / "tones" / "metadata.jsonl")[3]
    assert (tone["text"], tone["emoji"]) == ("waving hand: dark skin tone", "1f44b")


def test_archives_that_cannot_be_used(archives: list[str], tmp_path: Path) -> None:
    main = load("prepare")["main"]
    with pytest.raises(InputError, match=r"images\.tgz is not @lobehub/fluent-emoji-3d@1\.1\.0: its SHA-256 is"):
        main([str(tmp_path / "data"), *archives[:-1]])
    with pytest.raises(InputError, match=r"images\.tgz does not have package/en/data\.json"):
        main([str(tmp_path / "data"), *archives, "--names", archives[1]])
    cut = tmp_path / "cut.tgz"
    cut.write_bytes(Path(archives[1]).read_bytes()[:-100])
    with pytest.raises(InputError, match=r"cut\.tgz is no complete \.tgz file"):
        main([str(tmp_path / "data"), *archives, "--images", str(cut)])
    assert not (tmp_path / "data").exists()


TINY_AUTOENCODER = ["block_out_channels=[4, 4, 4, 8]", "norm_num_groups=4"]
TINY_TEXT = ["d_model=32", "d_kv=16", "d_ff=32", "num_layers=1", "num_heads=2"]
TINY_TRANSFORMER = [
    "num_attention_heads=2",
    "cross_attention_dim=64",
    "num_layers=1",
    "caption_channels=32",
]


def train(name: str, *changes: str) -> None:
    few = ["steps=2", "data.batch_size=2", "checkpoints.every=2", "report.progress=false", *changes]
    configuration = recipe_files.read(str(EXAMPLE / f"{name}.yaml"), few)
    assert configuration.output is not None
    assert launch(configuration, Path(configuration.output)) is None


def test_the_whole_chain(
    archives: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the archives to a trained adapter, in the order of the README; the models are too small to learn much."""
    pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    load("prepare")["main"](["runs/emoji/data", *archives, "--size", "64"])
    tokenizer = ["runs/emoji/data/metadata.jsonl", "runs/emoji/tokenizer", "--vocabulary", "60"]
    load("tokenizer")["main"](tokenizer)
    with pytest.raises(OutputError, match="has a tokenizer"):
        load("tokenizer")["main"](tokenizer)
    read = T5Tokenizer.from_pretrained("runs/emoji/tokenizer")
    ids = read("red heart").input_ids
    assert ids[-1] == read.eos_token_id == 1
    assert 2 not in ids
    assert read.decode(ids, skip_special_tokens=True) == "red heart"

    vae = [f"models.vae.config.{change}" for change in TINY_AUTOENCODER]
    train("autoencoder", *vae, "validation.count=2", "objective.standardize=4")
    text = [f"models.text_encoder.config.{change}" for change in TINY_TEXT]
    transformer = [f"models.transformer.config.{change}" for change in TINY_TRANSFORMER]
    plain = [*text, *transformer, "samples.steps=1", "compile=false"]
    options = [option for change in [*plain, "data.sources.0.crop=centre"] for option in ("--set", change)]
    with pytest.raises(SystemExit, match="0"):
        app(["cache", str(EXAMPLE / "transformer.yaml"), "runs/emoji/cache", "--latents-only", *options])
    train("transformer", *plain, "data.sources.0={kind: cache, path: runs/emoji/cache, real_prompt_ratio: 0.8}")
    assert len(list(Path("runs/emoji/transformer/samples").glob("*.png"))) == 8
    train("lora")

    evaluate = load("evaluate")["main"]
    arguments = ["runs/emoji/transformer/result", "runs/emoji/data", "--steps", "1"]
    evaluate([*arguments, "--count", "4", "--output", "plain.png"])
    with Image.open("plain.png") as image:
        assert image.size == (1024, 64)
    blue = ["--lora", "runs/emoji/lora/result", "--background", "#4080e0", "--without", "animals-nature"]
    evaluate([*arguments, *blue, "--count", "3"])
    output = capsys.readouterr().out
    assert output.count("right: ") == 2
    assert "with a border of the color #4080e0: " in output
    with pytest.raises(InputError, match="there are 3 images to choose from, fewer than 64"):
        evaluate([*arguments, *blue])


def test_what_is_compared() -> None:
    names = load("evaluate")
    image = Image.new("RGB", (64, 64), "#4080e0")
    image.paste(Image.new("RGB", (32, 32), "red"), (16, 16))
    np.testing.assert_array_equal(names["border"](image), [64, 128, 224])
    assert names["pixels"](image).shape == (32 * 32 * 3,)
    assert [names["chosen"]([{"group": str(i % 2), "n": i} for i in range(8)], 2, "1")[i]["n"] for i in (0, 1)] == [
        0,
        4,
    ]
