"""Folders of images: captions in every form, images of every kind, and what cannot be used."""

from __future__ import annotations

import io
import json
import logging
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from impasto.errors import ConfigurationError, InputError, OutputError
from impasto.training.assembly.assemble import faults_of
from impasto.training.data.captions import Captions
from impasto.training.data.folders import FolderSource
from impasto.training.data.images import Reading
from impasto.training.data.sample import Sample
from impasto.training.data.views import Views

from .folder_of_images import smooth_image, write_folder


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def captions(source: FolderSource) -> dict[str, Captions]:
    return {source.name(i): source.captions(i) for i in range(len(source))}


# --- captions ---


def test_metadata_with_short_and_long_captions(tmp_path: Path) -> None:
    smooth_image(8, 8).save(tmp_path / "a.png")
    (tmp_path / "sub").mkdir()
    smooth_image(8, 8).save(tmp_path / "sub" / "b.jpg")
    lines = [
        {"file_name": "a.png", "texts": ["one", " two ", "", "one"], "sharegpt4v": "a long one", "score": 3},
        {"file_name": "sub/b.jpg", "caption": "three"},
    ]
    (tmp_path / "metadata.jsonl").write_text("\n\n".join(map(json.dumps, lines)))
    assert captions(FolderSource(tmp_path)) == {
        "a.png": Captions(("one", "two"), ("a long one",)),
        "sub/b.jpg": Captions(("three",)),
    }


def test_images_that_the_metadata_does_not_list_are_counted(tmp_path: Path) -> None:
    write_folder(tmp_path, [(8, 8), (8, 8)])
    assert FolderSource(tmp_path).unlisted == 0
    for name in ("new.png", "0_mask.png"):
        smooth_image(8, 8).save(tmp_path / name)
    source = FolderSource(tmp_path, mask_suffix="_mask")
    assert (len(source), source.unlisted) == (2, 1)
    assert faults_of(source) == {"their file of captions does not list them": 1}


def test_text_files_next_to_images(tmp_path: Path) -> None:
    write_folder(tmp_path, [(8, 8), (8, 8)], captions=False)
    (tmp_path / "0.txt").write_text("\ufeffein Würfel\n", encoding="utf-8")
    (tmp_path / "1.txt").write_text("a sphere")
    assert captions(FolderSource(tmp_path)) == {"0.png": Captions(("ein Würfel",)), "1.png": Captions(("a sphere",))}


def test_links_to_folders_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("here", "elsewhere"):
        write_folder(tmp_path / name, [(8, 8)])
    (tmp_path / "here" / "more").symlink_to(tmp_path / "elsewhere")
    with caplog.at_level(logging.WARNING):
        assert list(captions(FolderSource(tmp_path / "here"))) == ["0.png"]
    assert [str(tmp_path / "here" / "more") in record.getMessage() for record in caplog.records] == [True]


@pytest.mark.parametrize("place", ["InternData/data_info.json", "InternData/partition/data_info.json"])
def test_the_original_codes_json(tmp_path: Path, place: str) -> None:
    write_folder(tmp_path / "InternImgs", [(8, 12)], captions=False)
    record = {"path": "0.png", "prompt": "short", "sharegpt4v": "long", "width": 12, "height": 8, "ratio": 0.67}
    (tmp_path / place).parent.mkdir(parents=True)
    (tmp_path / place).write_text(json.dumps([record]))
    source = FolderSource(tmp_path)
    assert captions(source) == {"InternImgs/0.png": Captions(("short",), ("long",))}
    assert source.size(0) == (8, 12)


def test_one_caption_for_all_and_none_at_all(tmp_path: Path) -> None:
    write_folder(tmp_path, [(8, 8), (8, 8)], captions=False)
    source = FolderSource(tmp_path, Reading(caption="a photo of sks"))
    assert source.read(1, (8, 8), rng()).caption == "a photo of sks"
    assert FolderSource(tmp_path, Reading(needs_caption=False)).read(1, (8, 8), rng()).caption is None
    with pytest.raises(InputError, match=r"2 of 2 samples .*0.png: it has no caption") as stop:
        FolderSource(tmp_path, Reading(max_broken=1))
    assert "max_broken" in str(stop.value)


def test_the_share_of_short_captions() -> None:
    both = Captions(("a", "b"), ("long",))
    for ratio in (0.0, 0.3, 1.0):
        chosen = [both.choose(rng(i), ratio) for i in range(400)]
        assert sum(c != "long" for c in chosen) / 400 == pytest.approx(ratio, abs=0.08)
    assert {Captions(("a", "b")).choose(rng(i), 0.0) for i in range(40)} == {"a", "b"}  # there are no others


# --- images ---


def save(folder: Path, name: str, image: Image.Image, **options: object) -> Path:
    image.save(folder / name, **options)
    return folder / name


def only(folder: Path, **options: object) -> FolderSource:
    return FolderSource(folder, Reading(needs_caption=False, **options))  # type: ignore[arg-type]


