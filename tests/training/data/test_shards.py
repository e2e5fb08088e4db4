"""Webdataset shards: the same samples as from a folder, and what is left out."""

from __future__ import annotations

import io
import json
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from impasto.errors import InputError
from impasto.pipelines.image_files import measure_image, open_image
from impasto.training.data import shards as module
from impasto.training.data.captions import Captions
from impasto.training.data.folders import FolderSource
from impasto.training.data.images import Reading
from impasto.training.data.shards import ShardSource

from .folder_of_images import smooth_image, write_folder


def png(image: Image.Image) -> bytes:
    content = io.BytesIO()
    image.save(content, "PNG")
    return content.getvalue()


def write_shard(path: Path, files: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_shards_give_what_a_folder_gives(tmp_path: Path) -> None:
    sizes = [(20, 30), (16, 16), (40, 12)]
    folder = FolderSource(write_folder(tmp_path / "folder", sizes))
    for number in range(3):
        content = (tmp_path / "folder" / f"{number}.png").read_bytes()
        record = {"text": f"a red cube {number}", "dense": f"a large red cube {number}"}
        files = {f"{number}.png": content, f"{number}.json": json.dumps(record).encode()}
        write_shard(tmp_path / "shards" / f"{number}.tar", files)
    source = ShardSource(tmp_path / "shards")
    assert [source.size(i) for i in range(3)] == sizes
    for i in range(3):
        a, b = folder.read(i, (8, 8), rng()), source.read(i, (8, 8), rng())
        assert torch.equal(a.image, b.image)  # type: ignore[arg-type]
        assert (a.caption, a.size, a.crop) == (b.caption, b.size, b.crop)


def test_masks_captions_and_other_files(tmp_path: Path) -> None:
    mask = Image.fromarray(np.full((8, 8), 255, np.uint8))
    write_shard(
        tmp_path / "a.tar",
        {
            "x/one.jpg": png(smooth_image(8, 8)),
            "x/one.mask.png": png(mask),
            "x/one.txt": b"short\n",
            "x/one.json": b'{"sharegpt4v": "long", "url": "..."}',
            "x/one.cls": b"3",
            "notes.txt": b"no image",
        },
    )
    source = ShardSource([tmp_path / "a.tar"])
    assert source.without_image == 1
    assert [source.name(i) for i in range(len(source))] == ["a.tar/x/one"]
    assert source.captions(0) == Captions(("short",), ("long",))
    sample = source.read(0, (4, 4), rng())
    assert sample.loss_mask is not None
    assert sample.loss_mask.min() == 1


def test_a_caption_that_is_null_does_not_hide_the_one_in_a_text_file(tmp_path: Path) -> None:
    files = {"a.png": png(smooth_image(8, 8)), "a.txt": b"a cat", "a.json": b'{"text": null, "dense": null}'}
    assert ShardSource(write_shard(tmp_path / "a.tar", files)).captions(0) == Captions(("a cat",), ())


def test_sizes_are_upright_if_the_orientation_is_after_the_pixels(tmp_path: Path) -> None:
    content = late_orientation(smooth_image(200, 300))
    assert len(content) > 1 << 16
    source = ShardSource(write_shard(tmp_path / "a.tar", {"a.png": content, "a.txt": b"a cat"}))
    (tmp_path / "a.png").write_bytes(content)
    assert source.size(0) == measure_image(tmp_path / "a.png") == (300, 200)
    assert open_image(tmp_path / "a.png").size == (200, 300)


def late_orientation(image: Image.Image) -> bytes:
    """A PNG whose orientation, a quarter turn, is in a chunk before its end."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    content, chunk = io.BytesIO(), exif.tobytes().removeprefix(b"Exif\0\0")
    image.save(content, "PNG", compress_level=0)
    named = b"eXIf" + chunk
    late = struct.pack(">I", len(chunk)) + named + struct.pack(">I", zlib.crc32(named))
    return content.getvalue()[:-12] + late + content.getvalue()[-12:]


def test_damaged_shards_and_samples_are_named_and_left_out(tmp_path: Path) -> None:
    good = {f"{i}.png": png(smooth_image(64, 64, i)) for i in range(3)} | {f"{i}.txt": b"text" for i in range(3)}
    write_shard(tmp_path / "a.tar", good | {"3.png": b"no image", "3.txt": b"text", "4.png": png(smooth_image(8, 8))})
    whole = write_shard(tmp_path / "b.tar", good).read_bytes()
    (tmp_path / "b.tar").write_bytes(whole[: len(whole) // 2])  # within a file
    end = whole.rstrip(b"\0")
    (tmp_path / "c.tar").write_bytes(whole[: -(-len(end) // 512) * 512])  # between two files
    (tmp_path / "d.tar").write_bytes(b"\x1f\x8b" + whole)
    (tmp_path / "e.tar").write_bytes(b"")
    write_shard(tmp_path / "f.tar", {})
    source = ShardSource(tmp_path, Reading(max_broken=4))
    assert len(source) == 3
    assert [Path(name).name for name in source.damaged.reasons] == ["b.tar", "c.tar", "d.tar", "e.tar"]
    assert "truncated in" in source.damaged.reasons[str(tmp_path / "b.tar")]
    assert "its end is missing" in source.damaged.reasons[str(tmp_path / "c.tar")]
    assert source.faults.reasons == {
        "a.tar/3": "'3' cannot be read as an image: it is none of PNG, JPEG, WEBP, GIF, BMP",
        "a.tar/4": "it has no caption",
    }
    with pytest.raises(InputError, match=r"3 of 6 samples of the shards .*b.tar: .*truncated"):
        ShardSource(tmp_path, Reading(max_broken=2))


def test_the_index_spares_the_scan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"0.png": png(smooth_image(8, 12)), "0.txt": b"text", "1.png": b"broken", "1.txt": b"text"}
    write_shard(tmp_path / "data" / "a.tar", files)
    write_shard(tmp_path / "data" / "b.tar", {"2.png": png(smooth_image(9, 9)), "2.txt": b"two"})
    first = ShardSource(tmp_path / "data", Reading(max_broken=1), index=tmp_path / "run" / "shards.jsonl")
    scanned: list[str] = []
    scan = module._scan
    monkeypatch.setattr(module, "_scan", lambda path, stamp: (scanned.append(path.name), scan(path, stamp))[1])
    write_shard(tmp_path / "data" / "b.tar", {"3.png": png(smooth_image(7, 7)), "3.txt": b"three"})
    again = ShardSource(tmp_path / "data", Reading(max_broken=1), index=tmp_path / "run" / "shards.jsonl")
    assert scanned == ["b.tar"]
    assert [again.name(i) for i in range(2)] == ["a.tar/0", "b.tar/3"]
    assert first.faults.reasons == again.faults.reasons
    assert torch.equal(first.read(0, (8, 8), rng()).image, again.read(0, (8, 8), rng()).image)  # type: ignore[arg-type]


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no .tar files"):
        ShardSource(tmp_path)
    (tmp_path / "a.tar.gz").touch()
    with pytest.raises(InputError, match="decompress"):
        ShardSource(tmp_path)
    with pytest.raises(InputError, match="does not exist"):
        ShardSource([tmp_path / "x.tar"])
    write_shard(tmp_path / "a.tar", {"0.txt": b"alone"})
    with pytest.raises(InputError, match="no samples with an image"):
        ShardSource(tmp_path)
    with pytest.raises(InputError, match="given twice"):
        ShardSource([tmp_path / "a.tar"] * 2)
    write_shard(tmp_path / "a.tar", {"0.png": b"", "0.PNG": b""})
    with pytest.raises(InputError, match=r"it has '0.PNG' twice"):
        ShardSource(tmp_path, Reading(max_broken=0))


def test_shards_of_one_name_in_several_folders(tmp_path: Path) -> None:
    content = png(smooth_image(8, 8))
    for name in ("a", "b"):
        write_shard(tmp_path / name / "0.tar", {"x.png": content, "x.txt": name.encode()})
    source = ShardSource(tmp_path)
    assert [source.name(i) for i in range(2)] == ["a/0.tar/x", "b/0.tar/x"]
    assert [source.captions(i).short for i in range(2)] == [("a",), ("b",)]


def test_a_mask_of_too_many_bytes_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = png(smooth_image(8, 8)), png(smooth_image(64, 64))
    write_shard(tmp_path / "0.tar", {"x.png": small, "x.mask.png": large, "x.txt": b"a red cube"})
    monkeypatch.setattr(module, "MAX_FILE_BYTES", len(small))
    with pytest.raises(InputError, match=r"a file of x in .*0\.tar has [\d,]+ bytes, and at most"):
        ShardSource(tmp_path).read(0, (8, 8), rng())