def levels(sample: Sample) -> torch.Tensor:
    assert sample.image is not None
    return ((sample.image + 1) * 127.5).round().byte()


def test_an_image_becomes_a_tensor_without_change(tmp_path: Path) -> None:
    image = smooth_image(16, 24)
    save(tmp_path, "a.png", image)
    sample = only(tmp_path).read(0, (16, 24), rng())
    expected = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1
    torch.testing.assert_close(sample.image, expected, atol=1e-6, rtol=0)
    assert (sample.size, sample.crop) == ((16, 24), (0, 0))


def test_kinds_of_images(tmp_path: Path) -> None:
    level = 100
    grey = Image.new("L", (8, 8), level)
    rgb = Image.new("RGB", (8, 8), (level,) * 3)
    palette = rgb.convert("P", palette=Image.Palette.ADAPTIVE)
    half = Image.new("RGBA", (8, 8), (200, 200, 200, 128))
    sixteen = Image.fromarray(np.full((8, 8), level * 257, np.uint16))
    for name, image in {"a": grey, "b": rgb, "c": palette, "d": half, "e": sixteen, "f": grey.convert("LA")}.items():
        save(tmp_path, f"{name}.png", image)
    save(tmp_path, "g.jpg", rgb.convert("CMYK"))
    source = only(tmp_path, background="black")
    values = [levels(source.read(i, (8, 8), rng())) for i in range(len(source))]
    assert [round(v.float().mean().item()) for v in values] == [100] * 7
    assert all(v.shape == (3, 8, 8) for v in values)
    white = levels(only(tmp_path).read(3, (8, 8), rng()))
    assert round(white.float().mean().item()) == 227  # half of 200, half of 255


def test_images_are_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # a quarter turn
    for name in ("a.jpg", "b.png", "c.webp"):
        save(tmp_path, name, smooth_image(8, 20), exif=exif)
    source = only(tmp_path)
    assert [source.size(i) for i in range(3)] == [(20, 8)] * 3
    sample = source.read(1, (20, 8), rng())
    assert sample.size == (20, 8)
    turned = smooth_image(8, 20).transpose(Image.Transpose.ROTATE_270)
    assert torch.equal(levels(sample), torch.from_numpy(np.array(turned)).permute(2, 0, 1))


def test_crops_cover_the_target_and_say_where_they_lie(tmp_path: Path) -> None:
    save(tmp_path, "a.png", smooth_image(40, 100))
    centre = only(tmp_path).read(0, (20, 20), rng())
    assert (centre.size, centre.crop) == ((40, 100), (0, 15))
    resized = smooth_image(40, 100).resize((50, 20), Image.Resampling.LANCZOS).crop((15, 0, 35, 20))
    assert torch.equal(levels(centre), torch.from_numpy(np.array(resized)).permute(2, 0, 1))
    random = only(tmp_path, views=Views("random"))
    lefts = [random.read(0, (20, 20), rng(i)).crop[1] for i in range(200)]
    assert (min(lefts), max(lefts)) == (0, 30)
    fixed = only(tmp_path, views=Views(3, flip=True))
    lefts = [fixed.read(0, (20, 20), rng(i)).crop[1] for i in range(100)]
    assert 1 < len(set(lefts)) <= 3
    images = {levels(fixed.read(0, (20, 20), rng(i))).numpy().tobytes() for i in range(100)}
    assert len(images) == 2 * len(set(lefts))  # each crop, mirrored or not
    assert fixed.read(0, (20, 20), rng(7)).crop == fixed.read(0, (20, 20), rng(7)).crop


def test_masks_move_with_the_image(tmp_path: Path) -> None:
    half = np.zeros((40, 100), np.uint8)
    half[:, :50] = 255
    save(tmp_path, "a.jpg", smooth_image(40, 100))
    save(tmp_path, "a_mask.png", Image.fromarray(half))
    save(tmp_path, "b.png", smooth_image(40, 100))
    source = FolderSource(tmp_path, Reading(needs_caption=False), mask_suffix="_mask")
    assert len(source) == 2
    mask = source.read(0, (20, 20), rng()).loss_mask
    assert mask is not None
    assert mask.shape == (1, 20, 20)
    assert mask[0, :, :7].min() == 1
    assert mask[0, :, 13:].max() == 0
    assert source.read(1, (20, 20), rng()).loss_mask is None
    save(tmp_path, "b_mask.png", Image.new("L", (3, 3)))
    with pytest.raises(InputError, match=r"the mask of b.png has 3 x 3 pixels, and the image 100 x 40"):
        source.read(1, (20, 20), rng())


# --- the index of sizes ---


def test_sizes_are_kept_until_a_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, index = write_folder(tmp_path / "data", [(8, 8), (10, 12)]), tmp_path / "run" / "sizes.jsonl"
    FolderSource(folder, index=index)
    with index.open("ab") as file:
        file.write(b'{"file": "0.png", "chan')  # a write that was interrupted
    import impasto.training.data.sizes as sizes

    measured: list[Path] = []
    true_measure = sizes.measure_image
    monkeypatch.setattr(sizes, "measure_image", lambda path: (measured.append(path), true_measure(path))[1])
    smooth_image(30, 20).save(folder / "1.png")
    source = FolderSource(folder, index=index)
    assert measured == [folder / "1.png"]
    assert [source.size(0), source.size(1)] == [(8, 8), (30, 20)]


def test_an_index_that_cannot_be_used_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_folder(tmp_path / "data", [(8, 8)])
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"the index .*sizes.jsonl cannot be read: Not a directory"):
        FolderSource(folder, index=tmp_path / "file" / "sizes.jsonl")
    monkeypatch.setattr("impasto.files.os.write", lambda descriptor, content: 0)
    with pytest.raises(OutputError, match=r"sizes.jsonl cannot be written: No space left"):
        FolderSource(folder, index=tmp_path / "sizes.jsonl")


# --- what cannot be used ---


def bomb() -> bytes:
    """A PNG whose header says 100,000 x 100,000 pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def test_broken_images_are_counted_named_and_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_folder(tmp_path, [(8, 8)] * 4)
    (tmp_path / "0.png").write_bytes(b"no image")
    (tmp_path / "1.png").write_bytes(bomb())
    (tmp_path / "2.png").unlink()
    with caplog.at_level(logging.WARNING):
        source = FolderSource(tmp_path, Reading(max_broken=3))
    assert captions(source).keys() == {"3.png"}
    assert list(source.faults.reasons) == ["0.png", "1.png", "2.png"]
    assert "too large" in source.faults.reasons["1.png"] or "exceeds limit" in source.faults.reasons["1.png"]
    assert source.faults.reasons["2.png"] == "the file does not exist"
    assert [record.message.split(" ")[0] for record in caplog.records] == ["0.png", "1.png", "2.png"]
    with pytest.raises(InputError, match=r"2 of 4 samples .* at most 1 may be left out \(max_broken\): 0.png"):
        FolderSource(tmp_path, Reading(max_broken=1))
    with pytest.raises(InputError, match="2 of 4 samples"):
        FolderSource(tmp_path, Reading(max_broken=0.2))


def test_an_image_that_is_cut_off_is_found_when_it_is_read(tmp_path: Path) -> None:
    content = io.BytesIO()
    smooth_image(64, 64).save(content, "PNG")
    (tmp_path / "a.png").write_bytes(content.getvalue()[: len(content.getvalue()) // 2])
    source = only(tmp_path)
    with pytest.raises(InputError, match=r"a.png' cannot be read as an image"):
        source.read(0, (64, 64), rng())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param('{"file_name": "0.png"}\n{"file_name": 3', "line 2, column .*not valid JSON", id="JSON"),
        pytest.param('{"file_name": "0.png"}\n{"file": "0.png"}', 'line 2: .*as "file_name"', id="no name"),
        pytest.param('{"file_name": "0.png"}\n\n{"file_name": "0.png"}', "line 3: .* already in line 1", id="twice"),
        pytest.param('{"file_name": "../0.png"}', "line 1: '../0.png' is not the name of a file below", id="outside"),
        pytest.param('{"file_name": "/etc/passwd"}', "line 1: .* below the folder", id="absolute"),
        pytest.param('{"file_name": "0.png", "text": 4}', "line 1: text must be a text or a list", id="number"),
        pytest.param("\n", "has no images", id="empty"),
        pytest.param("[" * 100_000, "line 1: not valid JSON", id="deep"),
    ],
)  # fmt: skip
def test_metadata_that_is_refused(tmp_path: Path, content: str, message: str) -> None:
    write_folder(tmp_path, [(8, 8)])
    (tmp_path / "metadata.jsonl").write_text(content)
    with pytest.raises(InputError, match=message):
        FolderSource(tmp_path)


def test_folders_and_arguments_that_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        FolderSource(tmp_path / "missing")
    with pytest.raises(InputError, match="has no images"):
        FolderSource(tmp_path)
    (tmp_path / "data_info.json").write_text('{"path": "a.png"}')
    with pytest.raises(InputError, match="must hold a list of records"):
        FolderSource(tmp_path)
    (tmp_path / "data_info.json").unlink()
    write_folder(tmp_path, [(8, 8)], captions=False)
    (tmp_path / "0.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match=r"0.png: the caption 0.txt cannot be read"):
        FolderSource(tmp_path)
    (tmp_path / "0.txt").write_text("fine")
    for options, message in (
        ({"background": "no color"}, "background must be a color"),
        ({"real_prompt_ratio": 2}, "real_prompt_ratio"),
        ({"weight": -1}, "weight"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            Reading(**options)  # type: ignore[arg-type]
    for crop in ("middle", 0, 100):
        with pytest.raises(ConfigurationError, match="crop"):
            Views(crop)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="mask_suffix is empty"):
        FolderSource(tmp_path, mask_suffix="")
    with pytest.raises(ConfigurationError, match="max_broken"):
        FolderSource(tmp_path, Reading(max_broken=-1))
